"""Gemma 4: wider heads and fewer KV heads in global layers, late layers that reuse earlier keys.

transformers v5.23, models/gemma4/modeling_gemma4.py (the text model).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes, fp32_norm
from llmsize.anatomy.families.llama4 import norm_without_weights
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace


class Kind(NamedTuple):
    """What tells one layer from another."""

    local: bool
    reuses: bool
    """Whether it takes its keys and values from an earlier layer of its reach."""
    stores: bool
    """Whether later layers take theirs from it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of Gemma 4, local and global."""

    local: Sizes
    whole: Sizes
    window: int
    joined: bool
    """Whether the values of global layers are their keys."""
    bias: bool
    extra: int
    """Width of the input that every layer has of its own; 0 if there is none."""
    doubled: bool
    """Whether layers that reuse keys have twice the MLP."""
    mixture: Mixture | None

    def sizes(self, kind: Kind) -> Sizes:
        """The dimensions of one layer."""
        return self.local if kind.local else self.whole


KeyValues = dict[bool, tuple[Tensor, Tensor]]
"""The keys and values that later layers reuse, by whether they are local."""


def read(c: Config) -> Shape:
    """The shape from a `config.json`."""
    s = decoder.read(c, tied=True, activation="gelu_pytorch_tanh")
    joined = c.flag("attention_k_eq_v")
    kv_heads = c.size("num_global_key_value_heads", default=s.kv_heads) if joined else s.kv_heads
    head_dim = Dim(c.size("global_head_dim", default=512), "global_head_dim")
    whole = s._replace(head_dim=head_dim, kv_heads=Dim(kv_heads, "global_kv_heads"))
    return Shape(
        local=s,
        whole=whole._replace(rotary=head_dim),
        window=c.size("sliding_window", default=512),
        joined=joined,
        bias=c.flag("attention_bias"),
        extra=Dim(c.count("hidden_size_per_layer_input", default=256), "per_layer_input"),
        doubled=c.flag("use_double_wide_mlp"),
        mixture=read_mixture(c),
    )


def read_mixture(c: Config) -> Mixture | None:
    """The experts beside the MLP, if there are any."""
    if not c.flag("enable_moe_block"):
        return None
    older = c.value("expert_intermediate_size") is not None
    return mixture.read(c, width="expert_intermediate_size" if older else "moe_intermediate_size")


def layer_kinds(c: Config, layers: int) -> list[Kind]:
    """The kind of every layer; the last one of each reach before the reusing ones stores."""
    local = [window > 0 for window in decoder.windows(c, layers, lambda i: (i + 1) % 6 > 0)]
    first = layers - c.count("num_kv_shared_layers")
    if first < 1 or not set(local[first:]) <= set(local[:first]):
        raise c.error(
            f"has no layer before layer {first} that the later ones could take their keys from",
            "correct `num_kv_shared_layers`",
        )
    kinds = []
    for index, is_local in enumerate(local):
        last_of_reach = index < first and is_local not in local[index + 1 : first]
        kinds.append(Kind(is_local, index >= first, first < layers and last_of_reach))
    return kinds


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = read(c)
    x = model(t, s, c)
    tied = "model.embed_tokens" if s.local.tied else ""
    return blocks.causal_lm(t, x, s.local.vocabulary, tied=tied)


def model(t: Trace, s: Shape, c: Config) -> Tensor:
    """Embedding, an input for every layer, layers, final norm."""
    hidden, layers = s.local.hidden, s.local.layers
    embeddings = blocks.embed(t, "model.embed_tokens", s.local.vocabulary, hidden)
    embeddings = ops.scale(t, embeddings)
    extra = per_layer_inputs(t, c, embeddings, layers, s.extra) if s.extra else None
    position_ids = blocks.positions(t)
    around = {
        local: Around(
            {0: blocks.rotary(t, embeddings, sizes.rotary)},
            {window: blocks.mask(t, window)},
            [],
        )
        for local, sizes, window in ((True, s.local, s.window), (False, s.whole, 0))
    }
    stored: KeyValues = {}

    def block(x: Tensor, kind: Kind) -> Tensor:
        residual = x
        x = fp32_norm(t, x, "input_layernorm")
        x = attention(t, s, x, around[kind.local], kind, stored)
        x = fp32_norm(t, x, "post_attention_layernorm")
        x = ops.add(t, residual, x)
        residual = x
        x = feed(t, s, x, kind)
        x = fp32_norm(t, x, "post_feedforward_layernorm")
        x = ops.add(t, residual, x)
        return x if extra is None else add_input(t, s, x, extra)

    x = t.layers("model.layers", block, embeddings, layer_kinds(c, layers), position_ids)
    return fp32_norm(t, x, "model.norm")


def per_layer_inputs(t: Trace, c: Config, x: Tensor, layers: int, width: int) -> Tensor:
    """An embedding for every layer, added to a projection of the token's."""
    rows = Dim(c.size("vocab_size_per_layer_input", "vocab_size"), "per_layer_vocabulary")
    looked_up = blocks.embed(t, "model.embed_tokens_per_layer", rows, layers * width)
    looked_up = ops.scale(t, looked_up)
    projected = t.linear(x, "model.per_layer_model_projection", layers * width, role="projection")
    projected = ops.scale(t, projected).view(t.batch, t.sequence, layers, width)
    projected = fp32_norm(t, projected, "model.per_layer_projection_norm")
    total = ops.add(t, projected.view(*looked_up.shape), looked_up)
    return ops.scale(t, total)


