"""What `llmsize train` answers: the peak, its timeline, what was assumed, and what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import inf

from llmsize import presets
from llmsize.anatomy import Setting, traced
from llmsize.anatomy.adapters import ALL_LINEAR
from llmsize.answer import Cell, Estimate, Row, Scalar, Table
from llmsize.architecture import Architecture
from llmsize.cli import options
from llmsize.errors import LLMSizeError, printable
from llmsize.formats import FP32, Format
from llmsize.memory.host import bus_traffic, evictable, host_memory
from llmsize.memory.methods import Choices, method_named
from llmsize.memory.objectives import OBJECTIVES, objective_notes
from llmsize.memory.peak import device_context, device_memory
from llmsize.memory.training import TrainingRun, TrainingStep, training_step
from llmsize.optimizers import DTYPE, Optimizer
from llmsize.planning import changes as planning
from llmsize.planning.fits import Band, band_for, verdict
from llmsize.planning.slowdown import slowdown
from llmsize.planning.training import (
    Question,
    changes,
    growing_segments,
    host_need,
    need,
    need_at_least,
    run_of,
    within,
)
from llmsize.stack import Stack
from llmsize.term import Term, fact, term
from llmsize.units import format_bytes, format_count, format_share

FOLLOWED = "the step, followed tensor by tensor"
MOMENTS = {"step": "the optimizer's step", "reference": "the reference's forward pass"}
"""Moments of the peak beside the two passes, where their names alone say too little."""
BESIDE = {
    "attention": "attention", "padded": "padded", "compile": "compiled", "targets": "targets",
    "adapter_dropout": "adapter_dropout", "adapter_dtype": "adapter_format",
    "modules_to_save": "modules_to_save", "bias": "bias", "width": "width", "factor": "factor",
    "virtual_tokens": "tokens", "base": "base", "upcast": "upcast", "freeze": "frozen_layers",
    "reference": "reference", "completion": "completion", "rollouts": "rollouts",
    "vllm_bytes": "engine", "vllm_sleep": "engine_sleeps", "every": "recompute_every",
    "offload_checkpoints": "offload_checkpoints", "fused_backward": "fused_backward",
    "gradient_as_bucket_view": "bucket_views",
}  # fmt: skip
"""Words that most questions go without, and the fields of `Choices` that they are."""
WITH_CUDA = ("NVIDIA", "AMD")
"""Makers of cards whose PyTorch is that of CUDA: the same kernels, or their translation by HIP, and
the same caching allocator (PyTorch's notes on HIP)."""


def estimate(question: Question, budget: int | None, *, timeline: bool, every: bool) -> Estimate:
    """The peak, what waits in host memory, and, if asked for, the timeline and the changes."""
    run = run_of(question)
    step = training_step(question.architecture, run)
    needed = partial(
        device_memory, question.architecture, run, question.stack, card=question.accelerator
    )
    memory = needed()
    if budget is not None and memory.value > budget:
        memory = needed(budget)
    host = host_memory(question.architecture, run)
    fits = None if budget is None else memory.value <= budget
    answer = [_table(memory), *_host_tables(host, question.architecture, run)]
    if timeline:
        answer.append(_timeline(step))
    if every or fits is False:
        answer.append(_changes(question, budget))
    return Estimate(
        command="train",
        question=_asked(question, budget),
        headline=_headline(question, memory, host, budget),
        answer=tuple(answer),
        assumptions=_assumptions(question, run),
        notes=(
            *_notes(question, step, memory, budget), *_unmatched(question),
            *_of_precision(question, run.setting),
        ),
        verdict=fits,
    )  # fmt: skip


def _asked(question: Question, budget: int | None) -> dict[str, Scalar]:
    """The question in the command's words; those of `BESIDE` only where they were given."""
    choices, usual = question.choices, Choices()
    beside = {word: getattr(choices, field) for word, field in BESIDE.items()
              if getattr(choices, field) != getattr(usual, field)}  # fmt: skip
    return {
        "model": question.architecture.name, "method": choices.method,
        "objective": choices.objective, "batch": choices.batch,
        "seq_len": choices.sequence, "dtype": choices.format.name,
        "recipe": question.precision.name, "optimizer": question.optimizer.name,
        "stack": question.stack.name, "recompute": choices.recompute,
        "rank": choices.rank if "rank" in method_named(choices.method).takes else None,
        "accumulate": choices.accumulation, "offload": choices.offload,
        "gpus": choices.replicas, "memory_bytes": budget,
        **{word: _plain(value) for word, value in beside.items()},
    }  # fmt: skip


def _plain(value: Scalar | Format | tuple[str, ...]) -> Scalar:
    """A choice as the command line takes it."""
    if isinstance(value, tuple):
        return ",".join(value)
    return value.name if isinstance(value, Format) else value


def _subject(question: Question) -> str:
    """What is trained how, in a few words."""
    choices = question.choices
    aim = "" if choices.objective == "sft" else f" for {choices.objective}"
    what = f"{question.architecture.name}, {choices.method}{aim}"
    of_two = " × 2" if OBJECTIVES[choices.objective].pairs else ""
    return f"{what}, {choices.batch:,}{of_two} × {choices.sequence:,} tokens"


def _headline(question: Question, memory: Term, host: Term, budget: int | None) -> str:
    choices, what = question.choices, _subject(question)
    where = f"each of {choices.replicas:,} devices" if choices.replicas > 1 else "the device"
    said = f"{what}: {format_bytes(memory.value)} on {where}"
    if host.value:
        said += f" and {format_bytes(host.value)} in host memory"
    if budget is None:
        return said
    if memory.value > budget:
        says = "does not fit"
    else:
        says = "is tight" if _is_tight(memory, budget, _band(question)) else "fits"
    return f"{said}, {says} in {format_bytes(budget)}"


def _band(question: Question) -> Band:
    """How far off such estimates are, by runs that others have measured."""
    return band_for(presets.every(Band).values(), "training", question.stack.name)


def _is_tight(memory: Term, budget: int, band: Band) -> bool:
    """Whether what measured runs differ by is more than what is left, or more than what lacks."""
    return verdict(memory.value, budget, band=band.share) == "tight"


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
                "alive after": _followed("alive after", point.after),
                "highest": _followed("highest", point.highest),
                "": "█" * max(1, round(24 * point.highest / top)),
            },
        )
        for point in step.timeline
    ]
    return Table("timeline", ("alive after", "highest", ""), tuple(rows), heading="when")


