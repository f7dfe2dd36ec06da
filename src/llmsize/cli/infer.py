"""`llmsize infer`: what serving a model takes, where, and what a card leaves for the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Annotated, NamedTuple

from llmsize import presets, units
from llmsize.anatomy import LoRA, Trace, traced
from llmsize.anatomy.adapters import ALL_LINEAR
from llmsize.anatomy.towers import towers
from llmsize.answer import Absent, Cell, Estimate, Row, Table
from llmsize.architecture import Architecture
from llmsize.cli import machines, options
from llmsize.cli.declare import Option, choosing, counting
from llmsize.cli.jobs import engine_on
from llmsize.cli.machines import Hardware
from llmsize.cli.options import Model
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError, printable
from llmsize.formats import Format
from llmsize.hardware import Accelerator
from llmsize.memory.llamacpp import Server
from llmsize.memory.serving import ELSEWHERE, PLAIN_SERVER, Serving, fullest, need, pool, serving
from llmsize.memory.serving import adapters as adapters_of
from llmsize.memory.weights import Recipe
from llmsize.planning import changes as planning
from llmsize.planning import serving as asking
from llmsize.planning.serving import Budget
from llmsize.planning.support import (
    check_draft,
    check_prediction,
    check_support,
    computed_in,
    obstacle_to,
)
from llmsize.sources.quantization import recipe_name
from llmsize.term import Term, total
from llmsize.throughput import Bandwidth, efficiency, measured_bandwidth
from llmsize.units import GIB, format_bytes, format_count, format_share

EXAMPLES = (
    "llmsize infer llama-3.1-8b --context 32768",
    "llmsize infer llama-3.1-8b --engine vllm --gpu h100-sxm-80gb --context 8192",
    "llmsize infer llama-3.3-70b --engine llama.cpp --quant q4_k_m --gpu rtx-4090 --gpus 2",
    "llmsize infer qwen2.5-7b --engine ollama --fit context --vram 12GB",
    "llmsize infer gemma-3-12b --context 4096:131072:x2",
)

FITTED = {
    "context": "context", "batch": "batch", "users": "batch", "quant": "quant",
    "gpu-layers": "gpu-layers",
}  # fmt: skip
"""What `--fit` solves for, and what that is called in a question."""
OFFLOADED = ("cpu", "disk")
MOST_ROWS = 64
"""Of a sweep."""
SHOWN_DEVICES = 4


@dataclass(frozen=True, slots=True)
class Subject:
    """A model for one engine, before it is known how its weights are stored."""

    architecture: Architecture
    trace: Trace
    engine: Engine
    format: Format
    cache: Format
    accelerator: Accelerator | None = None
    assumed: str = ""
    """Why it is not computed in the format of its weights."""

    def stored(self, name: str) -> Serving:
        """The model with weights by the recipe or in the format of that name.

        Raises `LLMSizeError` where the engine or the accelerator does not have it.
        """
        recipe = (
            presets.find(Recipe, name) if name else None
        )  # `fp8` is a format, too: of every weight
        storage = options.storage(name) if name and recipe is None else None
        if self.engine.allocation == "buffers" and recipe is None:
            recipe = presets.get(Recipe, f"gguf-{name}" if storage else self.engine.recipe)
        plain = storage.format if storage and recipe is None else self.format
        if recipe is None and storage and plain.block_bytes < 2:
            raise LLMSizeError(
                f"`{plain.name}` alone does not say how weights are quantized",
                hint=f"name a recipe: {', '.join(_named_alike(plain.name))}",
            )
        if recipe is not None:
            check_support(self.engine, self.accelerator, _format_named(recipe.base))
        return serving(
            self.architecture, self.trace, self.engine, recipe, _format_named, format=plain,
            keys=self.cache, values=self.cache,
        )  # fmt: skip


# fmt: off
EngineName = Annotated[str, Option(
    "--engine", metavar="NAME", help="See `llmsize show engines`.",
    autocompletion=options.completing("engines"))]
Contexts = Annotated[str, Option(
    "--context", metavar="TOKENS",
    help="Tokens per sequence; `4096,32768` or `4096:131072:x2` for a table.")]
Prompt = Annotated[int | None, counting(
    "--prompt", what="prompt", metavar="TOKENS", show_default="the whole context",
    help="Tokens of each prompt.")]
Batches = Annotated[str, Option(
    "--batch", metavar="N", help="Sequences at once, or several to compare.")]
Quantization = Annotated[str, Option(
    "--quant", metavar="RECIPE", show_default="the checkpoint's own",
    help="How weights are stored, or several: `llmsize show recipes`.",
    autocompletion=options.completing("recipes"))]
ComputeFormat = Annotated[str, Option(
    "--dtype", metavar="FORMAT", show_default="the checkpoint's own",
    help="What is computed in: `bf16`, `fp16`, `fp32`.",
    autocompletion=options.completing("formats"))]
CacheFormat = Annotated[str, Option(
    "--kv-dtype", metavar="FORMAT", show_default="the engine's own",
    help="Format of the cache, such as `fp8` or `q8_0`.",
    autocompletion=options.completing("formats"))]
Utilization = Annotated[float | None, Option(
    "--gpu-memory-utilization", metavar="SHARE", show_default="the engine's own",
    help="Share of a device that an engine with a pool allocates.")]
GpuLayers = Annotated[int | None, Option(
    "--gpu-layers", metavar="N", min=0, show_default="all",
    help="Layers on the devices; the others are in host memory.")]
Stages = Annotated[int, Option(
    "--stages", metavar="N", min=1, help="Of a pipeline; each has its share of the devices.")]
Beams = Annotated[int, Option("--beams", metavar="N", min=1, help="Beams of each sequence.")]
Returned = Annotated[int, Option(
    "--num-return-sequences", metavar="N", min=1, help="Continuations of each prompt.")]
SharedPrefix = Annotated[int, Option(
    "--shared-prefix", metavar="TOKENS", min=0,
    help="Tokens that all sequences begin with; a pool keeps them once.")]
Adapters = Annotated[int, Option(
    "--adapters", metavar="N", min=0, help="LoRA adapters served at once.")]
AdapterRank = Annotated[int, Option("--rank", metavar="R", min=1, help="Rank of those adapters.")]
DraftModel = Annotated[str, Option(
    "--draft", metavar="MODEL", show_default=False,
    help="A draft model for speculative decoding, or `mtp`: the model's own prediction layer.",
    autocompletion=options.completing("models"))]
Ubatch = Annotated[int, Option("--ubatch", metavar="N", min=1, help="Tokens computed at once.")]
CpuMoe = Annotated[int, Option(
    "--cpu-moe", "--n-cpu-moe", metavar="N", min=0,
    help="Layers whose experts stay in host memory.")]
CpuOffload = Annotated[int, Option(
    "--cpu-offload-gb", metavar="GIB", min=0,
    help="Weights that every device leaves in host memory.")]
TensorSplit = Annotated[str, Option(
    "--tensor-split", metavar="SHARES", show_default="equal",
    help="Share of the layers of every device, such as `3,1`.")]
FlashAttention = Annotated[bool, Option(
    "--flash-attention/--no-flash-attention", help="The kernel that `-fa` chooses.")]
Offload = Annotated[str | None, choosing(
    "--offload", known=OFFLOADED, what="place to offload to", metavar="PLACE", show_default=False,
    help="As many layers on the devices as fit, the others there")]
Fit = Annotated[str | None, choosing(
    "--fit", known=FITTED, what="knob to solve for", metavar="WHAT", show_default=False,
    help="Solve for the best that fits")]
# fmt: on


class Load(NamedTuple):
    """What is asked at once."""

    context: Contexts = "4096"
    prompt: Prompt = None
    batch: Batches = "1"
    beams: Beams = 1
    returned: Returned = 1
    shared: SharedPrefix = 0


class Formats(NamedTuple):
    """Formats."""

    quant: Quantization = ""
    dtype: ComputeFormat = ""
    kv_dtype: CacheFormat = ""


class Placement(NamedTuple):
    """Where it is."""

    utilization: Utilization = None
    gpu_layers: GpuLayers = None
    stages: Stages = 1
    offload: Offload = None
    cpu_moe: CpuMoe = 0
    cpu_offload_gb: CpuOffload = 0


class Beside(NamedTuple):
    """Beside the model."""

    adapters: Adapters = 0
    rank: AdapterRank = 16
    draft: DraftModel = ""


class LlamaCpp(NamedTuple):
    """llama.cpp and what runs it."""

    ubatch: Ubatch = 512
    tensor_split: TensorSplit = ""
    flash_attention: FlashAttention = True


def infer(
    model: Model,
    *,
    engine: EngineName = "transformers",
    load: Load,
    formats: Formats,
    placement: Placement,
    beside: Beside,
    llama_cpp: LlamaCpp,
    fit: Fit = None,
    hardware: Hardware,
    assume_family: options.AssumeFamily = "",
) -> Estimate:
    """Memory to serve MODEL with an engine: weights, cache, workspace, and what is left."""
    machine = machines.machine(hardware)
    budget = Budget(int(machine.usable.value), placement.utilization) if machine else None
    architecture = options.assuming(options.architecture(model), assume_family)
    accelerator = machine.accelerator if machine else None
    runs = presets.get(Engine, engine)
    if machine:
        runs = engine_on(machine, runs)
    subject = _subject(architecture, runs, formats, accelerator)
    asked = Asked(
        subject, load, placement, beside, _server(llama_cpp, subject.engine),
        _staged(machine.devices if machine else hardware.gpus or 1, placement.stages),
    )  # fmt: skip
    settings = list(_settings(load, formats, subject))
    if len(settings) > 1:
        if fit or placement.offload:
            raise LLMSizeError(
                "a table of several values is not solved", hint="give one value beside `--fit`"
            )
        return _sweep(subject, [(each, _serving(asked, each)) for each in settings], budget)
    question, name = _serving(asked, settings[0]), settings[0].stored
    if what := _solved_for(placement.offload, fit):
        question, name = _solved(question, name, what, budget, subject)
    return _estimate(subject, question, name, budget)


class Asked(NamedTuple):
    """All that a question is about but the setting, of which there may be several."""

    subject: Subject
    load: Load
    placement: Placement
    beside: Beside
    server: Server
    devices: int
    """Of each stage."""


class Setting(NamedTuple):
    """One row of a table: how the weights are stored, tokens and sequences."""

    stored: str
    context: int
    batch: int


def _settings(load: Load, formats: Formats, subject: Subject) -> Iterator[Setting]:
    """Every combination of what is asked for."""
    contexts, batches = _values(load.context, "context"), _values(load.batch, "batch")
    _check_lengths(load, contexts)
    for stored in options.names(formats.quant) or (_own_recipe(subject),):
        for context, batch in product(contexts, batches):
            yield Setting(stored, context, batch)


def _serving(asked: Asked, setting: Setting) -> Serving:
    """The question for one setting."""
    load, placement = asked.load, asked.placement
    made = replace(
        asked.subject.stored(setting.stored), context=setting.context, batch=setting.batch,
        prompt=min(load.prompt or 0, setting.context), rows=max(load.beams, load.returned),
        reordered=load.beams > 1, shared=load.shared, devices=asked.devices,
        stages=placement.stages, gpu_layers=placement.gpu_layers, server=asked.server,
        offload="disk" if placement.offload == "disk" else "host",
        host_experts=placement.cpu_moe, host_bytes=placement.cpu_offload_gb * GIB,
    )  # fmt: skip
    if asked.beside.adapters:
        lora = LoRA(rank=asked.beside.rank, targets=(ALL_LINEAR,))
        made = replace(made, beside=(adapters_of(made, asked.beside.adapters, lora),))
    return _drafted(asked.subject, asked.beside.draft, made)


def _drafted(subject: Subject, name: str, question: Serving) -> Serving:
    """With the model of that name as a draft, or with its own prediction layer; as it is for none.

    Raises `LLMSizeError` for one that does not draft for it.
    """
    if not name:
        return question
    if name == PREDICTION:
        check_prediction(subject.engine, subject.architecture, subject.trace)
        return replace(question, predicting=True)
    architecture = options.architecture(name)
    drafting = replace(subject, architecture=architecture, trace=traced(architecture))
    check_draft(subject.engine, subject.trace, drafting.trace)
    return replace(question, drafting=drafting.stored(_own_recipe(drafting)))


def _check_lengths(load: Load, contexts: Sequence[int]) -> None:
    """Raise `LLMSizeError` for a prompt that no context holds and for sequences without a beam."""
    if load.prompt is not None and load.prompt > max(contexts):
        raise LLMSizeError(
            f"a prompt of {load.prompt:,} tokens in a context of {max(contexts):,}",
            hint="`--context` counts prompt and answer together",
        )
    if 1 < load.beams < load.returned:
        raise LLMSizeError(
            f"{load.returned} sequences of {load.beams} beams",
            hint="a beam gives one sequence: ask for as many beams, or leave out `--beams`",
        )


def _server(given: LlamaCpp, engine: Engine) -> Server:
    """The options of llama.cpp. Raises `LLMSizeError` where another engine is to run."""
    server = replace(
        PLAIN_SERVER, ubatch=given.ubatch,
        tensor_split=_shares(given.tensor_split), flash_attention=given.flash_attention,
    )  # fmt: skip
    if server != PLAIN_SERVER and engine.allocation != "buffers":
        raise LLMSizeError(
            f"{engine.title} has no options of llama.cpp", hint="add `--engine llama.cpp`"
        )
    return server


def _staged(devices: int, stages: int) -> int:
    """Devices of each stage of a pipeline."""
    if devices % stages:
        raise LLMSizeError(
            f"{devices} devices are not divided into {stages} stages",
            hint="`--gpus` is the number of all devices",
        )
    return devices // stages


def _subject(
    architecture: Architecture, engine: Engine, formats: Formats,
    accelerator: Accelerator | None = None,
) -> Subject:  # fmt: skip
    """The model for an engine. Raises `LLMSizeError` for what does not run or go together."""
    format = presets.get(Format, formats.dtype or options.own_dtype(architecture) or "bf16")
    format, assumed = (format, "") if formats.dtype else computed_in(format, engine, accelerator)
    allowed = [
        format.name if name == "weights" else name for name in engine.kv_formats or ("weights",)
    ]
    cache = presets.get(Format, formats.kv_dtype or allowed[0])
    if cache.name not in allowed and not cache.name.startswith(tuple(allowed)):
        raise LLMSizeError(
            f"{engine.title} keeps no cache in `{cache.name}`",
            hint=f"formats of its cache: {', '.join(allowed)}",
        )
    check_support(engine, accelerator, format, cache)
    return Subject(architecture, traced(architecture), engine, format, cache, accelerator, assumed)


def offloaded(
    architecture: Architecture, name: str, *, context: int, batch: int, memory: int
) -> Serving | None:
    """As many layers on a device of that memory as fit, the rest in host memory.

    `name` is how the weights are stored; `None` if not even the rest of the model fits.
    """
    subject = _subject(architecture, presets.get(Engine, "transformers"), Formats())
    made = replace(subject.stored(name), context=context, batch=batch)
    return asking.largest_that_fits(made, "gpu-layers", Budget(memory))


def _own_recipe(subject: Subject) -> str:
    """How the checkpoint itself is quantized, unless the engine has files of its own."""
    return subject.engine.recipe or recipe_name(subject.architecture.stored)


def _shares(text: str) -> tuple[float, ...]:
    """`3,1` as numbers. Raises `LLMSizeError` for what is none."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise LLMSizeError(
            f"cannot read the split `{printable(text)}`", hint="write `3,1`"
        ) from None


