"""FLOP of a forward pass: a fold over the matrices that a token meets, and over what it attends to.

A multiplication and an addition are two. Not counted: norms, activations, softmax, rotary
embeddings, the lookup of the embedding, and the scan of a recurrent layer beyond its matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.parameters import hidden_size
from llmsize.anatomy.tape import Parameter
from llmsize.anatomy.trace import Trace
from llmsize.term import Term, term, total

SOURCE = "llmsize.anatomy: matrices of the model's forward pass"

LOOKUPS = ("embedding", "position")
"""Tables of which a token reads one row."""


def forward_flop_per_token(trace: Trace, context: int) -> Term:
    """FLOP that one token costs going forward when it attends to `context` tokens.

    Without causal masking, as PaLM and most reports count; a window attends to no more than itself.
    """
    weights = list(trace.weights.values())
    met = sum(_met(weight, weights) * weight.copies for weight in weights)
    attended = sum(
        _attended(trace, layer, cache, context) * len(trace.places[layer].indices)
        for layer, cache in trace.caches
    )
    parts = [
        _part("matrices", "2 * elements", elements=met),
        _part("head, tied to the embedding", "2 * elements", elements=_tied(weights)),
        _part("attention", "2 * width_times_tokens", width_times_tokens=attended),
    ]
    return total("forward pass of a token", *(part for part in parts if part.value))


def training_flop_per_token(trace: Trace, context: int) -> Term:
    """FLOP that one token costs in training: forward, and backward what really wants a gradient.

    A matrix costs the forward product, a second one for the gradient of its input where anything
    below it is trained, and a third for its own where it is trained itself; attention costs twice
    its forward FLOP where its queries, keys and values want gradients. `trace` is of a training
    setting, which says what is trained. Recomputation is not counted; a product that the lowest
    layer's attention could do without, where its keys want no gradient, is.
    """
    weights = list(trace.weights.values())
    lowest = _lowest_trained(weights)
    passed = [(weight, _passed_through(weight, weights, lowest)) for weight in weights]
    own = sum(_met(w, weights) * w.copies for w in weights if w.node is not None)
    through = sum(_met(weight, weights) * times for weight, times in passed)
    tied, embedding = _tied(weights), _trained(weights, "embedding")
    through += tied if lowest < NOTHING else 0
    own += tied if embedding else 0
    attention = 2 * sum(
        _attended(trace, layer, cache, context) * _attention_passed(trace, layer, passed)
        for layer, cache in trace.caches
    )
    parts = [
        forward_flop_per_token(trace, context),
        _part("gradients of activations", "2 * elements", elements=through),
        _part("gradients of weights", "2 * elements", elements=own),
        _part(
            "gradients through attention", "2 * width_times_tokens", width_times_tokens=attention
        ),
    ]
    return total("training of a token", *(part for part in parts if part.value))


NOTHING = 2**31
"""In place of the index of the first trained layer, where no layer is trained."""

FED_ALIKE = (("q", "k", "v", "qkv", "q_a", "kv_a"), ("gate", "up", "gate_up"))
"""Roles of matrices that take the same input: one of them does not come before another."""


def _lowest_trained(weights: Iterable[Parameter]) -> int:
    """Index of the first layer with a trained weight; -1 if the embeddings are trained."""
    trained = [weight for weight in weights if weight.node is not None]
    if any(weight.role in LOOKUPS for weight in trained):
        return -1
    return min((min(weight.indices) for weight in trained if weight.indices), default=NOTHING)


def _passed_through(weight: Parameter, weights: Sequence[Parameter], lowest: int) -> int:
    """For how many of the weights that it stands for the input wants a gradient."""
    if not weight.indices:  # the head, for which every layer comes before
        return int(lowest < NOTHING and weight.role not in LOOKUPS)
    above = sum(index > lowest for index in weight.indices)
    if lowest not in weight.indices:
        return above
    before = weights[: next(i for i, other in enumerate(weights) if other is weight)]
    return above + any(
        _feeds(other, weight, weights) for other in before if lowest in other.indices
    )


def _feeds(other: Parameter, weight: Parameter, weights: Sequence[Parameter]) -> bool:
    """Whether a gradient for `other`, earlier in the same layer, passes what `weight` takes."""
    if other.node is None:
        return False
    mine, its = _base_role(weight, weights), _base_role(other, weights)
    if _module(other) == _module(weight):
        return weight.role == "adapter" and other.role == "adapter"  # A comes before B
    return not any(mine in group and its in group for group in FED_ALIKE)


def _module(weight: Parameter) -> str:
    """The name of the linear layer that a weight or its adapter belongs to."""
    return weight.name.partition(".lora_")[0].removesuffix(".weight").removesuffix(".bias")


def _base_role(weight: Parameter, weights: Iterable[Parameter]) -> str:
    """The role of a weight, or of the one that it is an adapter of."""
    return next((base.role for base in _bases(weight, weights)), weight.role)


def _bases(weight: Parameter, weights: Iterable[Parameter]) -> Iterator[Parameter]:
    """The model's own weights of the layer that an adapter is beside."""
    if weight.role == "adapter":
        module = _module(weight)
        yield from (w for w in weights if w.role != "adapter" and _module(w) == module)