def _followed(name: str, size: int) -> Term:
    """Bytes of a moment, graded as the peak of the first table is."""
    return fact(name, size, unit="bytes", source=FOLLOWED, grade="formula")


def _changes(question: Question, budget: int | None) -> Table:
    """What each change alone would save of tensors, the most first, and whether it then fits."""
    rows, now = [], need_at_least(question)
    for saving in planning.ranked(question, _known_changes(), need_at_least):
        changed = saving.change.apply(question)
        cells: dict[str, Cell] = {
            "then": saving.then,
            "saves": term(
                "saves",
                "now - then",
                unit="bytes",
                grade=saving.then.grade,
                now=now.value,
                then=saving.then.value,
            ),
            "costs": _costs(question, changed, saving.change),
        }
        if (host := host_need(changed)).value:
            cells["host memory"] = host
        if budget is not None:
            lacks = "no, by gaps" if saving.then.value <= budget else "no"
            cells["fits"] = "yes" if within(changed, budget) else lacks
        rows.append(Row(saving.change.name, cells))
    fits = ("fits",) if budget is not None else ()
    columns = ("then", "saves", "host memory", *fits, "costs")
    return Table("changes, each alone", columns, tuple(rows), heading="what")


def _costs(question: Question, changed: Question, *done: planning.Change[Question]) -> str:
    """What changes give up, and what takes longer with them."""
    given_up = (change.costs for change in done)
    return ", ".join((*filter(None, given_up), *slowdown(question, changed)))


def _known_changes() -> tuple[planning.Change[Question], ...]:
    return changes(
        eight_bit=presets.get(Optimizer, "adamw-8bit"),
        base=lambda: presets.get(Format, "nf4"),
        double=lambda: presets.get(Format, "nf4-dq"),
        liger=presets.get(Stack, "liger"),
    )


