"""`llmsize fits`: what a memory can hold, or whether it holds one model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Annotated, NamedTuple

from llmsize import presets
from llmsize.answer import Absent, Cell, Estimate, Row, Table
from llmsize.architecture import Architecture
from llmsize.cli import catalogue, machines, options
from llmsize.cli.declare import Option, choosing, counting
from llmsize.cli.estimate import format_named
from llmsize.cli.fits_advice import layout, limits, remedies
from llmsize.cli.jobs import (
    band_of,
    in_detail,
    is_followed,
    multiplies,
    need_of,
    on,
    places_of,
    refusal,
    runtime,
    step,
    workload,
)
from llmsize.cli.machines import Hardware
from llmsize.cli.processes import divided
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError, did_you_mean, printable
from llmsize.formats import FP16
from llmsize.hardware import Accelerator, Instance, Machine, peak, rented
from llmsize.hardware import machine as machine_of
from llmsize.memory import overview
from llmsize.memory.overview import ADAPTERS, JOBS, Job, Storage, Subject, Workload
from llmsize.planning.catalogue import Choice, Filter, enough
from llmsize.planning.fits import verdict
from llmsize.planning.support import check_support
from llmsize.quick_dataclasses import replace
from llmsize.term import Term, term
from llmsize.units import format_bytes, format_count, format_share

EXAMPLES = (
    "llmsize fits --vram 16GB",
    "llmsize fits --gpu rtx-4090 --context 8192",
    "llmsize fits llama-2-7b --vram 16GB",
    "llmsize fits llama-2-7b --gpu t4 --job qlora && echo yes",
    "llmsize fits llama-3.1-70b --dtype nf4 --which gpu",
)

SHOWN = 20
"""Presets that are listed without `--all`."""
JOB_NAMES: dict[str, Job] = {
    "inference": "inference", "lora": "LoRA", "qlora": "QLoRA", "full": "full training"
}  # fmt: skip
SAYS = {"fits": "fits", "tight": "is tight on", "does not fit": "does not fit"}
BEYOND = "is just too large for"
"""What is said in place of *tight* where the estimate itself is above the memory."""


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
MinParameters = Annotated[
    int | None,
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
    context: options.OptionalContext = None
    rank: Rank = ADAPTERS.rank
    engine: options.EngineName = ""

    def about(self, model: Architecture | None = None) -> Use:
        """With the tokens that are usual for that model, or for any, where none are asked for."""
        usual = options.usual_length(model) if model else options.CONTEXT
        return self._replace(context=self.context or usual)

    def workload(self, storage: Storage) -> Workload:
        """The same with the weights stored in that way."""
        made = workload(storage, self.batch, self.context or options.CONTEXT, self.engine)
        return made._replace(lora=replace(made.lora, rank=self.rank))

    def question(self, **first: str | int | None) -> dict[str, str | int | None]:
        """The knobs as the answer repeats them, behind what comes first."""
        return first | self._asdict() | {"dtype": self.dtype or None, "engine": self.engine or None}


class Listing(NamedTuple):
    """Which models are listed."""

    commercial: options.Commercial = False
    family: options.Family = ""
    min_params: MinParameters = None
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
    _check_together(model, which, use, listing, hardware, strict=strict)
    if which:
        return _which(model, which, use, listing.everything)
    machine = machines.machine(hardware)
    if machine is None:
        raise LLMSizeError("no memory to fit into", hint="give `--vram 16GB` or `--gpu rtx-4090`")
    if model:
        return _one(model, hardware, machine, use, strict)
    return _largest(machine, use, listing)


def _check_together(
    model: str | None, which: str | None, use: Use, listing: Listing, hardware: Hardware,
    *, strict: bool,
) -> None:  # fmt: skip
    """Raise `LLMSizeError` for options that say nothing about what is asked."""
    if use.engine and use.job != "inference":
        raise LLMSizeError("an engine serves and does not train", hint="leave out `--engine`")
    if use.rank != ADAPTERS.rank and use.job not in ("lora", "qlora"):
        raise LLMSizeError("only adapters have a rank", hint="add `--job lora` or `--job qlora`")
    if which and hardware != Hardware():
        raise LLMSizeError(
            "`--which` goes through all hardware that is known",
            hint="leave out `--gpu`, `--vram`, `--gpus`, `--instance` and `--reserve`",
        )
    if model and listing._replace(everything=False) != Listing():
        raise LLMSizeError(
            "`--commercial`, `--family` and `--min-params` choose among models",
            hint="leave them out, or MODEL",
        )
    if model and listing.everything and not which:
        raise LLMSizeError("`--all` is for a list", hint="leave it out, or MODEL")
    if strict and (which or not model):
        raise LLMSizeError("`--strict` is about one MODEL on one machine", hint="leave it out")


def _families(name: str) -> tuple[str, ...]:
    """The one family, if any. Raises `LLMSizeError` for one that no model is of."""
    known = {model.family for model in presets.every(Architecture).values()} if name else ()
    if name and name not in known:
        raise LLMSizeError(
            f"no model is of the family `{printable(name)}`",
            hint=did_you_mean(name, known, otherwise="`llmsize show models` names them"),
        )
    return (name,) if name else ()


def _asked(
    architecture: Architecture, use: Use, accelerator: Accelerator | None = None
) -> tuple[Subject, Workload]:
    """The model, and what is done with it in `dtype`, in the engine's own files or as it is stored.

    Raises `LLMSizeError` for a `dtype` that the accelerator has no rate for, and where the software
    that would run it does not.
    """
    if use.job == "inference" and not use.dtype:
        files = presets.get(Engine, use.engine).recipe if use.engine else ""
        own_storage = options.own_storage(architecture)
        storage = options.storage(files, served=True) if files else own_storage
    else:
        own = options.own_dtype(architecture) or options.SILENT
        kept = use.dtype or ("nf4" if use.job == "qlora" else own)
        engine = presets.get(Engine, use.engine) if use.engine else None
        storage = catalogue.storage(kept, engine, served=use.job == "inference")
    if use.job in ("lora", "qlora"):
        _check_base(storage, use.job)
    if accelerator is not None and not multiplies(accelerator, storage.format.name):
        if use.dtype and storage.recipe is None:
            peak(accelerator, storage.format)  # raises, and says what it multiplies instead
        name = storage.name if storage.recipe else FP16.name
        storage = storage._replace(name=name, format=FP16)
    work = use.workload(storage)
    base = [format_named(storage.recipe.base)] if storage.recipe else []
    check_support(runtime(work, JOB_NAMES[use.job]), accelerator, *base)
    return overview.subject(architecture), work


def _check_base(storage: Storage, job: str) -> None:
    """Raise `LLMSizeError` for weights that no adapters are trained beside, or not by that name."""
    if reason := overview.not_adapted(storage):
        raise LLMSizeError(reason, hint="name another `--dtype`, such as `bf16` or `nf4`")
    if job == "qlora" and storage.recipe is None:
        raise LLMSizeError(
            "QLoRA trains beside quantized weights", hint="`--job lora`, or `--dtype nf4`"
        )


def _one(name: str, hardware: Hardware, machine: Machine, use: Use, strict: bool) -> Estimate:
    """Whether one model fits, part by part, and what to do if it does not."""
    architecture, job = options.architecture(name), JOB_NAMES[use.job]
    use = use.about(architecture)
    question = use.question(model=name, memory=int(machine.usable.value), devices=machine.devices)
    model, work = _asked(architecture, use, machine.accelerator)
    work = on(machine, work)
    budget = int(machine.usable.value)
    needed, *elsewhere = places_of(model, work, job, machine.devices, budget)
    said, stored = verdict(needed.value, budget, band=band_of(work, job).share), work.storage.name
    each = " on each device" if machine.devices > 1 else ""
    rows = [Row(part.name, {"bytes": part}) for part in needed.parts if part.value]
    rows.append(Row(f"needed{each}", {"bytes": needed}))
    holds = needed.value <= budget
    says = SAYS[said] if holds or said != "tight" else BEYOND
    headline = (
        f"{architecture.name} {says} {machine.title}: {job} in {stored} needs "
        f"{format_bytes(needed.value)}{each}, and there are {format_bytes(budget)}"
    )
    advised = limits(model, work, job, machine, needed) if holds else (
        remedies(model, work, job, machine))  # fmt: skip
    told = (*_of_room(model, work, job, machine, needed), *advised)
    return Estimate(
        "fits", question | {"dtype": stored, "answer": said}, headline,
        (Table("", ("bytes",), tuple(rows), heading=f"{job} in {stored}", total=True),
         Table("", ("bytes",), tuple(_room(machine, needed, elsewhere)))),
        _assumptions(work, job, architecture, machine.devices),
        (*told, *_in_detail(name, model, work, job, machine, hardware), _band(work, job)),
        verdict=said == "fits" if strict else holds,
    )  # fmt: skip


def _of_room(
    model: Subject, work: Workload, job: Job, machine: Machine, needed: Term
) -> Iterator[str]:
    """What the allocator does where a step of training would cache more than there is."""
    if machine.devices == 1 and is_followed(work, job):
        from llmsize.cli.train_answer import of_room

        yield from of_room(step(model.architecture, work, job), needed, int(machine.usable.value))


def _room(machine: Machine, needed: Term, elsewhere: Iterable[Term]) -> Iterator[Row]:
    """The memory of a device and what is left of it; what is needed of the host's."""
    rest = term(
        "headroom", "memory - needed", unit="bytes", memory=int(machine.usable.value),
        needed=needed.value, grade=needed.grade,
    )  # fmt: skip
    yield Row("memory", {"bytes": machine.usable})
    yield Row("headroom", {"bytes": rest})
    for place in elsewhere:
        yield Row(f"needed on the {place.name}", {"bytes": place})


