"""Model, KV and compute buffers of llama.cpp for every device and the host.

llama.cpp 0c1e57098: src/llama-model.cpp (`load_tensors`), src/llama-context.cpp (`sched_reserve`).
Not counted: the CUDA context, cuBLAS workspaces, and the output buffer of logits on the host.
"""

from __future__ import annotations

from itertools import accumulate

from llmsize.anatomy.cache import LayerCache
from llmsize.errors import LLMSizeError
from llmsize.formats import FP32, Format
from llmsize.memory.llamacpp import tensors as ops
from llmsize.memory.llamacpp.allocator import allocation
from llmsize.memory.llamacpp.cache import CUDA, HOST, Memory, Server, layer_cache_bytes, layer_cells
from llmsize.memory.llamacpp.forward import Decoder, Forward
from llmsize.memory.llamacpp.scheduler import Scheduler
from llmsize.memory.llamacpp.tensors import Tensor
from llmsize.memory.weights import Weight
from llmsize.quick_dataclasses import dataclass, replace
from llmsize.term import Term, fact, total

MAX_SEQUENCES = 256
"""`LLAMA_MAX_SEQ`, src/llama-cparams.h."""
MAX_DEVICES = 16
"""`GGML_CUDA_MAX_DEVICES`, ggml-cuda.h."""
PIPELINE_COPIES = 4
"""Batches that are under way at once on several devices (`GGML_SCHED_MAX_COPIES`)."""


@dataclass(frozen=True, slots=True)
class Model:
    """A GGUF file: its tensors with their formats, and the shape of its graph."""

    decoder: Decoder
    tensors: tuple[tuple[Weight, Format], ...]


@dataclass(frozen=True, slots=True)
class Buffers:
    """Bytes in one place."""

    model: int
    cache: int
    compute: int

    @property
    def total(self) -> int:
        """All three."""
        return self.model + self.cache + self.compute


def buffers(model: Model, server: Server, device: Memory = CUDA) -> tuple[Buffers, ...]:
    """The buffers of every device, the host last.

    Raises `LLMSizeError` for options that llama.cpp refuses.
    """
    if not model.decoder.flash_attention:
        server = replace(server, flash_attention=False)
    check(server)
    memories = [device] * server.devices + [HOST]
    host = server.devices
    layers = len(model.decoder.layers)
    places = [*layer_places(layers, server)]
    weights, held = _place_weights(model, server, memories, places)
    cache_at = [host if server.cache_on_host else place for place in places[:layers]]
    cache = [0] * len(memories)
    for layer, place in zip(model.decoder.layers, cache_at, strict=True):
        cache[place] += layer_cache_bytes(layer, server, memories[place])
    caches = [
        _caches(layer, server, place)
        for layer, place in zip(model.decoder.layers, cache_at, strict=True)
    ]
    index_keys = {}
    for index, keys in model.decoder.indexed.items():
        place = cache_at[index]
        cache[place] += layer_cache_bytes(keys, server, memories[place])
        index_keys[index], _ = _caches(keys, server, place)
    whole = host not in places
    states = {
        layer: _states(sizes, server, place)
        for layer, (sizes, place) in enumerate(zip(model.decoder.states, cache_at, strict=False))
        if sizes
    }
    graph = Forward(model.decoder, server, weights, caches, states, index_keys).run()
    piped = whole and server.devices > 1 and not server.cache_on_host and not server.cpu_moe_layers
    compute = Scheduler(memories, PIPELINE_COPIES if piped else 1).buffers(graph)
    return tuple(map(Buffers, held, cache, compute))


SOURCE = "llama.cpp 0c1e57098: its graph, scheduler and allocator, simulated"


def memory(model: Model, server: Server, device: Memory = CUDA) -> Term:
    """The buffers as a sum over places, each of model, KV cache and compute."""
    names = [f"GPU {index}" for index in range(server.devices)] + ["host"]
    return total(
        "llama.cpp",
        *(
            total(
                place,
                fact("model", held.model, unit="bytes", source=SOURCE),
                fact("KV cache", held.cache, unit="bytes", source=SOURCE),
                fact("compute buffer", held.compute, unit="bytes", source=SOURCE),
            )
            for place, held in zip(names, buffers(model, server, device), strict=True)
        ),
        unit="bytes",
        note="without the CUDA context, library workspaces and the logits on the host",
    )


