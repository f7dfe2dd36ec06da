"""DiffLlama: Llama's block, each pair of heads attending by the difference of two softmaxes.

transformers v5.23, models/diffllama/modeling_diffllama.py.
"""

from __future__ import annotations

from llmsize.anatomy import attention as kernels
from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Heads, Sizes
from llmsize.anatomy.scan_operations import exp
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, Format


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    if s.kv_heads % 2:
        raise c.error(f"has {s.kv_heads} KV heads", "values are halved by heads: give an even one")
    bias = c.flag("attention_bias")

    def block(x: Tensor, kind: int, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, bias),
            lambda x: decoder.gated(t, s, x),
        )

    return decoder.run(t, s, block, [0] * s.layers)


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, bias: bool) -> Tensor:
    """The same scores for either half of the values; half of the heads less the other half."""
    q, k, v = decoder.projections(t, s, Heads(bias=bias), x)
    q, k = decoder.turn(t, q, k, around)
    k, v = blocks.remember(t, k, v)
    halves = ops.split(t, v, s.kv_heads // 2, s.kv_heads // 2, dim=1)
    first, second = (twice(t, half) for half in halves)
    del halves
    one = attended(t, q, k, first, around.mask)
    weights = t.attention_weights
    other = attended(t, q, k, second, around.mask)
    both = ops.cat(t, (one, other))
    one, other = ops.split(t, both, s.heads // 2, s.heads // 2, dim=2)
    share = difference(t, s, q.format)
    out = ops.sub(t, one, ops.mul(t, share, other))
    out = ops.scale(t, ops.fused_norm(t, out))
    out = ops.reshape(t, out, t.batch, t.sequence, s.heads * s.head_dim)
    out = t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")
    del weights, one, other, both, first, second
    return out


def twice(t: Trace, x: Tensor) -> Tensor:
    """All heads one after another, and once more."""
    batch, heads, tokens, channels = x.shape
    node = t.record(ops.whole_backward, (x,), (), ("sum", x.shape))
    return t.new("repeat", (batch, 2 * heads, tokens, channels), x.format, node)


def attended(t: Trace, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q, k, v by heads; the result is batch, sequence, heads, channels."""
    kernel = kernels.eager if t.setting.attention == "eager" else kernels.attend
    return ops.transpose(t, kernel(t, q, k, v, mask), 1, 2)


def difference(t: Trace, s: Sizes, format: Format) -> Tensor:
    """How much of the second half's output is taken from the first's: one trained number."""
    raised = []
    for part in ("1", "2"):
        one, other = (t.weight(f"self_attn.lambda_{x}{part}", (s.head_dim,), "norm") for x in "qk")
        summed = ops.sum_first(t, ops.mul(t, one, other), FP32)
        raised.append(ops.to(t, exp(t, summed), format))
    return ops.shift(t, ops.sub(t, *raised))
