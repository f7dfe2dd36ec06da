"""Parts that several families share, each as its reference implementation has it.

transformers v5.23: src/transformers/models/llama/modeling_llama.py and its kin. Local variables
live as long as there, since a tensor lives as long as its last name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from llmsize.anatomy import attention
from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Leaf
from llmsize.anatomy.cache import Kind, LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.errors import printable
from llmsize.formats import BOOL, FP32, INT64, Format

Step = Callable[[Trace, Tensor], Tensor]
"""What is done to a tensor on its way."""


def as_it_is(t: Trace, x: Tensor) -> Tensor:
    """The same tensor."""
    return x


def embed(t: Trace, name: str, rows: int, width: int, own: Step = as_it_is) -> Tensor:
    """Token embeddings: batch, sequence, width; with what the embedding's `own` layer does to them.

    Virtual tokens join them as they come from there.
    """
    table = t.weight(f"{name}.weight", (rows, width), "embedding")
    x = ops.embedding(t, t.table(table), t.batch, Dim(t.setting.sequence, "sequence"))
    x = own(t, x)
    adapter = t.setting.adapter
    if adapter is not None and adapter.adapts_embedding(name) and not table.copied:
        x = adapter.around_embedding(t, x, name, rows, own)
    x = t.with_gradient(x) if t.setting.input_gradients else x
    return x if adapter is None else adapter.embedded(t, x)


def scaled_embeddings(t: Trace, x: Tensor) -> Tensor:
    """Embeddings that their own layer scales: a gradient asked for is that of the scaled ones."""
    if not (t.setting.input_gradients and type(x.node) is Leaf):
        return ops.scale(t, x)
    x.node = None  # and nobody waits for that of what they were before
    return t.with_gradient(ops.scale(t, x))


def positions(t: Trace) -> Tensor:
    """The position of each token of a sequence."""
    counted = t.new("arange", (1, t.sequence), INT64)
    shifted = t.new("add", counted.shape, INT64)
    del counted
    return shifted


def rms_norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """LlamaRMSNorm: normalised in fp32, and scaled in the input's format or before it is cast."""
    weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
    if t.setting.fused_norm:
        return ops.fused_norm(t, x, weight)
    format = x.format
    x = ops.to(t, x, FP32)
    variance: list[Tensor] = []
    x = ops.normalized(t, x, variance)
    if t.setting.scales_in_fp32:
        return ops.to(t, ops.mul(t, weight, x), format)
    return ops.mul(t, weight, ops.to(t, x, format))


def layer_norm(t: Trace, x: Tensor, name: str, *, bias: bool = True) -> Tensor:
    """torch.nn.LayerNorm."""
    width = (x.shape[-1],)
    weight = t.weight(f"{name}.weight", width, "norm")
    return ops.layer_norm(t, x, weight, t.weight(f"{name}.bias", width, "norm") if bias else None)


