"""Gemma 4: wider heads and fewer KV heads in global layers, late layers that reuse earlier keys.

transformers v5.23, models/gemma4/modeling_gemma4.py (the text model). What Gemma 3n has alike is
here too.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from llmsize.anatomy import blocks, decoder, lm_head, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.families.gemma import scaled
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.rotary import Rotation
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32
from llmsize.quick_dataclasses import dataclass


class Kind(NamedTuple):
    """What tells one layer from another."""

    local: bool
    reuses: bool
    """Whether it takes its keys and values from an earlier layer of its reach."""
    stores: bool
    """Whether later layers take theirs from it."""

    @property
    def shared(self) -> Kind | None:
        """What neighbours can tell: gradients of several layers meet in keys that are reused."""
        return self if self.reuses or self.stores else None


class Reach(NamedTuple):
    """What layers that look alike far back are given."""

    sizes: Sizes
    window: int
    rotation: Rotation
    mask: Tensor | None


KeyValues = dict[bool, tuple[Tensor, Tensor]]
"""The keys and values that later layers reuse, by whether they are local."""


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
    capped: bool
    """Whether the logits are kept within bounds."""


PLAIN = ("gemma4_unified", "gemma4_unified_text")
"""Types whose layers have no input of their own."""


def read(c: Config) -> Shape:
    """The shape from a `config.json`."""
    s = decoder.read(c, tied=True, activation="gelu_pytorch_tanh")
    plain = c.text("model_type") in PLAIN
    joined = c.flag("attention_k_eq_v")
    own = whole_layers(c)
    kv_heads = c.size("num_global_key_value_heads", default=s.kv_heads) if joined else s.kv_heads
    kv_heads = own.size("num_key_value_heads", default=kv_heads)
    head_dim = own.size("head_dim", default=c.size("global_head_dim", default=512))
    head_dim = Dim(head_dim, "global_head_dim")
    whole = s._replace(head_dim=head_dim, kv_heads=Dim(kv_heads, "global_kv_heads"))
    return Shape(
        local=s._replace(rotary=s.local_rotary),
        whole=whole._replace(rotary=head_dim),
        window=c.size("sliding_window", default=512),
        joined=joined,
        bias=c.flag("attention_bias"),
        extra=Dim(0 if plain else c.count("hidden_size_per_layer_input", default=256), "extra"),
        doubled=c.flag("use_double_wide_mlp"),
        mixture=read_mixture(c),
        capped=c.number("final_logit_softcapping") > 0,
    )


def whole_layers(c: Config) -> Config:
    """What transformers 5 saves of global layers: fields of each that replace the model's."""
    listed = c.value("per_layer_config")
    first = next(iter(listed.values()), None) if isinstance(listed, dict) else None
    return Config(first if isinstance(first, dict) else {}, c.model)


def read_mixture(c: Config) -> Mixture | None:
    """The experts beside the MLP, if there are any."""
    if not c.flag("enable_moe_block"):
        return None
    older = c.value("expert_intermediate_size") is not None
    width = "expert_intermediate_size" if older else "moe_intermediate_size"
    return mixture.read(c, width=width, wide=True)


def layer_kinds(c: Config, layers: int, shared: int) -> list[Kind]:
    """The kind of every layer; the last one of each reach before the `shared` ones stores."""
    local = [window > 0 for window in decoder.windows(c, layers, lambda i: (i + 1) % 6 > 0)]
    if c.text("model_type").startswith("gemma4"):
        local[-1] = False  # whatever is listed
    first = layers - shared
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
    head = Head(end=lm_head.SOFTCAP if s.capped else ())
    return lm_head.causal_lm(t, x, s.local.vocabulary, head, tied=s.local.tied)


