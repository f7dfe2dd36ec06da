"""What `llmsize fits` says beside its verdict: the room that is left, or what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import inf

from llmsize.anatomy.attention import ALIGNMENT
from llmsize.cli import options
from llmsize.cli.estimate import format_named
from llmsize.cli.jobs import need_of, places_of, refusal, step
from llmsize.cli.processes import divided
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError
from llmsize.formats import FP16
from llmsize.hardware import Machine
from llmsize.memory.overview import Job, Subject, Workload
from llmsize.memory.training import Offload
from llmsize.planning import changes
from llmsize.planning.fits import largest_below, most, smallest
from llmsize.planning.slowdown import slowdown
from llmsize.planning.training import (
    PLACES,
    Question,
    host_need,
    need_at_least,
    offloaded,
    within,
)
from llmsize.quick_dataclasses import replace
from llmsize.term import Term
from llmsize.units import format_bytes

MOST_DEVICES = 4096
"""Where the search for devices that are enough stops."""
KEPT: dict[Offload, str] = {
    "optimizer": "what the optimizer steps with",
    "parameters": "optimizer and weights",
}
"""What is offloaded, in words."""


def limits(
    model: Subject, work: Workload, job: Job, machine: Machine, needed: Term
) -> tuple[str, ...]:
    """The longest context, the largest batch and the largest rank that there is room for."""
    context, batch, rank = _largest_settings(model, work, job, machine, needed)
    made_for = model.architecture.context_length
    beyond = f" ({made_for:,} is what the model was made for)" if made_for and (
        made_for < context) else ""  # fmt: skip
    users = f": users at once, each with {work.context:,} tokens" if job == "inference" else ""
    told = [
        f"the longest context that fits has {context:,} tokens{beyond}",
        f"the largest batch that fits has {batch:,} sequences{users}",
    ]
    return (*told, *([f"the largest rank that fits is {rank:,}"] if rank else []))


def _largest_settings(
    model: Subject, work: Workload, job: Job, machine: Machine, needed: Term
) -> tuple[int, int, int]:
    """The largest context, batch and rank, each for itself; a rank of 0 without adapters."""
    engine = work.engine if job == "inference" else None
    buffered = engine is not None and engine.allocation == "buffers"
    least = needed if job == "inference" else need_of(model, work, job, machine.devices)

    def largest(
        setting: Callable[[int], Workload], known: int, *, block: int = 1, highest: int = 2**30
    ) -> int:
        def need(value: int) -> float:
            if value == known:
                return least.value
            try:
                return need_of(model, setting(value), job, machine.devices).value
            except LLMSizeError:  # a rank above a layer's dimensions
                return inf

        found = most(need, machine.usable.value, known, block=block, highest=highest)
        if job == "inference":
            return found
        return largest_below(lambda value: holds(setting(value)), found, lowest=known)

    holds = partial(_holds, model, job=job, machine=machine, devices=machine.devices)
    block = engine.token_block if engine and buffered else ALIGNMENT
    searches: list[Callable[[], int]] = [
        lambda: largest(lambda value: work._replace(context=value), work.context, block=block),
        lambda: largest(lambda value: work._replace(batch=value), work.batch,
                        highest=_most_slots() if buffered else 2**30),
        lambda: largest(lambda value: work._replace(lora=replace(work.lora, rank=value)),
                        work.lora.rank) if job in ("LoRA", "QLoRA") else 0,
    ]  # fmt: skip
    each = map if job == "inference" else divided  # training is replayed at every value
    context, batch, rank = each(lambda search: search(), searches)
    return context, batch, rank


def _most_slots() -> int:
    """Sequences that llama.cpp serves at once."""
    from llmsize.planning.serving import MOST_OF_BUFFERS  # with all that serving takes

    return MOST_OF_BUFFERS["batch"]


def remedies(model: Subject, work: Workload, job: Job, machine: Machine) -> tuple[str, ...]:
    """The cheapest change that makes it fit, and how many devices would do without one."""
    budget = int(machine.usable.value)
    fewest = _fewest(model, work, job, machine)
    told = [f"{fewest:,} such devices would be enough: {layout(work, job)}"] if fewest else []
    if job == "inference":
        return (*_smaller_served(model, work, machine), *told)
    if machine.devices > 1:
        return tuple(told)
    from llmsize.cli.train_answer import advice, remedy

    question = step(model.architecture, work, job)
    several = remedy(question, budget)
    told.insert(0, advice(question, several))
    if changes.applied(question, several).choices.offload == "none":
        told += _on_the_host(question, budget)
    return tuple(told)


def _fewest(model: Subject, work: Workload, job: Job, machine: Machine) -> int | None:
    """The smallest number of devices that is enough; of those that cut matrices a power of two."""

    def holds(devices: int) -> bool:
        try:
            return _holds(model, work, job, machine, devices)
        except LLMSizeError:  # heads that so many devices do not divide
            return False

    if job == "inference" and work.engine is not None and work.engine.split == "tensor":
        powers = (2**power for power in range(MOST_DEVICES.bit_length()))
        return next((n for n in powers if n >= machine.devices and holds(n)), None)
    return smallest(holds, lowest=machine.devices, highest=MOST_DEVICES)


def _holds(model: Subject, work: Workload, job: Job, machine: Machine, devices: int) -> bool:
    """Whether so many of those devices do, with the gaps between tensors on one that trains."""
    room = int(machine.usable.value)
    return places_of(model, work, job, devices, room)[0].value <= room


def layout(work: Workload, job: Job) -> str:
    """How several devices share the work."""
    if job != "inference":
        return "weights, gradients and states divided (ZeRO-3, FSDP), a batch on each"
    if work.engine is not None and work.engine.split == "tensor":
        return "every matrix divided (tensor parallel), heads by whole numbers"
    return "each has some of the layers, which run one after another"


def _smaller_served(model: Subject, work: Workload, machine: Machine) -> Iterator[str]:
    """The cheapest combination of changes to serve it, and a split with the host."""
    budget = machine.usable.value

    def enough(changed: Workload) -> bool:
        if refusal(changed, "inference", machine.accelerator):
            return False
        return need_of(model, changed, "inference", machine.devices).value <= budget

    if found := changes.combination(work, _smaller(work.engine), enough):
        done = " and ".join(change.name for change in found)
        yield f"to make it fit: {done}; costs {', '.join(change.costs for change in found)}"
    if machine.devices == 1 and work.engine is not None and "layers" in work.engine.to_host:
        yield from (f"{'or' if found else 'to make it fit:'} {kept}"
                    for kept in _split(model, work, work.engine, int(budget)))  # fmt: skip


def _on_the_host(question: Question, budget: int) -> Iterator[str]:
    """The least that has to be offloaded to host memory for a step to fit, nothing else changed."""
    for what in PLACES[1:]:
        changed = offloaded(question, what)
        if changed != question and within(changed, budget):
            kept = f"{KEPT[what]} in host memory (`llmsize train … --offload {what}`)"
            there = format_bytes(host_need(changed).value)
            sizes = f"{format_bytes(need_at_least(changed).value)} and {there} there"
            costs = ", ".join(("an optimizer step on the host", *slowdown(question, changed)))
            yield f"or keep {kept}: {sizes}; costs {costs}"
            return


def _split(model: Subject, work: Workload, engine: Engine, budget: int) -> Iterator[str]:
    """How many layers the device holds if the others stay in host memory."""
    from llmsize.cli.infer import offloaded
    from llmsize.memory.serving import ELSEWHERE, need

    name = work.storage.recipe.name if work.storage.recipe else ""
    try:
        found = offloaded(
            model.architecture, engine, name, context=work.context, batch=work.batch, memory=budget
        )
    except LLMSizeError:  # a recipe that the engine does not read
        return
    if found is not None and found.gpu_layers:
        kept = f"{found.gpu_layers} of {found.trace.depth} layers on the device"
        rest = sum(int(place.value) for place in need(found) if place.name in ELSEWHERE)
        slower = "the host runs the others" if engine.allocation == "buffers" else "the bus"
        yield (f"keep {kept} (`llmsize infer … --offload cpu`) and {format_bytes(rest)} in host "
               f"memory; costs speed: {slower}")  # fmt: skip


FEWER_BITS = {
    "grown": ("llm-int8", "nf4"), "pool": ("fp8", "awq-int4-g128"), "buffers": ("q8_0", "q4_k_m"),
}  # fmt: skip
"""What engines of each kind load in eight and in about four bits."""


def _stored_as(name: str) -> Callable[[Workload], Workload]:
    def stored(work: Workload) -> Workload:
        quantized = work.storage.recipe and format_named(work.storage.recipe.base) != FP16
        return work if quantized else work._replace(storage=options.storage(name, served=True))

    return stored


def _smaller(engine: Engine | None) -> tuple[changes.Change[Workload], ...]:
    """What could be done to serve with less."""
    eight, four = FEWER_BITS[engine.allocation if engine else "grown"]
    return (
        changes.Change(f"store the weights in {eight.removeprefix('llm-')}", 2.0,
                       "hardly any quality", _stored_as(eight)),
        changes.Change(f"store the weights in {four}", 3.0, "a little quality", _stored_as(four)),
        changes.Change("halve the context", 4.0, "half of the context",
                       lambda work: work._replace(context=max(1, work.context // 2))),
    )  # fmt: skip