def _in_detail(
    name: str, model: Subject, work: Workload, job: Job, machine: Machine, hardware: Hardware
) -> Iterator[str]:
    """The command that says the same and more; `train` divides nothing between devices."""
    command = in_detail(name, model.architecture, work, job)
    if command and (job == "inference" or machine.devices == 1):
        yield f"in detail: `{command} {machines.words(hardware)}`"


MORE = "larger ones are enough, too (`--all`)"
"""What is said where not all hardware is listed."""


def _which(name: str | None, kind: str, use: Use, everything: bool) -> Estimate:
    """The hardware that is enough for a model, smallest first."""
    if name is None:
        raise LLMSizeError("`--which` needs a model", hint="`llmsize fits llama-2-7b --which gpu`")
    job = JOB_NAMES[use.job]
    architecture = options.architecture(name)
    use = use.about(architecture)
    model, work = _asked(architecture, use)
    need = lru_cache(maxsize=64)(lambda devices: int(need_of(model, work, job, devices).value))
    offers = [
        machine
        for machine in OFFERS[kind]()
        if machine.accelerator is None
        or multiplies(machine.accelerator, work.storage.format.name)
        or work.storage.recipe is not None
        if not refusal(work, job, machine.accelerator)
    ]
    found = enough(
        [(machine, machine.devices, int(machine.usable.value)) for machine in offers],
        need,
        band=band_of(work, job).share,
    )
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
        _assumptions(work, job, model.architecture),
        (*([MORE] if len(rows) < len(found) else []), *([COUNTED] if job != "inference" else []),
         _band(work, job)), verdict=bool(found),
    )  # fmt: skip


