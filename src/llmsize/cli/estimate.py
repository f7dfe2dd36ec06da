"""`llmsize estimate`: the memory of one model for inference, training, LoRA and QLoRA."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Literal

from llmsize import presets
from llmsize.answer import Absent, Cell, Estimate, Row, Table
from llmsize.architecture import Architecture
from llmsize.cli import options
from llmsize.cli.declare import Option, choosing
from llmsize.cli.options import (
    AssumeFamily,
    Batch,
    Dtype,
    OptionalContext,
    OptionalModel,
    Parameters,
    completing,
)
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError
from llmsize.formats import FP32, TRAINED, Format
from llmsize.memory import overview
from llmsize.memory.overview import COMPONENTS, JOBS, Job, Parts, Storage, Subject, Workload
from llmsize.memory.peak import beside_tensors
from llmsize.memory.weights import Recipe
from llmsize.optimizers import Optimizer, Precision, check_recipe
from llmsize.planning.needs import serving
from llmsize.quick_dataclasses import replace
from llmsize.stack import Stack
from llmsize.term import Term, total
from llmsize.units import format_bytes, format_count

EXAMPLES = (
    "llmsize estimate --params 7B --dtype fp16",
    "llmsize estimate llama-2-7b --explain",
    "llmsize estimate ./config.json --batch 8 --context 8192",
    "llmsize estimate --params 2B --dtype fp32 --convention article",
)

QLORA_BASE = "nf4"
STATES = ("weights", "gradients", "optimizer states")
"""What a training step starts from: the model states of the ZeRO paper (arXiv:1910.02054)."""
OVERHEAD = "runtime overhead"
COUNTED_AS = {
    "recurrent state": "KV cache", "matrix unpacked": "activations",
    **dict.fromkeys(
        ("context and libraries", "CUDA context and libraries", "blocks beyond tensors",
         "rotary tables"), OVERHEAD,
    ),
}  # fmt: skip
"""The rows that parts of `llmsize infer` belong to; others have a row of their own."""
WHOLE_FILE = (
    "the whole file is on the device; llama.cpp leaves the embedding to the host (`llmsize infer "
    "--engine llama.cpp`)"
)
NOT_LOADED = "the language model alone is trained"


OptimizerName = Annotated[
    str,
    Option(
        "--optimizer",
        help="`llmsize show optimizers`.",
        metavar="NAME",
        autocompletion=completing("optimizers"),
    ),
]
RecipeName = Annotated[
    str,
    Option(
        "--recipe",
        help="Copies that training keeps: `amp`, `pure-16bit`, … (`llmsize show precisions`).",
        metavar="NAME",
        autocompletion=completing("precisions"),
        show_default=False,
    ),
]
Convention = Annotated[
    Literal["default", "article"],
    choosing(
        "--convention",
        known=("default", "article"),
        what="convention",
        help="`article` counts 24 bytes per parameter for fp32 training",
        metavar="NAME",
    ),
]


def estimate(
    model: OptionalModel = None,
    params: Parameters = None,
    dtype: Dtype = "",
    batch: Batch = 1,
    context: OptionalContext = None,
    optimizer: OptimizerName = "adamw",
    recipe: RecipeName = "",
    convention: Convention = "default",
    assume_family: AssumeFamily = "",
) -> Estimate:
    """Memory of a model, or of a parameter count: weights, training, KV cache, overhead."""
    subject, assumptions = _subject(model, params, assume_family)
    work, assumed = _workload(subject, dtype, batch, context, optimizer, recipe)
    works = _works(subject, work, dtype)
    name = works["inference"].storage.name
    question = {
        "model": model, "parameters": subject.parameters, "dtype": name,
        "batch": batch, "context": work.context, "optimizer": work.optimizer.name,
        "recipe": work.precision.name, "convention": convention,
    }  # fmt: skip
    if convention == "article":
        parts = overview.article(subject.parameters, work.storage.format)
        return _answer(question, subject, name, parts, (), (ARTICLE,))
    stack = presets.get(Stack, "transformers")
    parts = {job: _parts(subject, works[job], job, stack) for job in JOBS}
    assumptions += assumed + _range(subject, work)
    notes = (*_notes(work, parts), *_of_optimizer(subject, works["full training"], parts))
    return _answer(question, subject, name, parts, assumptions, notes)


def _parts(subject: Subject, work: Workload, job: Job, stack: Stack) -> Parts:
    """What one job takes on a device at the least, as `llmsize infer` or `llmsize train` has it."""
    if job == "inference":
        return _served(subject, work)
    parts = overview.need(subject, work, job)
    if any(isinstance(parts[what], str) for what in STATES):
        return parts
    beside = beside_tensors(overview.step_of(subject, work, job), stack)
    return parts | {OVERHEAD: total(OVERHEAD, *beside)}


def _served(subject: Subject, work: Workload) -> Parts:
    """A prompt read and answered by the engine that usually runs such weights.

    The pass is that of the shape, also where that stands in for a count; the weights are all on the
    device. An encoder answers nothing, and its pass follows a published formula.
    """
    parts = overview.inference(subject, work)
    if not subject.trace.caches:
        return parts | {"KV cache": "an encoder keeps nothing of its tokens"}
    shape = subject._replace(parameters=subject.shape_parameters)
    engine = presets.get(Engine, options.usual_engine(work.storage))
    followed: dict[str, list[Term]] = {}
    for part in serving(shape, work._replace(engine=engine)).parts:
        followed.setdefault(COUNTED_AS.get(part.name, part.name), []).append(part)
    del followed["weights"]
    for what, terms in followed.items():
        made = terms[0] if len(terms) == 1 else total(what, *terms)
        parts[what] = replace(made, grade="assumed") if subject.assumed else made
    return parts


CACHED = (
    "totals of training are tensors and context; `llmsize train` adds what the allocator caches, "
    "and says whether gaps between tensors let a step fail"
)

ARTICLE = (
    "the article keeps four fp32 numbers per parameter for AdamW, 16 bytes; PyTorch keeps two "
    "moments, 8 bytes, and 16 bytes per parameter in all"
)


def _subject(model: str | None, params: int | None, family: str) -> tuple[Subject, tuple[str, ...]]:
    """The model that was named, or a shape for the count that was given, and what that assumes."""
    if bool(model) == (params is not None):
        raise LLMSizeError(
            "name a model or give `--params`, not both" if model else "no model",
            hint="`llmsize estimate llama-2-7b` or `llmsize estimate --params 7B`",
        )
    if model:
        architecture = options.assuming(options.architecture(model), family)
        return overview.subject(architecture), options.taken_for(architecture)
    assert params is not None
    from llmsize.ladder import Ladder, nearest

    ladder = presets.get(Ladder, "dense")
    rung = nearest(ladder, params)
    shape = replace(presets.get(Architecture, rung), grade="assumed")
    told = (
        f"the shape of {rung} ({format_count(ladder.rungs[rung])}), the nearest known model; "
        "the weights are exactly the count that was given"
    )
    return overview.subject(shape, params), (told,)


def _workload(
    subject: Subject, dtype: str, batch: int, context: int | None, optimizer: str, recipe: str
) -> tuple[Workload, tuple[str, ...]]:
    """The knobs as records; those that nobody set are told."""
    storage, told = _storage(subject, dtype, presets.get(Precision, recipe) if recipe else None)
    assumed = [*told]
    if context is None:
        shape = subject.architecture
        context = options.CONTEXT if subject.assumed else options.usual_length(shape)
        assumed.append(f"{context:,} tokens in each sequence")
    precision = presets.get(Precision, recipe or default_precision(storage))
    check_recipe(precision, storage.format)
    work = Workload(
        storage, precision, presets.get(Optimizer, optimizer), format_named, batch, context
    )
    assumed += options.beyond_positions(subject.architecture, context)
    if options.usual_engine(storage) == "llama.cpp":
        assumed.append(WHOLE_FILE)
    assumed.append(
        f"LoRA and QLoRA with rank {work.lora.rank} on every linear layer, "
        f"and {QLORA_BASE} for the frozen weights of QLoRA"
    )
    return work, tuple(assumed)


def _storage(
    subject: Subject, dtype: str, recipe: Precision | None
) -> tuple[Storage, tuple[str, ...]]:
    """The weights as asked for, or as published; and what that assumes.

    A checkpoint in fp32 is trained in bf16 by a recipe that has a 16-bit copy.
    """
    if dtype:
        return options.storage(dtype), ()
    own = "" if subject.assumed else options.own_dtype(subject.architecture)
    if own == "float32" and recipe is not None and (recipe.master or recipe.autocast):
        return options.storage("bf16"), (f"`{recipe.name}` has its 16-bit copies in bf16",)
    storage = options.storage(own or ("fp16" if subject.assumed else options.SILENT))
    if subject.architecture.stored and not subject.assumed:
        return storage, options.requantized(subject.architecture, storage.name)
    return storage, (f"weights in {storage.name}" + (", as published" if own else ""),)


def default_precision(storage: Storage) -> str:
    """What people mean by training weights in a format."""
    return "fp32" if storage.format == FP32 else "mixed"


@lru_cache(maxsize=512)
def format_named(name: str) -> Format:
    """The format that a recipe names."""
    return presets.get(Format, name)


def _works(subject: Subject, work: Workload, dtype: str) -> dict[Job, Workload]:
    """The knobs of every job: checkpoints are served as they are stored, QLoRA has its own base."""
    own = not (dtype or subject.assumed)
    served = options.own_storage(subject.architecture) if own else work.storage
    beside = work.storage.format if work.storage.format in TRAINED else format_named("bf16")
    base = Storage(QLORA_BASE, beside, presets.get(Recipe, QLORA_BASE))
    return {
        "inference": work._replace(storage=served), "full training": work, "LoRA": work,
        "QLoRA": work._replace(storage=base),
    }  # fmt: skip


def _range(subject: Subject, work: Workload) -> tuple[str, ...]:
    """What the cache takes in real models of this size, where the shape is assumed."""
    if not subject.assumed:
        return ()
    from llmsize.ladder import Ladder, of_size

    near = of_size(presets.get(Ladder, "dense"), subject.parameters)
    if not near:
        return ("no known model has this size; only the weights can be trusted",)
    sizes = {
        name: overview.cache(overview.subject(presets.get(Architecture, name)), work).value
        for name in near
    }
    least, most = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    return (
        f"KV cache of real models of this size: {format_bytes(sizes[least])} ({least}) to "
        f"{format_bytes(sizes[most])} ({most})",
    )


def _notes(work: Workload, jobs: dict[Job, Parts]) -> tuple[str, ...]:
    told = [CACHED]
    if work.storage.trainable:
        does = "runs" if work.precision.autocast else "keeps"
        told.append(f"training {does} {work.precision.title} (`--recipe {work.precision.name}`)")
    if work.storage.name == "fp32":
        told.append(f"{ARTICLE} (`--convention article`)")
    full, adapted = (jobs[job]["activations"] for job in ("full training", "LoRA"))
    more = isinstance(full, Term) and isinstance(adapted, Term) and adapted.value > full.value
    if more and not work.precision.autocast:
        told.append(
            "LoRA saves states, not activations: peft computes adapters in fp32 and keeps an fp32 "
            "copy of what goes into each adapted layer; recomputing the layers is what saves those "
            "(`llmsize train … --method qlora --recompute full`)"
        )
    return tuple(told)


def _of_optimizer(subject: Subject, work: Workload, jobs: dict[Job, Parts]) -> Iterator[str]:
    """That full training keeps no activations at its peak, where that is the optimizer's step."""
    job: Job = "full training"
    if isinstance(jobs[job]["activations"], str):
        return
    step = overview.step_of(subject, work, job)
    if step.phase == "step" and step.step_scratch:
        yield (
            "full training peaks while the optimizer steps: its activations are what the optimizer "
            "allocates then; batch and context count once the backward pass is higher"
        )