def remember(t: Trace, k: Tensor, v: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values by heads stay for the next token: of all tokens, or of the last `window`.

    What comes back are those of all tokens that attention sees.
    """
    kind: Kind = "window" if window else "full"
    t.remember(LayerCache(kind, k.shape[1], k.shape[-1], v.shape[-1], window))
    return store(t, k, v, window)


def remember_encoded(
    t: Trace, q: Tensor, heads: int, made: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Keys and values of what an encoder makes: `made` once for the queries, kept for all tokens.

    transformers v5.23, cache_utils.py, `EncoderDecoderCache`.
    """
    head_dim = q.shape[-1]
    t.remember(LayerCache("cross", heads, head_dim, head_dim))
    if t.setting.cache and t.setting.past:
        shape = (t.batch, heads, t.setting.past, head_dim)
        return Tensor(shape, q.format, None), Tensor(shape, q.format, None)
    k, v = made()
    return grown(t, k), grown(t, v)


def store(t: Trace, k: Tensor, v: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
    """The dynamic cache of transformers: old and new, copied together for each new token.

    A window's cache is a view of what was copied last (transformers v5.23, cache_utils.py).
    """
    if t.setting.adapter is not None:
        k, v = t.setting.adapter.cached(t, k, v)
    if not t.setting.cache:
        return k, v
    if not window:
        k = grown(t, k)
        return k, grown(t, v)
    k, v = store_window(t, window, k, v)
    return k, v


def store_window(t: Trace, window: int, *states: Tensor) -> list[Tensor]:
    """States of the last `window` tokens by heads, old and new copied together."""
    if not t.setting.cache:
        return [*states]
    past = min(t.setting.past, window - 1)
    if not past:
        t.stored.append(t.new("window", (), INT64, role="cache"))
    whole = [t.new("cat", (*x.shape[:2], past + x.shape[2], x.shape[3]), x.format, role="cache")
             for x in states]  # fmt: skip
    for copy in whole:  # all are copied before the old ones go
        t.replace_cache(copy, t.setting.past)
    return whole


def grown(t: Trace, x: Tensor) -> Tensor:
    """What is cached of all tokens: batch, heads, tokens, channels."""
    if not t.setting.cache:
        return x
    past = t.setting.past
    whole = t.new("cat", (*x.shape[:2], past + x.shape[2], x.shape[3]), x.format, role="cache")
    t.replace_cache(whole, past)
    return whole


def queries_keys_values(
    t: Trace, x: Tensor, name: str, queries: int, keys: int, *, bias: bool = False
) -> Tensor:
    """Those of all heads, from one layer to adapt or from three in one (`fused_qkv`)."""
    parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    if t.setting.fused_qkv:
        return t.linear_in_parts(x, name, parts, bias=bias, role="qkv")
    return t.linear(x, name, queries + 2 * keys, bias=bias, role="qkv")


def attend(
    t: Trace,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    softcap: bool = False,
    softmax_format: Format | None = FP32,
) -> Tensor:
    """Attention of q, k, v by heads; the result is batch, sequence, all channels of all heads.

    `dropout` is the share of weights that training leaves out. No fused kernel limits scores: with
    a `softcap` attention is written out, with a softmax in that format.
    """
    groups = q.shape[1] // k.shape[1]
    if t.setting.repeats_keys and groups > 1:
        k, v = ops.repeat(t, k, groups), ops.repeat(t, v, groups)
    if t.setting.attention == "eager" or softcap:
        out = attention.eager(
            t, q, k, v, mask, dropout=dropout, softcap=softcap, softmax_format=softmax_format,
            cast_back=softmax_format is not None,
        )  # fmt: skip
    else:
        out = attention.attend(t, q, k, v, mask, dropout=dropout)
    return beside_each_other(t, q, out)


def beside_each_other(t: Trace, q: Tensor, out: Tensor) -> Tensor:
    """What attention gives, all heads in one, with what an adapter of `attending` makes of it."""
    adapter = t.attending
    return ops.merge_heads(t, out if adapter is None else adapter.attended(t, q, out))


def hand_back(t: Trace, returned: list[Tensor], weights: Tensor | None) -> None:
    """Hold what a layer returns beside its output, in place of what the last one did.

    The loop over the layers still has it when the next layer runs.
    """
    if not t.replaying:
        returned[:] = [] if weights is None else [weights]
        t.handing_back = bool(returned)


Activation = Step


def gelu_by_tanh(t: Trace, x: Tensor) -> Tensor:
    """GELU by its tanh formula, which GPT-2's implementation writes out."""
    return ops.gelu(t, x) if t.setting.fused_activation else ops.gelu_new(t, x)


def relu_squared(t: Tape, x: Tensor) -> Tensor:
    """The square of ReLU (Nemotron)."""
    return ops.power(t, ops.relu(t, x))


ACTIVATIONS: dict[str, Activation] = {
    "silu": ops.silu, "swish": ops.silu, "gelu": ops.gelu, "gelu_pytorch_tanh": ops.gelu,
    "relu": ops.relu, "gelu_new": gelu_by_tanh,
    "relu2": relu_squared,
}  # fmt: skip


def activation(c: Config, *names: str, default: str) -> Activation:
    """The activation that a configuration names."""
    name = c.text(*names, default=default)
    if name not in ACTIVATIONS:
        raise c.error(
            f"has the unknown activation `{printable(name)}`",
            f"known ones: {', '.join(ACTIVATIONS)}",
        )
    return ACTIVATIONS[name]


Masking = Literal["as needed", "always", "eager", "alibi", "chunked"]
"""Whether there is a mask: where the kernel asked for needs one, of yes and no whatever the kernel,
one to add since attention is written out, one for every head, which ALiBi is part of, or, where it
is needed, one for every sequence, whose chunks begin at its own first token."""


def mask(
    t: Trace,
    window: int = 0,
    masking: Masking = "as needed",
    heads: int = 1,
    *,
    given: bool = True,
    format: Format | None = None,
) -> Tensor | None:
    """The attention mask made once for all layers, in the `format` of the first one's input.

    Without padding, a fused kernel is told that attention is causal and needs no mask, unless the
    sequence outgrows a `window` (transformers v5.23, masking_utils.py). What says where a batch is
    padded is `given` with it, unless the tokens are others (T5's decoder).
    """
    padded = t.setting.padded and given
    prefix = t.setting.adapter.remembered if t.setting.adapter else 0
    past = min(t.setting.past, window - 1) if window else t.setting.past
    total = t.sequence + past + prefix
    added = masking in ("eager", "alibi") or t.setting.attention == "eager"
    outgrown = window and total >= window
    if not (added or masking == "always" or padded or outgrown or prefix):
        return None
    chunked = masking == "chunked" and window > 0
    batch = t.batch if padded or chunked else Dim(1, "one")
    allowed = t.new("mask", (batch, 1, t.sequence, total), BOOL)
    if not added:
        return allowed
    shape = (t.batch, heads if masking == "alibi" else 1, t.sequence, total)
    return t.new("mask", shape, format or (FP32 if t.setting.upcast else t.setting.format))
