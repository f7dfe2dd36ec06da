"""Laguna: every head's output behind a gate, heads counted for each layer, sigmoid routing.

transformers v5.23, models/laguna/modeling_laguna.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Sizes
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, rotary=0.5, local_rotary=1.0)
    m = mixture.read(c, scores="sigmoid", correction="weight", balanced=True)
    capped = c.number("moe_router_logit_softcapping") > 0
    bias = c.flag("attention_bias")
    gating = c.value("gating")
    per_head = gating in (None, True, "per-head")
    heads = c.each_layer(s.layers, "num_attention_heads_per_layer") or [s.heads] * s.layers
    if not all(isinstance(n, int) and n > 0 for n in heads):
        raise c.error("has no head count for every layer", "give one a layer")

    def block(x: Tensor, kind: tuple[int, bool, int], around: Around) -> Tensor:
        window, sparse, own_heads = kind
        here = s._replace(heads=Dim(own_heads, "heads"))
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, here, x, around, window, bias, per_head),
            lambda x: feed(t, s, m, x, capped) if sparse else decoder.gated(t, s, x),
        )

    reach = decoder.windows(c, s.layers, lambda layer: False)
    sparse = mixture.sparse_layers(c, s.layers, 1)
    kinds = list(zip(reach, sparse, heads[: s.layers], strict=True))
    return decoder.run(t, s, block, kinds, Frame(windows=reach, rope=rotary.Rope(apart=True)))


def attention(
    t: Trace, s: Sizes, x: Tensor, around: Around, window: int, bias: bool, per_head: bool
) -> Tensor:
    """Grouped-query attention whose output is scaled for each head or each channel."""
    q = t.linear(x, "self_attn.q_proj", s.heads * s.head_dim, bias=bias, role="q")
    k = t.linear(x, "self_attn.k_proj", s.kv_heads * s.head_dim, bias=bias, role="k")
    v = t.linear(x, "self_attn.v_proj", s.kv_heads * s.head_dim, bias=bias, role="v")
    q = blocks.rms_norm(t, ops.split_heads(t, q, s.heads), "self_attn.q_norm")
    k = blocks.rms_norm(t, ops.split_heads(t, k, s.kv_heads), "self_attn.k_norm")
    v = ops.split_heads(t, v, s.kv_heads)
    q, k = decoder.turn(t, q, k, around, window)
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window], dropout=s.attention_dropout)
    width = s.heads if per_head else s.heads * s.head_dim
    gate = ops.to(t, t.linear(x, "self_attn.g_proj", width, role="gate_attention"), FP32)
    gate = ops.to(t, ops.unary(t, "softplus", gate, keeps="input"), out.format)
    if per_head:
        heads = ops.reshape(t, out, t.batch, t.sequence, s.heads, s.head_dim)
        scaled = ops.mul(t, heads, ops.reshape(t, gate, t.batch, t.sequence, s.heads, 1))
        out = ops.reshape(t, scaled, *out.shape)
        del heads, scaled
    else:
        out = ops.mul(t, out, gate)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor, capped: bool) -> Tensor:
    """Routed experts, their sum scaled, and a shared one."""
    t.weight("mlp.gate.e_score_correction_bias", (m.count,), "router", fixed=True)
    tokens = x.view(t.batch * t.sequence, s.hidden)
    shared = decoder.gated(t, s, tokens, name="mlp.shared_experts", width=m.shared, role="shared_")
    logits = ops.to(t, mixture.router_logits(t, m, tokens, "mlp.gate", bias=False), FP32)
    if capped:
        logits = ops.scale(t, ops.tanh(t, ops.scale(t, logits)))
    routing = mixture.choose(t, m, logits, tokens.format)
    del logits
    routed = ops.scale(t, mixture.run_experts(t, s, m, tokens, routing))
    return ops.add(t, routed, shared).view(*x.shape)
