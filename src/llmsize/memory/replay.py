"""What PyTorch's allocator reserves for a run: its tensors, as they come and go, layer by layer.

The trace of a step is unfolded over all layers, and its large tensors are taken from and returned
to the segments of `reserved.py`, step after step until a step finds all it needs in what is cached.
Optimizer states are made in the first step, in the gaps that its activations left; that is why
later steps may need more. Small tensors (up to 1 MiB) are summed; a quantized base is loaded as it
is stored; what companions of an objective have beside the trained model is there as one block each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from math import inf, prod
from operator import itemgetter
from typing import NamedTuple

from llmsize.anatomy.setting import Setting
from llmsize.anatomy.tape import Parameter
from llmsize.anatomy.tensor import (
    HIDDEN_STATES,
    HIDDEN_STATES_GRADIENT,
    OUTSIDE,
    Event,
    Label,
    Shape,
)
from llmsize.architecture import Architecture
from llmsize.memory.reserved import (
    SEGMENT_UNIT,
    SMALL,
    Block,
    Expandable,
    OutOfMemory,
    Segments,
    whole,
)
from llmsize.memory.states import (
    copied_bytes,
    gradients_leave,
    gradients_stay,
    states,
    step_scratch,
    stored,
)
from llmsize.memory.timeline import Passage, Stretch, crest
from llmsize.memory.training import TrainingRun, training_step
from llmsize.term import Term

STEPS = 4
"""Steps after which a run is taken for steady, if it has not been before."""

WORKSPACE = (2 * 4096 + 8 * 16) * 1024
"""Bytes of a workspace of cuBLAS, which each thread that multiplies has: that of the forward pass
and that of the backward pass (pytorch v2.6, aten/src/ATen/cuda/CublasHandlePool.cpp,
`parseChosenWorkspaceSize`; Hopper has 32 MiB)."""

Like = tuple[str, Shape]
"""What tensors of one kind have in common: the operation that made them, and their shape."""

Move = tuple[int, int, int]
"""Bytes that come to life, and the number of the pile that they are put on; -1, and the pile whose
last tensor is released; or 0, that pile, and the one that its last tensor goes to."""


class Script(NamedTuple):
    """What happens to tensors `times` in a row."""

    times: int
    moves: Sequence[Move]
    """Of the large ones."""
    small: int
    """Bytes of small ones that are alive after it and were not before."""
    crest: int
    """The most of those that are alive within it."""


@lru_cache(maxsize=256)
def reserved(
    architecture: Architecture, run: TrainingRun, *, expandable: bool, room: float = inf
) -> int | None:
    """The most bytes that the allocator holds in a run, on a device with `room` for so many.

    More than those where the run fails: then free segments go back, and what is left of the others
    is in pieces too small for a tensor. `expandable` is the option `expandable_segments`. `None`
    where the layers hand each other what cannot be told apart once it is unfolded: what is alive at
    once is then not that of the step.
    """
    passes = _passes(architecture, run)
    if passes is None:
        return None
    weights = _in_order(training_step(architecture, run).weights)
    trained = [weight for weight in weights if weight.node is not None]
    loaded, made = _resident(architecture, run, weights, trained)
    scratch = _scratch(trained, run)
    small = _small_segments([*loaded, *made], passes, scratch)
    segments = (Expandable if expandable else Segments)(room=room - small)
    try:
        for size in loaded:
            segments.take(size)
        _run(segments, run, passes, made, scratch)
    except OutOfMemory as failure:
        return failure.reserved + small
    return segments.most + small


class _Pass(NamedTuple):
    """A forward and a backward pass over all layers."""

    scripts: Sequence[Script]
    piles: int
    """How many piles of tensors there are."""
    peak: int
    """The most bytes that are alive at once."""


@lru_cache(maxsize=4)  # a question is replayed with a limit and without
def _passes(architecture: Architecture, run: TrainingRun) -> tuple[_Pass, _Pass] | None:
    """The one that makes gradients, and the one that adds to them; the same if none stay.

    `None` where they are not met.
    """
    once = run._replace(accumulation=1, keeps_gradients=False)
    kept = gradients_stay(run) and not (run.fused_backward or gradients_leave(run))
    again = _pass(architecture, run)
    first = again if not kept or gradients_stay(once) else _pass(architecture, once)
    return (first, again) if is_met(first) else None


def _pass(architecture: Architecture, run: TrainingRun) -> _Pass:
    parts = training_step(architecture, run).as_run
    writer = _Writer(_left_to_others(passage for part in parts for passage in part.passages))
    scripts = [writer.script(part) for part in parts]
    return _Pass(scripts, len(writer.piles), crest(parts).bytes)


class Tally:
    """Has every byte that is asked for, and no more; remembers the most that was there at once."""

    def __init__(self) -> None:
        """Nothing is there."""
        self.now = self.most = 0

    def place(self, size: int) -> Block:
        """A block of that size."""
        self.now += size
        self.most = max(self.most, self.now)
        return 0, size

    def give(self, block: Block) -> None:
        """Return a block."""
        self.now -= block[1]


OFF = 0.05
"""By how much of the peak what is alive at once, unfolded, may differ from it."""


def is_met(one: _Pass) -> bool:
    """Whether what is alive at once when the layers are unfolded is what is alive in the step."""
    tally = Tally()
    _play(tally, one)
    least, most = (1 - OFF) * one.peak, (1 + OFF) * one.peak
    return tally.most <= most and tally.most + _most_of_small([one]) >= least


def _run(
    segments: Segments, run: TrainingRun, passes: tuple[_Pass, _Pass],
    made: Iterable[int], scratch: Sequence[int],
) -> None:  # fmt: skip
    """Step until a step asks the driver for nothing more, or leaves what the one before it left."""
    first, again = passes
    accumulates = run.accumulation > 1 and first is not again
    free: Sequence[int] = ()
    for number in range(STEPS):
        before, asked = free, segments.asked
        left = _play(segments, again if number and run.keeps_gradients else first)
        if accumulates:
            left += _play(segments, again)
        if not number:
            for size in made:
                segments.take(size)
        left_by_step = [segments.take(size) for size in scratch]
        for block in (*left_by_step, *(() if run.keeps_gradients else left)):
            segments.give(block)
        free = segments.sizes()
        if number and (segments.asked == asked or free == before):
            return


def _play(segments: Segments | Tally, one: _Pass) -> list[Block]:
    """Take and give what a pass does; the blocks that are left.

    Of the tensors on a pile the last one goes first: layers are left in the reverse of the order in
    which they are entered.
    """
    piles: list[list[Block]] = [[] for _ in range(one.piles)]
    place, give = segments.place, segments.give
    for script in one.scripts:
        for _ in range(script.times):
            for size, pile, after in script.moves:
                if size > 0:
                    piles[pile].append(place(size))
                elif blocks := piles[pile]:
                    if size:
                        give(blocks.pop())
                    else:
                        piles[after].append(blocks.pop())
    return [block for blocks in piles for block in blocks]


def _left_to_others(passages: Iterable[Passage]) -> Collection[Like]:
    """What is made in one layer and released in another."""
    return {
        _like(label) for passage in passages for size, label in passage.events
        if size < 0 and label[2] not in (passage.layer, OUTSIDE)
    }  # fmt: skip


def _like(label: Label) -> Like:
    _, operation, _, shape, _ = label
    return operation, shape


class _Writer:
    """Writes what happens to the large tensors of a pass, with their piles."""

    def __init__(self, left: Collection[Like]) -> None:
        """Nothing is written. What layers leave to each other is piled by what it is like."""
        self._left = left
        self.piles: dict[int | Like, int] = {}
        """Number of the pile of what the events of one storage share, or of what is like it."""
        self._sizes: dict[int, int] = {}
        """Bytes of the tensor that was last put on each pile."""
        self._written: dict[int, Script] = {}

    def script(self, part: Stretch) -> Script:
        """A stretch: passage by passage, each of which is written once."""
        moves: list[Move] = []
        small = highest = 0
        for passage in part.passages:
            key = id(passage)
            script = self._written.get(key) or self._written.setdefault(key, self._passage(passage))
            moves += script.moves
            highest = max(highest, small + script.crest)
            small += script.small
        return Script(part.times, moves, small, highest)

    def _passage(self, passage: Passage) -> Script:
        """What happens in it once. What gets another name in it is called so from its birth on."""
        moves: list[Move] = []
        born: dict[int, int] = {}
        small = highest = 0
        for size, label, after in _named(passage):
            if abs(size) <= SMALL:
                small += 0 if after else size
                highest = max(highest, small)
                continue
            pile, then = self._pile(label), self._pile(after or label)
            if size > 0 and not after:
                born[pile] = len(moves)
                self._sizes[pile] = size
                moves.append((whole(size), pile, pile))
            elif not after:
                born.pop(pile, None)  # one event may stand for many layers
                several = max(1, round(-size / self._sizes.get(pile, -size)))
                moves += [(-1, pile, pile)] * several
            else:
                self._sizes[then] = abs(size)
                if pile in born:
                    at = born[then] = born.pop(pile)
                    moves[at] = (moves[at][0], then, then)
                else:
                    moves.append((0, pile, then))
        return Script(1, moves, small, highest)

    def _pile(self, label: Label) -> int:
        like = _like(label)
        return self.piles.setdefault(like if like in self._left else id(label), len(self.piles))


def _named(passage: Passage) -> Iterator[tuple[int, Label, Label | None]]:
    """Its events; a storage that lives on as something else is one event with both names."""
    before: Event | None = None
    for event in passage.events:
        if not event[0]:
            continue
        if before is None:
            before = event
        elif before[0] < 0 and event[0] == -before[0] and _lives_on(before[1], event[1]):
            yield *before, event[1]
            before = None
        else:
            yield *before, None
            before = event
    if before is not None:
        yield *before, None


def _lives_on(label: Label, after: Label) -> bool:
    """Whether what is released is what comes to life, for another reason or handed on."""
    return after[1] in HANDED or (label[0] != after[0] and label[1:] == after[1:])


HANDED = (HIDDEN_STATES, HIDDEN_STATES_GRADIENT)
"""What layers hand each other."""


def _in_order(weights: Iterable[Parameter]) -> list[Parameter]:
    """Every single weight, layer by layer, as a module lists them: one entry for each copy."""
    found: list[tuple[float, Parameter]] = []
    outside = -1.0
    for weight in weights:
        outside = inf if weight.indices else outside
        found += [(index, weight) for index in weight.indices or (outside,)]
    return [weight for _, weight in sorted(found, key=itemgetter(0))]


def _resident(
    architecture: Architecture, run: TrainingRun,
    weights: Sequence[Parameter], trained: Sequence[Parameter],
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Sizes of what is there before the first step, and of what its optimizer makes.

    Gradients that a pass makes are not among them.
    """
    once = run._replace(accumulation=1, keeps_gradients=False)
    loaded, made = [WORKSPACE] * 2, []
    parts = len(run.optimizer.states) or 1
    for part in training_step(architecture, run).static.parts:
        if part.name == "optimizer states":
            made += _divided(part, trained, lambda w: [states(w, run) // parts] * parts)
        elif part.name == "weights":
            loaded += _divided(part, weights, lambda w: _tensors(w, run.setting))
        elif part.name == "master weights":
            loaded += _divided(part, trained, lambda w: [copied_bytes([w], run)])
        elif part.name != "gradients" or gradients_stay(once):
            loaded.append(int(part.value))
    return loaded, made


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
    part: Term, weights: Iterable[Parameter], of: Callable[[Parameter], Iterable[int]]
) -> list[int]:
    """The part in tensors of single weights; in one if it is not what they take together."""
    sizes = [size // weight.copies for weight in weights for size in of(weight)]
    rest = int(part.value) - sum(sizes)
    return [*sizes, rest] if rest >= 0 else [int(part.value)]


def _scratch(trained: Sequence[Parameter], run: TrainingRun) -> list[int]:
    """Sizes of what the optimizer allocates: for all weights at once, or for one of them."""
    kinds = list(dict.fromkeys(trained))
    if run.optimizer.stepping == "each" or run.optimizer.layout == "low_rank":
        return [step_scratch(kinds, run)]
    each = {id(kind): step_scratch([kind], run) // kind.copies for kind in kinds}
    return [each[id(weight)] for weight in trained]


def _small_segments(
    resident: Iterable[int], passes: Iterable[_Pass], scratch: Iterable[int]
) -> int:
    """Bytes of the segments of small tensors, which leave hardly any gaps."""
    most = _most_of_small(passes, scratch) + _sum_of_small(resident)
    return -(-most // SEGMENT_UNIT) * SEGMENT_UNIT


def _most_of_small(passes: Iterable[_Pass], scratch: Iterable[int] = ()) -> int:
    """The most bytes that small tensors take at once, in a pass or in the step after it."""
    most, stepping = 0, _sum_of_small(scratch)
    for each in passes:
        level = 0
        for script in each.scripts:
            before = max(0, script.small * (script.times - 1))
            most = max(most, level + before + script.crest)
            level += script.small * script.times
        most = max(most, level + stepping)
    return most


def _sum_of_small(sizes: Iterable[int]) -> int:
    return sum(size for size in sizes if size <= SMALL)
