"""`llmsize train`: the peak of a training step, when it is, and what lives then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_args

from llmsize import presets, units
from llmsize.anatomy import traced
from llmsize.answer import Cell, Estimate, Row, Table
from llmsize.architecture import Architecture
from llmsize.cli import options
from llmsize.cli.declare import Option
from llmsize.cli.options import Batch, Gpu, InstanceName, Model, Reserve, Vram
from llmsize.errors import LLMSizeError, did_you_mean, printable
from llmsize.formats import Format
from llmsize.memory.host import bus_traffic, evictable, host_memory
from llmsize.memory.methods import (
    QUANTIZED,
    Choices,
    Recompute,
    check_options,
    method_named,
    training_run,
)
from llmsize.memory.objectives import (
    OBJECTIVES,
    check_rollout,
    objective_named,
    reference_named,
)
from llmsize.memory.training import (
    Offload,
    TrainingRun,
    TrainingStep,
    device_memory,
    training_step,
)
from llmsize.optimizers import Optimizer, Precision
from llmsize.planning import changes as planning
from llmsize.planning.fits import largest
from llmsize.planning.support import check_support, computed_in
from llmsize.planning.training import Question, changes, host_need, need
from llmsize.stack import Stack
from llmsize.term import Term
from llmsize.units import format_bytes, format_count

EXAMPLES = (
    "llmsize train llama-3-8b --method lora --batch 4 --seq-len 2048",
    "llmsize train llama-2-7b --method qlora --gpu rtx-4090 --recompute full",
    "llmsize train gpt2 --recipe fp32 --timeline --explain",
    "llmsize train qwen2.5-7b --method lora --fit batch --vram 24GB",
    "llmsize train qwen2.5-7b --offload optimizer --changes",
)

RECOMPUTE: tuple[Recompute, ...] = ("none", "full", "selective")
FITTED = {"batch": "sequences", "seq-len": "tokens", "rank": ""}

# fmt: off
TrainedFormat = Annotated[str, Option(
    "--dtype", metavar="FORMAT", show_default="bf16, or fp16 where the card has none",
    help="Format of the weights: `fp32`, `fp16`, `bf16`.",
    autocompletion=options.completing("formats"))]
MethodName = Annotated[str, Option(
    "--method", help="`full`, `lora`, `qlora`, …: `llmsize show methods`.", metavar="NAME",
    autocompletion=options.completing("methods"))]
Length = Annotated[int, Option(
    "--seq-len", help="Tokens per sequence.", metavar="TOKENS",
    parser=lambda given: units.parse_count(str(given), "sequence length"))]
PrecisionName = Annotated[str, Option(
    "--recipe", metavar="NAME",
    help="Copies that training keeps: `fp32`, `amp`, `mixed`, `megatron`, `pure-16bit`.",
    autocompletion=options.completing("precisions"))]
OptimizerName = Annotated[str, Option(
    "--optimizer", metavar="NAME", show_default=False,
    help="`llmsize show optimizers`; `adamw` if the method has none.",
    autocompletion=options.completing("optimizers"))]
StackName = Annotated[str, Option(
    "--stack", metavar="NAME", help="Framework: `llmsize show stacks`.",
    autocompletion=options.completing("stacks"))]
Rank = Annotated[int | None, Option(
    "--rank", metavar="R", help="Rank of adapters or projections (16).",
    parser=lambda given: units.parse_count(str(given), "rank"))]
Targets = Annotated[str, Option(
    "--targets", metavar="NAMES", show_default=False,
    help="Adapted layers, such as `q_proj,v_proj`; `all-linear` for all.")]
AdapterDropout = Annotated[float | None, Option(
    "--adapter-dropout", min=0.0, max=0.99, help="Dropout of the adapters.")]
AdapterFormat = Annotated[str, Option(
    "--adapter-dtype", metavar="FORMAT", show_default=False,
    help="Format of the adapters, if not the stack's: `fp32`, `bf16`.",
    autocompletion=options.completing("formats"))]
ModulesToSave = Annotated[str, Option(
    "--modules-to-save", metavar="NAMES", show_default=False,
    help="Modules trained whole beside adapters: `embed_tokens,lm_head`.")]
Width = Annotated[int | None, Option(
    "--width", metavar="N", help="Width of bottlenecks (a sixteenth).",
    parser=lambda given: units.parse_count(str(given), "width"))]
VirtualTokens = Annotated[int | None, Option(
    "--virtual-tokens", metavar="N", help="Tokens of a prompt, mostly 20.",
    parser=lambda given: units.parse_count(str(given), "virtual tokens"))]
BaseFormat = Annotated[str, Option(
    "--base", metavar="FORMAT", show_default=False,
    help="Quantized frozen weights: `nf4`, `llm-int8`, `gptq-int4-g128`.",
    autocompletion=options.completing("formats"))]
Upcast = Annotated[bool, Option("--upcast", help="Keep in fp32 what is not quantized.")]
FrozenLayers = Annotated[int | None, Option(
    "--freeze", metavar="N", min=0, help="Freeze the first N layers.")]
ObjectiveName = Annotated[str, Option(
    "--objective", metavar="NAME", help=f"{', '.join(OBJECTIVES)}.",
    autocompletion=lambda: list(OBJECTIVES))]
ReferenceName = Annotated[str, Option(
    "--reference", metavar="KIND", show_default=False,
    help="Of a preference or policy: `model`, `adapter` (switched off), "
         "`precomputed` or `none`.")]
CompletionTokens = Annotated[int | None, Option(
    "--completion", metavar="TOKENS", help="Written of --seq-len (half).",
    parser=lambda given: units.parse_count(str(given), "completion"))]
Rollouts = Annotated[int | None, Option(
    "--rollouts", metavar="N", help="Sequences written at once (those of a step).",
    parser=lambda given: units.parse_count(str(given), "rollouts"))]
EngineShare = Annotated[float, Option(
    "--vllm-share", min=0.0, max=0.95, metavar="SHARE", show_default=False,
    help="Share of the device that vLLM takes to write: `0.3`.")]
EngineSleeps = Annotated[bool, Option(
    "--vllm-sleep", help="vLLM gives its memory back while training.")]
RecomputeName = Annotated[str, Option("--recompute", help="`none`, `full` or `selective`.")]
Every = Annotated[int, Option("--every", min=1, metavar="K", help="Recompute every K-th block.")]
OffloadCheckpoints = Annotated[bool, Option(
    "--offload-checkpoints", help="Keep checkpoints in host memory.")]
OffloadName = Annotated[str, Option(
    "--offload", metavar="WHAT", help="To host memory: `none`, `optimizer`, or all `parameters`.",
    autocompletion=lambda: list(get_args(Offload)))]
Replicas = Annotated[int | None, Option(
    "--gpus", metavar="N", show_default="1", rich_help_panel="Hardware",
    help="Replicas: each holds everything, and the buckets in which DDP sums gradients.",
    parser=lambda given: units.parse_count(str(given), "number of GPUs"))]
BucketViews = Annotated[bool, Option(
    "--gradient-as-bucket-view", help="DDP's gradients are views of its buckets.")]
Attention = Annotated[str, Option("--attention", help="`sdpa` or `eager`.")]
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
Fit = Annotated[str, Option(
    "--fit", metavar="WHAT", show_default=False,
    help=f"Solve for the largest {', '.join(FITTED)} that fits.")]
# fmt: on


def train(
    model: Model,
    method: MethodName = "full",
    batch: Batch = 1,
    sequence: Length = 2048,
    dtype: TrainedFormat = "",
    recipe: PrecisionName = "pure-16bit",
    optimizer: OptimizerName = "",
    stack: StackName = "transformers",
    rank: Rank = None,
    targets: Targets = "",
    adapter_dropout: AdapterDropout = None,
    adapter_dtype: AdapterFormat = "",
    modules_to_save: ModulesToSave = "",
    width: Width = None,
    tokens: VirtualTokens = None,
    base: BaseFormat = "",
    upcast: Upcast = False,
    freeze: FrozenLayers = None,
    objective: ObjectiveName = "sft",
    reference: ReferenceName = "",
    completion: CompletionTokens = None,
    rollouts: Rollouts = None,
    engine_share: EngineShare = 0.0,
    engine_sleeps: EngineSleeps = False,
    recompute: RecomputeName = "none",
    every: Every = 1,
    offload_checkpoints: OffloadCheckpoints = False,
    offload: OffloadName = "none",
    attention: Attention = "sdpa",
    padded: Padded = False,
    accumulate: Accumulate = 1,
    fused_backward: FusedBackward = False,
    compiled: Compiled = False,
    timeline: Timeline = False,
    output: options.Into = None,
    show_changes: ShowChanges = False,
    fit: Fit = "",
    gpu: Gpu = None,
    vram: Vram = None,
    gpus: Replicas = None,
    bucket_views: BucketViews = False,
    instance: InstanceName = None,
    reserve: Reserve = 0,
    assume_family: options.AssumeFamily = "",
) -> Estimate | str:
    """Memory to train MODEL on one device: the peak, its moment, and what lives then."""
    architecture = options.assuming(options.architecture(model), assume_family)
    chosen, machine = method_named(method), options.machine(gpu, vram, gpus, instance, reserve)
    budget = int(machine.usable.value) if machine else None
    accelerator, framework = machine.accelerator if machine else None, presets.get(Stack, stack)
    format, assumed = presets.get(Format, dtype or "bf16"), ""
    if not dtype:
        format, assumed = computed_in(format, framework, accelerator)
    aim = objective_named(objective)
    check_rollout(aim, completion=completion, rollouts=rollouts, engine=engine_share)
    given = _given(
        rank=rank, targets=_names(targets), adapter_dropout=adapter_dropout, width=width,
        adapter_format=presets.get(Format, adapter_dtype) if adapter_dtype else None,
        modules_to_save=_names(modules_to_save), tokens=tokens, frozen_layers=freeze,
        base=presets.get(Format, base) if base else None, upcast=upcast or None,
        completion=completion, rollouts=rollouts, engine=_engine(engine_share, budget),
        reference=reference_named(reference) if reference else None,
    )  # fmt: skip
    check_options(chosen, given)
    if chosen.name in QUANTIZED and "base" not in given:
        given["base"] = presets.get(Format, "nf4")
    check_support(framework, accelerator, format, *filter(None, [given.get("base")]))
    choices = Choices(
        method=chosen.name, objective=aim.name, engine_sleeps=engine_sleeps, batch=batch,
        sequence=sequence, format=format,
        recompute=_recompute(recompute), recompute_every=every,
        offload_checkpoints=offload_checkpoints,
        attention="eager" if _attention(attention) == "eager" else "sdpa",
        padded=padded, accumulation=accumulate, fused_backward=fused_backward, compiled=compiled,
        offload=_offload(offload), replicas=machine.devices if machine else gpus or 1,
        bucket_views=bucket_views,
        **given,
    )  # fmt: skip
    question = Question(
        architecture, choices, framework, presets.get(Precision, recipe),
        presets.get(Optimizer, optimizer or chosen.optimizer or "adamw"),
    )  # fmt: skip
    if fit:
        question = _fitted(question, fit, budget)
    if output is not None:
        return _drawn(question, output, timeline=timeline)
    made = _estimate(question, budget, timeline=timeline, every=show_changes)
    return replace(made, assumptions=(*made.assumptions, *filter(None, [assumed])))


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def _engine(share: float, budget: int | None) -> int | None:
    """Bytes of an inference engine that takes a share of the device."""
    if not share:
        return None
    if budget is None:
        raise LLMSizeError("a share of what?", hint="give a card: `--gpu h100` or `--vram 80GB`")
    return int(share * budget)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _recompute(text: str) -> Recompute:
    for known in RECOMPUTE:
        if text.strip().lower() == known:
            return known
    raise LLMSizeError(
        f"unknown way to recompute `{printable(text)}`",
        hint=did_you_mean(text, RECOMPUTE, otherwise=f"choose from {', '.join(RECOMPUTE)}"),
    )


def _offload(text: str) -> Offload:
    known: tuple[Offload, ...] = get_args(Offload)
    for place in known:
        if text.strip().lower() == place:
            return place
    raise LLMSizeError(
        f"cannot offload `{printable(text)}`",
        hint=did_you_mean(text, known, otherwise=f"choose from {', '.join(known)}"),
    )


def _attention(text: str) -> str:
    if text not in ("sdpa", "eager"):
        raise LLMSizeError(
            f"unknown attention `{printable(text)}`", hint="choose from `sdpa` and `eager`"
        )
    return text


def _fitted(question: Question, what: str, budget: int | None) -> Question:
    """The question with the largest value of one knob that fits the budget."""
    if what not in FITTED:
        raise LLMSizeError(
            f"cannot solve for `{printable(what)}`",
            hint=did_you_mean(what, FITTED, otherwise=f"choose from {', '.join(FITTED)}"),
        )
    method = method_named(question.choices.method)
    if what == "rank":
        check_options(method, ["rank"])
    if budget is None:
        raise LLMSizeError("fit into what?", hint="give a card: `--gpu rtx-4090` or `--vram 24GB`")

    def holds(value: int) -> bool:
        try:
            return need(_with(question, what, value)).value <= budget
        except LLMSizeError:
            if value == 1:
                raise
            return False  # a rank above a layer's dimensions

    return _with(question, what, largest(holds, highest=2**20) or 1)


def _with(question: Question, what: str, value: int) -> Question:
    match what:
        case "batch":
            choices = replace(question.choices, batch=value)
        case "seq-len":
            choices = replace(question.choices, sequence=value)
        case _:
            choices = replace(question.choices, rank=value)
    return replace(question, choices=choices)


def _drawn(question: Question, path: Path, *, timeline: bool) -> str:
    """The timeline as a file."""
    from llmsize.memory.timeline_chart import timeline_chart

    if not timeline:
        raise LLMSizeError("only a timeline is drawn into a file", hint="add `--timeline`")
    run = training_run(question.choices, question.stack, question.precision, question.optimizer)
    step = training_step(question.architecture, run)
    return options.drawn_into([timeline_chart(step, _subject(question))], path)


def _estimate(question: Question, budget: int | None, *, timeline: bool, every: bool) -> Estimate:
    run = training_run(question.choices, question.stack, question.precision, question.optimizer)
    step = training_step(question.architecture, run)
    memory, host = device_memory(step, question.stack), host_memory(question.architecture, run)
    fits = None if budget is None else memory.value <= budget
    choices = question.choices
    answer = [_table(memory), *_host_tables(host, question.architecture, run)]
    if timeline:
        answer.append(_timeline(step))
    if every or fits is False:
        answer.append(_changes(question, budget))
    return Estimate(
        command="train",
        question={
            "model": question.architecture.name, "method": choices.method,
            "objective": choices.objective, "batch": choices.batch,
            "seq_len": choices.sequence, "dtype": choices.format.name,
            "recipe": question.precision.name, "optimizer": question.optimizer.name,
            "stack": question.stack.name, "recompute": choices.recompute,
            "rank": choices.rank if "rank" in method_named(choices.method).takes else None,
            "accumulate": choices.accumulation, "offload": choices.offload,
            "gpus": choices.replicas, "memory_bytes": budget,
        },
        headline=_headline(question, memory, host, budget),
        answer=tuple(answer),
        assumptions=_assumptions(question),
        notes=_notes(question, step, memory, budget),
        verdict=fits,
    )  # fmt: skip


def _subject(question: Question) -> str:
    """What is trained how, in a few words."""
    choices = question.choices
    aim = "" if choices.objective == "sft" else f" for {choices.objective}"
    what = f"{question.architecture.title or question.architecture.name}, {choices.method}{aim}, "
    return what + f"{choices.batch:,} × {choices.sequence:,} tokens"


def _headline(question: Question, memory: Term, host: Term, budget: int | None) -> str:
    choices, what = question.choices, _subject(question)
    where = f"each of {choices.replicas:,} devices" if choices.replicas > 1 else "the device"
    said = f"{what}: {format_bytes(memory.value)} on {where}"
    if host.value:
        said += f" and {format_bytes(host.value)} in host memory"
    if budget is None:
        return said
    verdict = "fits" if memory.value <= budget else "does not fit"
    return f"{said}, {verdict} in {format_bytes(budget)}"


def _table(memory: Term) -> Table:
    """The parts of the device memory, largest moment first."""
    allocated, *beside = memory.parts
    rows = [*_rows(allocated)]
    rows.append(Row("allocated at the peak", {"memory": allocated}))
    rows += [Row(part.name, {"memory": part}) for part in beside]
    rows.append(Row("device memory", {"memory": memory}))
    return Table("memory at the peak of the step", ("memory",), tuple(rows), heading="what")


def _host_tables(host: Term, architecture: Architecture, run: TrainingRun) -> Iterator[Table]:
    """What lives in host memory, and what crosses the bus; nothing where nothing does."""
    if host.value:
        yield Table("host memory", ("memory",), (*_rows(host), Row(host.name, {"memory": host})),
                    heading="what")  # fmt: skip
        crossing = bus_traffic(architecture, run)
        yield Table("over the bus in a step", ("bytes",),
                    (*(Row(part.name, {"bytes": part}) for part in crossing.parts),
                     Row("altogether", {"bytes": crossing})), heading="what")  # fmt: skip
    if paged := evictable(architecture, run):
        yield Table("paging", ("memory",), (Row(paged.name, {"memory": paged}),), heading="what")


def _rows(memory: Term) -> tuple[Row, ...]:
    return tuple(Row(part.name, {"memory": part}) for part in memory.parts)


def _timeline(step: TrainingStep) -> Table:
    """What is alive along the step, with a bar for each stretch."""
    top = max(point.highest for point in step.timeline)
    rows = [
        Row(
            f"{point.phase}: {point.place}",
            {
                "alive after": Term("alive after", point.after, "bytes"),
                "highest": Term("highest", point.highest, "bytes"),
                "": "█" * max(1, round(24 * point.highest / top)),
            },
        )
        for point in step.timeline
    ]
    return Table("timeline", ("alive after", "highest", ""), tuple(rows), heading="when")


def _changes(question: Question, budget: int | None) -> Table:
    """What each change alone would save, the most first."""
    rows = []
    for saving in planning.ranked(question, _known_changes(), need):
        cells: dict[str, Cell] = {
            "then": saving.then,
            "saves": Term("saves", saving.saved, "bytes", grade=saving.then.grade),
            "costs": saving.change.costs,
        }
        if (host := host_need(saving.change.apply(question))).value:
            cells["host memory"] = host
        if budget is not None:
            cells["fits"] = "yes" if saving.then.value <= budget else "no"
        rows.append(Row(saving.change.name, cells))
    fits = ("fits",) if budget is not None else ()
    columns = ("then", "saves", "host memory", *fits, "costs")
    return Table("changes, each alone", columns, tuple(rows), heading="what")


def _known_changes() -> tuple[planning.Change[Question], ...]:
    return changes(
        eight_bit=presets.get(Optimizer, "adamw-8bit"),
        base=lambda: presets.get(Format, "nf4"),
        liger=presets.get(Stack, "liger"),
    )


def _assumptions(question: Question) -> tuple[str, ...]:
    """Where the numbers come from that are not counted."""
    stack, positions = question.stack, question.architecture.context_length
    told = [
        f"kernels of {stack.title or stack.name}; allocated is counted tensor by tensor, slack "
        f"{stack.allocator_slack:.0%} and context {format_bytes(stack.context)} are fitted"
    ]
    if positions is not None and question.choices.sequence > positions:
        told.append(
            f"{question.choices.sequence:,} tokens are more than the {positions:,} positions that "
            "the model was made for"
        )
    choices = question.choices
    if note := objective_named(choices.objective).note:
        told.append(note)
    if choices.replicas > 1:
        told.append(
            "data parallel (DDP): every device has a copy of everything and a batch of its own; "
            "`llmsize fits --gpus` counts what ZeRO-3 divides"
        )
    weights = traced(question.architecture).weights.values()
    if question.choices.base is not None and any(weight.experts for weight in weights):
        told.append(
            f"the experts of a layer are one tensor, which is not quantized: they stay in "
            f"{question.choices.format.name}"
        )
    if any(weight.role == "ssm" for weight in weights):
        told.append(
            "recurrent layers run in PyTorch, as transformers has them without the kernels of "
            "mamba-ssm and flash-linear-attention, which keep much less"
        )
    return tuple(told)


def _notes(
    question: Question, step: TrainingStep, memory: Term, budget: int | None
) -> tuple[str, ...]:
    where = f"layer {step.place}" if step.place else "outside of the layers"
    pass_ = step.phase in ("forward", "backward")
    told = [
        f"the peak is in the {step.phase}"
        + (f" pass, at {step.moment.operation}, {where}" if pass_ else ""),
        f"{format_count(step.trained)} parameters are trained",
    ]
    if step.stages:
        highest = ", ".join(f"{name} {format_bytes(size)}" for name, size in step.peaks.items())
        told.append(f"the highest of each moment: {highest}")
    if budget is not None and memory.value > budget:
        if question.optimizer.pageable:
            states = step.static.part("optimizer states").value
            told.append(
                f"the driver may page {format_bytes(states)} of states out to the host, which "
                f"leaves {format_bytes(memory.value - states)}; a page that is used comes back"
            )
        told.append(advice(question, budget))
    return tuple(told)


def advice(question: Question, budget: int) -> str:
    """The cheapest change that makes it fit, or the cheapest combination."""
    known = _known_changes()

    def enough(changed: Question) -> bool:
        try:
            return need(changed).value <= budget
        except LLMSizeError:
            return False  # what does not go together

    one = planning.single(question, known, enough)
    several = (one,) if one else planning.combination(question, known, enough)
    if not several:
        return "no change that llmsize knows makes it fit"
    changed = planning.applied(question, several)
    done = " and ".join(change.name for change in several)
    costs = ", ".join(change.costs for change in several)
    takes = format_bytes(need(changed).value)
    if (host := host_need(changed)).value:
        takes += f" and {format_bytes(host.value)} in host memory"
    return f"to make it fit: {done} ({takes}; costs {costs})"
