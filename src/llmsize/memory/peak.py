"""What is alive at the peak of a training step, and what the meters of a device show of it."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, prod
from typing import TYPE_CHECKING

from llmsize.anatomy.tensor import Shape
from llmsize.architecture import Architecture
from llmsize.formats import Format, stored_bytes
from llmsize.memory.timeline import Moment, counted
from llmsize.memory.training import TrainingRun, TrainingStep, training_step
from llmsize.term import Term, fact, term, total
from llmsize.units import MIB, format_share

if TYPE_CHECKING:
    from llmsize.hardware import Accelerator
    from llmsize.stack import Stack


ROLES = {
    "gradient": "gradients",
    "kept": "activations kept for backward",
    "cast": "autocast copies of weights",
    "temporary": "temporaries",
    "cache": "cache",
}
"""What the tensors of a step are alive for, in the order in which they are shown."""


SOFTMAX = "PyTorch v2.13, aten/src/ATen/native/cuda/SoftMax.cu, `softmax_backward_cuda_out`"

SHOWN = 8
"""Tensors that are listed one by one under each role; the rest is summed."""


def peak_memory(step: TrainingStep) -> Term:
    """Everything that is allocated at the highest moment of the step, by why it is there."""
    if step.phase in step.stages:
        moving = list(step.stages[step.phase].parts)
    elif step.phase == "step":
        moving = [
            counted("gradients", step.left),
            counted("optimizer scratch", step.step_scratch),
        ]
    else:
        alive = _by_role(step.moment)
        moving = [_role_term(role, alive[role]) for role in ROLES]
    if step.phase in step.beside:
        moving.append(step.beside[step.phase])
    parts = [part for part in (*step.static.parts, *moving) if part.value]
    return total("allocated at the peak", *parts, unit="bytes")


ALLOCATOR = "pytorch v2.6, c10/cuda/CUDACachingAllocator.cpp"


def device_memory(
    architecture: Architecture, run: TrainingRun, stack: Stack, room: int | None = None,
    card: Accelerator | None = None,
) -> Term:  # fmt: skip
    """The peak with what the allocator reserves above it and what the device holds besides.

    This is what `nvidia-smi` shows. Where a device has no `room` for all that the allocator would
    cache, it gives free segments back; where that does not help, it is what there would have to be
    for the run to come further. So a run fits where this is within the room, and then only.
    """
    least = least_memory(architecture, run, stack, card)
    *parts, context = least.parts
    allocated = int(least.value - context.value)
    if room is not None and room < least.value:
        slack = _slack(allocated, allocated)
    else:
        inside = inf if room is None else room - context.value
        slack = _slack_within(architecture, run, stack, allocated, inside)
    return total("device memory", *parts, slack, context)


def _slack_within(
    architecture: Architecture, run: TrainingRun, stack: Stack, allocated: int, room: float
) -> Term:
    """What the allocator reserves above what is allocated, with `room` for both."""
    from llmsize.memory.replay import reserved  # which overviews do without

    held = reserved(architecture, run, expandable=stack.expandable_segments, room=room)
    if held is not None:
        return _slack(held, allocated)
    usual = _usual_slack(allocated, stack)
    return usual if allocated + usual.value <= room else _slack(int(room), allocated)


def _slack(held: int, allocated: int) -> Term:
    return term(
        "allocator slack", "max(reserved - allocated, 0)", unit="bytes", source=ALLOCATOR,
        grade="formula", note=REPLAYED, reserved=held, allocated=allocated,
    )  # fmt: skip


REPLAYED = "the step's tensors, taken from the allocator's segments layer by layer"


def least_memory(
    architecture: Architecture, run: TrainingRun, stack: Stack, card: Accelerator | None = None
) -> Term:
    """What a device needs for the run at the least: all tensors, and the context.

    With less it fails; whether more is needed, for gaps between tensors, `device_memory` says.
    """
    step = training_step(architecture, run)
    return total("device memory", peak_memory(step), *beside_tensors(step, stack, card))


def beside_tensors(step: TrainingStep, stack: Stack, card: Accelerator | None = None) -> list[Term]:
    """What a device needs beside the tensors of a trace.

    What kernels take within themselves is allocated, too, although no trace of tensors sees it.
    """
    own = counted("kernels' own temporaries", step.within_kernels, source=SOFTMAX)
    return [*([own] if own.value else []), device_context(stack, card)]


LOCAL_MEMORY = (
    "https://forums.developer.nvidia.com/t/local-memory-management/289339: a context has local "
    "memory for every thread that there is room for"
)

DRIVER, LOCAL = 48 * MIB, 2_155
"""Bytes of a context, and of each thread: a line through what PyTorch's errors say of processes on
nine cards (tests/reference/device_context.csv)."""


def device_context(stack: Stack, card: Accelerator | None) -> Term:
    """What CUDA and its libraries hold beside the allocator, on a card where one is known."""
    threads = None if card is None else card.resident_threads
    if threads is None or stack.loads_all_kernels:
        return fact(
            "device context", stack.context, unit="bytes", source=stack.source, grade="fitted"
        )
    return term(
        "device context", "driver + threads * local", unit="bytes", source=LOCAL_MEMORY,
        grade="fitted", note="published processes lie between 81 % and 111 % of it",
        driver=DRIVER, threads=threads, local=LOCAL,
    )  # fmt: skip


def on_device(allocated: Term, stack: Stack) -> Term:
    """Allocated bytes with the allocator's usual slack and the device's context.

    It is for what is not one step of one device, which would be followed tensor by tensor.
    """
    slack = _usual_slack(int(allocated.value), stack)
    return total("device memory", allocated, slack, device_context(stack, None))


def _usual_slack(allocated: int, stack: Stack) -> Term:
    return term(
        "allocator slack",
        "ceil(allocated * share)",
        unit="bytes",
        source=stack.source,
        grade="fitted",
        note=f"published runs lie between {format_share(stack.slack_low)} and "
        f"{format_share(stack.slack_high)}",
        allocated=allocated,
        share=stack.allocator_slack,
    )


Kind = tuple[str, Shape, Format]
"""The operation that tensors are made by, their shape and their format."""


def _by_role(moment: Moment) -> dict[str, dict[Kind, int]]:
    """The tensors that are alive, by why they are: bytes of each kind."""
    alive: dict[str, dict[Kind, int]] = {role: {} for role in ROLES}
    for (role, operation, _, shape, format), size in moment.live.items():
        sizes, kind = alive[role], (operation, shape, format)
        sizes[kind] = sizes.get(kind, 0) + size
    return alive


def _role_term(role: str, sizes: Mapping[Kind, int]) -> Term:
    """The tensors that are alive for one reason: the largest by name, the rest together."""
    ranked = sorted(sizes.items(), key=lambda item: -item[1])
    listed = [_tensor_term(*key, size) for key, size in ranked[:SHOWN] if size]
    rest = sum(size for _, size in ranked[SHOWN:])
    if rest:
        listed.append(counted(f"{len(ranked) - SHOWN} smaller kinds", rest))
    return total(ROLES[role], *listed, unit="bytes")


def _tensor_term(operation: str, shape: Shape, format: Format, size: int) -> Term:
    """Tensors of one kind: their number times the product of their dimensions."""
    name = f"to {format.name}" if operation == "to" else operation
    each = stored_bytes(format, prod(shape))
    if not each or size % each:
        return counted(name, size)
    inputs: dict[str, int | float] = {"tensors": size // each}
    for index, dim in enumerate(shape):
        inputs[getattr(dim, "name", "") or f"size_{index}"] = int(dim)
    inputs["bytes_each"] = each // prod(shape) if shape else each
    if prod(inputs.values()) != size:  # a dimension that occurs twice
        return counted(name, size)
    return Term(name, size, "bytes", " * ".join(inputs), inputs, grade="formula")
