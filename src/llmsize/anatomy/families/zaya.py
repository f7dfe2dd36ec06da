"""ZAYA: attention over convolved queries and keys, a router with a memory across layers.

transformers v5.23, models/zaya/modeling_zaya.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture, recurrent, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32, INT64


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, tied=True, rotary=0.5, local_rotary=0.5)
    m = mixture.read(c)
    router = Dim(c.size("router_hidden_size", default=256), "router_width")
    kernels = (c.size("cca_time0", default=2), c.size("cca_time1", default=2))
    bias = c.flag("attention_bias")
    window = c.count("sliding_window")
    narrow = t.setting.format

    def block(x: Tensor, kind: tuple[bool, bool], around: Around) -> Tensor:
        first, local = kind
        residual = x
        x = blocks.rms_norm(t, ops.to(t, residual, narrow), "input_layernorm")
        x = attention(t, s, x, around, window if local else 0, kernels, bias)
        residual = scaled_add(t, x, residual, "post_attention_residual_scale")
        x = blocks.rms_norm(t, ops.to(t, residual, narrow), "post_attention_layernorm")
        x = feed(t, s, m, x, router, around.carried, first)
        return scaled_add(t, x, residual, "post_mlp_residual_scale")

    def begin(t: Trace, x: Tensor) -> Tensor:
        factor = t.weight("model.input_hidden_states_scale", (s.hidden,), "norm")
        offset = t.weight("model.input_hidden_states_bias", (s.hidden,), "norm")
        return ops.to(t, ops.mul(t, ops.add(t, x, offset), factor), FP32)

    def end(t: Trace, x: Tensor, name: str) -> Tensor:
        return blocks.rms_norm(t, ops.to(t, x, narrow), name)

    listed = c.each_layer(s.layers, "layer_types") or ["hybrid"] * s.layers
    kinds = [(i == 0, kind == "hybrid_sliding") for i, kind in enumerate(listed)]
    frame = Frame(
        windows={window if local else 0 for _, local in kinds},
        norm=end,
        begin=begin,
        rope=rotary.Rope(format=narrow, apart=True),
        handed_positions=False,
        carrying=True,
        head=Head(bias=c.flag("lm_head_bias")),
    )
    return decoder.run(t, s, block, kinds, frame)


def scaled_add(t: Trace, x: Tensor, residual: Tensor, name: str) -> Tensor:
    """Both shifted and scaled channel by channel, then added."""
    factor, offset = (
        t.weight(f"{name}.hidden_states_{part}", x.shape[-1:], "norm") for part in ("scale", "bias")
    )
    x = ops.mul(t, ops.add(t, x, offset), factor)
    factor, offset = (
        t.weight(f"{name}.residual_{part}", x.shape[-1:], "norm") for part in ("scale", "bias")
    )
    return ops.add(t, x, ops.mul(t, ops.add(t, residual, offset), factor))


def attention(
    t: Trace, s: Sizes, x: Tensor, around: Around, window: int, kernels: tuple[int, int], bias: bool
) -> Tensor:
    """Queries and keys convolved together; half of each value comes from the token before."""
    rotation = around.tables[window]
    assert rotation is not None
    q, k, v = convolved_heads(t, s, x, kernels, bias)
    q = unit(t, q)
    k = unit(t, k)
    temperature: Tensor = t.weight("self_attn.qk_norm.temp", (s.kv_heads,), "norm")
    k = ops.mul(t, k, ops.reshape(t, temperature, 1, 1, s.kv_heads, 1))
    q, k, v = (ops.transpose(t, part, 1, 2) for part in (q, k, v))
    q, k = rotary.turn(t, q, k, rotation)
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window], dropout=s.attention_dropout)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def unit(t: Trace, x: Tensor) -> Tensor:
    """Each head's vector with a fixed length."""
    length = ops.clamp(t, ops.length(t, x))
    inverse = ops.scale(t, ops.unary(t, "reciprocal", length, keeps="output"))
    return ops.mul(t, x, inverse)