@lru_cache(maxsize=512)
def _format_named(name: str) -> Format:
    return presets.get(Format, name)


def _values(text: str, what: str) -> list[int]:
    """`4096`, `4k,32k` or `4k:128k:x2`. Raises `LLMSizeError` for anything else."""
    if ":" not in text:
        return [units.parse_count(part, what) for part in text.split(",")]
    first, *rest = text.split(":")
    if len(rest) != 2 or not rest[1].lower().startswith("x"):
        raise LLMSizeError(
            f"cannot read the {what} `{printable(text)}`", hint="write `FIRST:LAST:xFACTOR`"
        )
    value, last = units.parse_count(first, what), units.parse_count(rest[0], what)
    factor = units.parse_count(rest[1][1:], "factor")
    found: list[int] = []
    while value <= last and factor > 1 and len(found) <= MOST_ROWS:
        found.append(value)
        value *= factor
    if not 0 < len(found) <= MOST_ROWS:
        raise LLMSizeError(
            f"`{printable(text)}` has no values or too many",
            hint=f"the factor is above 1 and a table has at most {MOST_ROWS} rows",
        )
    return found


def _solved_for(offload: str | None, fit: str | None) -> str:
    """What is solved for, if anything. Raises `LLMSizeError` for two things at once."""
    if offload and fit:
        raise LLMSizeError(
            f"`--offload {offload}` and `--fit {fit}` both solve for something",
            hint="`--offload` alone solves for the layers on the devices",
        )
    return "gpu-layers" if offload else FITTED[fit] if fit else ""


