"""Mixtures of experts: a router, the routed experts, and those that every token passes.

As transformers v5.23 runs them: tokens sorted by expert and one grouped product for all experts
(integrations/moe.py, `grouped_mm_experts_forward`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from llmsize.anatomy import balancing, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.linear import expert_linear
from llmsize.anatomy.operations import GradList, first
from llmsize.anatomy.tape import Parameter, Tape
from llmsize.anatomy.tensor import Dim, Shape, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32, INT32, INT64, Format
from llmsize.quick_dataclasses import dataclass

Scores = Literal["softmax", "native softmax", "sigmoid", "chosen"]
"""How the router's logits become weights: a softmax over all experts, in fp32 or in the format of
the logits, each expert for itself, or a softmax over those chosen."""

Correction = Literal["", "groups", "alike", "fp32", "weight"]
"""What the choice adds to the scores: nothing, nothing but a look at groups of experts, a buffer in
the format of the weights or in fp32, or a weight, which the family names."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """How many experts there are, how many a token is sent to, and how wide they are."""

    count: int
    chosen: int
    width: int
    shared: int
    """Width of the expert that every token passes, or of all such together; 0 if there is none."""
    scores: Scores
    precise: bool
    """Whether the router multiplies in fp32."""
    wide: bool
    """Whether the weights of the chosen experts stay in fp32."""
    correction: Correction
    normed: bool
    """Whether the weights of the chosen experts are made to sum to one."""
    scaled: bool
    """Whether they are multiplied by a number."""
    grouped: bool
    """Whether experts outside of the best groups lose their scores (DeepSeek V2)."""
    jittered: bool
    """Whether training multiplies what comes in by noise."""
    recorded: bool
    """Whether the model hands out the router's logits."""
    balanced: bool
    """Whether it then adds to its loss how unequally busy they keep the experts."""


class Routing(NamedTuple):
    """Where tokens are sent; all of it lives as long as the experts work."""

    weights: Tensor
    """Of the chosen experts of each token: tokens, chosen."""
    indices: Tensor | None = None
    logits: Tensor | None = None


def read(
    c: Config,
    *,
    scores: Scores = "softmax",
    precise: bool = False,
    wide: bool = False,
    correction: Correction = "",
    normed: bool = True,
    scaled: bool = False,
    grouped: bool = False,
    width: str = "moe_intermediate_size",
    jitter: str = "router_jitter_noise",
    balanced: bool = False,
) -> Mixture:
    """The mixture from a `config.json`; `width` is the field with the width of one expert,
    `jitter` that with the share of noise."""
    count = c.size("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    chosen = c.size("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts",
                    "moe_top_k", "moe_k")  # fmt: skip
    if chosen > count:
        raise c.error(f"sends a token to {chosen} of {count} experts", "correct one of them")
    one = c.size(width, "intermediate_size")
    shared = c.count("n_shared_experts", "num_shared_experts", "num_shared_expert") * one
    return Mixture(
        count=Dim(count, "experts"),
        chosen=chosen,
        width=Dim(one, "expert_width"),
        shared=Dim(c.count("shared_expert_intermediate_size", default=shared), "shared_width"),
        scores=scores,
        precise=precise,
        wide=wide,
        correction=correction,
        normed=c.flag("norm_topk_prob", default=normed),
        scaled=scaled,
        grouped=grouped,
        jittered=c.number(jitter) > 0,
        recorded=c.flag("output_router_logits"),
        balanced=balanced,
    )


def read_corrected(
    c: Config, *, correction: Correction = "alike", normed: bool = True, balanced: bool = False
) -> Mixture:
    """The mixture of DeepSeek V3: sigmoids in fp32, corrected for the choice, scaled."""
    return read(
        c, scores="sigmoid", precise=True, wide=True, correction=correction, normed=normed,
        scaled=True, balanced=balanced,
    )  # fmt: skip


def sparse_layers(c: Config, layers: int, first_sparse: int = 0) -> list[bool]:
    """Which layers have experts: as listed, or all from the first sparse one on.

    `first_sparse` is the family's default for `first_k_dense_replace`.
    """
    listed = isinstance(c.value("moe_layer_freq"), list | tuple)
    kinds = c.each_layer(layers, "mlp_layer_types", *(("moe_layer_freq",) if listed else ()))
    if kinds is not None:
        return [kind not in ("dense", 0) for kind in kinds]
    start = c.count("first_k_dense_replace", default=first_sparse)
    every = c.count("moe_layer_freq", "decoder_sparse_step", default=1) or layers + 1
    dense = c.sequence("mlp_only_layers") or ()
    offset = 0 if c.value("decoder_sparse_step") is None else 1
    return [i >= start and (i + offset) % every == 0 and i not in dense for i in range(layers)]


