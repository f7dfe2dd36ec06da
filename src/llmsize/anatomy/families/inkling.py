"""Inkling: relative positions, short convolutions in every layer, shared experts with weights.

transformers v5.23, models/inkling/modeling_inkling.py (the text model).
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsize.anatomy import blocks, decoder, mixture, recurrent
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


@dataclass(frozen=True, slots=True)
class Reach:
    """Attention of one kind of layer: local or to all tokens."""

    sizes: Sizes
    window: int
    profiles: int
    """Profiles of bias against distance that each token mixes."""
    extent: int
    """Distances that have a bias."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, rotary=0.0)
    m = mixture.read(c, scores="sigmoid")
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

    def begin(x: Tensor) -> Tensor:
        return blocks.rms_norm(t, x, "model.embed_tokens.embed_norm")

    kinds = list(zip(local_layers(c, s.layers), mixture.sparse_layers(c, s.layers), strict=True))
    return decoder.run(
        t, s, block, kinds, windows=(0, reaches[True].window), begin=begin, masking="eager"
    )


def read_reach(c: Config, s: Sizes, local: bool) -> Reach:
    """One kind of attention from a `config.json`."""
    profiles = Dim(c.size("d_rel", default=16), "profiles")
    if not local:
        extent = Dim(c.size("rel_extent", default=1024), "extent")
        return Reach(s, 0, profiles, extent)
    window = c.size("sliding_window_size", "sliding_window", default=512)
    sizes = s._replace(
        heads=Dim(c.size("swa_num_attention_heads", default=s.heads), "local_heads"),
        kv_heads=Dim(c.size("swa_num_key_value_heads", default=s.kv_heads), "local_kv_heads"),
        head_dim=Dim(c.size("swa_head_dim", default=s.head_dim), "local_head_dim"),
    )
    return Reach(sizes, window, profiles, Dim(window, "extent"))


def local_layers(c: Config, layers: int) -> list[bool]:
    """Which layers are local: as listed."""
    kinds = c.sequence("layer_types")
    if kinds is None or len(kinds) < layers:
        raise c.error("has no `layer_types` for every layer", "give one a layer")
    return [kinds[i] == "hybrid_sliding" for i in range(layers)]


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
    v = t.linear(x, "self_attn.v_proj", s.kv_heads * s.head_dim, role="v")
    mixing = t.linear(x, "self_attn.r_proj", s.heads * r.profiles, role="q")
    k = convolve(t, k, "self_attn.k_sconv", kernel)
    v = convolve(t, v, "self_attn.v_sconv", kernel)
    q = blocks.rms_norm(t, ops.split_heads(t, q, s.heads), "self_attn.q_norm")
    k = blocks.rms_norm(t, ops.split_heads(t, k, s.kv_heads), "self_attn.k_norm")
    v = ops.split_heads(t, v, s.kv_heads)
    profiles = t.weight("self_attn.rel_logits_proj.proj", (r.profiles, r.extent), "q")
    by_distance = ops.matmul(t, ops.split_heads(t, mixing, s.heads), profiles)
    k, v = blocks.remember(t, k, v, r.window)
    k, v = (ops.repeat(t, part, s.heads // s.kv_heads) for part in (k, v))
    scores = ops.scale(t, ops.matmul(t, q, ops.transpose(t, k, -1, -2)))
    scores = ops.add(t, scores, mixture.take(t, by_distance, scores.shape, "gather"))
    mask = around.masks[r.window]
    assert mask is not None
    weights = ops.to(t, ops.softmax(t, ops.add(t, scores, mask), FP32), v.format)
    out = ops.merge_heads(t, ops.matmul(t, weights, v))
    return t.linear(out, "self_attn.o_proj", s.hidden, role="o")


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts, and shared ones whose weights the router gives too."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    shared = m.shared // m.width
    logits = t.linear(ops.to(t, tokens, FP32), "mlp.gate", m.count + shared, role="router")
    factor = t.weight("mlp.gate.global_scale", (1,), "router")
    chosen = mixture.take(t, logits, (logits.shape[0], m.chosen + shared), "gather")
    weights = ops.mul(t, ops.softmax(t, chosen), ops.to(t, factor, FP32))
    weights = ops.to(t, weights, x.format)
    routed_weights, shared_weights = ops.split(t, weights, m.chosen, shared)
    routed = mixture.run_experts(t, s, m, tokens, mixture.Routing(routed_weights), "mlp.experts")
    return ops.add(t, routed, shared_experts(t, s, m, tokens, shared_weights)).view(*x.shape)


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
    copies = mixture.take(t, x, (shared, rows, s.hidden), "expand")
    inside = ops.mul(
        t,
        s.activation(t, ops.linear(t, copies, gate, None, m.width)),
        ops.linear(t, copies, up, None, m.width),
    )
    inside = ops.mul(t, inside, weights.view(shared, rows, 1))
    out = ops.linear(t, inside, down, None, s.hidden)
    return mixture.take(t, out, x.shape, "sum")
