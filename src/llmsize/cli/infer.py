"""`llmsize infer`: what serving a model takes, where, and what a card leaves for the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Annotated, NamedTuple

from llmsize import presets, units
from llmsize.anatomy import LoRA, traced
from llmsize.anatomy.adapters import ALL_LINEAR
from llmsize.answer import Estimate
from llmsize.architecture import Architecture
from llmsize.cli import machines, options
from llmsize.cli.declare import Option, choosing, counting
from llmsize.cli.infer_answer import estimate, sweep
from llmsize.cli.jobs import engine_on
from llmsize.cli.machines import Hardware
from llmsize.cli.options import Model
from llmsize.cli.served import PREDICTION, Setting, Subject, own_recipe, recipes, restored
from llmsize.engine import Engine, scheduled
from llmsize.errors import LLMSizeError, printable
from llmsize.formats import TF32, TRAINED, Format
from llmsize.hardware import Accelerator
from llmsize.memory.llamacpp.cache import Server
from llmsize.memory.serving import PLAIN_SERVER, Serving, has_encoder
from llmsize.memory.serving import adapters as adapters_of
from llmsize.memory.weights import Recipe
from llmsize.planning import serving as asking
from llmsize.planning.serving import Budget
from llmsize.planning.support import (
    check_draft,
    check_prediction,
    check_support,
    computed_in,
)
from llmsize.quick_dataclasses import replace
from llmsize.units import GIB

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
MEANT = {
    "context": "tokens of each sequence", "batch": "sequences at once", "users": "users at once",
    "gpu-layers": "layers on the devices",
}  # fmt: skip
"""What the solved numbers count."""
OFFLOADED = ("cpu", "disk")
MOST_ROWS = 64
"""Of a sweep."""


# fmt: off
Contexts = Annotated[str, Option(
    "--context", "--seq-len", metavar="TOKENS",
    show_default="4096, or the model's own if fewer",
    help="Tokens per sequence; `4096,32768` or `4096:131072:x2` for a table.")]
Prompt = Annotated[int | None, counting(
    "--prompt", what="prompt", metavar="TOKENS", show_default="the whole context",
    help="Tokens of each prompt.")]
Batches = Annotated[str, Option(
    "--batch", "--users", metavar="N", help="Sequences at once, or several to compare.")]
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
MaxSequences = Annotated[int | None, Option(
    "--max-num-seqs", metavar="N", min=1, show_default="by card",
    help="Sequences that it warms up for.")]
MaxTokens = Annotated[int | None, Option(
    "--max-num-batched-tokens", metavar="TOKENS", min=1, show_default="by card",
    help="Tokens computed at once.")]
Eager = Annotated[bool, Option("--enforce-eager", help="Without CUDA graphs.")]
TensorSplit = Annotated[str, Option(
    "--tensor-split", metavar="SHARES", show_default="equal",
    help="Share of the layers of every device, such as `3,1`.")]
FlashAttention = Annotated[bool, Option(
    "--flash-attention/--no-flash-attention", help="The kernel that `-fa` chooses.")]
Offload = Annotated[str | None, choosing(
    "--offload", known=OFFLOADED, what="place to offload to", metavar="PLACE", show_default=False,
    help="As many layers on the devices as fit, the others there")]
Fit = Annotated[str | None, choosing(
    "--fit", known=FITTED, what="quantity to solve for", metavar="WHAT", show_default=False,
    help="Solve for the best that fits")]
# fmt: on


class Load(NamedTuple):
    """What is asked at once."""

    context: Contexts = ""
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


class Scheduling(NamedTuple):
    """vLLM's scheduler."""

    sequences: MaxSequences = None
    tokens: MaxTokens = None
    eager: Eager = False


class LlamaCpp(NamedTuple):
    """llama.cpp and what runs it."""

    ubatch: Ubatch = 512
    tensor_split: TensorSplit = ""
    flash_attention: FlashAttention = True