def _assumptions(question: Question, run: TrainingRun) -> tuple[str, ...]:
    """Where the numbers come from that are not counted."""
    stack, model, choices = question.stack, question.architecture, question.choices
    context = device_context(stack, question.accelerator)
    fitted_to = " to the card's threads" if context.formula else ", whatever the card"
    told = [
        f"kernels of {stack.title or stack.name} (`--stack`)",
        f"a device context of {format_bytes(context.value)}, fitted{fitted_to}; all else is "
        "followed tensor by tensor",
    ]
    told += options.taken_for(model)
    told += options.language_model_alone(model)
    told += options.beyond_positions(model, choices.sequence)
    told += options.requantized(model, (choices.base or choices.format).name)
    if choices.base is not None and not choices.upcast and choices.format != FP32:
        head = "" if stack.quantizes_head else ", head"
        told.append(
            f"embeddings{head} and norms stay in {choices.format.name}; `--upcast` keeps them in "
            "fp32, as peft's prepare_model_for_kbit_training does, which TRL does not call"
        )
    told += objective_notes(OBJECTIVES[choices.objective], run.reference)
    if choices.replicas > 1:
        told.append(
            "data parallel (DDP): every device has a copy of everything and a batch of its own; "
            "`llmsize fits --gpus` counts what ZeRO-3 divides"
        )
    if (card := question.accelerator) is not None and card.vendor not in WITH_CUDA:
        told.append(
            f"counted as PyTorch runs on {' and '.join(WITH_CUDA)}: on {card.title} other kernels "
            "and another allocator take other bytes"
        )
    return (*told, *_of_kernels(question))


def _unmatched(question: Question) -> Iterator[str]:
    """Which targets no layer is called by, beside others that some are."""
    weights = traced(question.architecture).weights.values()
    known = {ALL_LINEAR, *(weight.name.split(".")[-2:][0] for weight in weights)}
    missing = [name for name in question.choices.targets if name not in known]
    if missing:
        names = " and ".join(f"`{printable(name)}`" for name in missing)
        yield f"no layer is called {names}: peft adapts the others"


def _of_kernels(question: Question) -> Iterator[str]:
    """What is special about experts and about recurrent layers, if there are any."""
    weights, stack = traced(question.architecture).weights.values(), question.stack
    quantized = question.choices.base is not None
    if quantized and not stack.quantizes_experts and any(weight.experts for weight in weights):
        yield ("the experts of a layer are one tensor, which is not quantized: they stay in "
               f"{question.choices.format.name}; before transformers 5 most were linear layers, "
               "which are (`--stack transformers-4`)")  # fmt: skip
    if any(weight.role == "ssm" for weight in weights):
        if quantized:
            yield ("recurrent layers' matrices that the kernels, or transformers, use without "
                   f"their layers stay in {question.choices.format.name}: a quantized one fails "
                   "there (`llm_int8_skip_modules`)")  # fmt: skip
        yield (
            "recurrent layers run by the kernels of mamba-ssm, causal-conv1d and "
            "flash-linear-attention; without them transformers keeps much more (`--stack "
            "transformers`)"
            if stack.fused_recurrence
            else "recurrent layers run in PyTorch, as transformers has them without the kernels "
            "of mamba-ssm and flash-linear-attention, which keep much less (`--stack "
            "transformers-kernels`)"
        )


def _notes(
    question: Question, step: TrainingStep, memory: Term, budget: int | None
) -> tuple[str, ...]:
    told = [
        f"the peak is in {_when(step)}",
        f"{format_count(step.trained)} parameters are trained{_ranked(question.choices)}",
    ]
    if step.stages:
        highest = ", ".join(f"{name} {format_bytes(size)}" for name, size in step.peaks.items())
        told.append(f"the highest of each moment: {highest}")
    if budget is not None:
        told += _of_budget(question, step, memory, budget)
    return tuple(told)


def _when(step: TrainingStep) -> str:
    """The moment of the peak."""
    if step.phase in ("forward", "backward"):
        where = f"layer {step.place}" if step.place else "outside of the layers"
        return f"the {step.phase} pass, at {step.moment.operation}, {where}"
    return MOMENTS.get(step.phase, f"the {step.phase}")


