"""Gemma 3n: several residual streams (AltUp), a low-rank path beside attention (Laurel).

transformers v5.23, models/gemma3n/modeling_gemma3n.py (the text model).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes, fp32_norm
from llmsize.anatomy.families.gemma4 import KeyValues, per_layer_inputs
from llmsize.anatomy.families.gemma4 import Kind as Layer
from llmsize.anatomy.families.gemma4 import layer_kinds as attention_kinds
from llmsize.anatomy.families.llama4 import norm_without_weights
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


class Kind(NamedTuple):
    """What tells one layer from another."""

    layer: Layer
    width: int
    """Of the MLP."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of Gemma 3n."""

    sizes: Sizes
    window: int
    streams: int
    rank: int
    """Of the path beside attention."""
    extra: int
    """Width of the input that every layer has of its own."""
    bias: bool


def read(c: Config) -> Shape:
    """The shape from a `config.json`."""
    widths = c.value("intermediate_size")
    first = widths[0] if isinstance(widths, list | tuple) and widths else widths
    fields = {**c.fields, "intermediate_size": first}
    return Shape(
        sizes=decoder.read(Config(fields, c.model), tied=True, activation="gelu_pytorch_tanh"),
        window=c.size("sliding_window", default=512),
        streams=Dim(c.few("altup_num_inputs", default=4), "streams"),
        rank=Dim(c.size("laurel_rank", default=64), "laurel_rank"),
        extra=Dim(c.size("hidden_size_per_layer_input", default=256), "per_layer_input"),
        bias=c.flag("attention_bias"),
    )


def layer_kinds(c: Config, s: Sizes) -> list[Kind]:
    """The attention of every layer and the width of its MLP."""
    widths = c.value("intermediate_size")
    if not isinstance(widths, list | tuple):
        widths = [widths] * s.layers
    if len(widths) < s.layers or not all(isinstance(n, int) and n > 0 for n in widths):
        raise c.error("has no `intermediate_size` for every layer", "give one number a layer")
    shared = {"num_kv_shared_layers": c.count("num_kv_shared_layers", default=15)}
    layers = attention_kinds(Config({**c.fields, **shared}, c.model), s.layers)
    return [Kind(*pair) for pair in zip(layers, widths[: s.layers], strict=True)]


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = read(c)
    x = model(t, s, c)
    tied = "model.embed_tokens" if s.sizes.tied else ""
    return blocks.causal_lm(t, x, s.sizes.vocabulary, tied=tied)


def model(t: Trace, s: Shape, c: Config) -> Tensor:
    """Embedding made into streams, layers, streams joined, final norm."""
    d = s.sizes
    embeddings = ops.scale(t, blocks.embed(t, "model.embed_tokens", d.vocabulary, d.hidden))
    extra = per_layer_inputs(t, c, embeddings, d.layers, s.extra)
    position_ids = blocks.positions(t)
    masks = {window: blocks.mask(t, window) for window in (0, s.window)}
    rotation = blocks.rotary(t, embeddings, d.rotary)
    around = Around(dict.fromkeys(masks, rotation), masks, [])
    stored: KeyValues = {}
    streams = ops.cat(t, [embeddings, *projections(t, s, [embeddings] * (s.streams - 1), "")], 0)
    x = t.layers(
        "model.layers", lambda x, kind: block(t, s, x, kind, around, stored, extra),
        streams, layer_kinds(c, d), position_ids,
    )  # fmt: skip
    first, *others = stacked(t, s, x)
    joined = ops.cat(t, [first, *projections(t, s, others, "unembed_")], 0)
    x = mixture.take(t, joined, first.shape, "mean")
    return fp32_norm(t, x, "model.norm")


def projections(t: Trace, s: Shape, inputs: list[Tensor], kind: str) -> list[Tensor]:
    """Each input projected and scaled to the magnitude of the first."""
    made = []
    for index, x in enumerate(inputs):
        name = f"model.altup_{kind}projections.{index}"
        x = t.linear(x, name, s.sizes.hidden, role="projection")
        magnitude = ops.rsqrt(t, ops.mean(t, ops.power(t, x)))
        made.append(ops.mul(t, x, magnitude))
    return made


def stacked(t: Trace, s: Shape, x: Tensor) -> list[Tensor]:
    """The streams one by one."""
    shape = (t.batch, t.sequence, s.sizes.hidden)
    return [mixture.take(t, x, shape, "select") for _ in range(s.streams)]


