"""Inkling: relative positions, short convolutions in every layer, shared experts with weights.

transformers v5.23, models/inkling/modeling_inkling.py (the text model).
"""

from __future__ import annotations

from llmsize.anatomy import attention as kernels
from llmsize.anatomy import blocks, decoder, mixture, recurrent
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Sizes
from llmsize.anatomy.families.minicpm3 import scaled_norm
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.operations.rules import whole_backward
from llmsize.anatomy.scan_operations import exp
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32, INT64
from llmsize.quick_dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reach:
    """Attention of one kind of layer: local or to all tokens."""

    sizes: Sizes
    window: int
    profiles: int
    """Profiles of bias against distance that each token mixes."""
    extent: int
    """Distances that have a bias."""
    tempered: bool
    """Whether queries and biases grow with the position."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c.changed(tie_word_embeddings=False), rotary=0.0)  # it never is
    m = mixture.read(c, scores="sigmoid", correction="alike")
    kernel = c.size("conv_kernel_size", default=4)
    reaches = {local: read_reach(c, s, local) for local in (False, True)}

    def block(x: Tensor, kind: tuple[bool, bool], around: Around) -> Tensor:
        local, sparse = kind
        reach = reaches[local]
        residual = x
        x = blocks.rms_norm(t, x, "input_layernorm")
        x = attention(t, reach, x, around, kernel)
        x = convolve(t, x, "attn_sconv", kernel)
        x = ops.add(t, residual, x)
        residual = x
        x = blocks.rms_norm(t, x, "post_attention_layernorm")
        x = feed(t, s, m, x) if sparse else decoder.gated(t, s, x)
        x = convolve(t, x, "mlp_sconv", kernel)
        return ops.add(t, residual, x)

    def begin(t: Trace, x: Tensor) -> Tensor:
        return blocks.rms_norm(t, x, "model.embed_tokens.embed_norm")

    kinds = list(zip(local_layers(c, s.layers), mixture.sparse_layers(c, s.layers), strict=True))
    used = {reaches[local].window for local, _ in kinds}
    frame = Frame(
        norm=scaled_norm, windows=used, masks=(0, s.window), begin=begin, handed_positions=False
    )
    return decoder.run(t, s, block, kinds, frame)


def read_reach(c: Config, s: Sizes, local: bool) -> Reach:
    """One kind of attention from a `config.json`."""
    profiles = Dim(c.size("d_rel", default=16), "profiles")
    if not local:
        extent = Dim(c.size("rel_extent", default=1024), "extent")
        tempered = c.value("log_scaling_n_floor") is not None
        return Reach(s, 0, profiles, extent, tempered)
    window = c.size("sliding_window_size", "sliding_window", default=512)
    sizes = s._replace(
        heads=Dim(c.size("swa_num_attention_heads", default=64), "local_heads"),
        kv_heads=Dim(c.size("swa_num_key_value_heads", default=16), "local_kv_heads"),
        head_dim=Dim(c.size("swa_head_dim", default=128), "local_head_dim"),
    )
    return Reach(sizes, window, profiles, Dim(window, "extent"), False)


def local_layers(c: Config, layers: int) -> list[bool]:
    """Which layers are local: as listed by kind or by index, or all but every sixth."""
    kinds = c.each_layer(layers, "layer_types")
    if kinds is not None:
        return [kind == "hybrid_sliding" for kind in kinds]
    local = c.sequence("local_layer_ids")
    if local is None:
        return [(index + 1) % 6 > 0 for index in range(layers)]
    return [index in local for index in range(layers)]


def convolve(t: Trace, x: Tensor, name: str, kernel: int) -> Tensor:
    """A short convolution added to its input."""
    recurrent.remember(t, 0, x.shape[-1], kernel)
    format = x.format
    x = ops.to(t, x, FP32)
    residual = x
    x = ops.transpose(t, recurrent.without_padding(t, x), 1, 2)
    x = recurrent.convolve(t, x, f"{name}.conv1d", kernel, activated=False)
    x = ops.transpose(t, x, 1, 2)
    return ops.to(t, ops.add(t, x, residual), format)


def attention(t: Trace, r: Reach, x: Tensor, around: Around, kernel: int) -> Tensor:
    """Grouped-query attention over convolved keys and values, with a bias for each distance."""
    s = r.sizes
    q = t.linear(x, "self_attn.q_proj", s.heads * s.head_dim, role="q")
    k = t.linear(x, "self_attn.k_proj", s.kv_heads * s.head_dim, role="k")
    k = convolve(t, k, "self_attn.k_sconv", kernel)
    v = t.linear(x, "self_attn.v_proj", s.kv_heads * s.head_dim, role="v")
    v = convolve(t, v, "self_attn.v_sconv", kernel)
    mixing = t.linear(x, "self_attn.r_proj", s.heads * r.profiles, role="q")
    q = blocks.rms_norm(t, ops.split_heads(t, q, s.heads), "self_attn.q_norm")
    k = blocks.rms_norm(t, ops.split_heads(t, k, s.kv_heads), "self_attn.k_norm")
    v = ops.split_heads(t, v, s.kv_heads)
    k, v = blocks.remember(t, k, v, r.window)
    bias = relative_bias(t, r, mixing, k.shape[2])
    if r.tempered:
        q, bias = grown(t, q), grown(t, bias)
    out = attend(t, q, k, v, bias, around.masks[r.window])
    return t.linear(ops.merge_heads(t, out), "self_attn.o_proj", s.hidden, role="o")


def relative_bias(t: Trace, r: Reach, mixing: Tensor, tokens: int) -> Tensor:
    """A number for each head, query and key: what the query mixes of the profiles at that distance.

    Beyond the profiles' extent it is zero.
    """
    profiles = t.weight("self_attn.rel_logits_proj.proj", (r.profiles, r.extent), "q")
    by_token = ops.reshape(t, mixing, t.batch, t.sequence, r.sizes.heads, r.profiles)
    by_distance = ops.transpose(t, ops.matmul(t, by_token, profiles), 1, 2)
    distances = (1, 1, t.sequence, tokens)
    distance = t.new("sub", distances, INT64)
    index = t.new("clamp", distances, INT64)
    shape = (*by_distance.shape[:3], tokens)
    context = ("gather_backward", by_distance.shape)
    node = t.record(whole_backward, (by_distance,), (by_distance, index), context)
    picked = t.new("gather", shape, by_distance.format, node)
    outside = [t.new("compare", distances, BOOL) for _ in range(2)]
    barred = t.new("bitwise_or", distances, BOOL)
    del outside, distance
    return ops.masked_fill(t, picked, barred)


def grown(t: Trace, x: Tensor) -> Tensor:
    """`x` times a number that grows with the position, in fp32, cast back."""
    growth = t.new("log", (1, 1, t.sequence, 1), FP32)
    return ops.to(t, ops.mul(t, ops.to(t, x, FP32), growth), x.format)


def attend(t: Trace, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with a bias, which is a mask to add for any kernel."""
    groups = q.shape[1] // k.shape[1]
    if t.setting.attention == "eager":
        assert mask is not None
        k, v = ops.repeat(t, k, groups), ops.repeat(t, v, groups)
        scores = ops.scale(t, ops.matmul(t, q, ops.transpose(t, k, -1, -2)))
        scores = ops.add(t, ops.add(t, scores, bias), mask)
        weights = ops.to(t, ops.softmax(t, scores, FP32), v.format)
        return ops.matmul(t, weights, v)
    shared = mask is None and groups > 1
    if not shared:
        k, v = ops.repeat(t, k, groups), ops.repeat(t, v, groups)
    if mask is None:
        mask = t.new("ge", (1, 1, *bias.shape[2:]), BOOL)
    bias = ops.contiguous(t, ops.where(t, mask, bias))
    q, k, v, bias = (ops.cast(t, part) for part in (q, k, v, bias))
    if shared:
        return kernels.math(t, q, k, v, bias, dropout=0.0, repeated=True)
    return kernels.efficient(t, q, k, v, bias)


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts, and shared ones whose weights the router gives too."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    shared = m.shared // m.width
    routing, shared_weights = route(t, m, tokens, shared)
    routed = mixture.run_experts(t, s, m, tokens, routing)
    both = ops.add(t, routed, shared_experts(t, s, m, tokens, shared_weights))
    return ops.reshape(t, both, *x.shape)


