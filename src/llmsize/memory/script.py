"""What happens to the large tensors of a pass over all layers, written down for the allocator.

A stretch that is passed for many layers is written once. What one layer makes and another releases
has a pile for all that is like it, from which the last one goes first: layers are left in the
reverse of the order in which they are entered.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count
from math import prod
from typing import NamedTuple

from llmsize.anatomy.tensor import (
    HIDDEN_STATES,
    HIDDEN_STATES_GRADIENT,
    OUTSIDE,
    Event,
    Label,
    Shape,
)
from llmsize.formats import stored_bytes
from llmsize.memory.reserved import SMALL, whole
from llmsize.memory.timeline import Passage, Stretch

Like = tuple[str, Shape, str]
"""What tensors of one kind have in common: the operation that made them, shape and format."""

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


class Pass(NamedTuple):
    """A forward and a backward pass over all layers."""

    scripts: Sequence[Script]
    piles: int
    """How many piles of tensors there are."""

    def small(self, before: int) -> tuple[int, int]:
        """Bytes of small tensors after it and at their most, with those that are there `before`."""
        level = most = before
        for script in self.scripts:
            again = max(0, script.small * (script.times - 1))
            most = max(most, level + again + script.crest)
            level += script.small * script.times
        return level, most


def written(parts: Sequence[Stretch], around: Sequence[Stretch] = ()) -> Pass:
    """The pass that goes through these stretches.

    Those of another model may be `around` it: that one goes forward before, and back after it.
    """
    numbers = count()
    scripts, others = _scripts(parts, numbers), _scripts(around, numbers)
    forward = sum(part.phase == "forward" for part in around)
    return Pass([*others[:forward], *scripts, *others[forward:]], next(numbers))


def _scripts(parts: Sequence[Stretch], numbers: Iterator[int]) -> list[Script]:
    """What happens in the stretches of one model, whose piles get the next `numbers`."""
    passages = (passage for part in parts for passage in part.passages)
    writer = _Writer(_left_to_others(passages), numbers)
    return [writer.script(part) for part in parts]


def _left_to_others(passages: Iterable[Passage]) -> Collection[Like]:
    """What is made in one layer and released in another."""
    return {
        _like(label) for passage in dict.fromkeys(passages) for size, label in passage.events
        if size < 0 and label[2] not in (passage.layer, OUTSIDE)
    }  # fmt: skip


def _like(label: Label) -> Like:
    _, operation, _, shape, format = label
    return operation, shape, format.name


class _Writer:
    """Writes what happens to the large tensors of a pass, with their piles."""

    def __init__(self, left: Collection[Like], numbers: Iterator[int]) -> None:
        """Nothing is written. What layers leave to each other is piled by what it is like."""
        self._left = left
        self._numbers = numbers
        self._piles: dict[int | Like, int] = {}
        """Number of the pile of what the events of one storage share, or of what is like it."""
        self._sizes: dict[int, int] = {}
        """Bytes of the tensor that was last put on each pile."""
        self._written: dict[Passage, Script] = {}

    def script(self, part: Stretch) -> Script:
        """A stretch: passage by passage, each of which is written once."""
        moves: list[Move] = []
        small = highest = 0
        for passage in part.passages:
            script = self._written.get(passage) or self._passage(passage)
            moves += script.moves
            highest = max(highest, small + script.crest)
            small += script.small
        return Script(part.times, moves, small, highest)

    def _passage(self, passage: Passage) -> Script:
        """What happens in it once."""
        moves: list[Move] = []
        born: dict[int, int] = {}
        small = highest = 0
        for size, label, after in _named(passage):
            if abs(size) > SMALL and self._is_large(size, label):
                self._move(moves, born, size, self._pile(label), after and self._pile(after))
            elif not after:
                small += size
                highest = max(highest, small)
        script = self._written[passage] = Script(1, moves, small, highest)
        return script

    def _is_large(self, size: int, label: Label) -> bool:
        """Whether it is not many small ones that are released at once."""
        _, _, _, shape, format = label
        return (
            size > 0 or self._pile(label) in self._sizes
            or stored_bytes(format, prod(shape)) > SMALL
        )  # fmt: skip

    def _move(
        self, moves: list[Move], born: dict[int, int], size: int, pile: int, then: int | None
    ) -> None:
        """One more of the moves of a passage: to life or released, or from one pile to another.

        What is moved where it was `born`, by the number of that move, was there from the beginning.
        """
        if then is not None:
            self._sizes[then] = abs(size)
            if pile in born:
                at = born[then] = born.pop(pile)
                moves[at] = (moves[at][0], then, then)
            else:
                moves.append((0, pile, then))
        elif size > 0:
            born[pile] = len(moves)
            self._sizes[pile] = size
            moves.append((whole(size), pile, pile))
        else:
            born.pop(pile, None)
            several = max(1, round(-size / self._sizes.get(pile, -size)))
            moves += [(-1, pile, pile)] * several  # one event may stand for many layers

    def _pile(self, label: Label) -> int:
        like = _like(label)
        key = like if like in self._left else id(label)
        pile = self._piles.get(key)
        if pile is None:
            pile = self._piles[key] = next(self._numbers)
        return pile


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