def _answer(
    question: dict[str, str | int | None], subject: Subject, stored: str,
    jobs: dict[Job, Parts], assumptions: tuple[str, ...], notes: tuple[str, ...],
) -> Estimate:  # fmt: skip
    sums = {job: overview.sum_of(parts) for job, parts in jobs.items()}
    names = dict.fromkeys((*COMPONENTS[:-1], *jobs["inference"]))  # towers before the overhead
    rows = [_row(name, {job: jobs[job].get(name, NOT_LOADED) for job in JOBS}) for name in names]
    rows.insert(len(STATES), _row("model states", {job: _states(jobs[job]) for job in JOBS}))
    rows.append(_row("total", sums))
    table = Table("", JOBS, tuple(rows), heading="memory", total=True)
    headline = _headline(subject, stored, jobs, sums)
    return Estimate("estimate", question, headline, (table,), assumptions, notes)


def _row(name: str, cells: dict[Job, Term | str]) -> Row:
    made: dict[str, Cell] = {
        job: cell if isinstance(cell, Term) else Absent(cell) for job, cell in cells.items()
    }
    return Row(name, made)


def _states(parts: Parts) -> Term | str:
    """Weights, gradients and optimizer states together: what a training step starts from."""
    kept = {name: parts[name] for name in STATES}
    missing = [part for part in kept.values() if isinstance(part, str)]
    return missing[0] if missing else overview.sum_of(kept, "model states")


def _headline(
    subject: Subject, stored: str, jobs: dict[Job, Parts], sums: dict[Job, Term | str]
) -> str:
    name = "" if subject.assumed else f"{subject.architecture.name}: "
    said = []
    weights = jobs["inference"]["weights"]
    if isinstance(weights, Term):
        said.append(f"weights {format_bytes(weights.value)}")
    for job in ("inference", "full training"):
        need = sums[job]
        if isinstance(need, Term):
            said.append(f"{job} {format_bytes(need.value)}")
    asked = f"{name}{format_count(subject.parameters)} parameters in {stored}"
    return f"{asked}{', ' if name else ': '}{', '.join(said)}"
