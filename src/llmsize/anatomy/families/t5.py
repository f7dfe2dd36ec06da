"""T5, Flan-T5, mT5 and UMT5: an encoder and a decoder that reads it.

transformers v5.23, models/t5/modeling_t5.py, models/mt5, models/umt5. Both stacks are given the
same number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from llmsize.anatomy import attention as kernels
from llmsize.anatomy import blocks, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP16, FP32, INT64, Format
from llmsize.quick_dataclasses import dataclass

HAS_ENCODER = True
"""What is written attends to what an encoder makes of other tokens."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of T5."""

    encoder_layers: int
    decoder_layers: int
    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    buckets: int
    """Distances that have a bias of their own."""
    tied: bool
    scaled: bool
    """Whether what the head reads is scaled; so it is in T5, not in its later versions."""
    gated: bool
    activation: blocks.Activation
    dropout: float
    apart: bool
    """Whether every layer has biases of its own (UMT5)."""


def read(c: Config) -> Shape:
    """The shape from a `config.json`; later versions are tied whatever theirs says.

    Flan-T5 and T5 v1.1 are not, and say so: their checkpoints hold a head that differs from the
    embedding, which `from_pretrained` leaves apart (transformers v5.23, modeling_utils.py,
    `tie_weights`). A model built from the configuration alone has them tied.
    """
    family = c.text("model_type")
    kind = c.text("feed_forward_proj", default="relu" if family == "t5" else "gated-gelu")
    gated = kind.startswith("gated-")
    name = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    layers = c.few("num_layers")
    tied = family != "t5" or c.flag("tie_word_embeddings", default=True)
    return Shape(
        encoder_layers=layers,
        decoder_layers=c.few("num_decoder_layers", default=layers),
        hidden=Dim(c.size("d_model"), "hidden"),
        heads=Dim(c.size("num_heads"), "heads"),
        head_dim=Dim(c.size("d_kv"), "head_dim"),
        intermediate=Dim(c.size("d_ff"), "intermediate"),
        vocabulary=Dim(c.size("vocab_size"), "vocabulary"),
        buckets=Dim(c.size("relative_attention_num_buckets", default=32), "buckets"),
        tied=tied,
        scaled=family != "mt5" and c.flag("scale_decoder_outputs", default=tied),
        gated=gated,
        activation=blocks.activation(Config({"name": name}, c.model), "name", default="relu"),
        dropout=c.number("dropout_rate", default=0.1),
        apart=family == "umt5",
    )


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens of both stacks to loss or logits."""
    s = read(c)
    encoded = stack(t, s, "encoder", s.encoder_layers, None, None)
    shifted = t.new("new_zeros", (t.batch, t.sequence), INT64)
    decoded = stack(t, s, "decoder", s.decoder_layers, shifted, encoded)
    x = ops.scale(t, decoded) if s.scaled else decoded
    result = lm_head.causal_lm(t, x, s.vocabulary, Head("shared"), tied=s.tied, loss=loss)
    if t.outputs is not None:
        t.outputs = (*t.outputs, encoded)
    return result


def loss(t: Trace, logits: Tensor) -> Tensor:
    """The loss in the format of the logits, of labels that are not shifted."""
    if t.setting.loss == "chunked" or t.setting.compiled_loss:
        return lm_head.causal_lm_loss(t, logits)
    return ops.cross_entropy(t, logits, Tensor((t.batch, t.sequence), INT64, None))


def stack(
    t: Trace, s: Shape, name: str, layers: int, tokens: Tensor | None, encoded: Tensor | None
) -> Tensor:
    """Embeddings, blocks, final norm; the decoder attends to what is `encoded` as well."""
    decodes = encoded is not None
    table = t.weight("shared.weight", (s.vocabulary, s.hidden), "embedding")
    embeddings = ops.embedding(t, table, t.batch, t.sequence, indices=tokens)
    if t.setting.input_gradients:
        embeddings = t.with_gradient(embeddings)
    mask = blocks.mask(t, given=not decodes) if decodes or t.setting.padded else None
    across = blocks.mask(t) if decodes and t.setting.padded else None
    biases: list[Tensor] = []  # made by the first layer for all

    def block(x: Tensor, kind: tuple[bool, bool]) -> Tensor:
        first, _ = kind
        own = biases[0] if not first else None
        x, own = layer(t, s, x, mask, own, decodes=decodes)
        x = without_infinities(t, x)
        other = biases[1] if not first and decodes else None
        if encoded is not None:
            weights = t.attention_weights  # which have a name until there are others
            x, other = cross_layer(t, s, x, encoded, across, other)
            del weights
            x = without_infinities(t, x)
        x = without_infinities(t, feed(t, s, x, f"layer.{2 if decodes else 1}"))
        biases[:] = [bias for bias in (own, other) if bias is not None]
        return x

    # the gradient of what is encoded begins in the last layer; the others add to it
    kinds = [(s.apart or index == 0, index == layers - 1) for index in range(layers)]
    embedded = [ops.dropout(t, embeddings, s.dropout)]
    x = t.layers(
        f"{name}.block", block, embedded.pop(), kinds, mask, across, carried=biases,
        told=lambda kind: kind[0],  # whether what is carried begins there
    )  # fmt: skip
    x = ops.dropout(t, norm(t, x, f"{name}.final_layer_norm"), s.dropout)
    biases.clear()
    return x


def without_infinities(t: Trace, x: Tensor) -> Tensor:
    """`x` below the largest number of fp16, if it is in fp16."""
    if x.format is not FP16:
        return x
    size = t.new("abs", x.shape, x.format)
    infinite = t.new("eq", x.shape, BOOL)
    del size
    highest = t.new("where", (), FP32)
    del infinite
    lowest = t.new("neg", (), FP32)
    return ops.clamp(t, x, 2, (lowest, highest))


def layer(
    t: Trace, s: Shape, x: Tensor, mask: Tensor | None, bias: Tensor | None, *, decodes: bool
) -> tuple[Tensor, Tensor | None]:
    """Self-attention, added to the residual, and its bias if others share it."""
    normed = norm(t, x, "layer.0.layer_norm")
    made = partial(position_bias, t, s, bidirectional=not decodes)
    name = "layer.0.SelfAttention"
    attended, bias = attention(t, s, normed, normed, name, mask, bias or made, causal=decodes)
    return ops.add(t, x, ops.dropout(t, attended, s.dropout)), bias


def cross_layer(
    t: Trace, s: Shape, x: Tensor, encoded: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Attention to what the encoder gives, added to the residual, and its bias if shared."""
    normed = norm(t, x, "layer.1.layer_norm")
    made = partial(no_bias, t, s)
    name = "layer.1.EncDecAttention"
    attended, bias = attention(t, s, normed, encoded, name, mask, bias or made, causal=False)
    return ops.add(t, x, ops.dropout(t, attended, s.dropout)), bias


