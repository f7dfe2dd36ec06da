"""Questions about serving: does it fit, what is the most that fits, and how fast could it be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from math import inf

from llmsize.anatomy.attention import ALIGNMENT
from llmsize.anatomy.flops import forward_flop_per_token
from llmsize.anatomy.parameters import hidden_size, vocabulary
from llmsize.errors import LLMSizeError
from llmsize.formats import Format
from llmsize.hardware import BUS, RATES, Accelerator, bandwidth, peak, supports
from llmsize.memory.llamacpp.buffers import MAX_SEQUENCES
from llmsize.memory.serving import (
    ELSEWHERE,
    Serving,
    apart,
    cache_of,
    fullest,
    need,
    pool,
)
from llmsize.memory.weights import weight_bytes
from llmsize.planning.changes import Change
from llmsize.planning.fits import most, smallest
from llmsize.quick_dataclasses import dataclass, replace
from llmsize.term import Term, fact, term
from llmsize.units import GIB

MOST = {"context": 2**24, "batch": 2**16}
"""Where the search for tokens or sequences stops."""

MOST_OF_BUFFERS = {"context": 2**20, "batch": MAX_SEQUENCES}
"""The same for llama.cpp, which has so many slots at most and is asked graph by graph."""


QUALITY = (
    (7.0, "hardly any quality"), (4.1, "a little quality"), (3.5, "some quality"),
    (0.0, "much quality"),
)  # fmt: skip
"""Bits of a weight, and what is given up with so many. Of LLaMA 7B's perplexity, 5.91, llama.cpp
adds 0.0004 with q8_0, 0.05 with q4_k_m, 0.24 with q3_k_m, 0.87 with q2_k (its pull request 1684).
"""


@dataclass(frozen=True, slots=True)
class Budget:
    """What one device gives."""

    memory: int
    """Bytes."""
    utilization: float | None = None
    """The share that a pool is made of; the engine's own unless given."""


def fits(question: Serving, budget: Budget) -> bool:
    """Whether every device has room for what it needs; a pool for every sequence."""
    return _needed(question, budget) <= budget.memory


def _needed(question: Serving, budget: Budget) -> float:
    """Bytes on the fullest device; without end where a pool has no room for every sequence."""
    place = fullest(need(question))
    if place.value > budget.memory or question.engine.allocation != "pool":
        return place.value
    room = pool(question, budget.memory, budget.utilization).bytes
    return place.value if room >= place.part("KV cache").value else inf


def largest_that_fits(question: Serving, what: str, budget: Budget) -> Serving | None:
    """The question with the largest `what` that fits: `context`, `batch` or `gpu-layers`.

    `None` if not even the smallest does.
    """

    def changed(value: int) -> Serving:
        if what == "context":
            return replace(question, context=value, prompt=min(question.prompt, value))
        if what == "gpu-layers":
            return replace(question, gpu_layers=value - 1)
        return replace(question, batch=value)

    buffered = question.engine.allocation == "buffers"
    limits = MOST_OF_BUFFERS if buffered else MOST
    highest = question.trace.depth + 2 if what == "gpu-layers" else limits[what]
    block = question.engine.token_block if buffered else ALIGNMENT

    @cache
    def needed(value: int) -> float:
        return _needed(changed(value), budget)

    if needed(1) > budget.memory:
        return None
    return changed(
        most(needed, budget.memory, 1, highest=highest, block=block if what == "context" else 1)
    )


def stored_bytes_of(question: Serving) -> int:
    """Bytes of all weights, wherever they are."""
    return sum(weight.copies * weight_bytes(weight, format) for weight, format in question.weights)