def add_input(t: Trace, s: Shape, x: Tensor, extra: Tensor) -> Tensor:
    """The layer's own input, gated by the residual stream and added to it."""
    residual = x
    x = t.linear(x, "per_layer_input_gate", s.extra, role="gate")
    x = s.local.activation(t, x)
    x = ops.mul(t, x, ops.slice_last(t, extra, s.extra))
    x = t.linear(x, "per_layer_projection", s.local.hidden, role="down")
    x = fp32_norm(t, x, "post_per_layer_input_norm")
    return ops.add(t, residual, x)


def attention(
    t: Trace, s: Shape, x: Tensor, around: Around, kind: Kind, stored: KeyValues
) -> Tensor:
    """Grouped-query attention with normalised queries, keys and values."""
    d = s.sizes(kind)
    q = t.linear(x, "self_attn.q_proj", d.heads * d.head_dim, bias=s.bias, role="q")
    q = fp32_norm(t, ops.split_heads(t, q, d.heads), "self_attn.q_norm")
    if kind.reuses:
        k, v = stored[kind.local]
        q, _ = decoder.turn(t, q, q, around)
        t.remember(LayerCache("none"))
    else:
        k = t.linear(x, "self_attn.k_proj", d.kv_heads * d.head_dim, bias=s.bias, role="k")
        k = v = ops.split_heads(t, k, d.kv_heads)
        if kind.local or not s.joined:
            v = t.linear(x, "self_attn.v_proj", d.kv_heads * d.head_dim, bias=s.bias, role="v")
            v = ops.split_heads(t, v, d.kv_heads)
        k = fp32_norm(t, k, "self_attn.k_norm")
        q, k = decoder.turn(t, q, k, around)
        v = norm_without_weights(t, v)
        k, v = blocks.remember(t, k, v, s.window if kind.local else 0)
    if kind.stores:
        stored[kind.local] = k, v
    out = blocks.attend(t, q, k, v, around.masks[s.window if kind.local else 0])
    return t.linear(out, "self_attn.o_proj", d.hidden, bias=s.bias, role="o")


def feed(t: Trace, s: Shape, x: Tensor, kind: Kind) -> Tensor:
    """The gated MLP, and experts beside it."""
    d = s.local
    width = d.intermediate * (2 if s.doubled and kind.reuses else 1)
    residual = x
    x = fp32_norm(t, x, "pre_feedforward_layernorm")
    x = decoder.gated(t, d, x, width=width)
    if s.mixture is None:
        return x
    dense = fp32_norm(t, x, "post_feedforward_layernorm_1")
    tokens = residual.view(t.batch * t.sequence, d.hidden)
    weights = route(t, s.mixture, tokens)
    tokens = fp32_norm(t, tokens, "pre_feedforward_layernorm_2")
    routed = mixture.run_experts(t, d, s.mixture, tokens, weights, "experts").view(*x.shape)
    routed = fp32_norm(t, routed, "post_feedforward_layernorm_2")
    return ops.add(t, dense, routed)


def route(t: Trace, m: Mixture, tokens: Tensor) -> mixture.Routing:
    """The weights of the chosen experts, scaled for each expert."""
    normed = norm_without_weights(t, tokens)
    scaled = ops.mul(t, normed, t.weight("router.scale", tokens.shape[-1:], "router"))
    weights = mixture.route(t, m, ops.scale(t, scaled), "router.proj", linear=True).weights
    factors = t.weight("router.per_expert_scale", (m.count,), "router")
    weights = ops.mul(t, weights, mixture.take(t, factors, weights.shape, "index"))
    return mixture.Routing(weights)