def _ranked(choices: Choices) -> str:
    """Of which rank adapters or projections are, and which layers have them."""
    takes = method_named(choices.method).takes
    if "rank" not in takes:
        return ""
    if "targets" not in takes:
        return f", by projections of rank {choices.rank:,}"
    plain = not choices.targets or ALL_LINEAR in choices.targets
    where = "every linear layer" if plain else printable(", ".join(choices.targets))
    return f": rank {choices.rank:,} in {where}"


def of_room(question: Question, memory: Term, budget: int) -> Iterator[str]:
    """What the allocator does where it would hold more than there is."""
    held, least = need(question).value, need_at_least(question).value
    if held > max(budget, memory.value):
        slower = memory.value <= budget
        yield (
            f"with room for all that the allocator would cache it would take {format_bytes(held)}"
            + ("; here free segments go back and are asked for again, which takes time" * slower)
        )
    if least <= budget < memory.value:
        yield (
            f"tensors and context are {format_bytes(least)}, but what is free between the tensors "
            "is in pieces too small, even once free segments have gone back"
        )


def _of_budget(question: Question, step: TrainingStep, memory: Term, budget: int) -> Iterator[str]:
    """What to do where it does not fit, and how sure that is."""
    yield from of_room(question, memory, budget)
    if memory.value > budget:
        if question.optimizer.pageable:
            states = step.static.part("optimizer states").value
            yield (
                f"the driver may page {format_bytes(states)} of states out to the host, which "
                f"leaves {format_bytes(memory.value - states)}; a page that is used comes back"
            )
        yield advice(question, remedy(question, budget))
    band = _band(question)
    if _is_tight(memory, budget, band):
        yield (
            f"a close call: 95 % of {band.cases} measured runs are within "
            f"{format_share(band.share)} of the estimate"
        )


def _of_precision(question: Question, setting: Setting) -> Iterator[str]:
    """What a usual run keeps, or computes, in another format than this one."""
    method, precision = method_named(question.choices.method), question.precision
    if question.choices.format == FP32:
        return
    if method.name == "full" and precision.weights == DTYPE and not precision.master:
        yield (f"training keeps {precision.title} (`--recipe {precision.name}`); `estimate` and "
               "`fits` count an fp32 master copy (`--recipe mixed`)")  # fmt: skip
    wide = setting.adapter is not None and setting.adapter.format == FP32
    if wide and "rank" in method.takes and not precision.autocast:
        yield ("fp32 adapters are computed in fp32; under autocast, as by the Trainer's "
               "`bf16=True`, in 16 bit (`--recipe amp`)")  # fmt: skip


def remedy(question: Question, budget: int) -> tuple[planning.Change[Question], ...]:
    """The cheapest change that makes it fit, or the cheapest combination; none if nothing does."""
    known = (growing_segments(), *_known_changes())

    def enough(changed: Question) -> bool:
        try:
            return within(changed, budget)
        except LLMSizeError:
            return False  # what does not go together

    one = planning.single(question, known, enough)
    below = one.price if one else inf
    return planning.combination(question, known[1:], enough, below) or ((one,) if one else ())


def advice(question: Question, several: tuple[planning.Change[Question], ...]) -> str:
    """A remedy in words: what it takes, and what it costs."""
    if not several:
        return "no change that llmsize knows makes it fit"
    changed = planning.applied(question, several)
    done = " and ".join(change.name for change in several)
    costs = _costs(question, changed, *several)
    takes = format_bytes(need_at_least(changed).value)
    if (host := host_need(changed)).value:
        takes += f" and {format_bytes(host.value)} in host memory"
    return f"to make it fit: {done} ({takes}; costs {costs})"


def drawn(question: Question, file: str, *, timeline: bool) -> str:
    """The timeline as a file. Raises `LLMSizeError` where none was asked for."""
    from llmsize.memory.timeline_chart import timeline_chart

    if not timeline:
        raise LLMSizeError("only a timeline is drawn into a file", hint="add `--timeline`")
    step = training_step(question.architecture, run_of(question))
    return options.drawn_into([timeline_chart(step, _subject(question))], file)
