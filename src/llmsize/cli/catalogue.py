"""`llmsize fits` without a model: the largest counts for a memory, and the models that fit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from math import ceil, prod

from llmsize import presets
from llmsize.answer import Absent, Cell, Row, Table
from llmsize.architecture import Architecture
from llmsize.cli import options
from llmsize.cli.estimate import format_named
from llmsize.cli.jobs import band_of, refusal, step
from llmsize.cli.processes import divided
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError
from llmsize.hardware import Machine
from llmsize.ladder import typical, typical_depth
from llmsize.memory import overview
from llmsize.memory.overview import JOBS, Job, Storage, Subject, Workload
from llmsize.planning.catalogue import (
    Choice,
    Each,
    Filter,
    by_size,
    largest_first,
    parameters,
    search,
    wanted,
)
from llmsize.planning.fits import approached, largest_near
from llmsize.planning.needs import estimated, serving, tuning_at_least
from llmsize.term import Term, fact

STORAGES = {
    "fp32": "fp32", "fp16/bf16": "bf16", "int8": "llm-int8", "q8_0": "q8_0", "q6_k": "q6_k",
    "q5_k_m": "q5_k_m", "q4_k_m": "q4_k_m", "nf4": "nf4",
}  # fmt: skip
"""The rows of the answer, and the format or the recipe of each, the largest first: what
transformers and bitsandbytes load, and the files of llama.cpp that are published most."""

LOADED = ("fp16/bf16", "int8", "nf4")
"""Those of them that transformers loads, the models of the catalogue among them; …"""
FILES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m")
"""… those that llama.cpp does; …"""
POOLED = {"fp16/bf16": "bf16", "fp8": "fp8", "int8": "w8a8", "awq-int4": "awq-int4-g128"}
"""… and what vLLM, SGLang and TensorRT-LLM load."""

QUANTIZED = "quantized weights are not trained themselves"
FOUR_BITS = 6
"""Bits of an element, scales included, below which weights are said to be in four bits."""
APART = 8
"""Layers between the usual depths."""
STEP, MOST = 10**6, 10**14
"""The largest parameter count is searched in steps of a million."""


def storages(engine: Engine | None) -> Mapping[str, str]:
    """How weights may be stored for an engine; for any of them if none is named."""
    if engine is None:
        return STORAGES
    if engine.allocation == "pool":
        return POOLED
    titles: tuple[str, ...] = FILES
    if engine.allocation == "grown":  # whose facts name the formats beside plain ones
        begins = ("bf16", *engine.capability)
        titles = tuple(title for title in LOADED if STORAGES[title].startswith(begins))
    return {title: STORAGES[title] for title in titles}


def storage(name: str, engine: Engine | None, *, served: bool) -> Storage:
    """Weights as a row of the answer has them (`int8`), or in any other format or recipe.

    Raises `LLMSizeError` for a name that is neither.
    """
    return options.storage(storages(engine).get(name, name), served=served)


def senseless(work: Workload, job: Job) -> str:
    """Why weights that are stored so are not used for a job; empty if they are."""
    storage = work.storage
    if job == "inference":
        return ""
    if reason := overview.not_adapted(storage):
        return reason
    if job == "full training":
        return "" if storage.trainable else QUANTIZED
    base = format_named(storage.recipe.base) if storage.recipe else storage.format
    if base.bits_per_element < FOUR_BITS:
        return "LoRA beside 4-bit weights is QLoRA" if job == "LoRA" else ""
    return "" if job == "LoRA" else "QLoRA trains beside 4-bit weights"


def counts(
    works: Mapping[str, Workload], machine: Machine, jobs: tuple[Job, ...] = JOBS, each: Each = map
) -> Table:
    """The largest number of parameters for every way to store weights and every job."""
    asked = [(job, work) for work in works.values() for job in jobs]
    found = iter(each(lambda pair: _largest_count(pair[0], pair[1], machine), asked))
    rows = tuple(Row(title, {job: _parameters(next(found)) for job in jobs}) for title in works)
    return Table("largest number of parameters", jobs, rows, heading="weights in")


def most_parameters(job: Job, work: Workload, machine: Machine) -> Cell:
    """The most parameters whose estimated need is within the memory."""
    return _parameters(_largest_count(job, work, machine))


def _largest_count(job: Job, work: Workload, machine: Machine) -> int | str:
    """The same as a number, or why there is none."""
    reason = senseless(work, job) or refusal(work, job, machine.accelerator)
    if reason:
        return reason
    budget, each = machine.usable.value, _least(work, job) * STEP / machine.devices
    need = lru_cache(maxsize=None)(partial(_estimated, work, job, machine.devices))

    # what the weights alone allow is near, and whoever starts from there traces few shapes
    most, allowed = MOST // STEP, min(max(int(budget / each), 1), MOST // STEP)
    nearer = max(allowed + int((budget - need(allowed)) // each), 1)
    guess = approached(need, budget, allowed, nearer, highest=most)
    found = largest_near(lambda steps: need(steps) <= budget, guess, highest=most)
    return found * STEP if need(found) <= budget else "not even a million parameters fit"


def _parameters(found: int | str) -> Cell:
    if isinstance(found, str):
        return Absent(found)
    return fact(
        "parameters", found, unit="parameters", grade="assumed",
        source="the largest count whose estimate is within the memory",
    )  # fmt: skip


def _estimated(work: Workload, job: Job, devices: int, steps: int) -> float:
    """What so many parameters need: between the two usual depths next to theirs, by a line.

    By itself each of these depths has a cache of its own, and most small ones a half more than the
    one before it: the largest count would be where one begins, whatever the weights are stored in.
    """
    depth = typical_depth(steps * STEP) / APART
    below = max(int(depth), 1)
    beyond = min(max(depth - below, 0.0), 1.0)

    def need(layers: int) -> float:
        shape = _typical(layers)._replace(parameters=steps * STEP)
        return estimated(shape, work, job, devices).value

    least = need(below * APART)
    return least + beyond * (need((below + 1) * APART) - least) if beyond else least


@lru_cache(maxsize=64)
def _typical(layers: int) -> Subject:
    """A model of that depth; each of the few shapes is traced once."""
    return overview.subject(typical(layers))


def models_that_fit(
    works: Mapping[str, Workload], machine: Machine, job: Job, filter: Filter,
    engine: Engine | None, *, everything: bool = False,
) -> Iterator[Choice]:  # fmt: skip
    """The presets that fit for a job, largest first, in the most precise format that does.

    The formats are those of one engine, transformers unless another is named. Models are put in
    order before the search, so that it can end early, or after one for `everything`.
    """
    loaded = {title: works[title] for title in LOADED if title in works}
    usable = works if engine else loaded or works
    models = [model for model in presets.every(Architecture).values() if wanted(model, filter)]
    searched = searching(usable, machine, job)
    if not everything:
        return searched(largest_first(models))
    found = searched(models, each=divided)
    return iter(sorted(found, key=lambda choice: by_size(choice.model, choice.parameters)))


def searching(
    works: Mapping[str, Workload], machine: Machine, job: Job, *, certain: bool = False
) -> Callable[..., Iterator[Choice]]:
    """A `search` of any models for a job; where it has to be `certain`, nothing tight is taken."""
    usable = {
        title: work
        for title, work in works.items()
        if not senseless(work, job) and not refusal(work, job, machine.accelerator)
    }
    subjects = lru_cache(maxsize=1)(overview.subject)
    budget, devices = int(machine.usable.value), machine.devices
    # formats may have engines of their own: the widest of their bands is safe for all
    band = max((band_of(work, job).share for work in usable.values()), default=0.0)

    def need(model: Architecture, title: str) -> int | None:
        work = usable[title]
        try:
            if job == "inference":
                return int(serving(subjects(model), work, devices).value)
            return int(tuning_at_least(step(model, work, job), devices).value)
        except LLMSizeError:  # a family or a shape that cannot be traced is no candidate
            return None

    return partial(
        search, formats=tuple(usable), need=need, budget=budget, band=band,
        least=bound(usable, subjects, job, budget, devices), certain=certain,
    )  # fmt: skip


def bound(
    works: Mapping[str, Workload], subjects: Callable[[Architecture], Subject], job: Job,
    budget: int, devices: int,
) -> Callable[[Architecture, str], float]:  # fmt: skip
    """What a model takes at least on each device: by its count, or if that fits, as stored.

    How it is stored takes an outline of it, which a step of training that mostly fits is not worth.
    """

    def least(model: Architecture, title: str) -> float:
        work = works[title]
        bare = 0.0 if _is_file(work) else parameters(model) * _least(work, job) / devices
        mostly_fits = job != "inference" and bare < budget / 2
        if bare > budget or mostly_fits or job == "full training":
            return bare
        try:
            held = sum(part.value for part in _held(subjects(model), work, job))
        except LLMSizeError:
            return bare
        return max(bare, held / devices)

    return least


def _least(work: Workload, job: Job) -> float:
    """Bytes of all devices together that no parameter does without."""
    if job == "full training":
        return float(sum(work.precision.bytes_per_parameter))
    recipe = work.storage.recipe
    format = format_named(recipe.base) if recipe else work.storage.format
    return format.bits_per_element / 8


def _held(model: Subject, work: Workload, job: Job) -> Iterator[Term]:
    """What is there before anything is computed, on all devices together.

    The tensors of a file are not unfolded for it: all but the embeddings, which llama.cpp leaves to
    the host, are bound enough.
    """
    if _is_file(work):
        size = ceil(_on_devices(model) * _least(work, job))
        yield fact("weights", size, unit="bytes", source="the format that most are in")
    else:
        yield overview.stored(model, work.storage, work.format_of)
    if job == "inference":
        yield overview.cache(model, work)


def _is_file(work: Workload) -> bool:
    """Whether the weights are in one of llama.cpp's files."""
    return work.storage.recipe is not None and work.storage.recipe.container == "gguf"


def _on_devices(model: Subject) -> int:
    """Parameters that are not looked up by a token's number or place."""
    return sum(
        prod(weight.shape) * weight.copies
        for weight in model.trace.weights.values()
        if weight.role not in ("embedding", "position")
    )


def models_table(chosen: list[Choice], job: Job) -> Table:
    """The models that fit, in their order."""
    rows = tuple(
        Row(
            choice.model.name,
            {
                "parameters": known("parameters", choice.parameters, "parameters"),
                "weights in": choice.format,
                "needs": known("needed", choice.need, "bytes"),
                "headroom": known("headroom", choice.headroom, "bytes"),
                "verdict": choice.verdict,
            },
        )
        for choice in chosen
    )
    columns = ("parameters", "weights in", "needs", "headroom", "verdict")
    return Table(f"models that fit for {job}", columns, rows, heading="model")


def known(name: str, value: int | None, unit: str) -> Cell:
    """A number of the preset or of the estimate."""
    if value is None:
        return Absent("not published")
    return fact(name, value, unit=unit, source="preset" if unit == "parameters" else "estimate",
                grade="exact" if unit == "parameters" else "formula")  # fmt: skip