def _solved(
    question: Serving, name: str, what: str, budget: Budget | None, subject: Subject
) -> tuple[Serving, str]:
    """The question with the best value that fits; as it was where none does."""
    if budget is None:
        raise LLMSizeError("fit into what?", hint="give a card: `--gpu rtx-4090` or `--vram 24GB`")
    if what == "gpu-layers" and "layers" not in question.engine.to_host:
        return asking.least_on_host(question, budget) or question, name
    if what != "quant":
        return asking.largest_that_fits(question, what, budget) or question, name
    made = {other: _restored(question, subject, other) for other in _recipes(subject)}
    best = asking.best_that_fits(made.values(), budget)
    return next(((q, other) for other, q in made.items() if q is best), (question, name))


def _named_alike(name: str) -> list[str]:
    """Recipes that have a format's name in theirs."""
    return [recipe for recipe in presets.names(Recipe) if name in recipe] or ["llm-int8", "nf4"]


def _restored(question: Serving, subject: Subject, name: str) -> Serving:
    made = subject.stored(name)
    return replace(question, weights=made.weights, file=made.file)


CANDIDATES = ("fp8", "awq-int4-g128", "nf4")
"""What weights are stored in for engines without files of their own, from the best."""
GGUF = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q3_k_m", "q2_k")


