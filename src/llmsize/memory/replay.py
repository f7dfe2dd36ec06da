"""What PyTorch's allocator reserves for a run: its tensors, as they come and go, layer by layer.

The trace of a step is unfolded over all layers, and its large tensors are taken from and returned
to the segments of `reserved.py`, step after step until a step finds all it needs in what is cached.
Optimizer states are made in the first step, in the gaps that its activations left; that is why
later steps may need more. Small tensors (up to 1 MiB) are summed; a quantized base is loaded as it
is stored; frozen companions of an objective are one block each, and what they read is not replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from math import inf, prod
from operator import itemgetter
from typing import NamedTuple

from llmsize.anatomy.setting import Setting
from llmsize.anatomy.tape import Parameter
from llmsize.architecture import Architecture
from llmsize.memory.reserved import SEGMENT_UNIT, SMALL, Block, Expandable, OutOfMemory, Segments
from llmsize.memory.script import Pass, written
from llmsize.memory.states import (
    copied_bytes,
    gradients_leave,
    gradients_stay,
    in_unified_memory,
    states,
    step_scratch,
    stored,
)
from llmsize.memory.training import (
    VALUE_MODEL,
    TrainingRun,
    TrainingStep,
    critic,
    training_step,
)

STEPS = 4
"""Steps after which a run is taken for steady, if it has not been before."""

WORKSPACE = (2 * 4096 + 8 * 16) * 1024
"""Bytes of a workspace of cuBLAS, which each thread that multiplies has: that of the forward pass
and that of the backward pass (pytorch v2.6, aten/src/ATen/cuda/CublasHandlePool.cpp,
`parseChosenWorkspaceSize`; Hopper has 32 MiB)."""


@lru_cache(maxsize=256)
def reserved(
    architecture: Architecture, run: TrainingRun, *, expandable: bool, room: float = inf
) -> int | None:
    """The most bytes that the allocator holds in a run, on a device with `room` for so many.

    More than those where the run fails: then free segments go back, and what is left of the others
    is in pieces too small for a tensor. `expandable` is the option `expandable_segments`. States in
    unified memory, which the allocator does not see, are counted with it. `None` where layers hand
    each other what cannot be told apart once it is unfolded.
    """
    play = play_of(architecture, run)
    segments = (Expandable if expandable else Segments)(room=room - play.beside)
    try:
        _run(segments, play)
    except OutOfMemory as failure:
        return failure.reserved + play.beside
    except Indistinct:
        return None
    return segments.most + play.beside


class Play(NamedTuple):
    """What a run asks of the allocator."""

    loaded: Sequence[int]
    """Sizes of what is there before the first step."""
    first: Pass
    """The pass that makes gradients."""
    again: Pass
    """The one that adds to them; the same if none stay."""
    accumulates: bool
    """Whether both are in a step."""
    keeps: bool
    """Whether gradients are there for the next step."""
    made: Sequence[int]
    """Sizes of what the optimizer makes in its first step, …"""
    scratch: Sequence[int]
    """… and of what it allocates in every one."""
    beside: int
    """Bytes of the segments of small tensors, and in unified memory."""


@lru_cache(maxsize=4)  # a question is replayed with a limit and without
def play_of(architecture: Architecture, run: TrainingRun) -> Play:
    """What the run asks for. Raises `LLMSizeError` as a step does."""
    once = _from_nothing(run)
    kept = gradients_stay(run) and not (run.fused_backward or gradients_leave(run))
    first = again = pass_of(architecture, run)
    if kept and not gradients_stay(once):
        first = pass_of(architecture, once)
    loaded, unified = [WORKSPACE] * 2, 0
    made: list[int] = []
    scratch: list[int] = []
    for step, own in _trained_models(architecture, run):
        weights = _in_order(step.weights)
        trained = [weight for weight in weights if weight.node is not None]
        paged = [weight for weight in dict.fromkeys(trained) if in_unified_memory(weight, own)]
        elsewhere = sum(states(weight, own) for weight in paged)
        loaded += _loaded(step, own, weights, trained)
        made += _made(step, own, trained, elsewhere)
        scratch = scratch or _scratch(trained, own)  # of the policy alone, as in its step
        unified += elsewhere
    passes = [first] if first is again else [first, again]
    small = _sum_of_small([*loaded, *made]) + _most_of_small(passes, _sum_of_small(scratch))
    return Play(
        loaded, first, again, run.accumulation > 1 and first is not again, run.keeps_gradients,
        made, scratch, -(-small // SEGMENT_UNIT) * SEGMENT_UNIT + unified,
    )  # fmt: skip


def _from_nothing(run: TrainingRun) -> TrainingRun:
    """The run with a step of one micro-batch that finds no gradients there."""
    return run._replace(accumulation=1, keeps_gradients=False)


def _trained_models(
    architecture: Architecture, run: TrainingRun
) -> Iterator[tuple[TrainingStep, TrainingRun]]:
    """The model's step, and that of a value model beside it."""
    yield training_step(architecture, run), run
    if run.objective.critic:
        yield from _trained_models(architecture, critic(run))


