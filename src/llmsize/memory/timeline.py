"""The life of a step's tensors, folded: how much is alive when, and what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from llmsize.anatomy.course import Turn
from llmsize.anatomy.tape import Segment
from llmsize.anatomy.tensor import HANDED_ON, OUTSIDE, Event, What
from llmsize.anatomy.trace import Trace
from llmsize.term import Term

ANATOMY = "the anatomy of the model"


def counted(name: str, size: int, note: str = "", source: str = ANATOMY) -> Term:
    """Bytes of tensors that were counted one by one."""
    return Term(name, size, "bytes", source=source, note=note)


class Passage:
    """What happens in one traced layer, or outside of the layers, in one go."""

    def __init__(self, events: Sequence[Event], layer: int = OUTSIDE) -> None:
        """Fold the `events` of a traced layer."""
        levels = [0, *accumulate([change for change, _ in events])]
        self.events = events
        self.layer = layer
        self.net = levels[-1]
        """Bytes that are alive after it and were not before."""
        self.crest = max(levels)
        """The most that is alive within it, above what was before."""
        self.crest_at = levels.index(self.crest)
        """How many events lead up to the crest."""

    @cached_property
    def lasting(self) -> Sequence[Event]:
        """What it leaves alive, and what it releases that was alive before."""
        return unmatched(self.events)

    @property
    def again(self) -> Passage:
        """The same for another layer: what all layers share is taken up and let go of once."""
        return self._own or self

    @cached_property
    def _own(self) -> Passage | None:
        """What is the layer's own, unless all of it is: what refers to itself is freed late.

        What it is handed is of a layer, too.
        """
        if all(what.layer >= 0 for _, what in self.events):
            return None
        handed = {id(what): what for _, what in self.events if what.layer == HANDED_ON}
        made = {key: what._replace(layer=self.layer) for key, what in handed.items()}
        own = [(size, made.get(id(what), what)) for size, what in self.events
               if what.layer != OUTSIDE]  # fmt: skip
        return Passage(own, self.layer)


class Stretch(NamedTuple):
    """Passages that happen `times` in a row: once, or once for each layer of a kind."""

    phase: str
    turn: int
    """Number of the turn it begins with; -1 outside of the layers."""
    times: int
    passages: Sequence[Passage]
    net: int
    """Bytes that are alive after one of them and were not before."""
    crest: int
    """The most that is alive within one of them, above what was before."""
    crest_in: int
    """Index of the passage that has the crest."""

    def lasting(self) -> Iterator[Event]:
        """What one of them leaves alive, and what it releases that was alive before."""
        for passage in self.passages:
            yield from passage.lasting


class Moment(NamedTuple):
    """One point of the timeline and all that is alive at it."""

    phase: str
    operation: str
    """What has just been made."""
    layer: int
    """Number of the turn of the layers at work; -1 outside of the layers."""
    bytes: int
    """Alive at this point, without what lives through the whole step."""
    live: dict[What, int]
    """The same, by what it is."""


def stretches(trace: Trace) -> Iterator[Stretch]:
    """The tape in stretches, for all layers; those of a pattern that repeats are one."""
    passed: dict[int, Passage] = {}
    for segment, after in pairwise([*trace.segments, Segment("end", -1, len(trace.events))]):
        passage = Passage(trace.events[segment.start : after.start], segment.layer)
        if segment.layer >= 0:
            passed[segment.layer] = passage
        elif passage.events:
            yield _stretch(segment.phase, -1, 1, [passage])
        if passed and (after.layer < 0 or after.phase != segment.phase or after.layer in passed):
            yield from _along(trace.course, segment.phase, passed)
            passed = {}


def _along(course: Sequence[Turn], phase: str, passed: Mapping[int, Passage]) -> Iterator[Stretch]:
    """All layers in the direction in which the traced ones were `passed`."""
    first, *_, last = (*passed, *passed)
    turns = [(number, turn) for number, turn in enumerate(course) if turn.layer in passed]
    if first > last or phase == "backward":
        turns.reverse()
    whole = _whole(turns, passed)
    for _, pattern in groupby(turns, lambda pair: pair[1].pattern):
        together = list(pattern)
        passages = [
            passed[turn.layer] if number in whole else passed[turn.layer].again
            for number, turn in together
        ]
        number, turn = together[0]
        if any(passage.events for passage in passages):
            yield _stretch(phase, number, len(turn.indices), passages)


def _whole(turns: Iterable[tuple[int, Turn]], passed: Mapping[int, Passage]) -> set[int]:
    """Numbers of the turns at which, of all that one layer shows, what all layers share changes.

    It is let go of at the turn that was traced. If nothing of it goes, it is held for another
    reason from the first such layer on, which on the way back is another one.
    """
    found: dict[int, int] = {}
    for number, turn in turns:
        passage = passed[turn.layer]
        lets_go = passage.net != passage.again.net
        alone = len(turn.indices) == 1
        if number == turn.layer if lets_go else alone:
            found.setdefault(turn.layer, number)
    return set(found.values())


def _stretch(phase: str, turn: int, times: int, passages: Sequence[Passage]) -> Stretch:
    live = highest = highest_in = 0
    for index, passage in enumerate(passages):
        if live + passage.crest > highest:
            highest, highest_in = live + passage.crest, index
        live += passage.net
    return Stretch(phase, turn, times, passages, live, highest, highest_in)


def unmatched(events: Iterable[Event]) -> Sequence[Event]:
    """Events without those of storages that come to life and go among them."""
    found: dict[int, Event] = {}
    for event in events:
        what = id(event[1])
        if found.pop(what, None) is None:
            found[what] = event
    return list(found.values())


def level(parts: Sequence[Stretch]) -> int:
    """Bytes alive after all of `parts`."""
    return sum(part.net * part.times for part in parts)


class Crest(NamedTuple):
    """Where the most is alive."""

    bytes: int
    at: int
    """Index of the stretch."""
    turn: int
    """How often the stretch has happened before."""


def crest(parts: Sequence[Stretch], phase: str = "") -> Crest:
    """Where most is alive, in one phase or in all."""
    live = 0
    highest = Crest(0, 0, 0)
    for index, part in enumerate(parts):
        before = max(0, part.net * (part.times - 1))
        if live + before + part.crest > highest.bytes and phase in ("", part.phase):
            turn = part.times - 1 if before else 0
            highest = Crest(live + before + part.crest, index, turn)
        live += part.net * part.times
    return highest


def peak(parts: Sequence[Stretch], phase: str = "") -> Moment:
    """The moment at which most is alive, in one phase or in all, with all that is alive."""
    size, at, turn = crest(parts, phase)
    part = parts[at]
    highest = part.passages[part.crest_in]
    live = _alive(
        *((earlier.lasting(), earlier.times) for earlier in parts[:at]),
        (part.lasting(), turn),
        *((before.lasting, 1) for before in part.passages[: part.crest_in]),
        (unmatched(highest.events[: highest.crest_at]), 1),
    )
    last = highest.events[highest.crest_at - 1][1].operation if highest.crest_at else ""
    return Moment(part.phase, last, part.turn, size, live)


def _alive(*passed: tuple[Iterable[Event], int]) -> dict[What, int]:
    """Bytes alive, by what they are, after events that happen so many times."""
    sizes: dict[int, int] = {}  # by identity, which the events of one storage share
    named: dict[int, What] = {}
    for events, times in passed:
        if times:
            for change, what in events:
                key = id(what)
                sizes[key] = sizes.get(key, 0) + change * times
                named[key] = what
    live: dict[What, int] = {}
    for key, size in sizes.items():
        if size:
            live[named[key]] = live.get(named[key], 0) + size
    return {what: size for what, size in live.items() if size}