def check(server: Server) -> None:
    """Raise `LLMSizeError` for options that llama.cpp refuses, or that make no sense."""
    counts = (server.context, server.ubatch, server.sequences)
    if min(counts) < 1 or min(server.devices, server.gpu_layers or 0, server.cpu_moe_layers) < 0:
        raise LLMSizeError(
            "a context, batch or number of slots is below one, or a count is negative",
            hint="llama.cpp needs at least one token, one slot and one token per batch",
        )
    if server.sequences > MAX_SEQUENCES or server.devices > MAX_DEVICES:
        raise LLMSizeError(
            f"{server.sequences} slots on {server.devices} devices are too many",
            hint=f"llama.cpp has at most {MAX_SEQUENCES} slots and {MAX_DEVICES} devices",
        )
    if server.values.block_elements > 1 and not server.flash_attention:
        raise LLMSizeError(
            f"a cache of values in `{server.values.name}` needs flash attention",
            hint="turn flash attention on, or keep the values in 16 bit",
        )
    split = server.tensor_split
    if split and len(split) != server.devices:
        raise LLMSizeError(
            f"the split names {len(split)} shares for {server.devices} devices",
            hint="give one share for every device: `--gpus` says how many there are",
        )
    if split and not (min(split) >= 0 and 0 < sum(split) < 1e9):
        raise LLMSizeError(
            f"nothing is split into shares of {', '.join(f'{share:g}' for share in split)}",
            hint="give shares that are not negative, one of them above zero",
        )


def layer_places(layers: int, server: Server) -> list[int]:
    """The device of every layer and of the output matrix; the host for those that are left."""
    wanted = layers + 1 if server.gpu_layers is None else min(server.gpu_layers, layers + 1)
    count = wanted if server.devices else 0
    first = layers + 1 - count
    shares = server.tensor_split or (1.0,) * max(1, server.devices)
    ends = [end / sum(shares) for end in accumulate(shares)]
    return [
        server.devices if layer < first else sum(end <= (layer - first) / count for end in ends)
        for layer in range(layers + 1)
    ]


def _place_weights(
    model: Model, server: Server, memories: list[Memory], places: list[int]
) -> tuple[dict[str, Tensor], list[int]]:
    """Every weight where it is loaded, and the bytes of weights in every place."""
    host = server.devices
    placed: dict[str, Tensor] = {}
    held = [0] * len(memories)
    for weight, format in model.tensors:
        if weight.role == "rope":
            _repeat(weight, format, placed, held, memories, places)
            continue
        place = places[weight.layer]
        kept_back = "_exps." in weight.name and weight.layer < server.cpu_moe_layers
        if weight.role in ("embedding", "position") or kept_back:
            place = host
        placed[weight.name] = tensor = _stored(weight, format, place)
        held[place] += allocation(tensor, memories[place])
    if "output.weight" not in placed:
        embedding = placed["token_embd.weight"]
        placed["output.weight"] = output = ops.stored(
            embedding.format, embedding.shape, places[-1], weight=True
        )
        if places[-1] != host:
            held[places[-1]] += allocation(output, memories[places[-1]])
    return placed, held


def _repeat(
    weight: Weight,
    format: Format,
    placed: dict[str, Tensor],
    held: list[int],
    memories: list[Memory],
    places: list[int],
) -> None:
    """Rotary factors belong to every layer and are loaded once wherever there is one."""
    copies = {place: _stored(weight, format, place) for place in set(places[:-1])}
    for place, copy in copies.items():
        held[place] += allocation(copy, memories[place])
    placed.update(
        {f"blk.{layer}.{weight.name}": copies[place] for layer, place in enumerate(places[:-1])}
    )


def _stored(weight: Weight, format: Format, place: int) -> Tensor:
    return ops.stored(format, reversed(weight.shape), place, weight=True)


def _caches(layer: LayerCache, server: Server, place: int) -> tuple[Tensor, Tensor | None]:
    cells = layer_cells(layer, server)

    def made(format: Format, width: int) -> Tensor:
        return ops.stored(format, (width, cells, server.streams), place, weight=False)

    keys = made(server.keys, layer.kv_heads * layer.key_dim)
    return keys, made(server.values, layer.kv_heads * layer.value_dim) if layer.value_dim else None


def _states(sizes: tuple[int, ...], server: Server, place: int) -> tuple[Tensor, ...]:
    """The recurrent caches of a layer, one cell for each sequence."""
    return tuple(ops.stored(FP32, (size, server.sequences), place, weight=False) for size in sizes)