def _offer(machine: Machine, need: int, said: str) -> Row:
    """One machine, and how it holds what is needed on each of its devices."""
    name = machine.instance.name if machine.instance else machine.title
    return Row(name, {
        "devices": str(machine.devices), "memory of each": machine.usable,
        "needed on each": catalogue.known("needed", need, "bytes"), "verdict": said,
    })  # fmt: skip


AT_ONCE = (
    "all prompts are read at once, as transformers does; engines that read them in pieces need "
    "less for activations (`--engine vllm`)"
)
"""What is said of more than one sequence."""


def _assumptions(
    work: Workload, job: Job, architecture: Architecture, devices: int = 1
) -> tuple[str, ...]:
    told = [f"{work.batch} × {work.context:,} tokens (`--batch`, `--context`)"]
    told += options.beyond_positions(architecture, work.context)
    if devices > 1:
        whole = "" if job == "inference" else "; `llmsize train --gpus` has all of it on each (DDP)"
        told.append(f"{devices:,} devices: {layout(work, job)}{whole}")
    if job == "inference" and work.batch > 1 and not (work.engine and work.engine.prefill):
        told.append(AT_ONCE)
    if job != "inference":
        told.append("every layer is recomputed in the backward pass (gradient checkpointing)")
        told += options.language_model_alone(architecture)
        told += options.requantized(architecture, work.storage.name)
    return tuple(told)