def model(t: Trace, s: Shape, c: Config) -> Tensor:
    """Embedding, an input for every layer, layers, final norm."""
    hidden, layers = s.local.hidden, s.local.layers
    embeddings = blocks.embed(t, "model.embed_tokens", s.local.vocabulary, hidden)
    embeddings = scaled(t, embeddings)
    extra = per_layer_inputs(t, c, embeddings, layers, s.extra) if s.extra else None
    position_ids = blocks.positions(t)
    masks = {0: blocks.mask(t), s.window: blocks.mask(t, s.window)}
    kinds = layer_kinds(c, layers, c.count("num_kv_shared_layers"))
    reaches = {
        local: Reach(d, window, rotary.table(t, embeddings, d.rotary), masks[window])
        for local, d, window in ((True, s.local, s.window), (False, s.whole, 0))
        if any(kind.local == local for kind in kinds)
    }
    stored: KeyValues = {}

    def block(x: Tensor, kind: Kind) -> Tensor:
        last = kind.reuses and t.setting.last_logits and not t.setting.training
        x = last_token(t, x) if last else x
        residual = x
        x = power_norm(t, x, "input_layernorm")
        joined = s.joined and not kind.local
        x = attention(t, x, reaches[kind.local], kind, stored, bias=s.bias, joined=joined)
        x = power_norm(t, x, "post_attention_layernorm")
        x = ops.add(t, residual, x)
        residual = x
        x = feed(t, s, x, kind)
        x = power_norm(t, x, "post_feedforward_layernorm")
        x = ops.add(t, residual, x)
        del residual
        if extra is not None:
            own = ops.select(t, extra, 2)
            x = add_input(t, s, x, last_token(t, own) if last else own)
        return scaled_in_place(t, x)

    x = t.layers(
        "model.layers", block, embeddings, kinds, position_ids, told=lambda kind: kind.shared
    )
    return power_norm(t, x, "model.norm")


def last_token(t: Trace, x: Tensor) -> Tensor:
    """The last token of each sequence: layers that reuse keys need no other to go on from."""
    return ops.narrow(t, x, 1, 1)


def scaled_in_place(t: Trace, x: Tensor) -> Tensor:
    """What a layer gives times a number, which is a buffer of the layer's.

    The buffer is kept, so that a recomputed layer runs again before the gradient passes here.
    """
    format = t.setting.format
    t.add_buffer(format.block_bytes)
    return ops.mul_in_place(t, x, Tensor((1,), format, None))


def power_norm(t: Trace, x: Tensor, name: str = "") -> Tensor:
    """RMSNorm in fp32 by a power of the mean square, scaled in fp32 if it has a `name`."""
    format = x.format
    wide = ops.to(t, x, FP32)
    square = ops.shift(t, ops.mean(t, ops.power(t, wide)))
    normed = ops.mul(t, wide, ops.power(t, square))
    del wide, square
    if name:
        weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
        normed = ops.mul(t, normed, ops.to(t, weight, FP32))
    return ops.to(t, normed, format)


def per_layer_inputs(t: Trace, c: Config, x: Tensor, layers: int, width: int) -> Tensor:
    """An embedding for every layer, added to a projection of the token's."""
    rows = Dim(c.size("vocab_size_per_layer_input", "vocab_size"), "per_layer_vocabulary")
    looked_up = scaled(t, blocks.embed(t, "model.embed_tokens_per_layer", rows, layers * width))
    projected = t.linear(x, "model.per_layer_model_projection", layers * width, role="projection")
    projected = ops.scale(t, projected)
    return joined_inputs(t, looked_up, projected, layers, width)


def joined_inputs(
    t: Trace, looked_up: Tensor, projected: Tensor, layers: int, width: int
) -> Tensor:
    """What was looked up for each layer and the normalised projection, added and scaled."""
    shape = (t.batch, t.sequence, layers, width)
    projected = ops.reshape(t, projected, *shape)
    projected = power_norm(t, projected, "model.per_layer_projection_norm")
    return ops.scale(t, ops.add(t, projected, ops.reshape(t, looked_up, *shape)))


def add_input(t: Trace, s: Shape, x: Tensor, extra: Tensor) -> Tensor:
    """The layer's own input, gated by the residual stream and added to it."""
    residual = x
    x = t.linear(x, "per_layer_input_gate", s.extra, role="gate")
    x = s.local.activation(t, x)
    x = ops.mul(t, x, extra)
    x = t.linear(x, "per_layer_projection", s.local.hidden, role="down")
    x = power_norm(t, x, "post_per_layer_input_norm")
    return ops.add(t, residual, x)


