"""FLOP of a forward pass: a fold over the matrices that a token meets, and over what it attends to.

A multiplication and an addition are two. Not counted: norms, activations, softmax, rotary
embeddings, the lookup of the embedding, and the scan of a recurrent layer beyond its matrices.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from llmsize.anatomy.cache import LayerCache
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
    met = sum(_met(weight) for weight in weights)
    head = 0 if any(w.role == "head" for w in weights) else _size(weights, "embedding")
    attended = sum(
        _width(trace, layer) * _span(cache, context) * len(trace.places[layer].indices)
        for layer, cache in trace.caches
    )
    parts = [
        _part("matrices", "2 * elements", elements=met),
        _part("head, tied to the embedding", "2 * elements", elements=head),
        _part("attention", "2 * width_times_tokens", width_times_tokens=attended),
    ]
    return total("forward pass of a token", *(part for part in parts if part.value))


def _part(name: str, formula: str, **inputs: int) -> Term:
    return term(name, formula, unit="FLOP/token", source=SOURCE, grade="exact", note="", **inputs)


def _met(weight: Parameter) -> int:
    """Elements of a weight that one token is multiplied with."""
    if len(weight.shape) < 2 or weight.role in LOOKUPS:
        return 0
    size = prod(weight.shape) * weight.copies
    return size * weight.chosen // weight.experts if weight.experts else size


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
    hidden = next(w.shape[-1] for w in trace.weights.values() if w.role == "embedding")
    cache = next(cache for at, cache in trace.caches if at == layer)
    values = sizes.get("o", 0) // hidden
    if "q_b" in sizes:
        return sizes["q_b"] * hidden // sizes["q_a"] + values
    if "q" in sizes:
        return sizes["q"] // hidden + values
    keys_and_values = cache.kv_heads * (cache.key_dim + cache.value_dim)
    return sizes.get("qkv", 0) // hidden - keys_and_values + values