def _recipes(subject: Subject) -> tuple[str, ...]:
    """Ways to store the weights that are commonly published for the engine, from the best."""
    engine, accelerator = subject.engine, subject.accelerator
    if engine.allocation == "buffers":
        return ("gguf-f16", *GGUF)
    if engine.name == "mlx":
        return ("", "mlx-int8-g64", "mlx-int6-g64", "mlx-int4-g64", "mlx-int3-g64")
    known = CANDIDATES[: None if engine.name.startswith("transformers") else 2]
    bases = {name: _format_named(presets.get(Recipe, name).base) for name in known}
    return ("", *(
        name for name in known
        if accelerator is None or not obstacle_to(bases[name], engine, accelerator)
    ))  # fmt: skip


# ── the answer ───────────────────────────────────────────────────────────────────────────────────


def _estimate(subject: Subject, question: Serving, name: str, budget: Budget | None) -> Estimate:
    places = need(question)
    fits = None if budget is None else asking.fits(question, budget)
    answer, assumed = [_table(places)], list(_assumptions(subject, question))
    accelerator = subject.accelerator
    if accelerator is not None and accelerator.bandwidth_gb_s and accelerator.peak_tflops:
        reached = _reached(question, accelerator)
        answer.append(_bounds(question, accelerator, reached))
        assumed.append(
            f"tokens/s as measured: {format_share(reached.median)} of the bandwidth, as one "
            f"sequence reached in published runs ({efficiency(reached).note}; {reached.title})"
        )
        if question.drafting or question.predicting:
            assumed.append("tokens/s are those of the model alone: what a draft gains is not known")
    return Estimate(
        command="infer",
        question={
            "model": question.architecture.name, "engine": question.engine.name,
            "quant": name or None, "dtype": question.format.name, "kv_dtype": question.keys.name,
            "context": question.context, "prompt": question.prompt or question.context,
            "batch": question.batch, "rows": question.rows,
            "devices": question.devices * question.stages, "stages": question.stages,
            "gpu_layers": question.gpu_layers, "host_bytes": question.host_bytes,
            "host_experts": question.host_experts,
            "draft": _draft_name(question),
            "memory_bytes": budget.memory if budget else None,
            "gpu_memory_utilization": _share(question, budget),
        },
        headline=_headline(question, name, places, budget, fits),
        answer=tuple(answer),
        assumptions=tuple(assumed),
        notes=tuple(_notes(subject, question, name, budget, fits)),
        verdict=fits,
    )  # fmt: skip


