"""Counting parameters: a fold over the weights that a forward pass names."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from llmsize.anatomy.tape import Parameter
from llmsize.anatomy.tensor import Shape, named
from llmsize.anatomy.trace import Trace
from llmsize.errors import LLMSizeError
from llmsize.term import Term, total

COMPONENTS = {
    "embedding": ("embedding", "position", "projection"),
    "attention": (
        "q",
        "k",
        "v",
        "qkv",
        "kv",
        "q_a",
        "q_b",
        "kv_a",
        "kv_b",
        "o",
        "sinks",
        "indexer",
        "gate_attention",
    ),
    "MLP": ("gate", "up", "down", "gate_up", "activation"),
    "shared experts": ("shared_gate", "shared_up", "shared_down", "shared_gate_up"),
    "experts": ("expert_gate", "expert_up", "expert_down", "expert_gate_up", "expert_bias"),
    "router": ("router",),
    "recurrent": ("ssm", "conv"),
    "hyper-connections": ("hyper_connection",),
    "norms": ("norm",),
    "biases": ("bias",),
    "head": ("head", "transform", "pooler", "score", "contact"),
    "adapters": ("adapter",),
}
"""What the roles of weights add up to, in the order in which they are shown."""


class Parameters(NamedTuple):
    """A model's parameters by what they mean. Tied matrices count once."""

    total: int
    embedding: int
    """Token embedding alone."""
    position: int
    """Learned position embeddings."""
    head: int
    """The language-model head; 0 if it shares the token embedding."""
    experts: int
    """All routed experts."""
    active: int
    """Parameters that one token uses: all but the routed experts it is not sent to. The embedding
    and the head are included."""

    @property
    def non_embedding(self) -> int:
        """Kaplan et al.'s N: without token and position embeddings and without an untied head."""
        return self.total - self.embedding - self.position - self.head


def count(weights: Iterable[Parameter]) -> Parameters:
    """Add up `weights`, each as often as it stands for."""
    sums = dict.fromkeys(("total", "embedding", "position", "head", "experts", "active"), 0)
    for weight in weights:
        size = prod(weight.shape) * weight.copies
        sums["total"] += size
        sums["active"] += size * weight.chosen // weight.experts if weight.experts else size
        sums["experts"] += size if weight.experts else 0
        if weight.role in ("embedding", "position", "head"):
            sums[weight.role] += size
    return Parameters(**sums)


def vocabulary(trace: Trace) -> int:
    """Entries of the token embedding."""
    return int(_embedding(trace)[0])


def hidden_size(trace: Trace) -> int:
    """Channels of the residual stream, which are those of the token embedding."""
    return int(_embedding(trace)[-1])


def _embedding(trace: Trace) -> Shape:
    for weight in trace.weights.values():
        if weight.role == "embedding":
            return weight.shape
    raise LLMSizeError("the model has no token embedding", hint="name another")


def by_component(weights: Iterable[Parameter]) -> Term:
    """The same as a sum of components, each the sum of its tensors, with the products shown.

    Raises `KeyError` for a weight whose role belongs to no component.
    """
    component = {role: name for name, roles in COMPONENTS.items() for role in roles}
    parts: dict[str, list[Term]] = {name: [] for name in COMPONENTS}
    for weight in weights:
        parts[component[weight.role]].append(_leaf(weight))
    return total(
        "parameters",
        *(total(name, *_merged(leaves)) for name, leaves in parts.items() if leaves),
        unit="parameters",
    )


def _leaf(weight: Parameter) -> Term:
    """One tensor's elements: its dimensions by name, times the layers that have one."""
    inputs: dict[str, int] = {}
    factors: list[str] = []
    for index, dim in enumerate(weight.shape):
        name = named(dim) if hasattr(dim, "name") else f"size_{index}"
        inputs[name] = int(dim)
        factors.append(name)
    if weight.copies > 1:
        inputs["layers"] = weight.copies
        factors.append("layers")
    return _product(weight.name, factors, inputs)


def _product(name: str, factors: list[str], inputs: dict[str, int]) -> Term:
    return Term(
        name, prod(inputs[factor] for factor in factors), "parameters", " * ".join(factors), inputs
    )


def _merged(leaves: list[Term]) -> list[Term]:
    """Leaves of one name and shape joined: stand-ins for different layers of the same kind."""
    merged: dict[tuple[object, ...], Term] = {}
    for leaf in leaves:
        sizes = {name: int(size) for name, size in leaf.inputs.items() if name != "layers"}
        key = (leaf.name, *sizes.items())
        layers = int(leaf.inputs.get("layers", 1))
        if key in merged:
            layers += int(merged[key].inputs.get("layers", 1))
        factors = [f for f in leaf.formula.split(" * ") if f != "layers"]
        if layers > 1:
            sizes["layers"] = layers
            factors.append("layers")
        merged[key] = _product(leaf.name, factors, sizes)
    return list(merged.values())
