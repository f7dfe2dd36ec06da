"""What a model needs on the fullest of several equal devices, in every way of using it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from math import prod
from typing import TYPE_CHECKING, Literal

from llmsize.anatomy import outlined
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError
from llmsize.formats import FP16, FP32
from llmsize.memory.overview import RUNTIME, Job, Subject, Workload, need, on_each, step_of
from llmsize.memory.peak import device_memory, least_memory, on_device
from llmsize.memory.states import stored
from llmsize.memory.timeline import counted
from llmsize.memory.training import TrainingRun, TrainingStep, training_step
from llmsize.quick_dataclasses import replace
from llmsize.term import Term, term, total

if TYPE_CHECKING:
    from llmsize.planning.training import Question

Way = Literal["serve", "lora", "qlora", "full"]

FETCHED = 2
"""Layers that are whole at once: the one at work and the next."""
FSDP = "Zhao et al. 2023, arXiv:2304.11277, section 3; pytorch v2.9, torch/distributed/fsdp"
ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054, section 5"


def serving(model: Subject, work: Workload, devices: int = 1) -> Term:
    """Memory of the fullest of `devices` that serve a model together, as `llmsize infer` has it.

    A shape that stands in for a parameter count, and a format that nothing is computed in, follow
    published rules instead. Raises `LLMSizeError` for a job that makes no sense.
    """
    return serving_places(model, work, devices)[0]


def serving_places(model: Subject, work: Workload, devices: int = 1) -> tuple[Term, ...]:
    """The same, and what is in host memory where the engine leaves something there."""
    if work.engine is not None and not model.assumed and simulated(work):
        return _simulated_places(model, work, work.engine, devices)
    return (estimated(model, work, "inference", devices),)


def simulated(work: Workload) -> bool:
    """Whether an engine computes in the format of the weights, or knows the recipe that they have.

    What passes of such a model need is simulated, and follows published rules otherwise.
    """
    format = work.storage.format
    computed = format.block_elements == 1 and format.block_bytes in (2, 4)
    return computed or work.storage.recipe is not None


def _simulated_places(
    model: Subject, work: Workload, engine: Engine, devices: int
) -> tuple[Term, ...]:
    from llmsize.memory import serving as served  # with llama.cpp, which is large

    storage = work.storage
    kept = FP16 if engine.allocation == "buffers" else storage.format
    made = served.serving(
        model.architecture, model.trace, engine, storage.recipe, work.format_of,
        format=storage.format, keys=kept, values=kept,
    )  # fmt: skip
    if engine.split == "layers":
        devices = max(1, min(devices, made.trace.depth))
    question = replace(made, context=work.context, batch=work.batch, devices=devices)
    places = served.need(question)
    needed = served.fullest(places)
    elsewhere = (place for place in places if place.name in served.ELSEWHERE and place.value)
    if engine.allocation != "pool":
        return (needed, *elsewhere)
    inside = int(needed.value) - served.outside_share(needed, engine)
    shared = served.shared_out(needed, engine, int(needed.value))
    return (_with_share(needed, engine, inside, shared - inside), *elsewhere)


def _with_share(needed: Term, engine: Engine, inside: int, outside: int) -> Term:
    """What is needed, and the rest of a device that an engine with a pool leaves alone.

    It takes a share of the device for what is `inside` of it, and what is `outside` comes on top.
    """
    spared = term(
        "left alone by the engine", "max(ceil(inside / share) - inside - outside, 0)",
        unit="bytes", source=engine.source, inside=inside, share=engine.utilization,
        outside=outside, note="`--gpu-memory-utilization`: the pool is made of a share of a device",
    )  # fmt: skip
    return total(needed.name, *needed.parts, spared)


def estimated(model: Subject, work: Workload, job: Job, devices: int = 1) -> Term:
    """The same by formulas, for a count of parameters in the shape of a known model.

    Training on several devices divides the states; each has the activations of its own batch, and
    the layers that are gathered. Raises `LLMSizeError` for a job that makes no sense.
    """
    parts = need(model, work, job)
    weights, activations = parts["weights"], parts["activations"]
    training = job != "inference" and isinstance(activations, Term)
    whole: tuple[Term, ...] = ()
    if devices > 1 and training and isinstance(weights, Term):
        step = step_of(model, work, job)
        scratch = step.step_scratch * model.parameters // model.shape_parameters // devices
        alive = max(_at_the_loss(step) - int(step.static.value), scratch)
        outside = [w for w in model.trace.weights.values() if not w.indices]
        gathered = term(
            "gathered weights", "ceil(weights * fetched / layers) + outside * bytes_each",
            unit="bytes", source=FSDP, grade="assumed", weights=weights.value, fetched=FETCHED,
            layers=model.trace.depth, outside=sum(prod(w.shape) for w in outside),
            bytes_each=work.storage.format.block_bytes,
        )  # fmt: skip
        whole = (counted("activations", alive), gathered)
    needed = on_each(parts, devices, *whole)
    if isinstance(needed, str):
        raise LLMSizeError(needed, hint="name another `--dtype` or `--job`")
    if job == "inference" and work.engine and work.engine.allocation == "pool":
        beside = int(RUNTIME.value)
        return _with_share(needed, work.engine, int(needed.value) - beside, beside)
    return needed


def tuning(question: Question, devices: int = 1, room: int | None = None) -> Term:
    """Device memory of a training step on each of `devices`, which have `room` for so many bytes.

    They divide what lives through the step, the gradients and what the optimizer allocates, as
    ZeRO-3 does; activations are on each, and so is what is gathered for use.
    """
    if devices == 1:
        return device_memory(
            question.architecture, _run_of(question), question.stack, room, question.accelerator
        )
    return tuning_at_least(question, devices)


def tuning_at_least(question: Question, devices: int = 1) -> Term:
    """The least of that which the step does without on no device: what a search asks about."""
    run = _run_of(question)
    if devices == 1:
        return least_memory(question.architecture, run, question.stack, question.accelerator)
    step = training_step(question.architecture, run)
    share = partial(_share, devices=devices)
    gathered = counted("gathered weights", _gathered(question, run), source=FSDP)
    static = share(step.static)
    allocated = total("allocated", static, gathered, *_moving(step, share))
    weights = step.static.part("weights")
    if question.stack.loads_whole and weights.value + share(weights).value > allocated.value:
        allocated = total("allocated while loading", weights, share(weights))
    return on_device(allocated, question.stack)


def _run_of(question: Question) -> TrainingRun:
    from llmsize.planning.training import run_of  # with every method

    return run_of(question)


def _moving(step: TrainingStep, share: Callable[[Term], Term]) -> tuple[Term, ...]:
    """What comes and goes in a step whose gradients are divided, at its highest moment.

    At the loss there are no gradients yet; later there are fewer activations; last the optimizer
    steps.
    """
    static = int(step.static.value)
    later = sum(size for what, size in step.moment.live.items() if what.role == "gradient")
    alive = counted("gradients", later), counted("gradients", step.gradients)
    moments = (
        (counted("activations", _at_the_loss(step) - static),),
        (counted("activations", step.moment.bytes - later), share(alive[0])),
        (share(alive[1]), share(counted("optimizer", step.step_scratch))),
    )
    return max(moments, key=lambda parts: sum(part.value for part in parts))


def _at_the_loss(step: TrainingStep) -> int:
    """Bytes alive at the highest moment before the backward pass reaches the layers."""
    before = takewhile(
        lambda point: point.phase == "forward" or not point.place.startswith("layer"),
        step.timeline,
    )
    return max(point.highest for point in before)


def _gathered(question: Question, run: TrainingRun) -> int:
    """Bytes of what is whole on each device: what is outside of the layers, and two layers.

    A layer is used while the next one is fetched; the root's own weights stay from the forward to
    the backward pass. They are gathered in the format of the products.
    """
    trace = outlined(question.architecture, run.setting)
    layers: Counter[int] = Counter()
    outside = 0
    for weight in trace.weights.values():
        size = stored(weight, run.setting) // weight.copies
        if weight.format is FP32 and run.setting.autocast is not None:
            size = prod(weight.shape) * run.setting.autocast.block_bytes
        layers.update(dict.fromkeys(weight.indices, size))
        outside += 0 if weight.indices else size
    return outside + FETCHED * max(layers.values(), default=0)


def _share(part: Term, devices: int) -> Term:
    """What each of several devices has of what they divide."""
    return term(
        part.name, "ceil(bytes / devices)", unit="bytes", source=ZERO, grade=part.grade,
        bytes=part.value, devices=devices,
    )  # fmt: skip
