"""Mixtures of experts: a router, the routed experts, and those that every token passes.

As transformers v5.23 runs them: tokens sorted by expert and one grouped product for all experts
(integrations/moe.py, `grouped_mm_experts_forward`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmsize.anatomy import decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.operations import GradList, attach, first
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Dim, Shape, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, INT64

Scores = Literal["softmax", "sigmoid"]
"""How the router's logits become weights: over all experts, or each expert for itself."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """How many experts there are, how many a token is sent to, and how wide they are."""

    count: int
    chosen: int
    width: int
    shared: int
    """Width of the expert that every token passes, or of all such together; 0 if there is none."""
    scores: Scores


def read(c: Config, *, scores: Scores = "softmax", width: str = "moe_intermediate_size") -> Mixture:
    """The mixture from a `config.json`; `width` is the field with the width of one expert."""
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
    )


def sparse_layers(c: Config, layers: int, first_sparse: int = 0) -> list[bool]:
    """Which layers have experts: as listed, or all from the first sparse one on.

    `first_sparse` is the family's default for `first_k_dense_replace`.
    """
    listed = isinstance(c.value("moe_layer_freq"), list | tuple)
    kinds = c.sequence("mlp_layer_types", *(("moe_layer_freq",) if listed else ()))
    if kinds is not None:
        if len(kinds) < layers:
            raise c.error(f"has {len(kinds)} MLP types for {layers} layers", "give one a layer")
        return [kinds[i] not in ("dense", 0) for i in range(layers)]
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
    shared: str = "mlp.shared_experts",
    router_bias: bool = False,
) -> Tensor:
    """The routed experts' output, and the shared expert's if there is one."""
    residual = x
    tokens = x.view(t.batch * t.sequence, x.shape[-1])
    weights = route(t, m, tokens, router, bias=router_bias)
    x = run_experts(t, s, m, tokens, weights, experts).view(*x.shape)
    if m.shared:
        x = ops.add(
            t, x, decoder.gated(t, s, residual, name=shared, width=m.shared, role="shared_")
        )
    return x


def route(t: Trace, m: Mixture, tokens: Tensor, name: str, *, bias: bool = False) -> Tensor:
    """The weights of the chosen experts of each token: tokens, chosen."""
    if m.scores == "sigmoid":
        logits = t.linear(ops.to(t, tokens, FP32), name, m.count, bias=bias, role="router")
        scores = ops.sigmoid(t, logits)
    else:
        logits = t.linear(tokens, name, m.count, bias=bias, role="router")
        scores = ops.softmax(t, logits, FP32)
    weights = take(t, scores, (scores.shape[0], m.chosen), "topk")
    total = take(t, weights, (scores.shape[0], 1), "sum")
    weights = ops.mul(t, weights, total)
    return ops.to(t, weights, tokens.format)


def run_experts(
    t: Trace,
    s: Sizes,
    m: Mixture,
    tokens: Tensor,
    weights: Tensor,
    name: str,
    *,
    gated: bool = True,
    bias: bool = False,
    transposed: bool = False,
    inner: int = 0,
) -> Tensor:
    """Every token through its chosen experts, their outputs weighted and summed.

    Ungated experts have no `gate`; `transposed` weights are stored as (in, out). `inner` is the
    width of their input and output if not that of the residual stream.
    """
    width = inner or s.hidden
    rows = tokens.shape[0] * m.chosen
    order = t.new("sort", (rows,), INT64)
    chosen = take(t, tokens, (rows, width), "index")
    if gated:
        both = grouped(t, m, chosen, f"{name}.gate_up_proj", 2 * m.width, "expert_gate_up",
                       bias=bias, transposed=transposed)  # fmt: skip
        gate, up = ops.split(t, both, m.width, m.width)
        inside = ops.mul(t, s.activation(t, gate), up)
    else:
        up = grouped(t, m, chosen, f"{name}.up_proj", m.width, "expert_up",
                     bias=bias, transposed=transposed)  # fmt: skip
        inside = s.activation(t, up)
    out = grouped(t, m, inside, f"{name}.down_proj", width, "expert_down",
                  bias=bias, transposed=transposed)  # fmt: skip
    weighted = ops.mul(t, out, weights.view(rows, 1))
    weighted = take(t, weighted, weighted.shape, "index")
    del order
    return take(t, weighted, (tokens.shape[0], width), "sum")


def grouped(
    t: Trace, m: Mixture, x: Tensor, name: str, out: int, role: str, *, bias: bool, transposed: bool
) -> Tensor:
    """A linear layer of each expert for the rows of its tokens."""
    width = x.shape[-1]
    shape = (m.count, width, out) if transposed else (m.count, out, width)
    weight = t.weight(name, shape, role, experts=m.count, chosen=m.chosen)
    result = ops.linear(t, x, weight, None, out)
    if bias:
        offsets = t.weight(
            f"{name}_bias", (m.count, out), "expert_bias", experts=m.count, chosen=m.chosen
        )
        result = ops.add(t, result, take(t, offsets, (x.shape[0], out), "index"))
    return result


def take(t: Trace, x: Tensor, shape: Shape, operation: str) -> Tensor:
    """Elements of `x` picked, repeated or summed; the gradient fills a tensor of its size."""
    node = t.record(_take_backward, (x,), (), (x.shape, operation))
    return attach(t.new(operation, shape, x.format), node)


def _take_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    shape, operation = node.context
    return (t.new(f"{operation}_backward", shape, first(grads).format),)
