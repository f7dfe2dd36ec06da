"""What training holds through a step and leaves behind: weights, gradients, optimizer states.

Bytes of tensors on the device or in host memory, wherever the run has put them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

from llmsize.anatomy import Setting, Trace
from llmsize.anatomy.autograd import Leaf
from llmsize.anatomy.tape import Parameter
from llmsize.formats import INT64, Format, matrix_bytes, stored_bytes
from llmsize.memory.timeline import counted
from llmsize.optimizers import (
    DTYPE,
    factors,
    kept_format,
    leftover_bytes,
    orthogonalization_bytes,
    projection_bytes,
    state_bytes,
    state_format,
    subspace_bytes,
    takes,
)
from llmsize.term import Term, fact, total

if TYPE_CHECKING:
    from llmsize.memory.training import TrainingRun


def static_memory(trace: Trace, run: TrainingRun) -> Term:
    """What lives through the step on the device, by what it is."""
    trained = trained_weights(trace)
    parts = [_weights(trace.weights.values(), run), _buffers(trace)]
    if run.offload == "none":
        optimizer, held = run.optimizer, all_states(trained, run)
        parts.append(counted("optimizer states", held, optimizer.title, optimizer.source))
    parts.append(
        counted("inputs", _inputs(trace, run.setting), "token ids, labels and mask in int64")
    )
    if run.precision.master and run.offload == "none":
        precision, held = run.precision, copied_bytes(trained, run)
        parts.insert(1, counted("master weights", held, precision.title, precision.source))
    if gradients_stay(run) and not (run.fused_backward or gradients_leave(run)):
        parts.append(counted("gradients", kept_gradients(trained, run), "kept between batches"))
    if _has_buckets(run):
        parts.append(fact("buckets of the reducer", gradient_bytes(trained, run), unit="bytes",
                          source=REDUCER))  # fmt: skip
    return total("lives through the step", *parts, unit="bytes")


def trained_weights(trace: Trace) -> list[Parameter]:
    """What wants a gradient of its own."""
    return [weight for weight in trace.weights.values() if weight.node is not None]


REDUCER = "pytorch v2.6, torch/csrc/distributed/c10d/reducer.cpp (Reducer::initialize_buckets)"


def _weights(weights: Iterable[Parameter], run: TrainingRun) -> Term:
    if run.offload == "parameters":
        return counted("weights", at_work(weights, run.setting), "the block at work and the next")
    return counted("weights", sum(stored(weight, run.setting) for weight in weights))


def _buffers(trace: Trace) -> Term:
    return counted("buffers", trace.buffer_bytes, "inverse frequencies of the rotary embedding")


def at_work(weights: Iterable[Parameter], setting: Setting) -> int:
    """Bytes of two blocks in a row, at most: embedding, each layer, head with what leads to it.

    Tied weights are in the first and in the last block.
    """
    first = last = tied = 0
    layers: Counter[int] = Counter()
    headless = True
    for weight in weights:
        size = stored(weight, setting)
        headless = headless and weight.role != "head"
        if weight.indices:
            layers.update(dict.fromkeys(weight.indices, size // weight.copies))
        elif weight.role in ("embedding", "position"):
            first += size
            tied += size if weight.role == "embedding" else 0
        else:
            last += size
    blocks = [first, *(layers[index] for index in sorted(layers)), last + (tied if headless else 0)]
    return max(sum(pair) for pair in pairwise(blocks))


def stored(weight: Parameter, setting: Setting) -> int:
    """Bytes of a weight where it lives, its scales included if it is quantized."""
    if setting.quantized is not None and weight.quantized:
        rows, columns = prod(weight.shape[:-1]), weight.shape[-1]
        return matrix_bytes(setting.quantized, rows, columns) * weight.copies
    return weight.bytes * weight.copies * (1 + weight.copied)


def reached(weight: Parameter) -> bool:
    """Whether a weight gets a gradient: it is trained, and the loss depends on it.

    An adapter beside a layer that is never called, only its weight used, has none.
    """
    return isinstance(weight.node, Leaf) and weight.node.uses > 0


def gradient_bytes(trained: Iterable[Parameter], run: TrainingRun) -> int:
    """Bytes of the gradients of all trained weights in the format that the recipe keeps."""
    name = run.precision.gradients if _main_gradients(run) else DTYPE
    return sum(
        stored_bytes(kept_format(run.precision, name, w.format), prod(w.shape)) * w.copies
        for w in filter(reached, trained)
    )


def kept_gradients(trained: list[Parameter], run: TrainingRun) -> int:
    """The same with what gradients hold that are views of larger ones, which stay whole."""
    beside = (w.format.block_bytes * w.beside * w.copies for w in filter(reached, trained))
    return gradient_bytes(trained, run) + (0 if _main_gradients(run) else sum(beside))


def step_scratch(trained: Iterable[Parameter], run: TrainingRun) -> int:
    """What the optimizer allocates on the device to step when all gradients are there."""
    stepping = run.offload == "none" and not run.fused_backward
    return _scratch(list(filter(reached, trained)), run) if stepping else 0


def scratch_alone(weight: Parameter, run: TrainingRun) -> int:
    """The same for a step on a single weight, of those that `weight` stands for."""
    alone = Parameter(weight.name, weight.shape, weight.format, weight.role, ())
    return _scratch([alone], run)


def _scratch(stepped: Sequence[Parameter], run: TrainingRun) -> int:
    """The copies of weights that the optimizer's operations make, and the gradients in the master
    weights' format; or in a subspace, what one weight takes.
    """
    own = (highest_in_turn if run.optimizer.layout in IN_TURN else _copies)(stepped, run)
    recast = bool(run.precision.master) and not _main_gradients(run)
    return own + recast * copied_bytes(stepped, run)


def _copies(trained: Iterable[Parameter], run: TrainingRun) -> int:
    """Bytes of the copies that a step makes of all weights, or of one after the other."""
    optimizer = run.optimizer
    if optimizer.stepping != "each":
        copies = optimizer.step_copies
        return copies * sum(stepped_bytes(weight, run) for weight in trained) if copies else 0
    highest = before = 0
    for weight in trained:
        size, stepped = prod(weight.shape), _stepped(weight, run)
        format = state_format(optimizer, optimizer.step_format, stepped)
        copies = optimizer.step_copies + 2 * (format != stepped)
        beside = max(before * optimizer.step_leftovers, factors(optimizer, weight.shape))
        highest = max(highest, stored_bytes(format, size * copies + beside))
        before = size
    return highest


IN_TURN = {"low_rank": projection_bytes, "matrix": orthogonalization_bytes}
"""What a step allocates for a weight, of layouts that take one matrix after the other."""


def highest_in_turn(trained: Iterable[Parameter], run: TrainingRun) -> int:
    """What a step that takes one matrix after the other allocates for the one that takes most.

    Where there are projections, it takes what has none first, and the two temporaries of the last
    of those are there until the first projected gradient has a denominator.
    """
    optimizer, weights = run.optimizer, list(trained)
    allocated = IN_TURN[optimizer.layout]
    own = [allocated(optimizer, w.shape, w.role, _stepped(w, run)) for w in weights]
    if optimizer.layout == "low_rank":
        plain = [w for w in weights if not takes(optimizer, w.shape, w.role)]
        sizes = [stored_bytes(_stepped(w, run), prod(w.shape)) for w in plain]
        own += [leftover_bytes(before, after) for before, after in pairwise(sizes)]
        within = next((w for w in weights if takes(optimizer, w.shape, w.role)), None)
        if plain and within is not None:
            held = subspace_bytes(optimizer, within.shape, _stepped(within, run))
            own.append(2 * sizes[-1] + 2 * held)
    return max(own, default=0)


def copied_bytes(trained: Iterable[Parameter], run: TrainingRun) -> int:
    """Bytes of the copies that the optimizer works on; a weight in their format has none."""
    return sum(
        stepped_bytes(weight, run) for weight in trained if _stepped(weight, run) != weight.format
    )


def stepped_bytes(weight: Parameter, run: TrainingRun) -> int:
    """Bytes of a weight in the format of the copy that the optimizer works on."""
    return stored_bytes(_stepped(weight, run), prod(weight.shape)) * weight.copies


def _stepped(weight: Parameter, run: TrainingRun) -> Format:
    """The format of the copy of a weight that the optimizer works on."""
    if not run.precision.master:
        return weight.format
    return kept_format(run.precision, run.precision.master, weight.format)


def states(weight: Parameter, run: TrainingRun) -> int:
    """Bytes of the optimizer's states of a weight."""
    stepped = _stepped(weight, run)
    return state_bytes(run.optimizer, weight.shape, role=weight.role, stepped=stepped) * (
        weight.copies
    )