def feed(
    t: Trace,
    s: Sizes,
    m: Mixture,
    x: Tensor,
    *,
    router: str = "mlp.gate",
    experts: str = "mlp.experts",
    bias: bool = False,
) -> Tensor:
    """The routed experts' output, and the shared expert's, with a `bias`, if there is one."""
    x = residual = jittered(t, m, x)
    tokens = x.view(t.batch * t.sequence, x.shape[-1])
    routing = route(t, m, tokens, router)
    x = run_experts(t, s, m, tokens, routing, experts).view(*x.shape)
    if m.shared:
        alike = decoder.gated(
            t, s, residual, name="mlp.shared_experts", width=m.shared, bias=bias, role="shared_"
        )
        x = ops.add(t, x, alike)
    return x


def jittered(t: Trace, m: Mixture, x: Tensor) -> Tensor:
    """`x` times noise, in place, if training asks for it."""
    if not (m.jittered and t.setting.training):
        return x
    return ops.mul_in_place(t, x, t.new("uniform", x.shape, x.format))


def route(t: Trace, m: Mixture, tokens: Tensor, name: str, *, linear: bool = False) -> Routing:
    """The weights of the chosen experts of each token.

    `linear` says that the router is a module of its own kind, which an adapter may sit beside.
    """
    if linear:
        logits = t.linear(tokens, name, m.count, role="router")
    else:
        logits = router_logits(t, m, tokens, name, bias=False)
    return choose(t, m, logits, tokens.format)


def hand_out(t: Trace, m: Mixture, routing: Routing) -> None:
    """Hold the logits of the router until the model has run, if it is asked for them."""
    if m.recorded and routing.logits is not None:
        balancing.record(t, routing.logits, m.chosen, balanced=m.balanced)


def choose(t: Trace, m: Mixture, logits: Tensor, format: Format) -> Routing:
    """The weights of the experts with the best `logits`, in `format` unless they stay in fp32."""
    logits = ops.to(t, logits, FP32) if m.scores == "chosen" else logits
    weights, indices = chosen(t, m, logits)
    if not m.wide:
        weights = ops.to(t, weights, format)
    return Routing(weights, indices, logits)


def router_logits(t: Trace, m: Mixture, tokens: Tensor, name: str, *, bias: bool) -> Tensor:
    """How well each expert suits each token."""
    weight: Tensor = t.weight(f"{name}.weight", (m.count, tokens.shape[-1]), "router")
    weight = t.adapted_matrix(weight, f"{name}.weight", "router")
    offset = t.weight(f"{name}.bias", (m.count,), "bias") if bias else None
    if m.precise:
        tokens, weight = ops.to(t, tokens, FP32), ops.to(t, weight, FP32)
    return ops.linear(t, tokens, weight, offset)


def chosen(t: Trace, m: Mixture, logits: Tensor, *, bounded: bool = False) -> tuple[Tensor, Tensor]:
    """Weights and indices of the chosen experts; `bounded` sums are not too small."""
    if m.scores == "chosen":
        highest, indices = ops.topk(t, logits, m.chosen)
        return ops.softmax(t, highest), indices
    if m.scores == "sigmoid":
        scores = ops.sigmoid(t, ops.to(t, logits, FP32))
    else:
        scores = ops.softmax(t, logits, FP32 if m.scores == "softmax" else None)
    if m.correction:
        indices = corrected_choice(t, m, scores)
        weights = ops.gather(t, scores, indices)
    else:
        if m.grouped:
            scores = ops.masked_fill(t, scores, t.new("bitwise_not", scores.shape, BOOL))
        weights, indices = ops.topk(t, scores, m.chosen)
    if m.normed:
        whole = ops.total(t, weights)
        if bounded:
            weights = ops.divide(t, weights, ops.clamp(t, whole))
        else:
            weights = ops.divide_in_place(t, weights, whole)
    return ops.scale(t, weights) if m.scaled else weights, indices


def corrected_choice(t: Trace, m: Mixture, scores: Tensor) -> Tensor:
    """The experts whose score with its correction is highest; no gradient passes here."""
    if m.correction in ("alike", "fp32"):
        format = FP32 if m.correction == "fp32" else t.setting.format
        t.add_buffer(m.count * format.block_bytes)
    corrected = t.new("add", scores.shape, scores.format)
    masked = t.new("masked_fill", scores.shape, scores.format)
    values = t.new("topk", (scores.shape[0], m.chosen), scores.format)
    indices = t.new("topk", (scores.shape[0], m.chosen), INT64)
    del corrected, masked, values
    return indices


Gate = Callable[[Trace, Sizes, Tensor], Tensor]
"""Joins the halves of what experts with a gate project to."""