def _draft_name(question: Serving) -> str | None:
    if question.predicting:
        return PREDICTION
    return question.drafting.architecture.name if question.drafting else None


def _share(question: Serving, budget: Budget | None) -> float | None:
    if question.engine.allocation != "pool":
        return None
    given = budget.utilization if budget else None
    return question.engine.utilization if given is None else given


def _headline(
    question: Serving, name: str, places: tuple[Term, ...], budget: Budget | None,
    fits: bool | None,
) -> str:  # fmt: skip
    place = fullest(places)
    title = question.architecture.title or question.architecture.name
    what = f"{title} in {name or question.format.name}, {question.engine.title}, "
    what += f"{question.batch:,} × {question.context:,} tokens: {format_bytes(place.value)}"
    if place.name.startswith("each of "):
        what += f" on {place.name}"
    elif len(places) > 1:
        what += f" on {place.name}, the fullest," if question.devices > 1 else " on the device"
    host = next((p for p in places if p.name in ELSEWHERE), None)
    if host is not None:
        what += f" and {format_bytes(host.value)} on the {host.name}"
    what = what.removesuffix(",")
    if budget is None:
        return what
    return f"{what}, {'fits' if fits else 'does not fit'} in {format_bytes(budget.memory)}"


PREDICTION = "mtp"
"""In place of a draft model: multi-token prediction by the model itself."""

