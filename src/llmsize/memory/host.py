"""What a training step holds in host memory, and what crosses the bus between host and device.

With its optimizer offloaded the host holds what the optimizer steps on and with: a copy of the
trained weights, their gradients and states (Ren et al. 2021, arXiv:2101.06840). Gradients go there
as they come, the stepped weights come back. With its parameters offloaded the host holds all
weights, and the device fetches block by block, forward and backward (Rajbhandari et al. 2021,
arXiv:2104.07857).
"""

from __future__ import annotations

from collections.abc import Iterator

from llmsize.anatomy import Trace, outlined
from llmsize.anatomy.tape import Parameter
from llmsize.architecture import Architecture
from llmsize.memory.states import (
    PAGED,
    gradient_bytes,
    highest_in_turn,
    in_unified_memory,
    states,
    stepped_bytes,
    stored,
    trained_weights,
)
from llmsize.memory.timeline import counted
from llmsize.memory.training import VALUE_MODEL, TrainingRun, critic
from llmsize.term import Term, fact, term, total

OFFLOAD = "pytorch/ao 173b31e, torchao/optim/cpu_offload.py"
PINNED = "pytorch v2.6, aten/src/ATen/core/CachingHostAllocator.h (allocate)"
INFINITY = "Rajbhandari et al. 2021, arXiv:2104.07857, section 5"


def host_memory(architecture: Architecture, run: TrainingRun) -> Term:
    """Bytes of tensors in host memory, by what they are; no parts where nothing is offloaded."""
    if run.offload == "none" and not run.setting.offload_checkpoints:
        return total("host memory", unit="bytes")
    trace = outlined(architecture, run.setting)
    parts = list(_resident(trace, run))
    if run.setting.offload_checkpoints:
        parts.append(counted("offloaded checkpoints", _checkpoints(trace)))
    if run.objective.critic and run.offload != "none":
        below = host_memory(architecture, critic(run))
        parts.append(total(VALUE_MODEL, *below.parts, unit="bytes"))
    return total("host memory", *(part for part in parts if part.value), unit="bytes")


def evictable(architecture: Architecture, run: TrainingRun) -> Term | None:
    """The states that the driver may move to the host when the device is full, if it may.

    They are in unified memory, which PyTorch neither allocates nor sees.
    """
    if not run.optimizer.pageable:
        return None
    trained = trained_weights(outlined(architecture, run.setting))
    held = sum(states(weight, run) for weight in trained if in_unified_memory(weight, run))
    return fact("paged to the host at most", held, unit="bytes", source=PAGED)


def bus_traffic(architecture: Architecture, run: TrainingRun) -> Term:
    """Bytes that cross the bus in one optimizer step, by what they are."""
    trace = outlined(architecture, run.setting)
    trained, batches = trained_weights(trace), run.accumulation
    parts = []
    if run.offload != "none":
        parts.append(term(
            "gradients to the host", "gradients * micro_batches", unit="bytes", source=OFFLOAD,
            gradients=gradient_bytes(trained, run), micro_batches=batches,
        ))  # fmt: skip
    if run.offload == "optimizer":
        back = sum(weight.bytes * weight.copies for weight in trained)
        parts.append(fact("stepped weights to the device", back, unit="bytes", source=OFFLOAD))
    if run.offload == "parameters":
        parts.append(term(
            "weights to the device", "weights * passes * micro_batches", unit="bytes",
            source=INFINITY, grade="formula", passes=2, micro_batches=batches,
            weights=sum(stored(weight, run.setting) for weight in trace.weights.values()),
        ))  # fmt: skip
    if run.setting.offload_checkpoints:
        parts.append(term(
            "checkpoints, there and back", "2 * checkpoints * micro_batches", unit="bytes",
            checkpoints=_checkpoints(trace), micro_batches=batches,
        ))  # fmt: skip
    if run.objective.critic and parts:
        below = bus_traffic(architecture, critic(run))
        parts.append(total(VALUE_MODEL, *below.parts, unit="bytes"))
    return total("over the bus in a step", *parts, unit="bytes")


def _resident(trace: Trace, run: TrainingRun) -> Iterator[Term]:
    """What lives in host memory through the step."""
    if run.offload == "none":
        return
    trained = trained_weights(trace)
    copies = sum(stepped_bytes(weight, run) for weight in trained)
    pinned = [trained]  # the gradients
    held = sum(states(weight, run) for weight in trained)
    yield counted("optimizer states", held, run.optimizer.title, OFFLOAD)
    if run.precision.master:
        yield counted("master weights", copies, run.precision.title, OFFLOAD)
        pinned.append(trained)
    elif run.offload == "optimizer":
        yield counted("weights to step on", copies, "a copy in the weights' format", OFFLOAD)
        pinned.append(trained)
    yield counted("gradients", copies, "in the format of the weights that are stepped on", OFFLOAD)
    rounded = sum(_rounding(stepped_bytes(w, run), w) for each in pinned for w in each)
    if run.offload == "parameters":
        weights = list(trace.weights.values())
        yield counted("weights", sum(stored(weight, run.setting) for weight in weights))
        rounded += sum(_rounding(stored(weight, run.setting), weight) for weight in weights)
    if run.optimizer.layout == "low_rank":
        yield counted("optimizer scratch", highest_in_turn(trained, run))
    yield Term("rounding of pinned blocks", rounded, "bytes", source=PINNED, grade="formula",
               note="each pinned tensor takes a power of two; flat buffers less")  # fmt: skip


def _rounding(size: int, weight: Parameter) -> int:
    """What powers of two add to the tensors that a weight stands for, `size` bytes together."""
    each = size // weight.copies
    return ((1 << max(each - 1, 0).bit_length()) - each) * weight.copies


def _checkpoints(trace: Trace) -> int:
    return sum(trace.offloaded.get(turn.parts[0], 0) * len(turn.indices) for turn in trace.course)