def attention(
    t: Trace,
    s: Shape,
    x: Tensor,
    source: Tensor,
    name: str,
    mask: Tensor | None,
    bias: Tensor | Callable[[Tensor, Tensor], Tensor],
    *,
    causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention from `x` to `source`, and its bias, which is made if need be, if it is shared."""
    width = s.heads * s.head_dim
    q = ops.split_heads(t, t.linear(x, f"{name}.q", width, role="q"), s.heads)
    made = partial(keys_and_values, t, s, source, name)
    if source is not x:
        k, v = blocks.remember_encoded(t, q, s.heads, made)
    else:
        k, v = made()
        k, v = blocks.remember(t, k, v) if causal else (k, v)
    added = bias if isinstance(bias, Tensor) else bias(q, k)
    out = attend(t, s, q, k, v, added, mask, causal=causal)
    return t.linear(out, f"{name}.o", s.hidden, role="o"), None if s.apart else added


def keys_and_values(t: Trace, s: Shape, source: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Keys and values by heads of the tokens that are attended to."""
    width = s.heads * s.head_dim
    k = ops.split_heads(t, t.linear(source, f"{name}.k", width, role="k"), s.heads)
    return k, ops.split_heads(t, t.linear(source, f"{name}.v", width, role="v"), s.heads)


def no_bias(t: Trace, s: Shape, q: Tensor, k: Tensor) -> Tensor:
    """Zeros for the encoder's tokens in the queries' format; a checkpointed layer asks for their
    gradient."""
    zeros = t.new("zeros", (1, s.heads, t.sequence, k.shape[2]), q.format)
    wanted = t.grad and t.setting.checkpoint_every and not s.apart
    return t.with_gradient(zeros) if wanted else zeros


def norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """RMSNorm whose variance alone is taken in fp32."""
    weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
    variance = ops.mean(t, ops.power(t, ops.to(t, x, FP32)))
    x = ops.mul(t, x, ops.rsqrt(t, ops.shift(t, variance)))
    if weight.format is not FP32:
        x = ops.to(t, x, weight.format)
    return ops.mul(t, weight, x)


def attend(
    t: Trace,
    s: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
) -> Tensor:
    """Unscaled attention with a bias, which takes a mask of numbers to any kernel."""
    if t.setting.attention == "eager":
        weights = ops.scale(t, ops.matmul(t, q, ops.transpose(t, k, -1, -2)))
        weights = ops.add(t, weights, bias)
        if mask is not None:
            weights = ops.add(t, weights, mask)
        weights = ops.softmax(t, weights)
        t.attention_weights = weights = ops.dropout(t, weights, s.dropout)
        return ops.merge_heads(t, ops.matmul(t, weights, v))
    bias = with_mask(t, bias, mask, causal=causal)
    q, k, v, added = (ops.cast(t, x) for x in (q, k, v, bias))
    return ops.merge_heads(t, kernels.efficient(t, q, k, v, added))


def with_mask(t: Trace, bias: Tensor, mask: Tensor | None, *, causal: bool) -> Tensor:
    """The bias where tokens are seen, laid out anew."""
    if mask is not None:
        bias = ops.where(t, mask, bias)
    elif causal and bias.shape[2] > 1:
        places = t.new("arange", (2, bias.shape[2]), INT64)
        visible = t.new("ge", (1, 1, *bias.shape[2:]), BOOL)
        del places
        bias = ops.where(t, visible, bias)
    return ops.contiguous(t, bias)


def position_bias(t: Trace, s: Shape, _: Tensor, k: Tensor, *, bidirectional: bool) -> Tensor:
    """A learned number for each head and bucket of distances: 1, heads, tokens, tokens.

    Its format is that of what is learned, whatever the queries' is.
    """
    total = k.shape[2]
    queries = t.new("add", (t.sequence, 1), INT64)
    places = t.new("arange", (total,), INT64)
    distance = t.new("sub", (t.sequence, total), INT64)
    name = "layer.0.SelfAttention.relative_attention_bias.weight"
    table = t.weight(name, (s.buckets, s.heads), "position")
    chosen = buckets(t, distance.shape, bidirectional=bidirectional)
    values = ops.embedding(t, table, *distance.shape, indices=chosen)
    del queries, places, distance
    by_head = ops.transpose(t, ops.transpose(t, values, 1, 2), 0, 1)
    return ops.reshape(t, by_head, 1, *by_head.shape)


def buckets(t: Trace, shape: tuple[int, ...], *, bidirectional: bool) -> Tensor:
    """Small distances each in a bucket of its own, large ones by their logarithm."""
    chosen = None
    if bidirectional:
        later = successively(t, shape, (BOOL, INT64, INT64))
        chosen = t.new("add", shape, INT64)
        del later
        distance = t.new("abs", shape, INT64)
    else:
        distance = successively(t, shape, (INT64, INT64, INT64))
    small = t.new("lt", shape, BOOL)
    large = successively(t, shape, (FP32, FP32, FP32, FP32, FP32, INT64, INT64))
    limit = t.new("full_like", shape, INT64)
    limited = t.new("minimum", shape, INT64)
    del large, limit
    picked = t.new("where", shape, INT64)
    if chosen is None:
        chosen = t.new("add", shape, INT64)
    del distance, small, limited, picked
    return chosen


def successively(t: Trace, shape: tuple[int, ...], formats: Sequence[Format]) -> Tensor:
    """The last of some elementwise results, each of which is made of the one before."""
    last = t.new("arithmetic", shape, formats[0])
    for format in formats[1:]:
        last = t.new("arithmetic", shape, format)
    return last


def feed(t: Trace, s: Shape, x: Tensor, layer: str) -> Tensor:
    """Two linear layers around the activation, added to the residual; in later versions three."""
    name = f"{layer}.DenseReluDense"
    fed = norm(t, x, f"{layer}.layer_norm")
    fed = gated(t, s, fed, name) if s.gated else plain(t, s, fed, name)
    return ops.add(t, x, ops.dropout(t, fed, s.dropout))


def plain(t: Trace, s: Shape, x: Tensor, name: str) -> Tensor:
    """Two linear layers around the activation."""
    x = t.linear(x, f"{name}.wi", s.intermediate, role="up")
    x = s.activation(t, x)
    x = ops.dropout(t, x, s.dropout)
    x = ops.to(t, x, kept_format(t))
    return t.linear(x, f"{name}.wo", s.hidden, role="down", kept=True)


def gated(t: Trace, s: Shape, x: Tensor, name: str) -> Tensor:
    """The gated MLP, with dropout before the last layer."""
    gate = s.activation(t, t.linear(x, f"{name}.wi_0", s.intermediate, role="gate"))
    up = t.linear(x, f"{name}.wi_1", s.intermediate, role="up")
    x = ops.mul(t, gate, up)
    x = ops.dropout(t, x, s.dropout)
    x = ops.to(t, x, kept_format(t))
    return t.linear(x, f"{name}.wo", s.hidden, role="down", kept=True)


def kept_format(t: Trace) -> Format:
    """The format of a weight that is never quantized, to which its input is cast before it."""
    return FP32 if t.setting.upcast else t.setting.format