ROWS = (
    *("weights", "rotary tables", "blocks beyond tensors", "KV cache", "recurrent state"),
    *("activations", "layer on visit from the host", "left by quantizing", "matrix unpacked"),
    *("CUDA graphs", "vision tower", "audio tower", "projector", "LoRA adapters", "draft model"),
    "context and libraries",
)
"""Parts of a place in the order in which they are shown."""


def _table(places: tuple[Term, ...]) -> Table:
    """Parts by place; of many devices the fullest alone."""
    devices = [place for place in places if place.name not in ELSEWHERE]
    if len(devices) > SHOWN_DEVICES:
        places = (fullest(places), *(place for place in places if place.name in ELSEWHERE))
    parts = {place.name: {part.name: part for part in place.parts} for place in places}
    rows = [
        Row(row, {place: held[row] for place, held in parts.items() if row in held})
        for row in ROWS if any(row in held and held[row].value for held in parts.values())
    ]  # fmt: skip
    rows.append(Row("total", {place.name: place for place in places}))
    names = tuple(place.name for place in places)
    return Table("memory", names, tuple(rows), heading="what", total=True)


def _bounds(question: Serving, accelerator: Accelerator, measured: Bandwidth) -> Table:
    """What the card allows, and what was reached on cards of its kind."""
    reached: Cell = Absent("no matrix product was measured on this card in the format")
    if accelerator.measured_matmul_tflops and asking.rate(question, accelerator) in SIXTEEN_BIT:
        reached = asking.first_token(question, accelerator, measured=True)
    first: dict[str, Cell] = {
        "at best": asking.first_token(question, accelerator), "as measured": reached
    }  # fmt: skip
    later: dict[str, Cell] = {
        "at best": asking.tokens_per_second(question, accelerator),
        "as measured": asking.tokens_per_second(question, accelerator, efficiency(measured)),
    }
    rows = (Row("time to first token", first), Row("tokens/s", later))
    return Table("bounds of speed", ("at best", "as measured"), rows, heading="what")


