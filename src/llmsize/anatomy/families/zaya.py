"""ZAYA: attention over convolved queries and keys, a router with a memory across layers.

transformers v5.23, models/zaya/modeling_zaya.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture, recurrent
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes
from llmsize.anatomy.families.llama4 import norm_without_weights
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, tied=True)
    m = mixture.read(c)
    router = Dim(c.size("router_hidden_size", default=256), "router_width")
    kernels = (c.size("cca_time0", default=2), c.size("cca_time1", default=2))
    bias = c.flag("attention_bias")
    window = c.count("sliding_window")

    def block(x: Tensor, kind: tuple[bool, bool], around: Around) -> Tensor:
        first, local = kind
        reach = window if local else 0
        residual = x
        x = blocks.rms_norm(t, x, "input_layernorm")
        x = attention(t, s, x, around, reach, kernels, bias)
        residual = scaled_add(t, x, residual, "post_attention_residual_scale")
        x = blocks.rms_norm(t, residual, "post_attention_layernorm")
        x = feed(t, s, m, x, router, first)
        return scaled_add(t, x, residual, "post_mlp_residual_scale")

    def begin(x: Tensor) -> Tensor:
        factor = t.weight("model.input_hidden_states_scale", (s.hidden,), "norm")
        offset = t.weight("model.input_hidden_states_bias", (s.hidden,), "norm")
        return ops.mul(t, ops.add(t, x, offset), factor)

    listed = c.sequence("layer_types") or ["hybrid"] * s.layers
    if len(listed) < s.layers:
        raise c.error("has no `layer_types` for every layer", "give one a layer")
    kinds = [(i == 0, listed[i] == "hybrid_sliding") for i in range(s.layers)]
    return decoder.run(
        t, s, block, kinds, windows=(0, window), begin=begin, head_bias=c.flag("lm_head_bias")
    )


def scaled_add(t: Trace, x: Tensor, residual: Tensor, name: str) -> Tensor:
    """Both shifted and scaled channel by channel, then added."""
    sides = []
    for side, tensor in (("hidden_states", x), ("residual", residual)):
        factor = t.weight(f"{name}.{side}_scale", tensor.shape[-1:], "norm")
        offset = t.weight(f"{name}.{side}_bias", tensor.shape[-1:], "norm")
        sides.append(ops.mul(t, ops.add(t, tensor, offset), factor))
    return ops.add(t, *sides)


def attention(
    t: Trace, s: Sizes, x: Tensor, around: Around, window: int, kernels: tuple[int, int], bias: bool
) -> Tensor:
    """Queries and keys convolved together; half of each value comes from the token before."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    name = "self_attn.qkv_proj"
    q = t.linear(x, f"{name}.q_proj", queries, bias=bias, role="q")
    k = t.linear(x, f"{name}.k_proj", keys, bias=bias, role="k")
    now = t.linear(x, f"{name}.v_proj_current", keys // 2, bias=bias, role="v")
    before = t.linear(x, f"{name}.v_proj_delayed", keys // 2, bias=bias, role="v")
    both = ops.cat(t, (q, k))
    both = recurrent.convolve(
        t, both, f"{name}.conv_qk_depthwise", kernels[0], bias=True, activated=False
    )
    both = grouped_convolution(t, s, both, f"{name}.conv_qk_grouped", kernels[1])
    recurrent.remember(t, s.hidden, queries + keys, kernels[0] + kernels[1] - 1)
    q, k = ops.split(t, both, queries, keys)
    q = norm_without_weights(t, ops.split_heads(t, q, s.heads))
    k = norm_without_weights(t, ops.split_heads(t, k, s.kv_heads))
    temperature = t.weight("self_attn.qk_norm.temp", (s.kv_heads,), "norm")
    k = ops.mul(t, k, temperature.view(s.kv_heads, 1, 1))
    v = ops.split_heads(t, ops.cat(t, (now, before)), s.kv_heads)
    q, k = decoder.turn(t, q, k, around)
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window])
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def grouped_convolution(t: Trace, s: Sizes, x: Tensor, name: str, kernel: int) -> Tensor:
    """A short convolution that mixes the channels of each head."""
    weight = t.weight(f"{name}.weight", (x.shape[-1], s.head_dim, kernel), "conv")
    offset = t.weight(f"{name}.bias", (x.shape[-1],), "bias")
    return recurrent.fused(t, "conv1d", (x, weight, offset), x.shape)


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor, router: int, first: bool) -> Tensor:
    """Routed experts; one more than there are may be chosen and does nothing."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    hidden = t.linear(tokens, "mlp.gate.down_proj", router, bias=True, role="router")
    if not first:
        hidden = ops.mul(t, hidden, t.weight("mlp.gate.router_states_scale", (router,), "router"))
    name = "mlp.gate.router_mlp"
    hidden = blocks.rms_norm(t, hidden, f"{name}.norm")
    for layer in ("fc1", "fc2"):
        hidden = t.linear(hidden, f"{name}.{layer}", router, bias=True, role="router")
        hidden = ops.gelu(t, hidden)
    logits = t.linear(hidden, f"{name}.out_proj", m.count + 1, role="router")
    scores = ops.softmax(t, logits)
    weights = mixture.take(t, scores, (scores.shape[0], m.chosen), "gather")
    return mixture.run_experts(t, s, m, tokens, mixture.Routing(weights), "mlp.experts").view(
        *x.shape
    )
