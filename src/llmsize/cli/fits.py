"""`llmsize fits`: what a memory can hold, or whether it holds one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from typing import Annotated, NamedTuple

from llmsize import presets
from llmsize.answer import Absent, Cell, Estimate, Row, Table
from llmsize.architecture import Architecture
from llmsize.cli import machines, options
from llmsize.cli.declare import Option, choosing, counting
from llmsize.cli.estimate import default_precision, format_named
from llmsize.cli.machines import Hardware
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError, did_you_mean, printable
from llmsize.formats import FP16
from llmsize.hardware import Accelerator, Instance, Machine, peak, rented, supports
from llmsize.hardware import machine as machine_of
from llmsize.ladder import typical
from llmsize.memory import overview
from llmsize.memory.methods import Choices
from llmsize.memory.overview import ADAPTERS, JOBS, Job, Storage, Subject, Workload
from llmsize.optimizers import Optimizer, Precision
from llmsize.planning import changes
from llmsize.planning.catalogue import Choice, Filter, enough, search, wanted
from llmsize.planning.fits import Band, approached, largest, largest_near, smallest, verdict
from llmsize.planning.needs import estimated, serving, tuning
from llmsize.planning.support import check_support
from llmsize.planning.training import Question
from llmsize.stack import Stack
from llmsize.term import Term, fact, term
from llmsize.units import format_bytes, format_count

EXAMPLES = (
    "llmsize fits --vram 16GB",
    "llmsize fits --gpu rtx-4090 --context 8192",
    "llmsize fits llama-2-7b --vram 16GB",
    "llmsize fits llama-2-7b --gpu t4 --job qlora && echo yes",
    "llmsize fits llama-3.1-70b --dtype nf4 --which gpu",
)

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
MOST_DEVICES = 4096
SAYS = {"fits": "fits", "tight": "is tight on", "does not fit": "does not fit"}


def _accelerators() -> Iterator[Machine]:
    yield from (machine_of(record) for record in presets.every(Accelerator).values())


def _instances() -> Iterator[Machine]:
    known = presets.every(Accelerator)
    for record in presets.every(Instance).values():
        yield rented(record, known.get(record.accelerator))


OFFERS = {"gpu": _accelerators, "instance": _instances}
"""The hardware that `--which` goes through."""


# fmt: off
JobName = Annotated[str, choosing("--job", "--task", known=JOB_NAMES, what="job", metavar="JOB")]
Rank = Annotated[
    int, Option("--rank", help="Of the adapters of LoRA and QLoRA.", metavar="R", min=1)
]
Which = Annotated[
    str | None,
    choosing(
        "--which", known=OFFERS, what="kind of hardware", metavar="KIND", show_default=False,
        help="List what is enough for MODEL, smallest first",
    ),
]
Strict = Annotated[bool, Option("--strict", help="Exit with 1 for what is `tight`, too.")]
Commercial = Annotated[bool, Option("--commercial", help="Only models for commercial use.")]
Family = Annotated[str, Option("--family", metavar="NAME", help="Only this `model_type`.")]
MinParameters = Annotated[
    int,
    counting(
        "--min-params", what="parameter count", metavar="N", help="Only models at least this large."
    ),
]
Everything = Annotated[bool, Option("--all", help=f"List everything, not the first {SHOWN}.")]
# fmt: on


class Use(NamedTuple):
    """Use.

    What a model is for, and how much of it at once.
    """

    dtype: options.Dtype = ""
    job: JobName = "inference"
    batch: options.Batch = 1
    context: options.Context = 4096
    rank: Rank = ADAPTERS.rank

    def workload(self, storage: Storage) -> Workload:
        """The same with the weights stored in that way."""
        made = workload(storage, self.batch, self.context)
        return made._replace(lora=replace(made.lora, rank=self.rank))

    def question(self, **first: str | int | None) -> dict[str, str | int | None]:
        """The knobs as the answer repeats them, behind what comes first."""
        return first | self._asdict() | {"dtype": self.dtype or None}


class Listing(NamedTuple):
    """Which models are listed."""

    commercial: Commercial = False
    family: Family = ""
    min_params: MinParameters = 1
    everything: Everything = False


def fits(
    model: options.OptionalModel = None,
    *,
    hardware: Hardware,
    use: Use,
    which: Which = None,
    strict: Strict = False,
    listing: Listing,
) -> Estimate:
    """The largest models that fit a memory, or whether one does (exit 0; 1 if it does not).

    Tight, inside the error band, is 0 where it is within the memory, and 1 with --strict.
    """
    if which:
        return _which(model, which, use, listing.everything)
    machine = machines.machine(hardware)
    if machine is None:
        raise LLMSizeError("no memory to fit into", hint="give `--vram 16GB` or `--gpu rtx-4090`")
    if model:
        return _one(model, machine, use, strict)
    return _largest(machine, use, listing)


def _families(name: str) -> tuple[str, ...]:
    """The one family, if any. Raises `LLMSizeError` for one that no model is of."""
    known = {model.family for model in presets.every(Architecture).values()} if name else ()
    if name and name not in known:
        raise LLMSizeError(
            f"no model is of the family `{printable(name)}`",
            hint=did_you_mean(name, known, otherwise="`llmsize show models` names them"),
        )
    return (name,) if name else ()


def workload(storage: Storage, batch: int, context: int) -> Workload:
    """Training recomputes every layer: what fits is asked by those who have little memory."""
    return Workload(
        storage, presets.get(Precision, default_precision(storage)),
        presets.get(Optimizer, "adamw"), format_named, batch, context, recompute=True,
    )  # fmt: skip


def _exact(model: Subject, work: Workload, job: Job, devices: int) -> Term:
    """The same for a known model, whose passes are walked operation by operation."""
    if job == "inference":
        return serving(model, work, partial(presets.get, Engine), devices)
    if job == "full training" and not work.storage.trainable:
        return estimated(model, work, job, devices)
    return tuning(_step(model.architecture, work, job), devices)


def _step(model: Architecture, work: Workload, job: Job) -> Question:
    """The training step that `llmsize train --recompute full` is asked about."""
    recipe, full = work.storage.recipe, job == "full training"
    method = "full" if full else "qlora" if recipe else "lora"
    choices = Choices(
        method, work.batch, work.context, work.storage.format, rank=work.lora.rank,
        recompute="full", base=format_named(recipe.base) if recipe else None,
    )  # fmt: skip
    precision = work.precision if full else presets.get(Precision, "pure-16bit")
    stack = presets.get(Stack, "transformers")
    return Question(model, choices, stack, precision, work.optimizer)


def _asked(
    architecture: Architecture, use: Use, accelerator: Accelerator | None = None
) -> tuple[Subject, Workload]:
    """The model, and what is done with it in `dtype` or in its own format.

    Raises `LLMSizeError` for a `dtype` that the accelerator has no rate for, and where the software
    that would run it does not.
    """
    if use.job == "inference" and not use.dtype:
        storage = options.own_storage(architecture)
    else:
        own = options.own_dtype(architecture) or "fp16"
        storage = options.storage(use.dtype or ("nf4" if use.job == "qlora" else own))
    if accelerator is not None and not multiplies(accelerator, storage.format.name):
        if use.dtype and storage.recipe is None:
            peak(accelerator, storage.format)  # raises, and says what it multiplies instead
        name = storage.name if storage.recipe else FP16.name
        storage = storage._replace(name=name, format=FP16)
    base = [format_named(storage.recipe.base)] if storage.recipe else []
    check_support(_runtime(storage, JOB_NAMES[use.job]), accelerator, *base)
    return overview.subject(architecture), use.workload(storage)


def _runtime(storage: Storage, job: Job) -> Engine | Stack:
    """What would run it: llama.cpp its own files, transformers everything else."""
    if job != "inference":
        return presets.get(Stack, "transformers")
    gguf = storage.recipe is not None and storage.recipe.container == "gguf"
    return presets.get(Engine, "llama.cpp" if gguf else "transformers")


def multiplies(accelerator: Accelerator, format: str) -> bool:
    """Whether products in a format are known to be possible, or nothing of the chip is known."""
    return not accelerator.peak_tflops or supports(accelerator, format)


def _one(name: str, machine: Machine, use: Use, strict: bool) -> Estimate:
    """Whether one model fits, part by part, and what to do if it does not."""
    architecture, job = options.architecture(name), JOB_NAMES[use.job]
    question = use.question(model=name, memory=int(machine.usable.value), devices=machine.devices)
    model, work = _asked(architecture, use, machine.accelerator)
    needed, budget = _exact(model, work, job, machine.devices), int(machine.usable.value)
    said, stored = verdict(needed.value, budget, band=band_of(job).share), work.storage.name
    each = " on each device" if machine.devices > 1 else ""
    rows = [Row(part.name, {"bytes": part}) for part in needed.parts if part.value]
    rows.append(Row(f"needed{each}", {"bytes": needed}))
    rest = term(
        "headroom", "memory - needed", unit="bytes", memory=budget, needed=needed.value,
        grade=needed.grade,
    )  # fmt: skip
    room = (Row("memory", {"bytes": machine.usable}), Row("headroom", {"bytes": rest}))
    headline = (
        f"{architecture.name} {SAYS[said]} {machine.title}: {job} in {stored} needs "
        f"{format_bytes(needed.value)}{each}, and there are {format_bytes(budget)}"
    )
    within = needed.value <= budget
    advice = _limits(model, work, job, machine) if within else _changes(model, work, job, machine)
    return Estimate(
        "fits", question | {"dtype": stored, "answer": said}, headline,
        (Table("", ("bytes",), tuple(rows), heading=f"{job} in {stored}", total=True),
         Table("", ("bytes",), room)),
        _assumptions(work, job, architecture), (*advice, _band(job)),
        verdict=said == "fits" if strict else within,
    )  # fmt: skip


def _limits(model: Subject, work: Workload, job: Job, machine: Machine) -> tuple[str, ...]:
    """The longest context, the largest batch and the largest rank that there is room for."""
    budget, devices = machine.usable.value, machine.devices

    def most(setting: Callable[[int], Workload], known: int) -> int:
        def need(value: int) -> float:
            try:
                return _exact(model, setting(value), job, devices).value
            except LLMSizeError:  # a rank above a layer's dimensions, more slots than llama.cpp's
                return float("inf")

        each = (need(2 * known) - need(known)) / known  # nearly every need grows by a line
        guess = int((budget - need(known)) / each) if 0 < each < float("inf") else 0
        return largest_near(
            lambda value: need(value) <= budget, known + guess, lowest=known, highest=2**30
        )

    context = most(lambda value: work._replace(context=value), work.context)
    batch = most(lambda value: work._replace(batch=value), work.batch)
    made_for = model.architecture.context_length
    beyond = f" ({made_for:,} is what the model was made for)" if made_for and (
        made_for < context) else ""  # fmt: skip
    told = [f"the longest context that fits has {context:,} tokens{beyond}"]
    if job == "inference":
        told.append(f"the largest batch that fits has {batch:,} sequences: users at once, each "
                    f"with {work.context:,} tokens")  # fmt: skip
    else:
        told.append(f"the largest batch that fits has {batch:,} sequences")
    if job in ("LoRA", "QLoRA"):
        rank = most(
            lambda value: work._replace(lora=replace(work.lora, rank=value)), work.lora.rank
        )
        told.append(f"the largest rank that fits is {rank:,}")
    return tuple(told)


def _changes(model: Subject, work: Workload, job: Job, machine: Machine) -> tuple[str, ...]:
    """The cheapest change that makes it fit, and how many devices would do without one."""
    budget = machine.usable.value
    fewest = smallest(
        lambda devices: _exact(model, work, job, devices).value <= budget,
        lowest=machine.devices, highest=MOST_DEVICES,
    )  # fmt: skip
    told = [f"{fewest:,} such devices would be enough"] if fewest else []
    if job != "inference" and machine.devices == 1:
        from llmsize.cli.train import advice

        return (advice(_step(model.architecture, work, job), int(budget)), *told)

    def enough(changed: Workload) -> bool:
        return _exact(model, changed, job, machine.devices).value <= budget

    found = changes.combination(work, _SMALLER, enough) if job == "inference" else None
    if found:
        done = " and ".join(change.name for change in found)
        told.insert(0, f"to make it fit: {done}; costs {', '.join(c.costs for c in found)}")
    if job == "inference" and machine.devices == 1:
        told += _split(model, work, int(budget))
    return tuple(told)


def _split(model: Subject, work: Workload, budget: int) -> Iterator[str]:
    """How many layers the device holds if the others stay in host memory."""
    from llmsize.cli.infer import offloaded

    name = work.storage.recipe.name if work.storage.recipe else ""
    try:
        found = offloaded(model.architecture, name, context=work.context, batch=work.batch,
                          memory=budget)  # fmt: skip
    except LLMSizeError:  # a recipe that the engine does not read
        return
    if found is not None and found.gpu_layers:
        kept = f"{found.gpu_layers} of {len(found.layers)} layers"
        yield f"or keep {kept} on the device (`llmsize infer --offload cpu`); costs speed: the bus"


def _stored_as(name: str) -> Callable[[Workload], Workload]:
    return lambda work: (
        work if work.storage.recipe else work._replace(storage=options.storage(name))
    )


_SMALLER: tuple[changes.Change[Workload], ...] = (
    changes.Change("store the weights in int8", 2.0, "hardly any quality", _stored_as("llm-int8")),
    changes.Change("store the weights in nf4", 3.0, "a little quality", _stored_as("nf4")),
    changes.Change("halve the context", 4.0, "half of the context",
                   lambda work: work._replace(context=max(1, work.context // 2))),
)  # fmt: skip


def _which(name: str | None, kind: str, use: Use, everything: bool) -> Estimate:
    """The hardware that is enough for a model, smallest first."""
    if name is None:
        raise LLMSizeError("`--which` needs a model", hint="`llmsize fits llama-2-7b --which gpu`")
    job = JOB_NAMES[use.job]
    model, work = _asked(options.architecture(name), use)
    need = lru_cache(maxsize=64)(lambda devices: int(_exact(model, work, job, devices).value))
    offers = [
        machine for machine in OFFERS[kind]()
        if machine.accelerator is None
        or work.storage.recipe is not None
        or multiplies(machine.accelerator, work.storage.format.name)
    ]  # fmt: skip
    found = enough(
        [(machine, machine.devices, int(machine.usable.value)) for machine in offers],
        need, band=band_of(job).share,
    )  # fmt: skip
    rows = tuple(
        _offer(machine, need(machine.devices), said)
        for machine, said in (found if everything else found[:SHOWN])
    )
    columns = ("devices", "memory of each", "needed on each", "verdict")
    least = rows[0].name if rows else "nothing that is known"
    return Estimate(
        "fits", use.question(model=name, which=kind),
        f"{model.architecture.name}, {job} in {work.storage.name}: {least} is enough; "
        f"{len(found)} of {len(offers)} are",
        (Table(f"{kind}s, smallest first", columns, rows, heading=kind),),
        _assumptions(work, job, model.architecture), (_band(job),), verdict=bool(found),
    )  # fmt: skip


def _offer(machine: Machine, need: int, said: str) -> Row:
    """One machine, and how it holds what is needed on each of its devices."""
    name = machine.instance.name if machine.instance else machine.title
    return Row(name, {
        "devices": str(machine.devices), "memory of each": machine.usable,
        "needed on each": _known("needed", need, "bytes"), "verdict": said,
    })  # fmt: skip


AT_ONCE = (
    "all prompts are read at once, as transformers does; engines that read them in pieces need "
    "less for activations (`llmsize infer --engine vllm --fit users`)"
)
"""What is said of more than one sequence."""


def _assumptions(work: Workload, job: Job, architecture: Architecture) -> tuple[str, ...]:
    told = [f"{work.batch} × {work.context:,} tokens (`--batch`, `--context`)"]
    if job == "inference" and work.batch > 1:
        told.append(AT_ONCE)
    if job != "inference":
        told.append("every layer is recomputed in the backward pass (gradient checkpointing)")
        told += options.requantized(architecture, work.storage.name)
    return tuple(told)


def band_of(job: Job) -> Band:
    """How far off the estimates of a job are, by runs that others have measured."""
    return presets.get(Band, "inference" if job == "inference" else "training")


def _band(job: Job) -> str:
    band = band_of(job)
    return (
        f"95 % of {band.cases} measured runs are within {band.share:.0%} of the estimate; inside "
        "that band it is `tight`"
    )


def _largest(machine: Machine, use: Use, listing: Listing) -> Estimate:
    """The largest count for every format and job, and the presets that fit for one job."""
    job = JOB_NAMES[use.job]
    works = {title: use.workload(options.storage(name)) for title, name in STORAGES.items()}
    rows = tuple(
        Row(title, {job: most_parameters(title, job, works[title], machine) for job in JOBS})
        for title in STORAGES
    )
    serving = rows[1].cells["inference"]
    most = f"serves up to {format_count(serving.value)}" if isinstance(serving, Term) else (
        "is too small for any")  # fmt: skip
    filter = Filter(
        listing.commercial, _families(listing.family), min_parameters=listing.min_params
    )
    found = _catalogue(works, machine, job, filter)
    shown = list(found if listing.everything else islice(found, SHOWN))
    more = next(found, None) is not None
    tables = (
        Table("largest number of parameters", JOBS, rows, heading="weights in"),
        _models(shown, job),
    )
    return Estimate(
        "fits",
        use.question(model=None, memory=int(machine.usable.value), devices=machine.devices),
        f"{machine.title} {most} parameters in 16 bit",
        tables,
        (
            f"{use.batch} × {use.context:,} tokens (`--batch`, `--context`)",
            "largest counts: the usual proportions of a decoder, and for training, every layer "
            "recomputed in the backward pass (gradient checkpointing)",
        ),
        (*(["smaller models fit, too (`--all`)"] if more else []), _band(job)),
    )  # fmt: skip


def most_parameters(title: str, job: Job, work: Workload, machine: Machine) -> Cell:
    """The most parameters whose estimated need is within the memory, weights stored as `title`."""
    if (title, job) in NOT_SO:
        return Absent(NOT_SO[title, job])

    budget, each = machine.usable.value, _least(work, job) * STEP / machine.devices

    def need(steps: int) -> float:
        return estimated(_typical(steps * STEP), work, job, machine.devices).value

    def holds(steps: int) -> bool:
        return need(steps) <= budget

    # what the weights alone allow is near, and whoever starts from there traces few shapes
    most, allowed = MOST // STEP, min(max(int(budget / each), 1), MOST // STEP)
    if job == "inference":  # the cache leaps with the shape's heads: from a quarter upwards
        near = max(allowed // 4, 1)
        found = largest(holds, lowest=near, highest=most) or largest(holds, highest=near)
    else:
        guess = approached(need, budget, allowed, each, highest=most)
        found = largest_near(holds, guess, highest=most)
    if found is None or not holds(found):
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
    return _shapes[shape.name]._replace(parameters=parameters)


def _catalogue(
    works: dict[str, Workload], machine: Machine, job: Job, filter: Filter
) -> Iterator[Choice]:
    """The presets that fit for a job, largest first, in the most precise format that does."""
    models = {n: m for n, m in presets.every(Architecture).items() if wanted(m, filter)}
    budget, devices, band = int(machine.usable.value), machine.devices, band_of(job).share

    @lru_cache(maxsize=1)
    def traced(model: str) -> Subject:
        return overview.subject(models[model])

    def size(model: Architecture, title: str) -> int | None:
        work = works[title]
        least = (model.published_parameters or 0) * _least(work, job) / devices
        if least > budget * (1 + band):
            return int(least)
        try:
            if job != "inference":
                return int(tuning(_step(model, work, job), devices).value)
            held = sum(part.value for part in _held(traced(model.name), work))
            if held > budget * devices:
                return int(held)
            return int(_exact(traced(model.name), work, job, devices).value)
        except LLMSizeError:  # a family or a shape that cannot be traced is no candidate
            return None

    formats = [title for title in STORAGES if title != "fp32" and (title, job) not in NOT_SO]
    return search(models.values(), formats, size, budget, band=band)


def _least(work: Workload, job: Job) -> float:
    """Bytes of all devices together that no parameter does without."""
    if job == "full training":
        return float(sum(work.precision.bytes_per_parameter))
    recipe = work.storage.recipe
    format = format_named(recipe.base) if recipe else work.storage.format
    return format.bits_per_element / 8


def _held(model: Subject, work: Workload) -> Iterator[Term]:
    """What serving takes before anything is computed, on all devices together."""
    yield overview.stored(model, work.storage, work.format_of)
    yield overview.cache(model, work)


def _models(chosen: list[Choice], job: Job) -> Table:
    rows = tuple(
        Row(
            choice.model.name,
            {
                "parameters": _known("parameters", choice.model.published_parameters, "parameters"),
                "weights in": choice.format,
                "needs": _known("needed", choice.need, "bytes"),
                "headroom": _known("headroom", choice.headroom, "bytes"),
                "verdict": choice.verdict,
            },
        )
        for choice in chosen
    )
    columns = ("parameters", "weights in", "needs", "headroom", "verdict")
    return Table(f"models that fit for {job}", columns, rows, heading="model")


def _known(name: str, value: int | None, unit: str) -> Cell:
    if value is None:
        return Absent("not published")
    return fact(name, value, unit=unit, source="preset" if unit == "parameters" else "estimate",
                grade="exact" if unit == "parameters" else "formula")  # fmt: skip