def attention(
    t: Trace,
    x: Tensor,
    reach: Reach,
    kind: Kind,
    stored: KeyValues,
    *,
    bias: bool = False,
    joined: bool = False,
    values_last: bool = False,
) -> Tensor:
    """Grouped-query attention with normalised queries, keys and values; late layers reuse keys.

    Values are made of the keys' projection if they are `joined`, else of their own, before the
    keys are normalised or after.
    """
    d = reach.sizes
    tables, mask = around_tokens(t, reach, x.shape[1])
    project = partial(by_heads, t, d, x, bias=bias)
    q = project("q", d.heads)
    q = power_norm(t, q, "self_attn.q_norm")
    q = rotary.rotate(t, q, *tables)
    q = ops.transpose(t, q, 1, 2)
    if kind.reuses:
        k, v = stored[kind.local]
        t.remember(LayerCache("none"))
    else:
        k = project("k", d.kv_heads)
        v = k if joined or values_last else project("v", d.kv_heads)
        k = power_norm(t, k, "self_attn.k_norm")
        k = rotary.rotate(t, k, *tables)
        k = ops.transpose(t, k, 1, 2)
        v = project("v", d.kv_heads) if values_last else v
        v = power_norm(t, v)
        v = ops.transpose(t, v, 1, 2)
        k, v = blocks.remember(t, k, v, reach.window)
    if kind.stores:
        stored[kind.local] = k, v
    out = blocks.attend(t, q, k, v, mask, dropout=d.attention_dropout)
    return t.linear(out, "self_attn.o_proj", d.hidden, bias=bias, role="o")


def around_tokens(t: Trace, reach: Reach, tokens: int) -> tuple[Rotation, Tensor | None]:
    """Cosines and sines, and the mask, of all tokens or of the last one."""
    tables, mask = rotary.by_token(reach.rotation), reach.mask
    if tokens < t.sequence:
        tables = Rotation(*[last_token(t, table) for table in tables])
        mask = None if mask is None else ops.narrow(t, mask, 2, 1)
    return tables, mask


def by_heads(t: Trace, d: Sizes, x: Tensor, part: str, heads: int, *, bias: bool) -> Tensor:
    """The projection to queries, keys or values: batch, tokens, heads, channels."""
    made = t.linear(x, f"self_attn.{part}_proj", heads * d.head_dim, bias=bias, role=part)
    return ops.reshape(t, made, t.batch, x.shape[1], heads, d.head_dim)


def feed(t: Trace, s: Shape, x: Tensor, kind: Kind) -> Tensor:
    """The gated MLP, and experts beside it."""
    d = s.local
    width = d.intermediate * (2 if s.doubled and kind.reuses else 1)
    residual = x
    x = power_norm(t, x, "pre_feedforward_layernorm")
    x = decoder.gated(t, d, x, width=width)
    if s.mixture is None:
        return x
    dense = power_norm(t, x, "post_feedforward_layernorm_1")
    tokens = ops.reshape(t, residual, t.batch * residual.shape[1], d.hidden)
    weights = route(t, s.mixture, tokens)
    normed = power_norm(t, tokens, "pre_feedforward_layernorm_2")
    routed = mixture.run_experts(t, d, s.mixture, normed, weights, "experts")
    routed = ops.reshape(t, routed, *x.shape)
    del normed
    routed = power_norm(t, routed, "post_feedforward_layernorm_2")
    return ops.add(t, dense, routed)


def route(t: Trace, m: Mixture, tokens: Tensor) -> mixture.Routing:
    """The weights of the chosen experts, scaled for each expert."""
    x = power_norm(t, tokens)
    x = ops.scale(t, ops.mul(t, x, t.weight("router.scale", tokens.shape[-1:], "router")))
    weights, indices, logits = mixture.route(t, m, x, "router.proj", linear=True)
    assert indices is not None
    factors = t.weight("router.per_expert_scale", (m.count,), "router")
    weights = ops.mul(t, weights, ops.index(t, factors, indices))
    return mixture.Routing(weights, indices, logits)
