"""`llmsize fits`: what a memory can hold, or whether it holds one model."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Annotated

import typer

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.cli import options
from llmsize.cli.estimate import default_precision, format_named
from llmsize.errors import LLMSizeError, did_you_mean, printable
from llmsize.estimate import Absent, Cell, Estimate, Row, Table
from llmsize.hardware import Machine
from llmsize.ladder import typical
from llmsize.memory import overview
from llmsize.memory.overview import BANDS, JOBS, Job, Storage, Subject, Workload
from llmsize.optimizers import Optimizer, Precision
from llmsize.planning.catalogue import Choice, search
from llmsize.planning.fits import largest, verdict
from llmsize.term import Term, fact
from llmsize.units import format_bytes, format_count

EXAMPLES = (
    "llmsize fits --vram 16GB",
    "llmsize fits --gpu rtx-4090 --context 8192",
    "llmsize fits llama-2-7b --vram 16GB",
    "llmsize fits llama-2-7b --gpu t4 --job qlora && echo yes",
)

CONTEXT = 4096
SHOWN = 20
"""Presets that are listed without `--all`."""
STEP, MOST = 10**6, 10**14
"""The largest parameter count is searched in steps of a million."""

STORAGES = {"fp32": "fp32", "fp16/bf16": "bf16", "int8": "llm-int8", "4-bit": "nf4"}
"""The rows of the answer, and the format or the recipe of each; the most precise first."""

NOT_SO: dict[tuple[str, Job], str] = {
    ("fp32", "QLoRA"): "QLoRA trains beside 4-bit weights",
    ("fp16/bf16", "QLoRA"): "QLoRA trains beside 4-bit weights",
    ("int8", "QLoRA"): "QLoRA trains beside 4-bit weights",
    ("4-bit", "LoRA"): "LoRA beside 4-bit weights is QLoRA",
    ("int8", "full training"): "quantized weights are not trained themselves",
    ("4-bit", "full training"): "quantized weights are not trained themselves",
}
JOB_NAMES: dict[str, Job] = {
    "inference": "inference", "lora": "LoRA", "qlora": "QLoRA", "full": "full training"
}  # fmt: skip
SAYS = {"fits": "fits", "tight": "is tight on", "does not fit": "does not fit"}


def _complete_job() -> list[str]:
    return list(JOB_NAMES)


def fits(
    model: options.OptionalModel = None,
    vram: options.Vram = None,
    gpu: options.Gpu = None,
    gpus: options.Gpus = None,
    instance: options.InstanceName = None,
    reserve: options.Reserve = 0,
    dtype: options.Dtype = "",
    job: Annotated[
        str,
        typer.Option("--job", help=f"{', '.join(JOB_NAMES)}.", autocompletion=_complete_job),
    ] = "inference",
    batch: options.Batch = 1,
    context: options.Context = None,
    everything: Annotated[
        bool, typer.Option("--all", help=f"List every preset, not the {SHOWN} largest.")
    ] = False,
) -> Estimate:
    """The largest models that fit a memory, or whether one does (exit 0 or 1)."""
    machine = options.machine(gpu, vram, gpus, instance, reserve)
    if machine is None:
        raise LLMSizeError("no memory to fit into", hint="give `--vram 16GB` or `--gpu rtx-4090`")
    context = context or CONTEXT
    question = {
        "model": model, "memory": int(machine.usable.value), "devices": machine.devices,
        "dtype": dtype or None, "job": job, "batch": batch, "context": context,
    }  # fmt: skip
    if model:
        return _one(question, options.architecture(model), machine, dtype, _job(job))
    return _largest(question, machine, everything)


def _job(text: str) -> Job:
    found = JOB_NAMES.get(text.strip().lower())
    if found is None:
        raise LLMSizeError(
            f"unknown job `{printable(text)}`",
            hint=did_you_mean(text, JOB_NAMES, otherwise=f"jobs: {', '.join(JOB_NAMES)}"),
        )
    return found


def _workload(question: dict[str, str | int | None], storage: Storage) -> Workload:
    """Training recomputes every layer: what fits is asked by those who have little memory."""
    return Workload(
        storage, presets.get(Precision, default_precision(storage)),
        presets.get(Optimizer, "adamw"), format_named,
        int(question["batch"] or 1), int(question["context"] or CONTEXT), recompute=True,
    )  # fmt: skip


def _needed(model: Subject, work: Workload, job: Job, devices: int) -> Term:
    """Bytes on the fullest device. Raises `LLMSizeError` for a job that makes no sense."""
    needed = overview.on_each(overview.need(model, work, job), devices)
    if isinstance(needed, str):
        raise LLMSizeError(needed, hint="name another `--dtype` or `--job`")
    return needed


def _one(
    question: dict[str, str | int | None], architecture: Architecture, machine: Machine,
    dtype: str, job: Job,
) -> Estimate:  # fmt: skip
    """Whether one model fits, part by part."""
    own = options.own_dtype(architecture) or "fp16"
    storage = options.storage(dtype or ("nf4" if job == "QLoRA" else own))
    model, work = overview.subject(architecture), _workload(question, storage)
    needed = _needed(model, work, job, machine.devices)
    budget = int(machine.usable.value)
    said = verdict(needed.value, budget, band=BANDS[job])
    parts = overview.need(model, work, job)
    rows = [Row(name, {"bytes": part}) for name, part in parts.items() if isinstance(part, Term)]
    each = " on each device" if machine.devices > 1 else ""
    rows.append(Row(f"needed{each}", {"bytes": needed}))
    headline = (
        f"{architecture.name} {SAYS[said]} {machine.title}: {job} in {storage.name} needs "
        f"{format_bytes(needed.value)}{each}, which has {format_bytes(budget)}"
    )
    return Estimate(
        "fits", question | {"dtype": storage.name}, headline,
        (Table("", ("bytes",), tuple(rows), heading=f"{job} in {storage.name}", total=True),
         Table("", ("bytes",), (Row("memory", {"bytes": machine.usable}),))),
        _assumptions(work, job), (_longest(model, work, job, machine), _band(job)),
        verdict=needed.value <= budget,
    )  # fmt: skip


def _assumptions(work: Workload, job: Job) -> tuple[str, ...]:
    told = [f"{work.batch} × {work.context:,} tokens (`--batch`, `--context`)"]
    if job != "inference":
        told.append("every layer is recomputed in the backward pass (gradient checkpointing)")
    return tuple(told)


def _band(job: Job) -> str:
    return f"such estimates are expected within {BANDS[job]:.0%}; inside that band it is `tight`"


def _longest(model: Subject, work: Workload, job: Job, machine: Machine) -> str:
    """The longest context that the memory leaves room for, in words."""
    found = largest(
        lambda context: (
            _needed(model, replace(work, context=context), job, machine.devices).value
            <= machine.usable.value
        ),
        highest=10**9,
    )
    return f"the longest context that fits has {found:,} tokens" if found else "no context fits"


def _largest(
    question: dict[str, str | int | None], machine: Machine, everything: bool
) -> Estimate:  # fmt: skip
    """The largest count for every format and job, and the presets that fit for inference."""
    works = {title: _workload(question, options.storage(name)) for title, name in STORAGES.items()}
    rows = tuple(
        Row(title, {job: _count(title, job, works[title], machine) for job in JOBS})
        for title in STORAGES
    )
    serving = rows[1].cells["inference"]
    count = format_count(serving.value) if isinstance(serving, Term) else "no"
    chosen = _catalogue(works, machine)
    shown = chosen if everything else chosen[:SHOWN]
    more = len(chosen) - len(shown)
    return Estimate(
        "fits", question, f"{machine.title} serves up to {count} parameters in 16 bit",
        (Table("largest number of parameters", JOBS, rows, heading="weights in"), _models(shown)),
        (
            f"{question['batch']} × {question['context']:,} tokens (`--batch`, `--context`)",
            "largest counts: the usual proportions of a decoder, and for training, every layer "
            "recomputed in the backward pass (gradient checkpointing)",
        ),
        (*([f"{more} smaller models fit, too (`--all`)"] if more else []), _band("inference")),
    )  # fmt: skip


def _count(title: str, job: Job, work: Workload, machine: Machine) -> Cell:
    """The most parameters whose estimated need is within the memory."""
    if (title, job) in NOT_SO:
        return Absent(NOT_SO[title, job])

    def holds(steps: int) -> bool:
        model = _typical(steps * STEP)
        return _needed(model, work, job, machine.devices).value <= machine.usable.value

    found = largest(holds, highest=MOST // STEP)
    if found is None:
        return Absent("not even a million parameters fit")
    return fact(
        "parameters", found * STEP, unit="parameters", grade="assumed",
        source="the largest count whose estimate is within the memory",
    )  # fmt: skip


_shapes: dict[str, Subject] = {}


def _typical(parameters: int) -> Subject:
    """A model of that size; each of the few shapes is traced once."""
    shape = typical(parameters)
    if shape.name not in _shapes:
        _shapes[shape.name] = overview.subject(shape)
    return replace(_shapes[shape.name], parameters=parameters)


def _catalogue(works: dict[str, Workload], machine: Machine) -> list[Choice]:
    """Every preset that fits for inference, in the most precise format that does."""

    @lru_cache(maxsize=1)
    def traced(model: str) -> Subject:
        return overview.subject(models[model])

    def size(model: Architecture, title: str) -> int | None:
        try:
            need = _needed(traced(model.name), works[title], "inference", machine.devices)
        except LLMSizeError:  # a family or a shape that cannot be traced is no candidate
            return None
        return int(need.value)

    models = presets.every(Architecture)
    formats = [title for title in STORAGES if title != "fp32"]
    budget = int(machine.usable.value)
    return list(search(models.values(), formats, size, budget, band=BANDS["inference"]))


def _models(chosen: list[Choice]) -> Table:
    rows = tuple(
        Row(
            choice.model.name,
            {
                "parameters": _known("parameters", choice.model.published_parameters, "parameters"),
                "weights in": choice.format,
                "needs": _known("needed", choice.need, "bytes"),
                "verdict": choice.verdict,
            },
        )
        for choice in chosen
    )
    columns = ("parameters", "weights in", "needs", "verdict")
    return Table("models that fit for inference", columns, rows, heading="model")


def _known(name: str, value: int | None, unit: str) -> Cell:
    if value is None:
        return Absent("not published")
    return fact(name, value, unit=unit, source="preset" if unit == "parameters" else "estimate",
                grade="exact" if unit == "parameters" else "formula")  # fmt: skip
