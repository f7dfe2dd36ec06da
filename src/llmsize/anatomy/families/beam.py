"""Beam: sandwich norms, every head's output behind a gate, three dense layers before experts.

transformers v5.23, models/beam/modeling_beam.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, lm_head, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Sizes, fp32_norm
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, rotary=0.0, local_rotary=1.0)
    t.once_linear = True
    m = mixture.read(c, scores="sigmoid", precise=True, wide=True, correction="alike")
    bias = c.flag("attention_bias")
    capped = c.number("final_logit_softcapping", default=30.0) > 0

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, sparse = kind
        residual = x
        x = fp32_norm(t, x, "input_layernorm")
        x = attention(t, s, x, around, window, bias)
        x = fp32_norm(t, x, "post_attention_layernorm")
        x = scaled_sum(t, x, residual)
        residual = x
        x = fp32_norm(t, x, "pre_feedforward_layernorm")
        x = feed(t, s, m, x) if sparse else gated(t, s, x)
        x = fp32_norm(t, x, "post_feedforward_layernorm")
        return scaled_sum(t, x, residual)

    last = s.layers - 1
    reach = decoder.windows(c, s.layers, lambda layer: (layer + 1) % 6 > 0 and layer < last)
    sparse = mixture.sparse_layers(c, s.layers, 3)
    kinds = list(zip(reach, sparse, strict=True))
    frame = Frame(
        norm=fp32_norm,
        windows=reach,
        scale=growth,
        rope=rotary.Rope(format=FP32, apart=True),
        head=Head(end=lm_head.FP32_SOFTCAP if capped else ()),
    )
    return decoder.run(t, s, block, kinds, frame)


def growth(t: Trace, window: int) -> Tensor | None:
    """How queries grow with their position, of layers without a window."""
    return None if window else t.new("exp", (1, 1, t.sequence, 1), FP32)


def scaled_sum(t: Trace, x: Tensor, residual: Tensor) -> Tensor:
    """What a half adds and the residual stream, scaled by the depth and summed."""
    x = ops.scale(t, x)
    return ops.add(t, x, ops.scale(t, residual))


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, window: int, bias: bool) -> Tensor:
    """Grouped-query attention with a gate before the output.

    Local layers are rotated; in the others queries grow with their position.
    """
    shape = (t.batch, t.sequence)
    q = t.linear(x, "self_attn.q_proj", s.heads * s.head_dim, bias=bias, role="q")
    q = fp32_norm(t, ops.reshape(t, q, *shape, s.heads, s.head_dim), "self_attn.q_norm")
    q = ops.transpose(t, q, 1, 2)
    k = t.linear(x, "self_attn.k_proj", s.kv_heads * s.head_dim, bias=bias, role="k")
    k = fp32_norm(t, ops.reshape(t, k, *shape, s.kv_heads, s.head_dim), "self_attn.k_norm")
    k = ops.transpose(t, k, 1, 2)
    v = t.linear(x, "self_attn.v_proj", s.kv_heads * s.head_dim, bias=bias, role="v")
    v = ops.split_heads(t, v, s.kv_heads)
    rotation, scale = around.tables[window], around.scales[window]
    if rotation is not None:
        q, k = rotary.turn_and_cast(t, q, k, rotation)
    if scale is not None:
        growing = ops.mul(t, ops.to(t, q, FP32), scale)
        q = ops.to(t, growing, q.format)
        del growing
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window], dropout=s.attention_dropout)
    out = ops.reshape(t, out, *shape, s.heads, s.head_dim)
    gate = t.linear(x, "self_attn.gate_proj", s.heads * s.head_dim, role="gate_attention")
    gate = ops.reshape(t, gate, *out.shape)
    offset: Tensor = t.weight("self_attn.gate_bias", (s.heads,), "bias")
    gate = ops.add(t, gate, ops.reshape(t, offset, 1, 1, s.heads, 1))
    out = ops.mul(t, out, ops.sigmoid(t, gate))
    out = ops.reshape(t, out, *shape, s.heads * s.head_dim)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def gated(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """The gated MLP, its product in fp32."""
    gate = t.linear(x, "mlp.gate_proj", s.intermediate, role="gate")
    up = t.linear(x, "mlp.up_proj", s.intermediate, role="up")
    product = wide_product(t, s, gate, up)
    return t.linear(product, "mlp.down_proj", s.hidden, role="down")


def wide_product(t: Trace, s: Sizes, gate: Tensor, up: Tensor) -> Tensor:
    """The activation of the gate times the other half, in fp32, cast back."""
    activated = s.activation(t, ops.to(t, gate, FP32))
    return ops.to(t, ops.mul(t, activated, ops.to(t, up, FP32)), gate.format)


def wide_halves(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """The first half gates the second, in fp32."""
    half = x.shape[-1] // 2
    gate, up = ops.split(t, x, half, half)
    return wide_product(t, s, gate, up)


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts, their sum scaled."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    routing = mixture.route(t, m, tokens, "mlp.gate")
    out = mixture.run_experts(t, s, m, tokens, routing, gate=wide_halves)
    return ops.scale(t, out).view(*x.shape)
