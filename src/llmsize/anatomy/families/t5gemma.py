"""T5Gemma: Gemma 2's layers as an encoder, and as a decoder that reads it in every layer.

transformers v5.23, models/t5gemma/modeling_t5gemma.py. Attention is written out whatever kernel is
asked for. Both stacks are given the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llmsize.anatomy import attention as kernels
from llmsize.anatomy import blocks, decoder, lm_head, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import ByWindow, Heads, Sizes, gemma_norm
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.rotary import Rotation
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32, INT64
from llmsize.quick_dataclasses import dataclass

HAS_ENCODER = True
"""What is written attends to what an encoder makes of other tokens."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The dimensions of the encoder or the decoder."""

    name: str
    sizes: Sizes
    windows: tuple[int, ...]
    """Of each layer; 0 for all tokens."""
    window: int
    bias: bool
    softcap: bool
    """Whether scores are kept within bounds."""
    capped: bool
    """Whether logits are."""
    dropout: float


def read(c: Config, name: str) -> Stack:
    """A stack from its part of a `config.json`, whose dropout is that of the whole."""
    fields = c.value(name)
    if not isinstance(fields, dict):
        raise c.error(f"has no `{name}`", "give the configuration of each stack")
    dropout = c.number("attention_dropout")
    part = Config({"sliding_window": 4096, **fields, "attention_dropout": dropout}, c.model)
    s = decoder.read(part, tied=True, activation="gelu_pytorch_tanh")
    return Stack(
        name=f"model.{name}",
        sizes=s._replace(tied=c.flag("tie_word_embeddings", default=True)),
        windows=tuple(decoder.windows(part, s.layers, lambda layer: layer % 2 == 0)),
        window=part.size("sliding_window"),
        bias=part.flag("attention_bias"),
        softcap=limited(part, "attn_logit_softcapping"),
        capped=limited(part, "final_logit_softcapping"),
        dropout=c.number("dropout_rate"),
    )


def limited(c: Config, field: str) -> bool:
    """Whether there is a limit, as there is if nothing is said."""
    return field not in c.fields or c.value(field) is not None


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens of both stacks to loss or logits."""
    reads, writes = read(c, "encoder"), read(c, "decoder")
    shifted = shifted_right(t)
    encoded = encode(t, reads)
    x = decode(t, writes, shifted, encoded)
    s = writes.sizes
    end = lm_head.SOFTCAP if writes.capped else ()
    head = Head(f"{writes.name}.embed_tokens", "lm_head.out_proj", end=end)
    result = lm_head.causal_lm(t, x, s.vocabulary, head, tied=s.tied, loss=loss)
    if t.outputs is not None:
        t.outputs = (*t.outputs, encoded)
    del shifted
    return result


def shifted_right(t: Trace) -> Tensor:
    """The labels behind the token that begins."""
    shifted = t.new("new_zeros", (t.batch, t.sequence), INT64)
    t.new("clone", (t.batch, max(t.sequence - 1, 1)), INT64)
    t.new("eq", shifted.shape, BOOL)
    return shifted


def loss(t: Trace, logits: Tensor) -> Tensor:
    """The loss of labels that are not shifted, in fp32."""
    labels = Tensor((t.batch, t.sequence), INT64, None)
    return ops.cross_entropy(t, ops.to(t, logits, FP32), labels)


def encode(t: Trace, d: Stack) -> Tensor:
    """What the encoder makes of its tokens, each of which sees all others."""
    table = t.weight(f"{d.name}.embed_tokens.weight", embedding_shape(d), "embedding")
    tokens = ops.embedding(t, t.table(table), t.batch, t.sequence)
    tokens = t.with_gradient(tokens) if t.setting.input_gradients else tokens
    position_ids = t.new("arange", (1, t.sequence), INT64)
    padding = None if t.setting.padded else t.new("to", (t.batch, t.sequence), INT64)
    masks = {
        window: blocks.mask(t, window, "eager") if t.setting.padded else None
        for window in (0, d.window)
    }
    scale = t.new("tensor", (), tokens.format)
    inputs = [scaled(t, d, tokens, scale)]
    around = Around(t, inputs[0], d, masks)

    layer = partial(encoder_layer, t, d, around)
    x = t.layers(f"{d.name}.layers", layer, inputs.pop(), d.windows, position_ids)
    around.masks.clear()  # from here on checkpoints alone hold them
    x = ops.dropout(t, gemma_norm(t, x, f"{d.name}.norm"), d.dropout)
    around.masks.clear()
    del tokens, position_ids, padding, masks, scale, around, layer
    return x


def encoder_layer(t: Trace, d: Stack, around: Around, x: Tensor, window: int) -> Tensor:
    """Attention and feed-forward."""
    x = half(t, d, x, "self_attn", lambda x: attention(t, d, x, around, window))
    return half(t, d, x, "feedforward", lambda x: feed(t, d, x))


def decode(t: Trace, d: Stack, shifted: Tensor, encoded: Tensor) -> Tensor:
    """The last hidden states of the decoder, which attends to its own tokens and the encoder's."""
    table = t.weight(f"{d.name}.embed_tokens.weight", embedding_shape(d), "embedding")
    tokens = ops.embedding(t, t.table(table), t.batch, t.sequence, indices=shifted)
    tokens = t.with_gradient(tokens) if t.setting.input_gradients else tokens
    position_ids = blocks.positions(t)
    padding = None if t.setting.cache else t.new("to", (t.batch, t.sequence), INT64)
    masks = {window: blocks.mask(t, window, "eager", given=False) for window in (0, d.window)}
    across = blocks.mask(t, 0, "eager") if t.setting.padded else None
    scale = t.new("tensor", (), tokens.format)
    inputs = [scaled(t, d, tokens, scale)]
    around = Around(t, inputs[0], d, masks)
    layer = partial(decoder_layer, t, d, around, encoded, across)
    # the gradient of what is encoded begins in the last layer; the others add to it
    last = d.sizes.layers - 1
    kinds = [(window, layer == last) for layer, window in enumerate(d.windows)]
    x = t.layers(
        f"{d.name}.layers", layer, inputs.pop(), kinds, position_ids, across, told=lambda kind: None
    )
    around.masks.clear()  # from here on checkpoints alone hold them
    x = ops.dropout(t, gemma_norm(t, x, f"{d.name}.norm"), d.dropout)
    around.masks.clear()
    del tokens, position_ids, padding, masks, scale, around, across, layer
    return x