def block(
    t: Trace, s: Shape, x: Tensor, kind: Kind, around: Around, stored: KeyValues, extra: Tensor
) -> Tensor:
    """One layer on the first stream; the others are predicted and corrected."""
    predicted = predict(t, s, x)
    active = stacked(t, s, predicted)[0]
    normed = fp32_norm(t, active, "input_layernorm")
    beside = laurel(t, s, normed)
    attended = attention(t, s, normed, around, kind.layer, stored)
    attended = fp32_norm(t, attended, "post_attention_layernorm")
    active = ops.scale(t, ops.add(t, ops.add(t, active, attended), beside))
    fed = fp32_norm(t, active, "pre_feedforward_layernorm")
    fed = decoder.gated(t, s.sizes, fed, width=kind.width)
    fed = fp32_norm(t, fed, "post_feedforward_layernorm")
    corrected = correct(t, s, predicted, ops.add(t, active, fed))
    first = stacked(t, s, corrected)[0]
    first = ops.mul(t, first, t.weight("altup.correct_output_scale", first.shape[-1:], "norm"))
    first = t.linear(first, "per_layer_input_gate", s.extra, role="gate")
    first = s.sizes.activation(t, first)
    first = ops.mul(t, first, ops.slice_last(t, extra, s.extra))
    first = t.linear(first, "per_layer_projection", s.sizes.hidden, role="down")
    first = fp32_norm(t, first, "post_per_layer_input_norm")
    return ops.add(t, corrected, first)


def modalities(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """What the streams' weights are made of."""
    x = ops.scale(t, fp32_norm(t, x, "altup.router_norm"))
    routed = t.linear(x, "altup.modality_router", s.streams, role="router")
    return ops.to(t, ops.tanh(t, ops.to(t, routed, FP32)), x.format)


def predict(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """Every stream as a mixture of all of them."""
    n = s.streams
    weights = modalities(t, s, stacked(t, s, x)[0])
    weights = t.linear(weights, "altup.prediction_coefs", n * n, role="router")
    columns = x.view(t.batch, t.sequence, s.sizes.hidden, n)
    mixed = ops.matmul(t, columns, weights.view(t.batch, t.sequence, n, n))
    return ops.add(t, mixed.view(*x.shape), x)


def correct(t: Trace, s: Shape, predicted: Tensor, active: Tensor) -> Tensor:
    """Every stream moved by what the layer added to the first."""
    weights = modalities(t, s, active)
    change = ops.add(t, active, ops.neg(t, stacked(t, s, predicted)[0]))
    weights = ops.shift(t, t.linear(weights, "altup.correction_coefs", s.streams, role="router"))
    weights = weights.view(s.streams, t.batch, t.sequence, 1)
    shape = (s.streams, t.batch, t.sequence, s.sizes.hidden)
    moved = ops.mul(t, mixture.take(t, change, shape, "repeat"), weights)
    return ops.add(t, moved.view(*predicted.shape), predicted)


def laurel(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """A low-rank path around attention."""
    low = t.linear(x, "laurel.linear_left", s.rank, role="down")
    wide = t.linear(low, "laurel.linear_right", s.sizes.hidden, role="up")
    return ops.add(t, x, fp32_norm(t, wide, "laurel.post_laurel_norm"))


def attention(
    t: Trace, s: Shape, x: Tensor, around: Around, kind: Layer, stored: KeyValues
) -> Tensor:
    """Grouped-query attention with normalised queries, keys and values; late layers reuse keys."""
    d = s.sizes
    window = s.window if kind.local else 0
    q = t.linear(x, "self_attn.q_proj", d.heads * d.head_dim, bias=s.bias, role="q")
    q = fp32_norm(t, ops.split_heads(t, q, d.heads), "self_attn.q_norm")
    if kind.reuses:
        k, v = stored[kind.local]
        q, _ = decoder.turn(t, q, q, around)
        t.remember(LayerCache("none"))
    else:
        k = t.linear(x, "self_attn.k_proj", d.kv_heads * d.head_dim, bias=s.bias, role="k")
        v = t.linear(x, "self_attn.v_proj", d.kv_heads * d.head_dim, bias=s.bias, role="v")
        k = fp32_norm(t, ops.split_heads(t, k, d.kv_heads), "self_attn.k_norm")
        q, k = decoder.turn(t, q, k, around)
        v = norm_without_weights(t, ops.split_heads(t, v, d.kv_heads))
        k, v = blocks.remember(t, k, v, window)
    if kind.stores:
        stored[kind.local] = k, v
    out = blocks.attend(t, q, k, v, around.masks[window])
    return t.linear(out, "self_attn.o_proj", d.hidden, bias=s.bias, role="o")
