"""What `fits` and `advise` ask about a model: one job, the weights stored in one way."""

from __future__ import annotations

from functools import cache
from shlex import quote

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.cli.estimate import default_precision, format_named
from llmsize.cli.options import usual_engine
from llmsize.engine import Engine, on_card
from llmsize.hardware import Accelerator, Machine, supports
from llmsize.memory.methods import Choices
from llmsize.memory.overview import Job, Storage, Subject, Workload
from llmsize.optimizers import Optimizer, Precision
from llmsize.planning.fits import Band, band_for
from llmsize.planning.needs import (
    estimated,
    serving_places,
    simulated,
    tuning,
    tuning_at_least,
)
from llmsize.planning.support import obstacle, obstacle_to
from llmsize.planning.training import Question
from llmsize.stack import Stack
from llmsize.term import Term

TRANSFORMERS = "transformers"
"""What serves and what trains unless told otherwise."""


def workload(storage: Storage, batch: int, context: int, engine: str = "") -> Workload:
    """A job's size; what serves it is the `engine`, or the one that usually runs such weights.

    Training recomputes every layer: what fits is asked by those who have little memory.
    """
    return Workload(
        storage, presets.get(Precision, default_precision(storage)),
        presets.get(Optimizer, "adamw"), format_named, batch, context, recompute=True,
        engine=presets.get(Engine, engine or usual_engine(storage)),
    )  # fmt: skip


def on(machine: Machine, work: Workload) -> Workload:
    """The same on that machine, whose cards decide how much some engines do at once."""
    engine = None if work.engine is None else engine_on(machine, work.engine)
    return work._replace(engine=engine, card=machine.accelerator)


def engine_on(machine: Machine, engine: Engine) -> Engine:
    """As it is by default on that machine's cards."""
    card, memory = machine.accelerator, int(machine.usable.value)
    if card is None:
        return on_card(engine, "", memory, devices=machine.devices)
    return on_card(engine, card.name, memory, card.compute_capability, machine.devices)


def places_of(
    model: Subject, work: Workload, job: Job, devices: int, room: int
) -> tuple[Term, ...]:
    """Bytes on the fullest device, by passes that are walked operation by operation, and in host
    memory where an engine holds some there.

    Devices have `room` for so many; what training caches on them depends on it.
    """
    if is_followed(work, job):
        return (tuning(step(model.architecture, work, job), devices, room),)
    if job == "inference":
        return serving_places(model, work, devices)
    return (estimated(model, work, job, devices),)


def need_of(model: Subject, work: Workload, job: Job, devices: int) -> Term:
    """What the fullest device does not do without, cached or not: it decides what fits."""
    if is_followed(work, job):
        return tuning_at_least(step(model.architecture, work, job), devices)
    return places_of(model, work, job, devices, 0)[0]


def is_followed(work: Workload, job: Job) -> bool:
    """Whether it is a step of training that can be run."""
    return job != "inference" and (job != "full training" or work.storage.trainable)


def step(model: Architecture, work: Workload, job: Job) -> Question:
    """The training step that `llmsize train --recompute full` is asked about."""
    recipe, full = work.storage.recipe, job == "full training"
    method = "full" if full else "qlora" if recipe else "lora"
    choices = Choices(
        method, work.batch, work.context, work.storage.format, rank=work.lora.rank,
        recompute="full", base=format_named(recipe.base) if recipe else None,
    )  # fmt: skip
    precision = work.precision if full else _beside_frozen()
    return Question(model, choices, _usual_stack(), precision, work.optimizer, work.card)


@cache
def _beside_frozen() -> Precision:
    """How adapters beside 16-bit or quantized weights are trained, and all that `train` does."""
    return presets.get(Precision, "pure-16bit")


@cache
def _usual_stack() -> Stack:
    """What trains."""
    return presets.get(Stack, TRANSFORMERS)


def in_detail(name: str, model: Architecture, work: Workload, job: Job) -> str:
    """The command that is about that job alone and tells more; empty if its need is estimated."""
    if job == "inference":
        return _inferred(name, model, work) if simulated(work) else ""
    trainable = job != "full training" or work.storage.trainable
    return _trained(name, step(model, work, job)) if trainable else ""


def _inferred(name: str, model: Architecture, work: Workload) -> str:
    engine, otherwise = work.engine or presets.get(Engine, TRANSFORMERS), bool(model.stored)
    return _command(
        "infer", name,
        quant=work.storage.name if work.storage.recipe or otherwise else None,
        dtype=work.storage.format.name if engine.allocation != "buffers" else None,
        engine=engine.name if engine.name != TRANSFORMERS else None,
        context=work.context, batch=work.batch if work.batch > 1 else None,
    )  # fmt: skip


def _trained(name: str, question: Question) -> str:
    asked, precision = question.choices, question.precision
    return _command(
        "train", name,
        method=asked.method, base=asked.base.name if asked.base else None,
        rank=asked.rank if asked.method != "full" else None, dtype=asked.format.name,
        recipe=precision.name if precision != _beside_frozen() else None,
        recompute=asked.recompute, seq_len=asked.sequence,
        batch=asked.batch if asked.batch > 1 else None,
    )  # fmt: skip


def _command(verb: str, model: str, **options: str | int | None) -> str:
    given = [f"--{key.replace('_', '-')} {value}" for key, value in options.items() if value]
    return " ".join([f"llmsize {verb}", quote(model), *given])


def runtime(work: Workload, job: Job) -> Engine | Stack:
    """What would run it."""
    if job == "inference" and work.engine is not None:
        return work.engine
    return _usual_stack()


def refusal(work: Workload, job: Job, accelerator: Accelerator | None) -> str:
    """Why what would run it does not, on that accelerator; empty if it does."""
    if accelerator is None:
        return ""
    recipe, runs = work.storage.recipe, runtime(work, job)
    reason = obstacle(runs, accelerator)
    return reason or (obstacle_to(format_named(recipe.base), runs, accelerator) if recipe else "")


def multiplies(accelerator: Accelerator, format: str) -> bool:
    """Whether products in a format are known to be possible, or nothing of the chip is known."""
    return not accelerator.peak_tflops or supports(accelerator, format)


def band_of(work: Workload, job: Job) -> Band:
    """How far off the estimates of a job are, by runs that others have measured."""
    known = presets.every(Band).values()
    return band_for(
        known, "inference" if job == "inference" else "training", runtime(work, job).name
    )
