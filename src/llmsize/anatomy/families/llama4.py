"""Llama 4: chunked attention between layers that see everything, experts in some layers.

transformers v5.23, models/llama4/modeling_llama4.py (the text model).
"""

from __future__ import annotations

from llmsize.anatomy import attention as kernels
from llmsize.anatomy import blocks, decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Sizes
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, INT64


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    m = mixture.read(c, width="intermediate_size", scores="sigmoid")
    dense = Dim(c.size("intermediate_size_mlp", default=s.intermediate), "intermediate")
    bias = c.flag("attention_bias")
    normed_heads = c.flag("use_qk_norm", default=True)

    tuned = c.flag("attn_temperature_tuning", default=True)

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, sparse = kind
        residual = x
        x = norm(t, x, "input_layernorm")
        attended = attention(t, s, x, around, window, bias, normed_heads, tuned)
        x = ops.add(t, residual, attended)
        residual = x
        x = norm(t, x, "post_attention_layernorm")
        if sparse:
            x, *alive = feed(t, s, m, x)
        else:
            x, alive = decoder.gated(t, s, x, name="feed_forward", width=dense), []
        x = ops.add(t, residual, ops.reshape(t, x, *residual.shape))
        del alive
        return x

    reach = decoder.windows(c, s.layers, lambda layer: (layer + 1) % period(c) > 0)
    kinds = list(zip(reach, sparse_layers(c, s.layers), strict=True))
    frame = Frame(
        windows=reach,
        norm=norm,
        masking="chunked",
        masks=(0, s.window),
        rope=rotary.Rope(rotary.complex_table),
    )
    return decoder.run(t, s, block, kinds, frame)


def period(c: Config) -> int:
    """Every that many layers one sees everything and does not rotate."""
    return c.size("no_rope_layer_interval", default=4)


def sparse_layers(c: Config, layers: int) -> list[bool]:
    """Which layers have experts: as listed, or every so many."""
    listed = c.sequence("moe_layers")
    step = c.size("interleave_moe_layer_step", default=1)
    return [i in listed if listed is not None else (i + 1) % step == 0 for i in range(layers)]


def norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """RMSNorm in fp32, scaled in the input's format."""
    weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
    return ops.mul(t, norm_without_weights(t, x), weight)


def norm_without_weights(t: Trace, x: Tensor) -> Tensor:
    """RMSNorm in fp32 that does not scale."""
    return ops.to(t, normed(t, ops.to(t, x, FP32)), x.format)


def normed(t: Trace, x: Tensor) -> Tensor:
    """`x` over the root of its mean square."""
    return ops.normalized(t, x)


def attention(
    t: Trace,
    s: Sizes,
    x: Tensor,
    around: Around,
    window: int,
    bias: bool,
    normed_heads: bool,
    tuned: bool,
) -> Tensor:
    """Grouped-query attention; heads are normalised where they are rotated, without weights.

    Where they are not, queries are scaled by their position if they are `tuned`.
    """
    q = t.linear(x, "self_attn.q_proj", s.heads * s.head_dim, bias=bias, role="q")
    k = t.linear(x, "self_attn.k_proj", s.kv_heads * s.head_dim, bias=bias, role="k")
    v = t.linear(x, "self_attn.v_proj", s.kv_heads * s.head_dim, bias=bias, role="v")
    q = ops.reshape(t, q, *x.shape[:2], s.heads, s.head_dim)
    k = ops.reshape(t, k, *x.shape[:2], s.kv_heads, s.head_dim)
    v = ops.split_heads(t, v, s.kv_heads)
    places = None
    if window:
        q, k = turn(t, q, k, around)
        if normed_heads:
            q = norm_without_weights(t, q)
            k = norm_without_weights(t, k)
    elif tuned:
        places = t.new("add", (t.sequence,), INT64)
        scales = t.new("add", (1, t.sequence, 1, 1), FP32)
        q = ops.to(t, ops.mul(t, q, scales), q.format)
    q, k = ops.transpose(t, q, 1, 2), ops.transpose(t, k, 1, 2)
    k, v = blocks.remember(t, k, v, window)
    out = attend(t, s, q, k, v, around.masks[window])
    out = t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")
    del places
    return out


def turn(t: Trace, q: Tensor, k: Tensor, around: Around) -> tuple[Tensor, Tensor]:
    """Neighbouring channels rotated as complex numbers in fp32; q and k are cast back together."""
    rotation = around.rotation
    assert rotation is not None
    wide = ops.to(t, q, FP32), ops.to(t, k, FP32)
    turned = [ops.mul_complex(t, part, rotation.cosines) for part in wide]
    return ops.to(t, turned[0], q.format), ops.to(t, turned[1], k.format)


def attend(t: Trace, s: Sizes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention whose softmax, where it is written out, stays in 16 bit."""
    dropout = s.attention_dropout
    if t.setting.attention != "eager":
        return blocks.attend(t, q, k, v, mask, dropout=dropout)
    assert mask is not None
    out = kernels.eager(t, q, k, v, mask, dropout=dropout, softmax_format=None, cast_back=False)
    return ops.merge_heads(t, out)


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> tuple[Tensor, Tensor]:
    """Every token through every expert, scaled by its scores, and through the shared expert.

    The scores of experts that are not chosen are zero. The router's logits come beside.
    """
    tokens = ops.reshape(t, x, t.batch * t.sequence, s.hidden)
    scores, logits = route(t, m, tokens)
    every = m.count * tokens.shape[0]
    inputs = mixture.take(t, tokens, (every, s.hidden), "repeat")
    scores = ops.transpose(t, scores, 0, 1)
    inputs = ops.mul(t, inputs, ops.reshape(t, scores, every, 1))
    routed = experts(t, s, m, inputs)
    out = decoder.gated(
        t, s, tokens, name="feed_forward.shared_expert", width=m.width, role="shared_"
    )
    apart = ops.reshape(t, routed, m.count, tokens.shape[0], s.hidden)
    return ops.add_in_place(t, out, ops.sum_first(t, apart)), logits


def route(t: Trace, m: Mixture, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of all experts, zero for those not chosen, and the logits."""
    # a class of its own, which `replace_with_bnb_linear` passes over
    logits = t.linear(tokens, "feed_forward.router", m.count, role="router", kept=True)
    highest, indices = ops.topk(t, logits, m.chosen)
    scores = ops.scatter_in_place(
        t, t.new("full_like", logits.shape, logits.format), highest, indices
    )
    scores = ops.to(t, ops.sigmoid(t, ops.to(t, scores, FP32)), scores.format)
    return scores, logits


def experts(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """The same number of rows through each expert, in batched products."""
    names = "feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"
    up = t.weight(
        names[0], (m.count, s.hidden, 2 * m.width), "expert_gate_up",
        experts=m.count, chosen=m.chosen,
    )  # fmt: skip
    down = t.weight(
        names[1], (m.count, m.width, s.hidden), "expert_down", experts=m.count, chosen=m.chosen
    )
    rows = x.shape[0]
    x = ops.reshape(t, x, m.count, rows // m.count, s.hidden)
    both = ops.matmul(t, x, t.adapted_matrix(up, names[0], "expert_gate_up", fused=2))
    gate, high = ops.split(t, both, m.width, m.width)
    down_weight = t.adapted_matrix(down, names[1], "expert_down")
    out = ops.matmul(t, ops.mul(t, high, s.activation(t, gate)), down_weight)
    return ops.reshape(t, out, rows, s.hidden)
