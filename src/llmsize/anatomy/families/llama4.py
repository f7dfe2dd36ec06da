"""Llama 4: chunked attention between layers that see everything, experts in some layers.

transformers v5.23, models/llama4/modeling_llama4.py (the text model).
"""

from __future__ import annotations

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
    m = mixture.read(c, width="intermediate_size", scores="sigmoid")
    dense = Dim(c.size("intermediate_size_mlp", default=s.intermediate), "intermediate")
    bias = c.flag("attention_bias")
    normed_heads = c.flag("use_qk_norm", default=True)

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, sparse = kind
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, window, bias, normed_heads),
            lambda x: (
                feed(t, s, m, x)
                if sparse
                else decoder.gated(t, s, x, name="feed_forward", width=dense)
            ),
        )

    reach = decoder.windows(c, s.layers, lambda layer: (layer + 1) % period(c) > 0)
    kinds = list(zip(reach, sparse_layers(c, s.layers), strict=True))
    return decoder.run(t, s, block, kinds, windows=reach)


def period(c: Config) -> int:
    """Every that many layers one sees everything and does not rotate."""
    return c.size("no_rope_layer_interval", default=4)


def sparse_layers(c: Config, layers: int) -> list[bool]:
    """Which layers have experts: as listed, or every so many."""
    listed = c.sequence("moe_layers")
    step = c.size("interleave_moe_layer_step", default=1)
    return [i in listed if listed is not None else (i + 1) % step == 0 for i in range(layers)]


def attention(
    t: Trace, s: Sizes, x: Tensor, around: Around, window: int, bias: bool, normed_heads: bool
) -> Tensor:
    """Grouped-query attention; heads are normalised where they are rotated, without weights."""
    q = t.linear(x, "self_attn.q_proj", s.heads * s.head_dim, bias=bias, role="q")
    k = t.linear(x, "self_attn.k_proj", s.kv_heads * s.head_dim, bias=bias, role="k")
    v = t.linear(x, "self_attn.v_proj", s.kv_heads * s.head_dim, bias=bias, role="v")
    q, k = ops.split_heads(t, q, s.heads), ops.split_heads(t, k, s.kv_heads)
    v = ops.split_heads(t, v, s.kv_heads)
    if window:
        q, k = decoder.turn(t, q, k, around)
        if normed_heads:
            q, k = norm_without_weights(t, q), norm_without_weights(t, k)
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window])
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def norm_without_weights(t: Trace, x: Tensor) -> Tensor:
    """RMSNorm in fp32 that does not scale."""
    format = x.format
    x = ops.to(t, x, FP32)
    x = ops.mul(t, x, ops.rsqrt(t, ops.shift(t, ops.mean(t, ops.power(t, x)))))
    return ops.to(t, x, format)


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts and one that every token passes."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    logits = t.linear(tokens, "feed_forward.router", m.count, role="router")
    chosen = mixture.take(t, logits, (logits.shape[0], m.chosen), "topk")
    weights = ops.to(t, ops.sigmoid(t, ops.to(t, chosen, FP32)), tokens.format)
    routed = mixture.run_experts(
        t, s, m, tokens, mixture.Routing(weights), "feed_forward.experts", transposed=True
    )
    shared = decoder.gated(
        t, s, tokens, name="feed_forward.shared_expert", width=m.width, role="shared_"
    )
    return ops.add(t, shared, routed).view(*x.shape)