def _reached(question: Serving, accelerator: Accelerator) -> Bandwidth:
    """What decoding reached of the bandwidth on cards of that kind with such weights."""
    known = presets.every(Bandwidth).values()
    return measured_bandwidth(known, accelerator, asking.bits_per_weight(question))


SIXTEEN_BIT = ("bf16", "fp16")
"""Rates that the measured matrix products stand for."""


def _assumptions(subject: Subject, question: Serving) -> Iterator[str]:
    engine = question.engine
    if engine.measured:
        yield f"{engine.title} {engine.versions}: measured are {', '.join(engine.measured)}"
    else:
        yield f"{engine.title} {engine.versions}: by its rules; nothing was compared with logs"
    if subject.assumed:
        yield subject.assumed
    if question.drafting and (told := check_draft(engine, question.trace, question.drafting.trace)):
        yield told
    recipe, weights = question.recipe, question.trace.weights.values()
    left = recipe is not None and recipe.linear_layers and engine.stacks_experts
    if recipe and left and any(weight.experts for weight in weights):
        yield f"the experts of a layer are one tensor, which `{recipe.name}` leaves in 16 bit"
    yield from _uncounted(question)
    positions = question.architecture.context_length
    if positions is not None and question.context > positions:
        yield (f"{question.context:,} tokens are more than the {positions:,} positions that the "
               "model was made for")  # fmt: skip


def _uncounted(question: Serving) -> Iterator[str]:
    """Parts of the checkpoint beside the language model that are in no row."""
    apart = []
    for part, parameters in towers(question.architecture.config, ""):
        if parameters is None:
            yield f"the {part} is of a kind that llmsize does not know and is not counted"
        elif question.engine.allocation == "buffers":
            apart.append(f"{part} ({format_count(parameters)} parameters)")
    if apart:
        yield f"not counted, from a file of their own (`--mmproj`): {', '.join(apart)}"


def _notes(
    subject: Subject, question: Serving, name: str, budget: Budget | None, fits: bool | None
) -> Iterator[str]:
    if budget is not None and question.engine.allocation == "pool":
        yield from _log_lines(question, budget)
    if crossing := asking.bus_bytes(question).value:
        yield f"{format_bytes(crossing)} cross the bus for every token"
    if question.host_experts and not _mixed(question):
        yield "no layer has experts: `--cpu-moe` changes nothing"
    elif question.engine.allocation == "buffers" and (
        question.gpu_layers is not None or question.host_experts
    ):
        yield "the bounds leave out how slow the host computes with what it holds"
    if budget is not None and fits is False:
        yield _advice(subject, question, name, budget)