def route(t: Trace, m: Mixture, tokens: Tensor, shared: int) -> tuple[mixture.Routing, Tensor]:
    """The weights of the chosen experts and of the shared ones, which sum to one, in fp32.

    Sigmoids choose; their logarithms are weighed against each other.
    """
    weight: Tensor = t.weight("mlp.gate.weight", (m.count + shared, tokens.shape[-1]), "router")
    logits = ops.linear(t, ops.to(t, tokens, FP32), ops.to(t, weight, FP32), None)
    scores = t.new("sigmoid", logits.shape, FP32)  # no gradient passes the choice
    indices = mixture.corrected_choice(t, m, scores)
    routed, own = ops.split(t, logits, m.count, shared)
    chosen = ops.cat(t, (ops.gather(t, routed, indices), own))
    chosen = ops.unary(t, "log_sigmoid", chosen, keeps="input")
    weights = exp(t, ops.sub(t, chosen, ops.log_sum_exp(t, chosen)))
    factor: Tensor = t.weight("mlp.gate.global_scale", (1,), "router")
    weights = ops.mul(t, ops.scale(t, weights), ops.to(t, factor, FP32))
    weights = ops.to(t, weights, tokens.format)
    parts = ops.split(t, weights, m.chosen, shared)
    chosen_weights, shared_weights = (ops.contiguous(t, part) for part in parts)
    return mixture.Routing(chosen_weights, indices, routed), shared_weights


def shared_experts(t: Trace, s: Sizes, m: Mixture, x: Tensor, weights: Tensor) -> Tensor:
    """Experts that every token passes, their outputs weighted and summed."""
    shared = m.shared // m.width
    rows = x.shape[0]
    name = "mlp.shared_experts"
    gate, up = (
        t.weight(f"{name}.{part}_proj", (shared, m.width, s.hidden), f"shared_{part}")
        for part in ("gate", "up")
    )
    down = t.weight(f"{name}.down_proj", (shared, s.hidden, m.width), "shared_down")
    same = ops.expand(t, x.view(1, rows, s.hidden), shared, rows, s.hidden)
    gated = s.activation(t, through(t, same, gate))
    inside = ops.mul(t, gated, through(t, same, up))
    del gated
    by_expert = ops.transpose(t, ops.reshape(t, weights, rows, shared, 1), 0, 1)
    out = through(t, ops.mul(t, inside, by_expert), down)
    wide = ops.to(t, out, FP32)
    return ops.to(t, ops.sum_first(t, wide), x.format)


def through(t: Trace, x: Tensor, weight: Tensor) -> Tensor:
    """`x` of every expert times its weights."""
    return ops.bmm(t, x, ops.transpose(t, weight, 1, 2))
