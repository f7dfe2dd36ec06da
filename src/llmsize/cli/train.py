"""`llmsize train`: the peak of a training step, when it is, and what lives then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, get_args

from llmsize import presets
from llmsize.answer import Estimate, Later
from llmsize.architecture import Architecture
from llmsize.cli import machines, options
from llmsize.cli.declare import Option, choosing, counting
from llmsize.cli.machines import Hardware
from llmsize.cli.options import Batch, Model
from llmsize.cli.train_answer import drawn, estimate
from llmsize.errors import LLMSizeError
from llmsize.formats import BF16, FP32, TRAINED, Format
from llmsize.hardware import Machine
from llmsize.memory.methods import (
    QUANTIZED,
    Biases,
    Choices,
    Recompute,
    check_options,
    method_named,
)
from llmsize.memory.objectives import OBJECTIVES, Reference, check_rollout
from llmsize.memory.training import Offload, training_step
from llmsize.memory.training_run import written
from llmsize.optimizers import Optimizer, Precision
from llmsize.planning.fits import largest, largest_below
from llmsize.planning.support import computed_in
from llmsize.planning.training import Question, check_runs, may_be_within, run_of, within
from llmsize.quick_dataclasses import replace
from llmsize.stack import Stack

EXAMPLES = (
    "llmsize train llama-3-8b --method lora --batch 4 --seq-len 2048",
    "llmsize train llama-2-7b --method qlora --gpu rtx-4090 --recompute full",
    "llmsize train gpt2 --recipe fp32 --timeline --explain",
    "llmsize train qwen2.5-7b --method lora --recompute full --fit batch --vram 24GB",
    "llmsize train qwen2.5-7b --offload optimizer --changes",
)

SEQUENCE = 2048
"""Tokens of a sequence where none are asked for, or fewer if the model has fewer positions."""
FITTED = {"batch": "batch", "seq-len": "sequence", "rank": "rank"}
"""What `--fit` solves for, and the field of `Choices` that it is."""

# fmt: off
TrainedFormat = Annotated[str, Option(
    "--dtype", metavar="FORMAT", show_default="bf16, or fp16 where the card has none",
    help="Format of the weights: `fp32`, `fp16`, `bf16`.",
    autocompletion=options.completing("formats"))]
MethodName = Annotated[str, Option(
    "--method", help="`full`, `lora`, `qlora`, …: `llmsize show methods`.", metavar="NAME",
    autocompletion=options.completing("methods"))]
Length = Annotated[int | None, counting(
    "--seq-len", "--context", what="sequence length", help="Tokens per sequence.",
    metavar="TOKENS", show_default="2048, or the model's own if fewer")]
PrecisionName = Annotated[str, Option(
    "--recipe", metavar="NAME",
    help="Copies that training keeps: `amp`, `pure-16bit`, … (`llmsize show precisions`).",
    autocompletion=options.completing("precisions"))]
OptimizerName = Annotated[str, Option(
    "--optimizer", metavar="NAME", show_default=False,
    help="`llmsize show optimizers`; the method's or the stack's own if absent.",
    autocompletion=options.completing("optimizers"))]
StackName = Annotated[str, Option(
    "--stack", metavar="NAME", help="Framework: `llmsize show stacks`.",
    autocompletion=options.completing("stacks"))]
Rank = Annotated[int | None, counting(
    "--rank", what="rank", metavar="R",
    help="Rank of adapters (16), or of GaLore's projections (128).")]
Targets = Annotated[str, Option(
    "--targets", metavar="NAMES", show_default=False,
    help="Adapted layers, such as `q_proj,v_proj`; `all-linear` for all.")]
AdapterDropout = Annotated[float | None, Option(
    "--adapter-dropout", metavar="SHARE", min=0.0, max=0.99, help="Dropout of the adapters.")]
AdapterFormat = Annotated[str, Option(
    "--adapter-dtype", metavar="FORMAT", show_default=False,
    help="Format of the adapters, if not the stack's: `fp32`, `bf16`.",
    autocompletion=options.completing("formats"))]
ModulesToSave = Annotated[str, Option(
    "--modules-to-save", metavar="NAMES", show_default=False,
    help="Modules trained whole beside adapters: `embed_tokens,lm_head`.")]
Bias = Annotated[Biases, choosing(
    "--bias", known=get_args(Biases), what="biases", metavar="WHICH",
    help="The model's biases trained beside adapters")]
Width = Annotated[int | None, counting(
    "--width", what="width", metavar="N", help="Width of bottlenecks (a sixteenth).")]
Factor = Annotated[int | None, counting(
    "--factor", what="factor", metavar="N", help="Rows of LoKr's small matrix (a square root).")]
VirtualTokens = Annotated[int | None, counting(
    "--virtual-tokens", what="virtual tokens", metavar="N",
    help="Tokens of a prompt (20), or trained tokens (2).")]
BaseFormat = Annotated[str, Option(
    "--base", metavar="FORMAT", show_default=False,
    help="Quantized frozen weights: `nf4`, `llm-int8`, `gptq-int4-g128`.",
    autocompletion=options.completing("formats"))]
Upcast = Annotated[bool, Option("--upcast", help="Keep in fp32 what is not quantized.")]
FrozenLayers = Annotated[int | None, Option(
    "--freeze", metavar="N", min=0, help="Freeze the first N layers.")]
ObjectiveName = Annotated[str, choosing(
    "--objective", known=OBJECTIVES, what="objective", metavar="NAME")]
ReferenceKind = Annotated[Reference | None, choosing(
    "--reference", known=get_args(Reference), what="reference", metavar="KIND",
    help="Frozen model of a preference or policy")]
CompletionTokens = Annotated[int | None, counting(
    "--completion", what="completion", metavar="TOKENS",
    help="Of --seq-len those that are written (half), or have a label (all).")]
Rollouts = Annotated[int | None, counting(
    "--rollouts", what="rollouts", metavar="N",
    help="Sequences written at once (those of a step).")]
EngineShare = Annotated[float, Option(
    "--vllm-share", min=0.0, max=0.95, metavar="SHARE", show_default=False,
    help="Share of the device that vLLM takes to write: `0.3`.")]
EngineSleeps = Annotated[bool, Option(
    "--vllm-sleep", help="vLLM gives its memory back while training.")]
RecomputeWay = Annotated[Recompute, choosing(
    "--recompute", known=get_args(Recompute), what="way to recompute", metavar="WAY",
    help="Blocks run again in the backward pass")]
Every = Annotated[int, Option("--every", min=1, metavar="K", help="Recompute every K-th block.")]
OffloadCheckpoints = Annotated[bool, Option(
    "--offload-checkpoints", help="Keep checkpoints in host memory.")]
OffloadWhat = Annotated[Offload, choosing(
    "--offload", known=get_args(Offload), what="part to offload", metavar="WHAT",
    help="Kept in host memory")]
BucketViews = Annotated[bool, Option(
    "--gradient-as-bucket-view", help="DDP's gradients are views of its buckets.")]
Attention = Annotated[Literal["sdpa", "eager"], choosing(
    "--attention", known=("sdpa", "eager"), what="attention", metavar="KERNEL")]
Padded = Annotated[bool, Option("--padded", help="The batch has padding and an attention mask.")]
Accumulate = Annotated[int, Option(
    "--accumulate", min=1, metavar="N", help="Micro-batches per optimizer step.")]
FusedBackward = Annotated[bool, Option(
    "--fused-backward", help="Step each weight as its gradient comes.")]
Compiled = Annotated[bool, Option(
    "--compile", help="torch.compile fuses norms, gates and the loss.")]
Timeline = Annotated[bool, Option(
    "--timeline", help="Draw what is alive from start to end of the step.")]
ShowChanges = Annotated[bool, Option(
    "--changes", help="What each change would save, also where it fits.")]
Fit = Annotated[str | None, choosing(
    "--fit", known=FITTED, what="quantity to solve for", metavar="WHAT",
    help="Solve for the largest that fits")]
# fmt: on


class Trained(NamedTuple):
    """What is trained."""

    method: MethodName = "full"
    rank: Rank = None
    targets: Targets = ""
    adapter_dropout: AdapterDropout = None
    adapter_dtype: AdapterFormat = ""
    modules_to_save: ModulesToSave = ""
    bias: Bias = "none"
    width: Width = None
    factor: Factor = None
    tokens: VirtualTokens = None
    base: BaseFormat = ""
    upcast: Upcast = False
    freeze: FrozenLayers = None


class Aim(NamedTuple):
    """What for."""

    objective: ObjectiveName = "sft"
    reference: ReferenceKind = None
    completion: CompletionTokens = None
    rollouts: Rollouts = None
    engine_share: EngineShare = 0.0
    engine_sleeps: EngineSleeps = False


class Knobs(NamedTuple):
    """One step."""

    batch: Batch = 1
    sequence: Length = None
    accumulate: Accumulate = 1
    padded: Padded = False
    dtype: TrainedFormat = ""
    recipe: PrecisionName = "pure-16bit"
    optimizer: OptimizerName = ""
    stack: StackName = "transformers"
    attention: Attention = "sdpa"
    compiled: Compiled = False


class Savings(NamedTuple):
    """What saves memory."""

    recompute: RecomputeWay = "none"
    every: Every = 1
    offload: OffloadWhat = "none"
    offload_checkpoints: OffloadCheckpoints = False
    fused_backward: FusedBackward = False
    bucket_views: BucketViews = False


class Step(NamedTuple):
    """All knobs of a training step."""

    knobs: Knobs
    trained: Trained
    aim: Aim
    savings: Savings


class View(NamedTuple):
    """What is shown."""

    timeline: Timeline = False
    output: options.Into = None
    changes: ShowChanges = False
    fit: Fit = None


def train(
    model: Model,
    assume_family: options.AssumeFamily = "",
    *,
    step: Step,
    view: View,
    hardware: Hardware,
) -> Estimate | str:
    """Memory to train MODEL on one device: the peak, its moment, and what lives then.

    Of several --gpus each is a replica: it holds everything, and the buckets of DDP.
    """
    architecture = options.assuming(options.architecture(model), assume_family)
    machine = machines.machine(hardware)
    budget = int(machine.usable.value) if machine else None
    stack = presets.get(Stack, step.knobs.stack)
    format, assumed = _format(step.knobs.dtype, stack, machine)
    question = _question(architecture, step, format, stack, machine, hardware.gpus or 1)
    if view.fit:
        question = _fitted(question, view.fit, budget)
    if view.output is not None:
        return drawn(question, view.output, timeline=view.timeline)
    run = run_of(question)
    training_step(architecture, run)  # which raises, if anything does
    if format not in (run.setting.format, run.setting.autocast):
        assumed = ""  # a recipe of fp32 throughout computes in no other format
    return Later.of(partial(_answer, question, budget, view, assumed))


def _answer(question: Question, budget: int | None, view: View, assumed: str) -> Estimate:
    made = estimate(question, budget, timeline=view.timeline, every=view.changes)
    return replace(
        made, assumptions=(*made.assumptions, *filter(None, [assumed])),
        notes=(*_solved(view.fit, question, made), *made.notes),
    )  # fmt: skip


def _solved(what: str | None, question: Question, made: Estimate) -> Iterator[str]:
    """What `--fit` found."""
    if what and made.verdict:
        value: int = getattr(question.choices, FITTED[what])
        bound = ", and the largest that all adapted layers take"
        ends = bound if what == "rank" and not _takes(_with(question, what, value + 1)) else ""
        yield f"the largest {what} that fits: {value:,}{ends}"
    elif what:
        yield f"not even the smallest {what} fits"


def _takes(question: Question) -> bool:
    """Whether the model can be trained so at all."""
    try:
        training_step(question.architecture, run_of(question))
    except LLMSizeError:
        return False  # a rank above a layer's dimensions
    return True


def _format(name: str, stack: Stack, machine: Machine | None) -> tuple[Format, str]:
    """The format of that name; or else what the card computes in, and why it is another.

    Raises `LLMSizeError` for one that nothing is trained in.
    """
    if not name:
        card = machine.accelerator if machine else None
        return computed_in(BF16, stack, card)
    format = presets.get(Format, name)
    if format not in TRAINED:
        raise LLMSizeError(
            f"weights in {format.name} are not trained",
            hint="`--dtype fp32`, `fp16` or `bf16`; frozen ones are quantized by `--base`",
        )
    return format, ""


def _question(
    architecture: Architecture, step: Step, format: Format, stack: Stack,
    machine: Machine | None, gpus: int,
) -> Question:  # fmt: skip
    """The knobs as records.

    Raises `LLMSizeError` for those that do not go together or that the machine does not run.
    """
    knobs, method = step.knobs, method_named(step.trained.method)
    given = _given(step, int(machine.usable.value) if machine else None)
    check_options(method, given)
    if method.name in QUANTIZED and "base" not in given:
        given["base"] = presets.get(Format, "nf4")
    if method.rank:
        given.setdefault("rank", method.rank)
    replicas = machine.devices if machine else gpus
    sequence = knobs.sequence or options.usual_length(architecture, SEQUENCE)
    choices = _choices(
        step, method=method.name, format=format, replicas=replicas, sequence=sequence, **given
    )
    optimizer = presets.get(Optimizer, knobs.optimizer or method.optimizer or stack.optimizer)
    precision = presets.get(Precision, knobs.recipe)
    if precision.name == Knobs().recipe and format == FP32:
        precision = presets.get(Precision, "fp32")  # the same bytes, by their name
    question = Question(
        architecture, choices, stack, precision, optimizer,
        machine.accelerator if machine else None,
    )  # fmt: skip
    check_runs(question)
    return question


def _choices(step: Step, **given: Any) -> Choices:
    """What every method and objective has, beside what is given for some."""
    knobs, savings, aim = step.knobs, step.savings, step.aim
    return Choices(
        objective=aim.objective, batch=knobs.batch, padded=knobs.padded, attention=knobs.attention,
        accumulation=knobs.accumulate, compiled=knobs.compiled, recompute=savings.recompute,
        recompute_every=savings.every, offload_checkpoints=savings.offload_checkpoints,
        offload=savings.offload, fused_backward=savings.fused_backward,
        bucket_views=savings.bucket_views, engine_sleeps=aim.engine_sleeps, **given,
    )  # fmt: skip


def _given(step: Step, budget: int | None) -> dict[str, Any]:
    """The choices that mean something for some methods or objectives only, where given.

    Raises `LLMSizeError` for rollouts where nothing is written, and an engine's sleep without one.
    """
    trained, aim = step.trained, step.aim
    if aim.engine_sleeps and not aim.engine_share:
        raise LLMSizeError("`--vllm-sleep` without vLLM", hint="add its share: `--vllm-share 0.3`")
    check_rollout(OBJECTIVES[aim.objective], rollouts=aim.rollouts, engine=aim.engine_share)
    given = {
        "rank": trained.rank, "targets": options.names(trained.targets), "width": trained.width,
        "factor": trained.factor, "adapter_dropout": trained.adapter_dropout,
        "tokens": trained.tokens, "modules_to_save": options.names(trained.modules_to_save),
        "bias": trained.bias if trained.bias != "none" else None,
        "frozen_layers": trained.freeze, "upcast": trained.upcast or None,
        "completion": aim.completion, "rollouts": aim.rollouts, "reference": aim.reference,
        "engine": _engine(aim.engine_share, budget),
        "adapter_format": presets.get(Format, trained.adapter_dtype)
        if trained.adapter_dtype else None,
        "base": _base(trained.base) if trained.base else None,
    }  # fmt: skip
    return {choice: value for choice, value in given.items() if value not in (None, ())}


def _base(name: str) -> Format:
    """The format of frozen weights, by the names that they have in `fits`, too.

    Raises `LLMSizeError` for one that no adapters are trained beside.
    """
    from llmsize.cli import catalogue
    from llmsize.memory.overview import not_adapted

    storage = catalogue.storage(name, None, served=False)
    if reason := not_adapted(storage):
        raise LLMSizeError(reason, hint="name another `--base`, such as `nf4` or `llm-int8`")
    return presets.get(Format, storage.recipe.base) if storage.recipe else storage.format


def _engine(share: float, budget: int | None) -> int | None:
    """Bytes of an inference engine that takes a share of the device."""
    if not share:
        return None
    if budget is None:
        raise LLMSizeError("a share of what?", hint="give a card: `--gpu h100` or `--vram 80GB`")
    return int(share * budget)


def _fitted(question: Question, what: str, budget: int | None) -> Question:
    """The question with the largest value of one knob that fits the budget."""
    if what == "rank":
        check_options(method_named(question.choices.method), ["rank"])
    if budget is None:
        raise LLMSizeError("fit into what?", hint="give a card: `--gpu rtx-4090` or `--vram 24GB`")
    lowest = 1 + (written(question.choices) if what == "seq-len" else 0)

    def holds(enough: Callable[[Question, int], bool], value: int) -> bool:
        try:
            return enough(_with(question, what, value), budget)
        except LLMSizeError:
            if value == lowest:
                raise
            return False  # a rank above a layer's dimensions

    bound = largest(partial(holds, may_be_within), lowest=lowest, highest=2**20) or lowest
    return _with(question, what, largest_below(partial(holds, within), bound, lowest=lowest))


def _with(question: Question, what: str, value: int) -> Question:
    knob: dict[str, Any] = {FITTED[what]: value}
    return replace(question, choices=replace(question.choices, **knob))
