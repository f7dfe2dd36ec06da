"""Gemma 3n: several residual streams (AltUp), a low-rank path beside attention (Laurel).

transformers v5.23, models/gemma3n/modeling_gemma3n.py (the text model).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from llmsize.anatomy import blocks, decoder, lm_head, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.families.gemma import scaled
from llmsize.anatomy.families.gemma4 import KeyValues, Reach, attention, joined_inputs, power_norm
from llmsize.anatomy.families.gemma4 import Kind as Layer
from llmsize.anatomy.families.gemma4 import layer_kinds as attention_kinds
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32, INT64
from llmsize.quick_dataclasses import dataclass


class Kind(NamedTuple):
    """What tells one layer from another."""

    layer: Layer
    width: int
    """Of the MLP."""
    sparse: bool
    """Whether the MLP's gate lets only the highest values pass."""


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
    return Shape(
        sizes=decoder.read(
            c.changed(intermediate_size=first), tied=True, activation="gelu_pytorch_tanh"
        ),
        window=c.size("sliding_window", default=512),
        streams=Dim(c.few("altup_num_inputs", default=4), "streams"),
        rank=Dim(c.size("laurel_rank", default=64), "laurel_rank"),
        extra=Dim(c.size("hidden_size_per_layer_input", default=256), "per_layer_input"),
        bias=c.flag("attention_bias"),
    )


def layer_kinds(c: Config, s: Sizes) -> list[Kind]:
    """The attention of every layer, the width of its MLP, and whether its gate is sparse."""
    widths = c.value("intermediate_size")
    if not isinstance(widths, list | tuple):
        widths = [widths] * s.layers
    if len(widths) < s.layers or not all(isinstance(n, int) and n > 0 for n in widths):
        raise c.error("has no `intermediate_size` for every layer", "give one number a layer")
    shares = c.sequence("activation_sparsity_pattern")
    if shares is None:
        shares = [0.95] * 10 + [0.0] * max(s.layers - 10, 0)
    if len(shares) < s.layers or not all(isinstance(n, int | float) for n in shares):
        raise c.error(
            "has no `activation_sparsity_pattern` for every layer", "give one number a layer"
        )
    layers = attention_kinds(c, s.layers, c.count("num_kv_shared_layers", default=15))
    return [
        Kind(layer, width, share > 0)
        for layer, width, share in zip(layers, widths, shares, strict=False)
    ]


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = read(c)
    x = model(t, s, c)
    capped = c.number("final_logit_softcapping", default=30.0) > 0
    head = Head(end=lm_head.SOFTCAP if capped else ())
    return lm_head.causal_lm(t, x, s.sizes.vocabulary, head, tied=s.sizes.tied)


def model(t: Trace, s: Shape, c: Config) -> Tensor:
    """Embedding made into streams, layers, streams joined, final norm."""
    d = s.sizes
    embeddings = scaled(t, blocks.embed(t, "model.embed_tokens", d.vocabulary, d.hidden))
    extra = per_layer_inputs(t, c, embeddings, d.layers, s.extra)
    position_ids = blocks.positions(t)
    masks = {window: blocks.mask(t, window) for window in (0, s.window)}
    size = magnitude(t, embeddings)
    projected = [embeddings] * (s.streams - 1)
    streams = [embeddings, *projections(t, s, projected, "", size)]
    kinds = layer_kinds(c, d)
    reaches = {
        local: Reach(d, window, rotary.table(t, embeddings, d.rotary), masks[window])
        for local, window in ((True, s.window), (False, 0))
        if any(kind.layer.local == local for kind in kinds)
    }
    stored: KeyValues = {}

    def run(x: Tensor, kind: Kind) -> Tensor:
        return block(t, s, x, kind, reaches, stored, ops.select(t, extra, 2))

    x = t.layers(
        "model.layers", run, stacked(t, streams), kinds, position_ids,
        told=lambda kind: kind.layer.shared,
    )  # fmt: skip
    del projected
    size = magnitude(t, ops.select(t, x, 0))
    streams = [ops.select(t, x, 0)]
    others = [ops.select(t, x, 0) for _ in range(s.streams - 1)]
    streams += projections(t, s, others, "unembed_", size)
    x = stacked(t, streams)
    x = mixture.take(t, x, x.shape[1:], "mean")
    return power_norm(t, x, "model.norm")


def per_layer_inputs(t: Trace, c: Config, x: Tensor, layers: int, width: int) -> Tensor:
    """An embedding for every layer of tokens that have one, added to a projection."""
    rows = Dim(c.size("vocab_size_per_layer_input", "vocab_size"), "per_layer_vocabulary")
    shape = (t.batch, t.sequence)
    known = [t.new(name, shape, BOOL) for name in ("ge", "lt", "logical_and")]
    tokens = t.new("where", shape, INT64)
    del known
    table = t.weight("model.embed_tokens_per_layer.weight", (rows, layers * width), "embedding")
    looked_up = scaled(t, ops.embedding(t, table, *shape, indices=tokens))
    del tokens
    name = "model.per_layer_model_projection"
    projected = t.linear(x, name, layers * width, role="projection")
    t.buffers += 2 * t.setting.format.block_bytes  # the scales of the projection and of the sum
    return joined_inputs(t, looked_up, ops.scale_in_place(t, projected), layers, width)


def magnitude(t: Trace, x: Tensor) -> Tensor:
    """The root of the mean square of each token."""
    return ops.power(t, ops.mean(t, ops.power(t, x)))


