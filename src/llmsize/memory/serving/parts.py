"""Parts that engines of several kinds hold: weights, cache, and what the runtime takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

from llmsize.anatomy.cache import LayerCache
from llmsize.engine import Engine
from llmsize.formats import Format
from llmsize.memory.kv_cache import kv_cache, pool_token_bytes
from llmsize.memory.serving.question import Serving
from llmsize.memory.weights import Stored, Weight, one_by_one, weight_bytes
from llmsize.term import Term, fact, term, total

SHARDED = frozenset(
    (*("embedding", "head", "q", "k", "v", "qkv", "o", "q_b", "kv_b", "gate", "up", "gate_up"),
     *("down", "expert_gate", "expert_up", "expert_gate_up", "expert_down"),
     *("shared_gate", "shared_up", "shared_gate_up", "shared_down"))
)  # fmt: skip
"""Roles of matrices that tensor parallelism cuts; all others are on every device."""


class Shard(NamedTuple):
    """A tensor, and how many devices share it."""

    weight: Weight
    format: Format
    cut: int


def shards(question: Serving, stored: Stored) -> Iterator[Shard]:
    """Every tensor, with experts padded as the engine does, and its share.

    Keys and values are cut by whole heads, so at most as many ways as there are.
    """
    engine = question.engine
    ways = question.devices if engine.split == "tensor" else 1
    hidden = next((w.shape[-1] for w, _ in stored if w.role == "embedding"), 0)
    kv_heads = kv_heads_of(question) or 1
    for weight, format in stored:
        cut = ways if weight.role in SHARDED else 1
        if weight.role in ("k", "v"):
            cut = min(ways, kv_heads)
        kernel = next((each for each in engine.padded if each["format"] == format.name), None)
        if kernel and hidden and weight.role.startswith("expert_"):
            weight = _padded(weight, kernel, hidden, cut)
        yield Shard(weight, format, cut)


def matrix_of(engine: Engine, weight: Weight) -> tuple[str, ...]:
    """What weights of a layer have in common that the engine holds as one matrix."""
    for roles in engine.joined:
        if weight.role in roles:
            return roles
    return (weight.name,)


def weights_of(question: Serving, stored: Stored) -> Term:
    """Bytes of the tensors on one of the devices that share their matrices."""
    sizes: dict[str, int] = {}
    for weight, format, cut in shards(question, stored):
        size = weight.copies * -(-weight_bytes(weight, format) // cut)
        sizes[format.name] = sizes.get(format.name, 0) + size
    source = "tensors of the checkpoint, each in the format of the recipe"
    parts = (
        fact(f"tensors in {name}", size, unit="bytes", source=source)
        for name, size in sorted(sizes.items(), key=lambda pair: -pair[1])
    )
    return total("weights", *parts, unit="bytes")


def _padded(weight: Weight, kernel: Mapping[str, str | int], hidden: int, cut: int) -> Weight:
    """An expert's matrix as a kernel wants it, whichever way round the library keeps it.

    The width of the MLP is padded after it is `cut`.
    """
    experts, *matrix = weight.shape
    down = weight.role.endswith("down")
    inputs = prod(matrix) // hidden if down else hidden
    outputs = prod(matrix) // inputs
    joined = 2 if weight.role.endswith("gate_up") else 1
    wide, narrow = int(kernel.get("width", 1)) * cut, int(kernel.get("hidden", 1))
    least = int(kernel.get("inputs", 1)) * (cut if down else 1)
    across, along = (narrow, max(wide, least)) if down else (wide * joined, max(narrow, least))
    padded = (experts, -(-outputs // across) * across, -(-inputs // along) * along)
    return weight._replace(shape=padded)


def within(question: Serving, first: int, end: int) -> Stored:
    """Tensors of the layers from `first` up to `end`.

    Embeddings come with the first layer, the last norm and the output matrix after the last.
    """
    layers = question.trace.depth
    if first == 0 and end == layers:
        return question.weights
    last = end + 1 if end == layers else end

    def held(weight: Weight) -> Weight | None:
        if weight.layer < 0:
            place = 0 if weight.role in ("embedding", "position") else layers
            return weight if first <= place < last else None
        if not weight.layers:
            return weight if first <= weight.layer < last else None
        own = tuple([layer for layer in weight.layers if first <= layer < last])
        return weight._replace(layer=own[0], layers=own) if own else None

    return tuple((own, format) for weight, format in question.weights if (own := held(weight)))


def apart(question: Serving, stored: Stored) -> tuple[Stored, Stored]:
    """Of the tensors `stored`, those on the device, and those of its layers in host memory.

    Experts by layer, or matrix after matrix until the bytes asked for are reached
    (vLLM v0.19.0, model_executor/offloader/uva.py).
    """
    if not question.host_bytes and not question.host_experts:
        return stored, ()
    left = question.host_bytes
    moved: set[tuple[object, ...]] = set()
    away: set[str] = set()
    stored = one_by_one(stored)
    for weight, format, cut in sorted(shards(question, stored), key=lambda s: s.weight.layer):
        if weight.layer < 0 or len(weight.shape) < 2:
            continue  # norms are the last parameters of a layer there
        matrix = (weight.layer, *matrix_of(question.engine, weight))
        expert = weight.role.startswith("expert_") and weight.layer < question.host_experts
        if expert or left > 0 or matrix in moved:
            moved.add(matrix)
            away.add(weight.name)
            left -= -(-weight_bytes(weight, format) // cut)
    kept = tuple(pair for pair in stored if pair[0].name not in away)
    return kept, tuple(pair for pair in stored if pair[0].name in away)


def cache_of(question: Serving, layers: tuple[LayerCache, ...] | None = None) -> tuple[Term, ...]:
    """The KV cache of all sequences on one device, and the recurrent state if there is one."""
    layers = question.layers if layers is None else layers
    ways = question.devices if question.engine.split == "tensor" else 1
    if question.engine.allocation == "pool" and question.policy.windows == "reserved":
        cached = [_pool_share(question, layers, ways)]
    else:
        rows = question.batch * question.rows
        own = _cached(question, layers, ways, question.context - question.shared, rows)
        common = _cached(question, layers, ways, question.shared, 1) if question.shared else []
        cached = [part for part in (*own, *common) if part.name != "recurrent state"]
    state = [part for part in _cached(question, layers, ways, 1, question.batch * question.rows)
             if part.name == "recurrent state"]  # fmt: skip
    found = (total("KV cache", *cached, unit="bytes"),)
    return (*found, total("recurrent state", *state)) if state else found


def _cached(
    question: Serving, layers: tuple[LayerCache, ...], ways: int, tokens: int, sequences: int
) -> tuple[Term, ...]:
    """What `sequences` of so many tokens keep; an encoder has read the whole prompt."""
    return kv_cache(
        layers, context=tokens, keys=question.keys, values=question.values, sequences=sequences,
        policy=question.policy, tensor_parallel=ways,
        encoder_context=question.prompt or question.context,
    ).parts  # fmt: skip


def _pool_share(question: Serving, layers: tuple[LayerCache, ...], ways: int) -> Term:
    return term(
        "blocks of the pool",
        "(sequences * ceil((tokens - shared) / block) + ceil(shared / block)) * block "
        "* bytes_per_token",
        unit="bytes", sequences=question.batch, tokens=question.context, shared=question.shared,
        block=question.policy.token_block,
        bytes_per_token=pool_token_bytes(
            layers, question.keys, question.values, question.policy, ways
        ),
        source="vLLM v0.19.0, v1/core/kv_cache_utils.py",
    )  # fmt: skip


def runtime(question: Serving) -> Term:
    """What is used before anything is loaded, and beside the framework's allocator."""
    engine = question.engine
    several = question.devices * question.stages > 1
    context = (engine.context_parallel if several else 0) or engine.context
    libraries = (engine.libraries_parallel if question.devices > 1 else 0) or engine.libraries
    return total(
        "context and libraries",
        *(fitted(engine, name, size)
          for name, size in (("context", context), ("libraries", libraries))),
        unit="bytes",
    )  # fmt: skip


def fitted(engine: Engine, name: str, size: int) -> Term:
    """A size in bytes that a preset gives, and what it was fitted to if it was."""
    told = f"n = {engine.fitted_to}" if engine.fitted_to else "as another engine's"
    return Term(
        name, size, "bytes", source=engine.source, note=told,
        grade="fitted" if engine.fitted_to else "assumed",
    )  # fmt: skip


def kv_heads_of(question: Serving) -> int:
    """KV heads of the layer that has the most; 0 without attention."""
    return max((layer.kv_heads for layer in question.layers), default=0)
