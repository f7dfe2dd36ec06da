"""Hunyuan: heads are normalised after they are rotated; with experts, one for every token.

transformers v5.23, models/hunyuan_v1_dense and models/hunyuan_v1_moe.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Heads, Sizes
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    sparse = c.text("model_type") == "hunyuan_v1_moe"
    t.once_linear = sparse
    m = mixture.read(c, width="intermediate_size") if sparse else None
    bias = c.flag("attention_bias")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, bias),
            lambda x: feed(t, s, m, x) if m else decoder.gated(t, s, x),
        )

    return decoder.run(t, s, block, ["full"] * s.layers)


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, bias: bool) -> Tensor:
    """Grouped-query attention."""
    q, k, v = decoder.projections(t, s, Heads(bias=bias), x)
    q, k = decoder.turn(t, q, k, around)
    q = blocks.rms_norm(t, q, "self_attn.query_layernorm")
    k = blocks.rms_norm(t, k, "self_attn.key_layernorm")
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, around.mask, dropout=s.attention_dropout)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts and one that every token passes, all of one width."""
    shared = decoder.gated(t, s, x, name="mlp.shared_mlp", role="shared_")
    tokens = x.view(t.batch * t.sequence, s.hidden)
    wide = ops.to(t, tokens, FP32)
    logits = t.linear(wide, "mlp.gate.wg", m.count, role="router", format=FP32)
    del wide
    weights = mixture.choose(t, m, logits, logits.format)
    routed = mixture.run_experts(t, s, m, tokens, weights).view(*x.shape)
    return ops.add(t, routed, shared)