def infer(
    model: Model,
    *,
    engine: options.EngineName = "",
    load: Load,
    formats: Formats,
    placement: Placement,
    beside: Beside,
    scheduling: Scheduling,
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
    runs = presets.get(Engine, engine or _usual_engine(architecture, formats))
    _check_together(runs, placement, beside, budget)
    if machine:
        runs = engine_on(machine, runs)
    runs = _scheduled(runs, scheduling)
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
        return sweep(subject, [(each, _serving(asked, each)) for each in settings], budget)
    question, name = _serving(asked, settings[0]), settings[0].stored
    if what := _solved_for(placement.offload, fit):
        question, name = _solved(question, name, what, budget, subject)
    made = estimate(subject, question, name, budget)
    return replace(made, notes=(*_found(fit, question, name, made), *made.notes))


def _usual_engine(architecture: Architecture, formats: Formats) -> str:
    """What runs the weights as they are asked for, or else as they are stored."""
    first = next(iter(options.names(formats.quant)), "")
    asked = options.storage(first, served=True) if first else options.own_storage(architecture)
    return options.usual_engine(asked)


def _check_together(
    engine: Engine, placement: Placement, beside: Beside, budget: Budget | None
) -> None:
    """Raise `LLMSizeError` for options that say nothing about what is asked."""
    if beside.rank != Beside().rank and not beside.adapters:
        raise LLMSizeError("a rank of no adapters", hint="add how many: `--adapters 4`")
    if placement.utilization is None:
        return
    if engine.allocation != "pool":
        raise LLMSizeError(
            f"{engine.title} takes what it needs, and no share of a device",
            hint="leave out `--gpu-memory-utilization`, or add `--engine vllm`",
        )
    if budget is None:
        raise LLMSizeError("a share of what?", hint="give a card: `--gpu h100` or `--vram 80GB`")


def _scheduled(engine: Engine, given: Scheduling) -> Engine:
    """The engine with what it is told. Raises `LLMSizeError` for one without such options."""
    if given == Scheduling():
        return engine
    if not engine.warm_sequences:
        raise LLMSizeError(
            f"{engine.title} has none of vLLM's options for its scheduler",
            hint="add `--engine vllm`; llama.cpp has `--ubatch`",
        )
    return scheduled(engine, given.sequences, given.tokens, eager=given.eager)


class Asked(NamedTuple):
    """All that a question is about but the setting, of which there may be several."""

    subject: Subject
    load: Load
    placement: Placement
    beside: Beside
    server: Server
    devices: int
    """Of each stage."""


def _settings(load: Load, formats: Formats, subject: Subject) -> Iterator[Setting]:
    """Every combination of what is asked for."""
    asked = load.context or str(options.usual_length(subject.architecture))
    contexts, batches = _values(asked, "context"), _values(load.batch, "batch")
    _check_lengths(load, contexts, apart=has_encoder(subject.trace))
    for stored in options.names(formats.quant) or (own_recipe(subject),):
        for context, batch in product(contexts, batches):
            yield Setting(stored, context, batch)


def _serving(asked: Asked, setting: Setting) -> Serving:
    """The question for one setting."""
    load, placement = asked.load, asked.placement
    prompt = load.prompt or 0
    if not has_encoder(asked.subject.trace):
        prompt = min(prompt, setting.context)
    made = replace(
        asked.subject.stored(setting.stored), context=setting.context, batch=setting.batch,
        prompt=prompt, rows=max(load.beams, load.returned),
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
    return replace(question, drafting=drafting.stored(own_recipe(drafting)))


def _check_lengths(load: Load, contexts: Sequence[int], *, apart: bool) -> None:
    """Raise `LLMSizeError` for a prompt that no context holds and for sequences without a beam.

    A prompt is `apart` from the context where an encoder reads it.
    """
    if not apart and load.prompt is not None and load.prompt > max(contexts):
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
    _check_computed(formats.dtype)
    format = presets.get(Format, formats.dtype or options.own_dtype(architecture) or options.SILENT)
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


def _check_computed(dtype: str) -> None:
    """Raise `LLMSizeError` for a format that weights are stored in and nothing is computed in."""
    if not dtype:
        return
    format = presets.find(Format, dtype)
    if presets.find(Recipe, dtype) if format is None else format not in (*TRAINED, TF32):
        raise LLMSizeError(
            f"nothing is computed in `{printable(dtype)}`",
            hint=f"weights are stored so by `--quant {printable(dtype)}`; "
            "`--dtype` is bf16, fp16 or fp32",
        )


def offloaded(
    architecture: Architecture, engine: Engine, name: str,
    *, context: int, batch: int, memory: int,
) -> Serving | None:  # fmt: skip
    """As many layers on a device of that memory as fit, the rest in host memory.

    `name` is how the weights are stored; `None` if not even the rest of the model fits.
    """
    subject = _subject(architecture, engine, Formats())
    made = replace(subject.stored(name), context=context, batch=batch)
    return asking.largest_that_fits(made, "gpu-layers", Budget(memory))


def _shares(text: str) -> tuple[float, ...]:
    """`3,1` as numbers. Raises `LLMSizeError` for what is none."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise LLMSizeError(
            f"cannot read the split `{printable(text)}`", hint="write `3,1`"
        ) from None


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


def _found(fit: str | None, question: Serving, name: str, made: Estimate) -> Iterator[str]:
    """What `--fit` found."""
    if fit is None:
        return
    if not made.verdict:
        published = "no quantization that is commonly published fits"
        yield published if fit == "quant" else f"not even the smallest {fit} fits"
    elif fit == "quant":
        yield f"the best that fits: `{name or question.format.name}`"
    else:
        most = getattr(question, FITTED[fit].replace("-", "_"))
        yield f"the most that fits: {most:,} {MEANT[fit]}"


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
    for other in recipes(subject):  # from the best
        made = restored(question, subject, other)
        if asking.fits(made, budget):
            return made, other
    return question, name