def pass_of(architecture: Architecture, run: TrainingRun) -> Pass:
    """A forward and a backward pass; a value model is the first to read and the last to learn."""
    return written(*(step.as_run for step, _ in _trained_models(architecture, run)))


class Indistinct(Exception):
    """What is released was not made, by its kind: layers hand each other what is not told apart."""


def _run(segments: Segments, play: Play) -> None:
    """Step until a step asks the driver for nothing more, or leaves what the one before it left.

    Raises `OutOfMemory`, or `Indistinct`.
    """
    for size in play.loaded:
        segments.take(size)
    free: Sequence[int] = ()
    for number in range(STEPS):
        before, asked = free, segments.asked
        left = passed(segments, play.again if number and play.keeps else play.first)
        if play.accumulates:
            left += passed(segments, play.again)
        if not number:
            for size in play.made:
                segments.take(size)
        left_by_step = [segments.take(size) for size in play.scratch]
        stays = play.keeps and not number  # gradients, which are added to from then on
        for block in (*left_by_step, *(() if stays else left)):
            segments.give(block)
        free = segments.sizes()
        if number and (segments.asked == asked or free == before):
            return


def passed(segments: Segments, one: Pass) -> list[Block]:
    """Take and give what a pass does; the blocks that are left.

    Raises `OutOfMemory`, or `Indistinct`.
    """
    piles: list[list[Block]] = [[] for _ in range(one.piles)]
    place, give = segments.place, segments.give
    try:
        for script in one.scripts:
            for _ in range(script.times):
                for size, pile, after in script.moves:
                    if size > 0:
                        piles[pile].append(place(size))
                    elif size:
                        give(piles[pile].pop())
                    else:
                        piles[after].append(piles[pile].pop())
    except IndexError:  # an empty pile
        raise Indistinct from None
    return [block for blocks in piles for block in blocks]


def _in_order(weights: Iterable[Parameter]) -> list[Parameter]:
    """Every single weight, layer by layer, as a module lists them: one entry for each copy."""
    found: list[tuple[float, Parameter]] = []
    outside = -1.0
    for weight in weights:
        outside = inf if weight.indices else outside
        found += [(index, weight) for index in weight.indices or (outside,)]
    return [weight for _, weight in sorted(found, key=itemgetter(0))]


def _loaded(
    step: TrainingStep, run: TrainingRun, weights: Sequence[Parameter], trained: Sequence[Parameter]
) -> Iterator[int]:
    """Sizes of what a model has there before the first step: no gradients that a pass makes."""
    for part in step.static.parts:
        held = int(part.value)
        if part.name == "weights":
            yield from _divided(held, weights, lambda w: _tensors(w, run.setting))
        elif part.name == "master weights":
            yield from _divided(held, trained, lambda w: [copied_bytes([w], run)])
        elif part.name == "gradients":
            yield from [held] if gradients_stay(_from_nothing(run)) else []
        elif part.name not in ("optimizer states", VALUE_MODEL):
            yield held


def _made(
    step: TrainingStep, run: TrainingRun, trained: Iterable[Parameter], elsewhere: int
) -> list[int]:
    """Sizes of the optimizer states, but for those that are `elsewhere`."""
    held = sum(int(part.value) for part in step.static.parts if part.name == "optimizer states")
    here = [weight for weight in trained if not in_unified_memory(weight, run)]
    parts = len(run.optimizer.states) or 1
    return _divided(held - elsewhere, here, lambda w: [states(w, run) // parts] * parts)


def _tensors(weight: Parameter, setting: Setting) -> list[int]:
    """Bytes of the tensors that hold a weight: if it is quantized, of its numbers and its scales.

    All of them that it stands for.
    """
    whole = stored(weight, setting)
    if setting.quantized is None or not weight.quantized:
        return [whole]
    numbers = prod(weight.shape) * weight.copies * int(setting.quantized.bits_per_element) // 8
    return [numbers, whole - numbers]


def _divided(
    held: int, weights: Iterable[Parameter], of: Callable[[Parameter], Iterable[int]]
) -> list[int]:
    """Bytes in tensors of single weights; in one if it is not what they take together."""
    kinds = list(weights)
    each = {kind: [size // kind.copies for size in of(kind)] for kind in dict.fromkeys(kinds)}
    sizes = [size for kind in kinds for size in each[kind]]
    rest = held - sum(sizes)
    return [*sizes, rest] if rest >= 0 else [held]


def _scratch(trained: Sequence[Parameter], run: TrainingRun) -> list[int]:
    """Sizes of what the optimizer allocates: for all weights at once, or for one of them."""
    kinds = list(dict.fromkeys(trained))
    if run.optimizer.stepping == "each" or run.optimizer.layout == "low_rank":
        return [step_scratch(kinds, run)]
    each = {id(kind): step_scratch([kind], run) // kind.copies for kind in kinds}
    return [each[id(weight)] for weight in trained]


def _most_of_small(passes: Iterable[Pass], scratch: int) -> int:
    """The most bytes that small tensors take at once, in passes in a row or in the step after."""
    level = most = 0
    for each in passes:
        level, highest = each.small(level)
        most = max(most, highest)
    return max(most, level + scratch)


def _sum_of_small(sizes: Iterable[int]) -> int:
    return sum(size for size in sizes if size <= SMALL)
