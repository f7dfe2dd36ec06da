"""The life of a step's tensors, folded: how much is alive when, and what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llmsize.anatomy.tape import Segment
from llmsize.anatomy.tensor import Event, What
from llmsize.anatomy.trace import Trace


class Stretch(NamedTuple):
    """Events that happen `times` in a row: once, or once for each layer of a kind."""

    phase: str
    layer: int
    """Number of the traced layer it begins with; -1 outside of the layers."""
    times: int
    events: Sequence[Event]
    net: int
    """Bytes that are alive after one of them and were not before."""
    crest: int
    """The most that is alive within one of them, above what was before."""
    crest_at: int
    """How many events lead up to the crest."""


class Moment(NamedTuple):
    """One point of the timeline and all that is alive at it."""

    phase: str
    operation: str
    """What has just been made."""
    layer: int
    bytes: int
    """Alive at this point, without what lives through the whole step."""
    live: dict[What, int]
    """The same, by what it is."""


def stretches(trace: Trace) -> Iterator[Stretch]:
    """The tape in stretches; the layers of a pattern that repeats are one."""
    segments = [*trace.segments, Segment("end", -1, len(trace.events))]
    begin = 0
    for index in range(1, len(segments)):
        before, after = segments[begin], segments[index]
        same = before.phase == after.phase and before.layer >= 0 and after.layer >= 0
        place = trace.places[before.layer]
        if same and place.pattern == trace.places[after.layer].pattern:
            continue
        if after.start > before.start:
            events = trace.events[before.start : after.start]
            yield _stretch(before, len(place.indices) or 1, events)
        begin = index


def _stretch(segment: Segment, times: int, events: Sequence[Event]) -> Stretch:
    live = crest = crest_at = 0
    for index, (change, _) in enumerate(events, 1):
        live += change
        if live > crest:
            crest, crest_at = live, index
    return Stretch(segment.phase, segment.layer, times, events, live, crest, crest_at)


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
    live: dict[What, int] = {}
    for earlier in parts[:at]:
        _add(live, earlier.events, earlier.times)
    _add(live, part.events, turn)
    _add(live, part.events[: part.crest_at], 1)
    last = part.events[part.crest_at - 1][1].operation if part.crest_at else ""
    return Moment(part.phase, last, part.layer, size, {w: n for w, n in live.items() if n})


def _add(live: dict[What, int], events: Sequence[Event], times: int) -> None:
    if times:
        for change, what in events:
            live[what] = live.get(what, 0) + change * times
