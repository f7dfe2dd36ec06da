"""Laguna: every head's output behind a gate, heads counted for each layer, sigmoid routing.

transformers v5.23, models/laguna/modeling_laguna.py.
"""

from __future__ import annotations

from dataclasses import replace

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    m = mixture.read(c, scores="sigmoid")
    bias = c.flag("attention_bias")
    gating = c.value("gating")
    per_head = gating in (None, True, "per-head")
    heads = c.sequence("num_attention_heads_per_layer") or [s.heads] * s.layers
    if len(heads) < s.layers or not all(isinstance(n, int) and n > 0 for n in heads):
        raise c.error("has no head count for every layer", "give one a layer")

    def block(x: Tensor, kind: tuple[int, bool, int], around: Around) -> Tensor:
        window, sparse, own_heads = kind
        here = replace(s, heads=Dim(own_heads, "heads"))
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, here, x, around, window, bias, per_head),
            lambda x: feed(t, s, m, x) if sparse else decoder.gated(t, s, x),
        )

    reach = decoder.windows(c, s.layers, lambda layer: False)
    sparse = mixture.sparse_layers(c, s.layers, 1)
    kinds = list(zip(reach, sparse, heads[: s.layers], strict=True))
    return decoder.run(t, s, block, kinds, windows=reach)


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
    q, k = decoder.turn(t, q, k, around)
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window])
    width = s.heads if per_head else s.heads * s.head_dim
    gate = ops.to(t, t.linear(x, "self_attn.g_proj", width, role="gate_attention"), FP32)
    gate = ops.to(t, ops.unary(t, "softplus", gate, keeps="input"), out.format)
    if per_head:
        heads = out.view(t.batch, t.sequence, s.heads, s.head_dim)
        out = ops.mul(t, heads, gate.view(t.batch, t.sequence, s.heads, 1))
        out = out.view(t.batch, t.sequence, s.heads * s.head_dim)
    else:
        out = ops.mul(t, out, gate)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts and a shared one; the correction of the scores is stored with the weights."""
    t.weight("mlp.gate.e_score_correction_bias", (m.count,), "router")
    return mixture.feed(t, s, m, x)