def _attention_passed(trace: Trace, layer: int, passed: Iterable[tuple[Parameter, int]]) -> int:
    """In how many of the layers that a traced one stands for attention wants gradients.

    Where the output projection's input does; where it has no weight of that name, in all of them.
    """
    indices = trace.places[layer].indices
    return next(
        (times for weight, times in passed if weight.role == "o" and weight.indices == indices),
        len(indices),
    )


def _attended(trace: Trace, layer: int, cache: LayerCache, context: int) -> int:
    return _width(trace, layer) * _span(cache, context)


def _tied(weights: Sequence[Parameter]) -> int:
    """Elements of an embedding that is the head, too."""
    return 0 if any(w.role == "head" for w in weights) else _size(weights, "embedding")


def _trained(weights: Iterable[Parameter], role: str) -> bool:
    return any(w.role == role and w.node is not None for w in weights)


def _part(name: str, formula: str, **inputs: int) -> Term:
    return term(name, formula, unit="FLOP/token", source=SOURCE, grade="exact", note="", **inputs)


def _met(weight: Parameter, weights: Iterable[Parameter]) -> int:
    """Elements of one copy of a weight that one token is multiplied with, in each of its calls."""
    if len(weight.shape) < 2 or weight.role in LOOKUPS:
        return 0
    routed = next(_bases(weight, weights), weight) if weight.role == "adapter" else weight
    size = prod(weight.shape) * weight.calls
    return size * routed.chosen // routed.experts if routed.experts else size


def _size(weights: Iterable[Parameter], role: str) -> int:
    return sum(prod(weight.shape) for weight in weights if weight.role == role)


def _span(cache: LayerCache, context: int) -> int:
    """Tokens that one token of a layer attends to."""
    match cache.kind:
        case "full" | "latent":
            return context
        case "window":
            return min(cache.window, context)
        case _:
            return 0


def _width(trace: Trace, layer: int) -> int:
    """Channels of all query heads and of all values together: what attention multiplies."""
    sizes: dict[str, int] = {}
    for (at, _), weight in trace.weights.items():
        if at == layer and len(weight.shape) >= 2:
            sizes[weight.role] = sizes.get(weight.role, 0) + prod(weight.shape)
    hidden = hidden_size(trace)
    cache = next(cache for at, cache in trace.caches if at == layer)
    values = sizes.get("o", 0) // hidden
    if "q_b" in sizes:
        return sizes["q_b"] * hidden // sizes["q_a"] + values
    if "q" in sizes:
        return sizes["q"] // hidden + values
    keys_and_values = cache.kv_heads * (cache.key_dim + cache.value_dim)
    return sizes.get("qkv", 0) // hidden - keys_and_values + values