def changes(
    question: Serving, budget: Budget, *, smaller_cache: Format | None,
    requantized: Iterable[tuple[str, Serving]],
) -> list[Change[Serving]]:  # fmt: skip
    """What could make it fit, from what costs least."""
    known: list[Change[Serving]] = []
    if smaller_cache is not None:
        known.append(Change(
            f"keep the cache in {smaller_cache.name}", 1, "a little precision of attention",
            lambda q: replace(q, keys=smaller_cache, values=smaller_cache),
        ))  # fmt: skip
    known += [
        Change(f"store the weights in {name}", 2 + rank / 100, _lost(made), _storing(made))
        for rank, (name, made) in enumerate(requantized)
    ]
    if question.batch > 1:
        known.append(
            Change("serve one sequence at a time", 3, "throughput", lambda q: replace(q, batch=1))
        )
    known.append(Change(
        f"halve the context to {question.context // 2:,} tokens", 3.5, "half the context",
        lambda q: replace(q, context=max(1, q.context // 2)),
    ))  # fmt: skip
    known += _to_host(question, budget)
    if question.engine.split != "none":
        several = question.devices * 2
        known.append(Change(
            f"use {several} devices", 5, "the devices",
            lambda q: replace(q, devices=several),
        ))  # fmt: skip
    return [change for change in known if _possible(change, question)]


def _lost(question: Serving) -> str:
    """What weights of so many bits give up."""
    bits = bits_per_weight(question)
    return next(quality for least, quality in QUALITY if bits >= least)


def _to_host(question: Serving, budget: Budget) -> Iterator[Change[Serving]]:
    """What could be left in host memory, of all that the engine can leave there."""
    ways = question.engine.to_host
    if "experts" in ways and (layers := _experts_on_host(question, budget)):
        yield Change(
            f"keep the experts of {layers} layers in host memory (`--cpu-moe {layers}`)",
            3.8,
            "speed: those experts run from host memory",
            lambda q: replace(q, host_experts=layers, host_bytes=0),
        )
    split = largest_that_fits(question, "gpu-layers", budget) if "layers" in ways else None
    if split and split.gpu_layers:
        yield Change(
            f"keep {split.gpu_layers} of {question.trace.depth} layers on the device", 4,
            "speed: the others run from host memory", lambda q: split,
        )  # fmt: skip
    if "parameters" in ways and (spare := least_on_host(question, budget)):
        gib = spare.host_bytes // GIB
        yield Change(
            f"leave {gib} GiB of weights in host memory (`--cpu-offload-gb {gib}`)", 4.2,
            "speed: they cross the bus for every token", lambda q: spare,
        )  # fmt: skip


def least_on_host(question: Serving, budget: Budget) -> Serving | None:
    """The question with the fewest GiB of parameters in host memory that fits, if one does."""

    def changed(gib: int) -> Serving:
        return replace(question, host_bytes=gib * GIB, host_experts=0)

    found = smallest(
        lambda gib: fits(changed(gib), budget), highest=stored_bytes_of(question) // GIB + 1
    )
    return None if found is None else changed(found)


def _experts_on_host(question: Serving, budget: Budget) -> int:
    """The fewest layers whose experts must be in host memory; 0 if none is enough."""
    if not any(weight.role.startswith("expert_") for weight, _ in question.weights):
        return 0

    def holds(layers: int) -> bool:
        return fits(replace(question, host_experts=layers, host_bytes=0), budget)

    return smallest(holds, highest=question.trace.depth) or 0


def _storing(other: Serving) -> Callable[[Serving], Serving]:
    return lambda question: replace(question, weights=other.weights, file=other.file)


def _possible(change: Change[Serving], question: Serving) -> bool:
    try:
        need(change.apply(question))
    except LLMSizeError:
        return False
    return True


# ── bounds of speed ──────────────────────────────────────────────────────────────────────────────


def bus_bytes(question: Serving) -> Term:
    """What crosses the bus for one decoded token when weights are in host memory.

    transformers brings the weights to the device, vLLM and SGLang read them from there; llama.cpp
    runs the layers on the host and only the hidden state crosses.
    """
    kept = question.engine.allocation == "buffers" and question.gpu_layers is None
    places = () if kept else need(question)
    host = next((place for place in places if place.name in ELSEWHERE), None)
    if host is None:
        return fact("bus bytes per token", 0, unit="bytes", source="nothing is in host memory")
    if question.engine.allocation == "buffers":
        return term(
            "bus bytes per token", "sequences * hidden * 4", unit="bytes",
            source="llama.cpp: the hidden state in fp32", sequences=question.batch,
            hidden=hidden_size(question.trace),
        )  # fmt: skip
    if question.engine.allocation == "pool":
        return _read_in_place(question)
    return fact(
        "bus bytes per token", int(host.part("weights").value), unit="bytes",
        source="all that is in host memory is read for every pass",
    )  # fmt: skip


def _read_in_place(question: Serving) -> Term:
    """What kernels read of weights in host memory: of experts no more than are chosen."""
    _, away = apart(question, question.weights)
    sizes = {True: 0, False: 0}
    for weight, format in away:
        sizes[weight.role.startswith("expert_")] += weight.copies * weight_bytes(weight, format)
    mixed = [p for p in question.trace.weights.values() if p.experts and p.chosen]
    return term(
        "bus bytes per token",
        "weights + ceil(of_experts * min(experts, chosen * sequences) / experts)",
        unit="bytes", source="vLLM v0.19.0, model_executor/offloader/uva.py",
        weights=sizes[False], of_experts=sizes[True], sequences=question.batch,
        experts=mixed[0].experts if mixed else 1, chosen=mixed[0].chosen if mixed else 1,
    )  # fmt: skip


def first_token(question: Serving, accelerator: Accelerator, *, measured: bool = False) -> Term:
    """Seconds to the first token: no less than the FLOP of the prompts and the bytes of weights.

    At the published rate, or at the fastest matrix product that was `measured` on the card. What
    all prompts begin with is computed once.
    """
    prompt = question.prompt or question.context
    per_token = forward_flop_per_token(question.trace, max(1, prompt // 2)).value
    spared = 2 * vocabulary(question.trace) * hidden_size(question.trace)
    shared, rows = min(question.shared, prompt), question.batch * question.rows
    ways = question.devices if question.engine.split == "tensor" else 1
    fastest = peak(accelerator, rate(question, accelerator)).value
    if measured:
        fastest = (accelerator.measured_matmul_tflops or 0) * 1e12
    return term(
        "time to first token",
        "max(((shared + sequences * (prompt - shared)) * (flop_per_token - head) "
        "+ sequences * head) / (devices * peak), weight_bytes / (devices * bandwidth)) "
        "+ bus_bytes / bus",
        unit="seconds", grade="formula", source="roofline, Williams et al. 2009",
        note="a bound: at the " + ("rate measured" if measured else "full rate of the card")
        + ", nothing waiting",
        sequences=rows, prompt=prompt, shared=shared, flop_per_token=per_token, head=spared,
        peak=fastest, devices=ways,
        weight_bytes=_read(question, shared + rows * (prompt - shared)),
        bandwidth=bandwidth(accelerator).value, bus_bytes=bus_bytes(question).value, bus=BUS.value,
    )  # fmt: skip


FULL = Term(
    "share of bandwidth", 1, "", source="roofline, Williams et al. 2009", grade="formula",
    note="a bound: at full bandwidth",
)  # fmt: skip


def tokens_per_second(question: Serving, accelerator: Accelerator, share: Term = FULL) -> Term:
    """Tokens of all sequences together per second at full context, of several beams those of one.

    No more than memory gives at that `share` of its bandwidth.
    """
    rows = question.batch * question.rows
    ways = question.devices if question.engine.split == "tensor" else 1
    flop = forward_flop_per_token(question.trace, question.context).value
    cached = sum(int(part.value) for part in cache_of(question))
    return term(
        "tokens per second",
        "sequences / (max(rows * flop_per_token / (devices * peak), "
        "(weight_bytes / devices + cache_bytes) / (share * bandwidth)) + bus_bytes / bus)",
        unit="tokens/s", grade=share.grade, source=share.source,
        note=f"every weight and the whole cache read once per token; {share.note}",
        sequences=question.batch if question.reordered else rows, rows=rows,
        flop_per_token=flop, devices=ways, share=share.value,
        peak=peak(accelerator, rate(question, accelerator)).value,
        weight_bytes=_read(question, rows), cache_bytes=cached,
        bandwidth=bandwidth(accelerator).value, bus_bytes=bus_bytes(question).value, bus=BUS.value,
    )  # fmt: skip


def bits_per_weight(question: Serving) -> float:
    """Bits that a weight is stored in, on average."""
    elements = sum(weight.copies * weight.elements for weight, _ in question.weights)
    return 8 * stored_bytes_of(question) / elements


def rate(question: Serving, accelerator: Accelerator) -> str:
    """The format whose rate bounds the products: that of the weights where it is multiplied."""
    for _, format in question.weights:
        for begin, name in RATES.items():
            if format.name.startswith(begin) and supports(accelerator, name):
                return name
    return next((name for name in ("bf16", "fp16") if supports(accelerator, name)), "fp32")


def _read(question: Serving, tokens: int) -> int:
    """Bytes of weights that a pass over so many tokens reads: of experts those that are chosen."""
    shares = {
        w.name.rpartition("{}")[2]: 1 - (1 - w.chosen / w.experts) ** tokens
        for w in question.trace.weights.values()
        if w.experts
    }
    chosen = max(shares.values(), default=1.0)
    size = 0
    tied = all(weight.role != "head" for weight, _ in question.weights)
    for weight, format in question.weights:
        if weight.role == "position" or (weight.role == "embedding" and not tied):
            continue
        full = weight_bytes(weight, format)
        read = round(full * chosen) if weight.role.startswith("expert_") else full
        size += weight.copies * read
    return size