def projections(t: Trace, s: Shape, inputs: list[Tensor], kind: str, size: Tensor) -> list[Tensor]:
    """Each input projected and scaled to the magnitude of the first.

    What is left of `inputs` is the last projection, which the reference holds.
    """
    made = []
    for index in range(len(inputs)):
        x = inputs.pop()
        name = f"model.altup_{kind}projections.{index}"
        projected = ops.to(t, t.linear(x, name, s.sizes.hidden, role="projection"), x.format)
        own = ops.mean(t, ops.power(t, projected))
        own = ops.unary(t, "sqrt", ops.clamp(t, own), keeps="output")
        made.append(ops.divide(t, ops.mul(t, projected, size), own))
    inputs.append(projected)
    return made


def stacked(t: Trace, streams: list[Tensor]) -> Tensor:
    """The streams as one tensor, whose first dimension they are."""
    return ops.cat(t, [ops.reshape(t, x, 1, *x.shape) for x in streams], 0)


def block(
    t: Trace,
    s: Shape,
    x: Tensor,
    kind: Kind,
    reaches: Mapping[bool, Reach],
    stored: KeyValues,
    extra: Tensor,
) -> Tensor:
    """One layer on the first stream; the others are predicted and corrected."""
    predicted = predict(t, s, x)
    active = ops.select(t, predicted, 0)
    normed = power_norm(t, active, "input_layernorm")
    beside = laurel(t, s, normed)
    reach = reaches[kind.layer.local]
    attended = attention(t, normed, reach, kind.layer, stored, bias=s.bias, values_last=True)
    attended = power_norm(t, attended, "post_attention_layernorm")
    gated = ops.add(t, active, attended)
    joined = ops.scale(t, ops.add(t, gated, beside))
    read = power_norm(t, joined, "pre_feedforward_layernorm")
    raw = feed(t, s, read, kind)
    fed = power_norm(t, raw, "post_feedforward_layernorm")
    activated = ops.add(t, joined, fed)
    corrected = correct(t, s, predicted, activated)
    first = ops.copy(t, ops.select(t, corrected, 0))
    first = ops.mul(t, first, t.weight("altup.correct_output_scale", first.shape[-1:], "norm"))
    first = t.linear(first, "per_layer_input_gate", s.extra, role="gate")
    first = s.sizes.activation(t, first)
    first = ops.mul(t, first, extra)
    first = t.linear(first, "per_layer_projection", s.sizes.hidden, role="down")
    first = power_norm(t, first, "post_per_layer_input_norm")
    out = ops.add_to_last(t, corrected, first, s.streams - 1)
    del beside, attended, gated, read, raw, activated
    return out


def feed(t: Trace, s: Shape, x: Tensor, kind: Kind) -> Tensor:
    """The gated MLP; a sparse gate is what exceeds a multiple of its deviation."""
    if not kind.sparse:
        return decoder.gated(t, s.sizes, x, width=kind.width)
    gate = t.linear(x, "mlp.gate_proj", kind.width, role="gate")
    gate = highest(t, gate)
    activated = s.sizes.activation(t, gate)
    up = t.linear(x, "mlp.up_proj", kind.width, role="up")
    return t.linear(ops.mul(t, activated, up), "mlp.down_proj", s.sizes.hidden, role="down")


def highest(t: Trace, x: Tensor) -> Tensor:
    """What of `x` is above its mean by a multiple of its deviation, else zero."""
    mean = ops.mean(t, x)
    multiple = t.new("icdf", (), x.format)
    cutoff = ops.add(t, mean, ops.mul(t, ops.spread(t, x), multiple))
    return ops.relu(t, ops.sub(t, x, cutoff))


def modalities(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """What the streams' weights are made of."""
    inputs = ops.scale(t, power_norm(t, x, "altup.router_norm"))
    routed = t.linear(inputs, "altup.modality_router", s.streams, role="router")
    return ops.to(t, ops.tanh(t, ops.to(t, routed, FP32)), x.format)


def predict(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """Every stream as a mixture of all of them."""
    n = s.streams
    t.add_buffer(t.setting.format.block_bytes)  # the scale of the router's input
    weights = modalities(t, s, ops.select(t, x, 0))
    weights = t.linear(weights, "altup.prediction_coefs", n * n, role="router")
    weights = ops.transpose(t, ops.reshape(t, weights, t.batch, t.sequence, n, n), 2, 3)
    mixed = ops.matmul(t, ops.permute(t, x, 1, 2, 3, 0), weights)
    mixed = ops.add_in_place(t, ops.permute(t, mixed, 3, 0, 1, 2), x)
    return ops.to(t, ops.contiguous(t, mixed), x.format)


def correct(t: Trace, s: Shape, predicted: Tensor, active: Tensor) -> Tensor:
    """Every stream moved by what the layer added to the first."""
    weights = modalities(t, s, active)
    change = ops.sub(t, active, ops.select(t, predicted, 0))
    change = ops.repeat_first(t, change, s.streams)
    weights = ops.shift(t, correction(t, s, weights))
    weights = ops.permute(t, ops.reshape(t, weights, *weights.shape, 1), 2, 0, 1, 3)
    moved = ops.add_in_place(t, ops.mul(t, change, weights), predicted)
    return ops.to(t, ops.contiguous(t, moved), active.format)


def correction(t: Trace, s: Shape, weights: Tensor) -> Tensor:
    """How much each stream is moved; in training the projection's weights are kept in bounds."""
    name = "altup.correction_coefs"
    if not t.setting.training:
        return t.linear(weights, name, s.streams, role="router")
    weight = t.weight(f"{name}.weight", (s.streams, s.streams), "router")
    return ops.linear(t, weights, ops.clamp(t, weight, bounds=2))


def laurel(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """A low-rank path around attention."""
    low = t.linear(x, "laurel.linear_left", s.rank, role="down")
    wide = t.linear(low, "laurel.linear_right", s.sizes.hidden, role="up")
    del low
    return ops.add(t, x, power_norm(t, wide, "laurel.post_laurel_norm"))