def _mixed(question: Serving) -> bool:
    """Whether any layer has experts."""
    return any(weight.experts for weight in question.trace.weights.values())


def _log_lines(question: Serving, budget: Budget) -> Iterator[str]:
    """What the engine would print when it starts."""
    left = pool(question, budget.memory, budget.utilization)
    if left.bytes <= 0:
        taken = format_bytes(int(budget.memory * (_share(question, budget) or 1)))
        yield (f"weights and activations leave nothing to the cache of the {taken} that "
               f"{question.engine.title} takes (`--gpu-memory-utilization`)")  # fmt: skip
        return
    if left.tokens:
        yield (f"Available KV cache memory: {left.bytes / units.GIB:.2f} GiB; "
               f"GPU KV cache size: {left.tokens:,} tokens")  # fmt: skip
    yield f"Maximum concurrency for {question.context:,} tokens per request: {left.sequences:.2f}x"


def _advice(subject: Subject, question: Serving, name: str, budget: Budget) -> str:
    """The cheapest single change that makes it fit."""
    kept = next((n for n in ("fp8", "q8_0") if n in question.engine.kv_formats), None)
    size = asking.stored_bytes_of(question)
    smaller: list[tuple[str, Serving]] = []
    for other in _recipes(subject):
        if other and other != name:
            made = _restored(question, subject, other)
            if asking.stored_bytes_of(made) < size:
                smaller.append((other, made))
    known = asking.changes(
        question, budget, smaller_cache=presets.get(Format, kept) if kept else None,
        requantized=smaller,
    )  # fmt: skip
    change = planning.single(question, known, lambda changed: asking.fits(changed, budget))
    if change is None:
        return "no single change that llmsize knows makes it fit"
    needed = fullest(need(change.apply(question))).value
    return f"to make it fit: {change.name} ({format_bytes(needed)}; costs {change.costs})"


def _sweep(
    subject: Subject, asked: Sequence[tuple[Setting, Serving]], budget: Budget | None
) -> Estimate:
    """One row for each combination: parts of the fullest device."""
    rows = tuple(_of_setting(setting, question, budget) for setting, question in asked)
    fitting = sum(row.cells.get("fits") == "yes" for row in rows)
    columns = ("weights", "KV cache", "other", "total") + (("fits",) if budget else ())
    title = subject.architecture.title or subject.architecture.name
    said = f"{title}, {subject.engine.title}: {len(rows)} settings"
    if budget is not None:
        said += f", {fitting} fit in {format_bytes(budget.memory)}"
    settings = [setting for setting, _ in asked]
    return Estimate(
        command="infer",
        question={
            "model": subject.architecture.name, "engine": subject.engine.name,
            "quant": _several(each.stored for each in settings),
            "context": _several(each.context for each in settings),
            "batch": _several(each.batch for each in settings),
            "memory_bytes": budget.memory if budget else None,
        },
        headline=said,
        answer=(Table("memory", columns, rows, heading="setting"),),
        verdict=fitting > 0 if budget else None,
    )  # fmt: skip


def _of_setting(setting: Setting, question: Serving, budget: Budget | None) -> Row:
    place = fullest(need(question))
    cells: dict[str, Cell] = {
        part.name: part for part in place.parts if part.name in ("weights", "KV cache")
    }
    rest = [part for part in place.parts if part.name not in cells]
    cells |= {"other": total("other", *rest, unit="bytes"), "total": place}
    if budget is not None:
        cells["fits"] = "yes" if asking.fits(question, budget) else "no"
    stored = setting.stored or question.format.name
    return Row(f"{stored}, {setting.batch} × {setting.context:,} tokens", cells)


def _several(values: Iterable[str | int]) -> str | None:
    """Each value once, between commas; nothing for empty names."""
    return ", ".join(dict.fromkeys(str(value) for value in values)) or None