def gated_halves(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """The activation of the first half times the second."""
    half = x.shape[-1] // 2
    gate, up = ops.split(t, x, half, half)
    return ops.mul(t, s.activation(t, gate), up)


def run_experts(
    t: Trace,
    s: Sizes,
    m: Mixture,
    tokens: Tensor,
    routing: Routing,
    name: str = "mlp.experts",
    *,
    gate: Gate | None = gated_halves,
    bias: bool = False,
    transposed: bool = False,
) -> Tensor:
    """Every token through its chosen experts, their outputs weighted and summed.

    `gate` joins gate and up, which experts without it do not have; `transposed` weights are stored
    as (in, out).
    """
    hand_out(t, m, routing)
    width, fused = tokens.shape[-1], 1 if gate is None else 2
    up, down = f"{name}.{'up_proj' if gate is None else 'gate_up_proj'}", f"{name}.down_proj"
    matrix = partial(_matrix, t, m, transposed=transposed)
    upper: Tensor = matrix(up, width, fused * m.width)
    lower: Tensor = matrix(down, m.width, width)
    with_lower, with_upper = t.merger(lower, down), t.merger(upper, up, fused=fused)
    by_expert = _by_expert(t, m, tokens, routing)
    offset = _row_biases(t, m, up, fused * m.width, by_expert) if bias else None
    upper, inputs = with_upper(), by_expert.tokens
    x = _grouped(t, inputs, upper, by_expert.ends, fused * m.width, offset)
    x = _with_adapters(t, inputs, x, up, by_expert.ends, fused=fused)
    x = s.activation(t, x) if gate is None else gate(t, s, x)
    offset = _row_biases(t, m, down, width, by_expert) if bias else None
    lower, inputs = with_lower(), x
    x = _grouped(t, inputs, lower, by_expert.ends, width, offset)
    x = _with_adapters(t, inputs, x, down, by_expert.ends)
    del inputs
    return _summed(t, m, x, by_expert.weights, tokens.format)


class ByExpert(NamedTuple):
    """A row for each token and each of its experts, sorted by expert; it lives until the end."""

    tokens: Tensor
    weights: Tensor
    experts: Tensor
    """Of which each row is."""
    ends: Tensor
    """The last row of each expert."""
    order: Tensor
    as_whole: Tensor
    counts: Tensor


def _by_expert(t: Trace, m: Mixture, tokens: Tensor, routing: Routing) -> ByExpert:
    """The tokens in the order of their experts."""
    rows = tokens.shape[0] * m.chosen
    experts, order = t.new("sort", (rows,), INT64), t.new("sort", (rows,), INT64)
    chosen = ops.index(t, tokens, t.new("floor_divide", (rows,), INT64))
    weights = ops.index(t, ops.reshape(t, routing.weights, rows), order)
    as_whole = t.new("to", (rows,), INT32)
    counts = t.new("histc", (m.count,), INT32)
    ends = t.new("cumsum", (m.count,), INT32)
    return ByExpert(chosen, weights, experts, ends, order, as_whole, counts)


def _summed(t: Trace, m: Mixture, x: Tensor, weights: Tensor, format: Format) -> Tensor:
    """The experts' rows weighted, back in the order of the tokens, and added up for each token."""
    rows = x.shape[0]
    weighted = ops.mul(t, x, weights.view(rows, 1))
    back, counted = t.new("empty_like", (rows,), INT64), t.new("arange", (rows,), INT64)
    del counted
    weighted = ops.index(t, weighted, back)
    summed = ops.sum_chosen(t, weighted, m.chosen)
    return ops.to(t, summed, format)


def _row_biases(t: Trace, m: Mixture, layer: str, out: int, rows: ByExpert) -> Tensor:
    """The bias of that layer for each row."""
    shape = (m.count, out)
    offsets = t.weight(f"{layer}_bias", shape, "expert_bias", experts=m.count, chosen=m.chosen)
    return ops.index(t, offsets, rows.experts)


def _matrix(
    t: Trace, m: Mixture, name: str, width: int, out: int, *, transposed: bool
) -> Parameter:
    """The weights of every expert, from `width` to `out`."""
    shape = (m.count, width, out) if transposed else (m.count, out, width)
    role = f"expert_{name.rpartition('.')[2].removesuffix('_proj')}"
    return t.weight(name, shape, role, experts=m.count, chosen=m.chosen)


def _grouped(
    t: Trace, x: Tensor, weight: Tensor, ends: Tensor, out: int, offset: Tensor | None
) -> Tensor:
    """A linear layer of each expert for the rows of its tokens, with a bias for each row."""
    if isinstance(weight, Parameter) and weight.quantized:
        x = expert_linear(t, x, weight, out)
    else:
        x = ops.grouped_linear(t, x, weight, ends, out)
    return x if offset is None else ops.add_in_place(t, x, offset)


def _with_adapters(
    t: Trace, x: Tensor, out: Tensor, name: str, ends: Tensor, *, fused: int = 1
) -> Tensor:
    """What experts give for `x`, which is `out` if they have no adapters beside them."""
    adapter = t.setting.adapter
    return out if adapter is None else adapter.beside_experts(t, x, out, name, ends, fused)


def take(t: Trace, x: Tensor, shape: Shape, operation: str) -> Tensor:
    """Elements of `x` picked, repeated or summed; the gradient fills a tensor of its size."""
    node = t.record(_take_backward, (x,), (), (x.shape, operation))
    return t.new(operation, shape, x.format, node)


def _take_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    shape, operation = node.context
    return (t.new(f"{operation}_backward", shape, first(grads).format),)
