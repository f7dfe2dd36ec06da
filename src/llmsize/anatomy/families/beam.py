"""Beam: sandwich norms, every head's output behind a gate, three dense layers before experts.

transformers v5.23, models/beam/modeling_beam.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes, fp32_norm
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    t.once_linear = True
    m = mixture.read(c, scores="sigmoid", precise=True, wide=True, correction="alike")
    bias = c.flag("attention_bias")

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, sparse = kind
        return decoder.sandwich(
            t,
            x,
            lambda x: attention(t, s, x, around, window, bias),
            lambda x: feed(t, s, m, x) if sparse else decoder.gated(t, s, x),
            norm=fp32_norm,
        )

    last = s.layers - 1
    reach = decoder.windows(c, s.layers, lambda layer: (layer + 1) % 6 > 0 and layer < last)
    sparse = mixture.sparse_layers(c, s.layers, 3)
    kinds = list(zip(reach, sparse, strict=True))
    return decoder.run(t, s, block, kinds, norm=fp32_norm, windows=reach)


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, window: int, bias: bool) -> Tensor:
    """Grouped-query attention, rotated in local layers only, with a gate before the output."""
    q = t.linear(x, "self_attn.q_proj", s.heads * s.head_dim, bias=bias, role="q")
    k = t.linear(x, "self_attn.k_proj", s.kv_heads * s.head_dim, bias=bias, role="k")
    v = t.linear(x, "self_attn.v_proj", s.kv_heads * s.head_dim, bias=bias, role="v")
    q = fp32_norm(t, ops.split_heads(t, q, s.heads), "self_attn.q_norm")
    k = fp32_norm(t, ops.split_heads(t, k, s.kv_heads), "self_attn.k_norm")
    v = ops.split_heads(t, v, s.kv_heads)
    if window:
        q, k = decoder.turn(t, q, k, around)
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window])
    gate = t.linear(x, "self_attn.gate_proj", s.heads * s.head_dim, role="gate_attention")
    offset = t.weight("self_attn.gate_bias", (s.heads,), "bias")
    by_heads = gate.view(t.batch, t.sequence, s.heads, s.head_dim)
    shifted = ops.add(t, by_heads, offset.view(s.heads, 1))
    out = ops.mul(t, out, ops.sigmoid(t, shifted).view(*out.shape))
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts, their sum scaled."""
    return ops.scale(t, mixture.feed(t, s, m, x))