def decoder_layer(
    t: Trace,
    d: Stack,
    around: Around,
    encoded: Tensor,
    across: Tensor | None,
    x: Tensor,
    kind: tuple[int, bool],
) -> Tensor:
    """Attention to earlier tokens, attention to what is encoded, feed-forward."""
    window, _ = kind
    x = half(t, d, x, "self_attn", lambda x: attention(t, d, x, around, window, cached=True))
    weights = t.attention_weights  # which have a name until there are others
    x = half(t, d, x, "cross_attn", lambda x: cross_attention(t, d, x, encoded, across))
    del weights
    return half(t, d, x, "feedforward", lambda x: feed(t, d, x))


def embedding_shape(d: Stack) -> tuple[int, int]:
    """Of a stack's own table of tokens."""
    return d.sizes.vocabulary, d.sizes.hidden


def scaled(t: Trace, d: Stack, x: Tensor, scale: Tensor) -> Tensor:
    """Embeddings times a number that is a tensor."""
    return ops.dropout(t, ops.mul(t, x, scale), d.dropout)


class Around:
    """What is made once for all layers of a stack."""

    def __init__(self, t: Trace, x: Tensor, d: Stack, masks: dict[int, Tensor | None]) -> None:
        """Angles for the stack's first input `x`, and those of the `masks` that layers use."""
        self.rotation: Rotation = rotary.table(t, x, d.sizes.rotary)
        self.masks = ByWindow(t, {window: masks[window] for window in {*d.windows}})


def half(t: Trace, d: Stack, x: Tensor, name: str, part: Callable[[Tensor], Tensor]) -> Tensor:
    """A part of a layer between two norms, added to what it read."""
    residual = x
    x = gemma_norm(t, x, f"pre_{name}_layernorm")
    x = part(x)
    x = gemma_norm(t, x, f"post_{name}_layernorm")
    return ops.add(t, residual, ops.dropout(t, x, d.dropout))


def attention(
    t: Trace, d: Stack, x: Tensor, around: Around, window: int, *, cached: bool = False
) -> Tensor:
    """Grouped-query attention to the stack's own tokens."""
    s = d.sizes
    q, k, v = decoder.projections(t, s, Heads(bias=d.bias), x)
    q, k = rotary.turn(t, q, k, around.rotation)
    if cached:
        k, v = blocks.remember(t, k, v, window)
    out = attend(t, d, q, k, v, around.masks[window])
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=d.bias, role="o")


def cross_attention(t: Trace, d: Stack, x: Tensor, encoded: Tensor, mask: Tensor | None) -> Tensor:
    """Grouped-query attention to the encoder's tokens, in which nothing is rotated."""
    s, name = d.sizes, "cross_attn"
    q = t.linear(x, f"{name}.q_proj", s.heads * s.head_dim, bias=d.bias, role="q")
    q = ops.split_heads(t, q, s.heads)
    k, v = blocks.remember_encoded(t, q, s.kv_heads, partial(keys_and_values, t, d, encoded, name))
    out = attend(t, d, q, k, v, mask)
    return t.linear(out, f"{name}.o_proj", s.hidden, bias=d.bias, role="o")


def keys_and_values(t: Trace, d: Stack, encoded: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Keys and values by heads of what is encoded."""
    heads, width = d.sizes.kv_heads, d.sizes.kv_heads * d.sizes.head_dim
    k = ops.split_heads(t, t.linear(encoded, f"{name}.k_proj", width, bias=d.bias, role="k"), heads)
    v = ops.split_heads(t, t.linear(encoded, f"{name}.v_proj", width, bias=d.bias, role="v"), heads)
    return k, v


def attend(t: Trace, d: Stack, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q, k, v by heads; the result is batch, sequence, all channels of all heads."""
    dropout = d.sizes.attention_dropout
    out = kernels.eager(t, q, k, v, mask, dropout=dropout, softcap=d.softcap)
    return ops.merge_heads(t, out)


def feed(t: Trace, d: Stack, x: Tensor) -> Tensor:
    """The gated MLP, with dropout before its last layer."""
    s = d.sizes
    gate = s.activation(t, t.linear(x, "mlp.gate_proj", s.intermediate, role="gate"))
    product = ops.mul(t, gate, t.linear(x, "mlp.up_proj", s.intermediate, role="up"))
    del gate
    product = ops.dropout(t, product, d.dropout)
    return t.linear(product, "mlp.down_proj", s.hidden, role="down")
