"""What to change in a training step so that it fits, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

from llmsize.anatomy import outlined
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.hardware import Accelerator
from llmsize.memory.host import host_memory
from llmsize.memory.methods import Choices
from llmsize.memory.peak import device_memory, least_memory
from llmsize.memory.states import static_memory
from llmsize.memory.training import Offload, TrainingRun
from llmsize.memory.training_run import training_run
from llmsize.optimizers import Optimizer, Precision
from llmsize.planning.changes import Change
from llmsize.planning.support import check_support, lack_of_kernels
from llmsize.quick_dataclasses import dataclass, replace
from llmsize.stack import Stack
from llmsize.term import Term

PLACES: tuple[Offload, ...] = get_args(Offload)
"""What may be offloaded, each more than the one before."""


@dataclass(frozen=True, slots=True)
class Question:
    """A training step with everything that could be done differently about it."""

    architecture: Architecture
    choices: Choices
    stack: Stack
    precision: Precision
    optimizer: Optimizer
    accelerator: Accelerator | None = None
    """The card it runs on, where one is named."""


def check_runs(question: Question) -> None:
    """Raise `LLMSizeError` for software, formats or an optimizer that the card does not run."""
    card, choices = question.accelerator, question.choices
    check_support(question.stack, card, *filter(None, [choices.format, choices.base]))
    if card is not None and (reason := lack_of_kernels(question.optimizer, card)):
        raise LLMSizeError(reason, hint="name another optimizer: `llmsize show optimizers`")


def need(question: Question, room: int | None = None) -> Term:
    """The device memory of the step, on a device that has `room` for so many bytes.

    Raises `LLMSizeError` for choices that do not go together, or that the card does not run.
    """
    check_runs(question)
    return device_memory(
        question.architecture, run_of(question), question.stack, room, question.accelerator
    )


def need_at_least(question: Question) -> Term:
    """Tensors and context, without which nothing fits. Raises as `need` does."""
    check_runs(question)
    return least_memory(
        question.architecture, run_of(question), question.stack, question.accelerator
    )


def may_be_within(question: Question, budget: int) -> bool:
    """Whether tensors and context are. Raises as `need` does.

    What lives through the step takes an outline alone, and mostly settles it where nothing helps.
    """
    run = run_of(question)
    held = static_memory(outlined(question.architecture, run.setting), run)
    return held.value <= budget and need_at_least(question).value <= budget


def within(question: Question, budget: int) -> bool:
    """Whether the step runs on a device of that memory, gaps between its tensors included.

    Raises as `need` does.
    """
    return may_be_within(question, budget) and need(question, budget).value <= budget


def host_need(question: Question) -> Term:
    """The host memory of the step, 0 where nothing is offloaded. Raises as `need` does."""
    return host_memory(question.architecture, run_of(question))


def run_of(question: Question) -> TrainingRun:
    """The knobs that the choices come to. Raises `LLMSizeError` as `need` does."""
    return training_run(question.choices, question.stack, question.precision, question.optimizer)


def growing_segments() -> Change[Question]:
    """The option of PyTorch's allocator that leaves hardly any gaps; HIP does not have it."""
    return Change(
        "set `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`", 0.0, "nothing",
        lambda q: replace(q, stack=replace(q.stack, expandable_segments=True))
        if q.accelerator is None or q.accelerator.vendor == "NVIDIA" else q,
    )  # fmt: skip


def changes(
    *, eight_bit: Optimizer, base: Callable[[], object], double: Callable[[], object], liger: Stack
) -> tuple[Change[Question], ...]:
    """What can be changed, cheapest first: nothing lost, then time, then what is trained.

    That order is a judgement. How much time, `llmsize.planning.slowdown` says of each question.
    """
    return (
        Change("use SDPA for attention", 0.5, "attention weights to look at",
               lambda q: _choose(q, attention="sdpa")),
        Change("make gradients views of their buckets", 0.5, "nothing",
               lambda q: _choose(q, bucket_views=q.choices.replicas > 1)),
        Change("use Liger's fused kernels", 1.0, "nothing but a dependency",
               lambda q: replace(q, stack=liger) if q.stack.name in liger.patches else q),
        Change("use double quantization", 1.5, "hardly any quality",
               lambda q: _choose(q, base=double()) if _has_plain_scales(q) else q),
        Change("use 8-bit optimizer states", 2.0, "hardly any quality",
               lambda q: _with_optimizer(q, eight_bit)),
        Change("halve the micro-batch", 3.0, "some speed: twice as many of them",
               lambda q: _choose(q, batch=q.choices.batch // 2,
                                 accumulation=2 * q.choices.accumulation)
               if q.choices.batch % 2 == 0 else q),
        Change("recompute every block", 4.0, "",
               lambda q: _choose(q, recompute="full")),
        Change("recompute and offload checkpoints", 5.0, "",
               lambda q: _choose(q, recompute="full", offload_checkpoints=True)),
        Change("offload the optimizer", 6.0, "an optimizer step on the host",
               lambda q: offloaded(q, "optimizer")),
        Change("offload optimizer and weights", 7.0, "an optimizer step on the host",
               lambda q: offloaded(q, "parameters")),
        Change("train LoRA adapters only", 8.0, "full fine-tuning",
               lambda q: _choose(q, method="lora") if q.choices.method == "full" else q),
        Change("train LoRA on an NF4 base", 9.0, "precision: a base in 4 bit",
               lambda q: _choose(q, method="qlora", base=base())
               if q.choices.method in ("full", "lora") else q),
    )  # fmt: skip


def _has_plain_scales(question: Question) -> bool:
    base = question.choices.base
    return base is not None and base.name == "nf4"


def _choose(question: Question, **words: object) -> Question:
    return replace(question, choices=replace(question.choices, **words))  # type: ignore[arg-type]


def _with_optimizer(question: Question, optimizer: Optimizer) -> Question:
    kept = question.optimizer.layout == "block" or question.choices.offload != "none"
    return question if kept else replace(question, optimizer=optimizer)


def offloaded(question: Question, what: Offload) -> Question:
    """The question with more on the host; 8-bit states stay, as their kernels run on the device."""
    further = PLACES.index(what) > PLACES.index(question.choices.offload)
    return _choose(question, offload=what) if further and not question.optimizer.block else question