def all_states(trained: Iterable[Parameter], run: TrainingRun) -> int:
    """Bytes of the optimizer's states of these weights, and of what they share.

    A fused backward pass has an optimizer for each weight, and no two share anything
    (pytorch v2.13, the tutorial "How to save memory by fusing the optimizer step into the backward
    pass").
    """
    weights, optimizer = list(trained), run.optimizer
    held = sum([states(weight, run) for weight in weights])
    if not optimizer.shared_bytes:
        return held
    alike = sum(w.copies for w in weights if takes(optimizer, w.shape, w.role))
    return held + optimizer.shared_bytes * (alike if run.fused_backward else min(alike, 1))


PAGED = "bitsandbytes 0.43.1, bitsandbytes/optim/optimizer.py (get_state_buffer)"
PAGED_AT_LEAST = 100_000
"""Numbers of a weight whose states are paged: those of smaller ones are plain tensors."""


def in_unified_memory(weight: Parameter, run: TrainingRun) -> bool:
    """Whether the optimizer's states of a weight are, where PyTorch neither allocates nor sees."""
    return run.optimizer.pageable and prod(weight.shape) >= PAGED_AT_LEAST


def _main_gradients(run: TrainingRun) -> bool:
    """Whether gradients are added up in a buffer of a wider format than the weights have."""
    return run.precision.gradients not in (DTYPE, run.precision.weights)


def gradients_stay(run: TrainingRun) -> bool:
    """Whether all gradients exist through the step, wherever they are."""
    return run.accumulation > 1 or run.keeps_gradients or _main_gradients(run)


def gradients_leave(run: TrainingRun) -> bool:
    """Whether each gradient goes elsewhere as it comes: to the host, or into its bucket."""
    return run.offload != "none" or (run.bucket_views and _has_buckets(run))


def _has_buckets(run: TrainingRun) -> bool:
    """Whether replicas sum gradients in buckets beside them; main gradients are buckets already
    (Megatron-LM core v0.11, megatron/core/distributed/param_and_grad_buffer.py)."""
    return run.replicas > 1 and not _main_gradients(run)


def _inputs(trace: Trace, setting: Setting) -> int:
    tokens = setting.sequence * (2 if setting.padded else 1)
    labels = 1 if trace.classifies else setting.sequence
    return INT64.block_bytes * setting.batch * (tokens + labels)