def _band(work: Workload, job: Job) -> str:
    """How certain the verdict is, and by what."""
    band, runs = band_of(work, job), runtime(work, job)
    share = format_share(band.share)
    if not band.cases:
        return (f"no total of {runs.title or runs.name} was measured; within {share}, the widest "
                "error of other engines' estimates, it is `tight`")  # fmt: skip
    return (
        f"95 % of {band.cases} measured runs are within {share} of the estimate; inside that band "
        "it is `tight`"
    )


def _largest(machine: Machine, use: Use, listing: Listing) -> Estimate:
    """The largest count for every format and job, and the presets that fit for one job."""
    use = use.about()
    job, engine = JOB_NAMES[use.job], presets.get(Engine, use.engine) if use.engine else None
    ways = {use.dtype: use.dtype} if use.dtype else catalogue.storages(engine)
    works = {
        title: on(machine, use.workload(catalogue.storage(name, engine, served=bool(engine))))
        for title, name in ways.items()
    }
    each = divided if listing.everything else map
    table = catalogue.counts(works, machine, ("inference",) if engine else JOBS, each)
    usual = "nf4" if job == "QLoRA" else "fp16/bf16"
    title = usual if usual in works else next(iter(works))
    filter = Filter(
        listing.commercial, _families(listing.family), min_parameters=listing.min_params or 0
    )
    found = catalogue.models_that_fit(
        works, machine, job, filter, engine, everything=listing.everything
    )
    shown = list(found if listing.everything else islice(found, SHOWN))
    more = next(found, None) is not None
    most = table.column(job)[title]
    return Estimate(
        "fits",
        use.question(model=None, memory=int(machine.usable.value), devices=machine.devices),
        _at_most(machine, most, job, title),
        (table, catalogue.models_table(shown, job)),
        (
            f"{use.batch} × {use.context:,} tokens (`--batch`, `--context`)",
            "largest counts: the usual proportions of a decoder with 8 heads of keys (models with "
            "fewer, or none, can be larger, as the list shows), and for training, every layer "
            "recomputed in the backward pass (gradient checkpointing)",
        ),
        (*_of_list(shown, job, more=more), _band(works[title], job)),
        verdict=None if shown or isinstance(most, Term) else False,
    )


COUNTED = (
    "needs are tensors and context: what the allocator caches above them where there is room, and "
    "whether gaps between them make one fail that is near the limit, `llmsize fits MODEL` says"
)
"""What is said of needs of training that are listed."""


def _of_list(shown: Sequence[Choice], job: Job, *, more: bool) -> Iterator[str]:
    """What the list of models leaves out, or that none is in it."""
    if shown and job != "inference":
        yield COUNTED
    if not shown:
        yield "no model that llmsize knows and that is asked for fits"
    elif more:
        yield "smaller models fit, too (`--all`)"


DOES = {
    "inference": "serves up to {}", "full training": "trains up to {}",
    "LoRA": "tunes up to {} by LoRA", "QLoRA": "tunes up to {} by QLoRA",
}  # fmt: skip


def _at_most(machine: Machine, most: Cell, job: Job, stored: str) -> str:
    """How large a model can be, or why none can."""
    stored = stored.replace("fp16/bf16", "16 bit")
    if isinstance(most, Term):
        does = DOES[job].format(f"{format_count(most.value)} parameters")
        return f"{machine.title} {does} in {stored}"
    reason = most.reason if isinstance(most, Absent) else most
    return f"{machine.title}, {job} in {stored}: {reason}"