def convolved_heads(
    t: Trace, s: Sizes, x: Tensor, kernels: tuple[int, int], bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by heads within each token, before they are normalised."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    name, shape, groups = "self_attn.qkv_proj", (t.batch, t.sequence), s.heads // s.kv_heads
    q = t.linear(x, f"{name}.q_proj", queries, bias=bias, role="q")
    k = t.linear(x, f"{name}.k_proj", keys, bias=bias, role="k")
    both = ops.cat(t, (q, k))
    q_rest = ops.reshape(t, q, *shape, s.heads, s.head_dim)
    k_rest = ops.transpose(t, ops.repeat(t, ops.split_heads(t, k, s.kv_heads), groups), 1, 2)
    q_rest = ops.scale(t, ops.add(t, q_rest, k_rest))
    grouped = ops.reshape(t, q_rest, *shape, s.kv_heads, groups, s.head_dim)
    k_rest = mixture.take(t, grouped, (*shape, s.kv_heads, s.head_dim), "mean")
    padding = kernels[0] + kernels[1] - 2
    recurrent.remember(t, s.hidden, queries + keys, padding + 1)
    both = convolve(t, s, ops.transpose(t, both, 1, 2), f"{name}.conv_qk", kernels)
    q_conv = ops.reshape(t, ops.slice_last(t, both, queries), *shape, s.heads, s.head_dim)
    q_turned = ops.add(t, q_conv, q_rest)
    k_conv = ops.reshape(t, ops.slice_last(t, both, keys), *shape, s.kv_heads, s.head_dim)
    k_turned = ops.add(t, k_conv, k_rest)
    v = values(t, x, keys, bias)
    del q, k
    return q_turned, k_turned, ops.reshape(t, v, *shape, s.kv_heads, s.head_dim)


def convolve(t: Trace, s: Sizes, x: Tensor, name: str, kernels: tuple[int, int]) -> Tensor:
    """Two short convolutions, of each channel and of those of each head; channels come last."""
    batch, channels, tokens = x.shape
    x = ops.pad_last(t, x, sum(kernels) - 2)
    for part, width, kernel, left in (
        ("depthwise", 1, kernels[0], tokens + kernels[1] - 1),
        ("grouped", s.head_dim, kernels[1], tokens),
    ):
        weight = t.weight(f"{name}_{part}.weight", (channels, width, kernel), "conv")
        offset = t.weight(f"{name}_{part}.bias", (channels,), "bias")
        x = ops.convolution(t, x, weight, offset, (batch, channels, left))
    return ops.transpose(t, x, 1, 2)


def values(t: Trace, x: Tensor, keys: int, bias: bool) -> Tensor:
    """Half of each value from the token itself, half from the one before it."""
    name = "self_attn.qkv_proj"
    now = t.linear(x, f"{name}.v_proj_current", keys // 2, bias=bias, role="v")
    delayed = t.linear(x, f"{name}.v_proj_delayed", keys // 2, bias=bias, role="v")
    nothing = t.new("new_zeros", (t.batch, 1, x.shape[-1]), x.format)
    before = t.linear(nothing, f"{name}.v_proj_delayed", keys // 2, bias=bias, role="v")
    shifted = ops.narrow(t, delayed, 1, t.sequence - 1) if t.sequence > 1 else None
    parts = (before,) if shifted is None else (before, shifted)
    return ops.cat(t, (now, ops.cat(t, parts, 1)))


def feed(
    t: Trace, s: Sizes, m: Mixture, x: Tensor, router: int, carried: list[Tensor], first: bool
) -> Tensor:
    """Routed experts; one more than there are may be chosen and does nothing."""
    routing = route(t, m, x, router, carried, first)
    tokens = x.view(t.batch * t.sequence, s.hidden)
    return mixture.run_experts(t, s, m, tokens, routing).view(*x.shape)


def route(
    t: Trace, m: Mixture, x: Tensor, router: int, carried: list[Tensor], first: bool
) -> mixture.Routing:
    """A small network whose hidden state each layer hands to the next."""
    t.add_buffer((m.count + 1) * FP32.block_bytes)
    hidden = t.linear(x, "mlp.gate.down_proj", router, bias=True, role="router")
    before = carried.pop() if carried else None
    if not first and before is not None:
        factor = t.weight("mlp.gate.router_states_scale", (router,), "router")
        hidden = ops.add(t, hidden, ops.mul(t, before, factor))
    carried.append(ops.copy(t, ops.narrow(t, hidden, 1, t.sequence)))
    name = "mlp.gate.router_mlp"
    x = blocks.rms_norm(t, hidden, f"{name}.norm")
    for layer in ("fc1", "fc2"):
        x = ops.gelu(t, t.linear(x, f"{name}.{layer}", router, bias=True, role="router"))
    logits = t.linear(x, f"{name}.out_proj", m.count + 1, role="router")
    scores = ops.softmax(t, logits)
    shape = (*scores.shape[:-1], m.chosen)
    corrected = t.new("add", scores.shape, FP32)
    indices = t.new("topk", shape, INT64)
    del corrected
    skipped = t.new("eq", shape, BOOL)
    weights = ops.masked_fill(t, ops.gather(t, scores, indices), skipped)
    chosen = t.new("masked_fill", shape, INT64)
    return mixture.Routing(ops.reshape(t, weights, t.batch * t.sequence, m.chosen), chosen)
