"""The life of a step's tensors, folded: how much is alive when, and what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from llmsize.anatomy.course import Turn
from llmsize.anatomy.tape import Segment
from llmsize.anatomy.tensor import HANDED_ON, OUTSIDE, Event, Label, What
from llmsize.anatomy.trace import Trace
from llmsize.term import Term, fact

ANATOMY = "the anatomy of the model"


def counted(name: str, size: int, note: str = "", source: str = ANATOMY) -> Term:
    """Bytes of tensors that were counted one by one."""
    return Term(name, size, "bytes", "", {}, source, "exact", (), note)


def traced(name: str, size: int) -> Term:
    """Bytes that a pass has alive together at some moment."""
    return fact(name, size, unit="bytes", source=ANATOMY, grade="formula")


class Passage:
    """What happens in one traced part of a layer, or outside of the layers, in one go."""

    def __init__(
        self,
        events: Sequence[Event],
        layer: int,
        net: int,
        crest: int,
        *,
        within: Sequence[tuple[int, int]] = (),
        once: Passage | None = None,
    ) -> None:
        """`within` are bytes that a kernel takes within itself, each behind so many events.

        In one that happens again for another layer as it did `once`, nothing happens to what all
        layers share, and that layer is handed what the first one was.
        """
        # apart: a tuple for each event that is remembered is one more for the collector to search
        self._changes, self._labels = _apart(events)
        self.layer = layer
        self.net = net
        """Bytes that are alive after it and were not before."""
        self.crest = crest
        """The most that is alive within it, above what was before."""
        self.within = within
        self.once = once

    @property
    def events(self) -> Sequence[Event]:
        """What comes to life and what goes, in order."""
        if self.once is not None:
            return _of_layers(self.once.events)
        return [*zip(self._changes, self._labels, strict=True)]

    @cached_property
    def lasting(self) -> Sequence[Event]:
        """What it leaves alive, and what it releases that was alive before."""
        if self.once is None:
            return _unmatched(self.events)
        return [(size, self._own(label)) for size, label in _of_layers(self.once.lasting)]

    def up_to_crest(self) -> Sequence[Event]:
        """Its events, until most is alive."""
        events = self.events
        levels = [*accumulate([change for change, _ in events], initial=0)]
        return events[: levels.index(self.crest)]

    def at_crest(self) -> Sequence[Event]:
        """What is alive by then and was not before, and what is released."""
        found = _unmatched(self.up_to_crest())
        return found if self.once is None else [(size, self._own(label)) for size, label in found]

    def as_run(self) -> Passage:
        """The same with what kernels take within themselves, which no trace of tensors sees."""
        once = self.once or self
        if not once.within:
            return self
        return once._passages_as_run[0 if once is self else 1]

    @cached_property
    def _passages_as_run(self) -> tuple[Passage, Passage]:
        before, events = self.events, list[Event]()
        places = [place for place, _ in self.within]
        for start, (place, size) in zip([0, *places], self.within, strict=False):
            events += before[start:place]
            role, operation, layer, shape, format = events[-1][1]
            own: Label = role, operation, layer, shape, format
            events += [(size, own), (-size, own)]
        return passages([*events, *before[places[-1] :]], self.layer)

    def _own(self, label: Label) -> Label:
        """What another layer is handed is of a layer, too."""
        role, operation, layer, shape, format = label
        return (role, operation, self.layer, shape, format) if layer == HANDED_ON else label


def passages(
    events: Sequence[Event], layer: int, within: Sequence[tuple[int, int]] = ()
) -> tuple[Passage, Passage]:
    """What happens in a traced part of a layer, and again in another layer of its kind."""
    live = crest = own = own_crest = 0
    for change, label in events:
        live += change
        if live > crest:
            crest = live
        if label[2] != OUTSIDE:
            own += change
            if own > own_crest:
                own_crest = own
    once = Passage(events, layer, live, crest, within=within)
    return once, Passage((), layer, own, own_crest, once=once)


def _of_layers(events: Sequence[Event]) -> Sequence[Event]:
    return [event for event in events if event[1][2] != OUTSIDE]


def _apart(events: Sequence[Event]) -> tuple[Sequence[int], Sequence[Label]]:
    """The changes and the labels of events."""
    changes, labels = zip(*events, strict=True) if events else ((), ())
    return changes, labels


def _unmatched(events: Sequence[Event]) -> Sequence[Event]:
    """Events without those of storages that come to life and go among them."""
    found: dict[int, Event] = {}
    for event in events:
        label = id(event[1])
        if label in found:
            del found[label]
        else:
            found[label] = event
    return list(found.values())


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
    layers: int
    """How many layers it passes; outside of them it counts as one."""

    @property
    def highest(self) -> Passage:
        """The passage that has the crest."""
        return self.passages[self.crest_in]

    def as_run(self) -> Stretch:
        """The same with what kernels take within themselves, which no trace of tensors sees."""
        passages = [passage.as_run() for passage in self.passages]
        return _stretch(self.phase, self.turn, self.times, passages, self.layers)

    def lasting(self) -> Iterator[Event]:
        """What one of them leaves alive, and what it releases that was alive before."""
        for passage in self.passages:
            yield from passage.lasting


class Moment:
    """The crest of the last of some stretches, and what is alive at it."""

    def __init__(self, parts: Sequence[Stretch], turn: int, size: int) -> None:
        """After the last has happened `turn` times."""
        self._parts = parts
        self._turn = turn
        self.phase = parts[-1].phase
        self.layer = parts[-1].turn
        """Number of the turn of the layers at work; -1 outside of the layers."""
        self.bytes = size
        """Alive at this point, without what lives through the whole step."""

    @cached_property
    def operation(self) -> str:
        """What has just been made."""
        events = self._parts[-1].highest.up_to_crest()
        return What(*events[-1][1]).operation if events else ""

    @cached_property
    def live(self) -> dict[What, int]:
        """What is alive at this point, with its bytes; found when it is first asked for."""
        *before, part = self._parts
        passed = [(earlier.passages, earlier.times) for earlier in before]
        passed += [(part.passages, self._turn), (part.passages[: part.crest_in], 1)]
        happened: dict[Passage, int] = {}  # a passage may be in the stretches of many turns
        for passages, times in passed:
            for passage in passages:
                happened[passage] = happened.get(passage, 0) + times
        lasting = [(passage.lasting, times) for passage, times in happened.items() if times]
        return _alive(*lasting, (part.highest.at_crest(), 1))


def stretches(trace: Trace) -> Iterator[Stretch]:
    """The tape in stretches, for all layers; those of a pattern that repeats are one."""
    events, within = trace.events, trace.within
    passed: dict[int, tuple[Passage, Passage]] = {}
    for segment, after in pairwise([*trace.segments, Segment("end", -1, len(events))]):
        start, stop = segment.start, after.start
        taken = [(at - start, size) for at, size in within if start < at <= stop] if within else ()
        happened = passages(events[start:stop], segment.layer, taken)
        if segment.layer >= 0:
            passed[segment.layer] = happened
        elif stop > start:
            yield _stretch(segment.phase, -1, 1, happened[:1])
        if passed and (after.layer < 0 or after.phase != segment.phase or after.layer in passed):
            yield from _along(trace.course, segment.phase, passed)
            passed = {}


def outside(phase: str, events: Sequence[Event]) -> Stretch:
    """What happens once, outside of the layers."""
    return _stretch(phase, -1, 1, passages(events, -1)[:1])


def _along(
    course: Sequence[Turn], phase: str, passed: Mapping[int, tuple[Passage, Passage]]
) -> Iterator[Stretch]:
    """All layers in the direction in which the traced parts of them were `passed`."""
    first, *_, last = (*passed, *passed)
    order = -1 if first > last or phase == "backward" else 1
    turns = [
        (number, turn, parts)
        for number, turn in enumerate(course)
        if (parts := [part for part in turn.parts[::order] if part in passed])
    ][::order]
    whole = _whole(turns, passed)
    for _, pattern in groupby(turns, lambda entry: entry[1].pattern):
        together = list(pattern)
        happening = [
            once if whole.get(part) == number else again
            for number, _, parts in together for part in parts for once, again in [passed[part]]
        ]  # fmt: skip
        number, turn, _ = together[0]
        if any(part.net or part.crest or part.events for part in happening):
            layers = len(turn.indices) * len(together)
            yield _stretch(phase, number, len(turn.indices), happening, layers)


def _whole(
    turns: Sequence[tuple[int, Turn, Sequence[int]]],
    passed: Mapping[int, tuple[Passage, Passage]],
) -> dict[int, int]:
    """For each part the turn at which, of all that it shows, what all layers share changes.

    It is let go of at the turn that was traced, the first. If nothing of it goes, it is held for
    another reason from the first such layer on, which on the way back is another one.
    """
    found: dict[int, int] = {}
    for number, turn, parts in turns:
        alone = len(turn.indices) == 1
        for part in parts:
            once, again = passed[part]
            if once.net != again.net:
                found[part] = min(number, found.get(part, number))
            elif alone:
                found.setdefault(part, number)
    return found


def _stretch(
    phase: str, turn: int, times: int, passages: Sequence[Passage], layers: int = 1
) -> Stretch:
    live = highest = highest_in = 0
    for index, passage in enumerate(passages):
        if live + passage.crest > highest:
            highest, highest_in = live + passage.crest, index
        live += passage.net
    return Stretch(phase, turn, times, passages, live, highest, highest_in, layers)


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
    live = highest = at = turn = 0
    for index, part in enumerate(parts):
        before = max(0, part.net * (part.times - 1))
        here = live + before + part.crest
        if here > highest and phase in ("", part.phase):
            highest, at, turn = here, index, part.times - 1 if before else 0
        live += part.net * part.times
    return Crest(highest, at, turn)


def peak(parts: Sequence[Stretch], phase: str = "") -> Moment:
    """The moment at which most is alive, in one phase or in all, with all that is alive."""
    size, at, turn = crest(parts, phase)
    return Moment(parts[: at + 1], turn, size)


def _alive(*passed: tuple[Iterable[Event], int]) -> dict[What, int]:
    """Bytes alive, by what they are, after events that happen so many times."""
    sizes: dict[int, int] = {}  # by identity, which the events of one storage share
    named: dict[int, Label] = {}
    for events, times in passed:
        for change, label in events:
            key = id(label)
            sizes[key] = sizes.get(key, 0) + change * times
            named[key] = label
    live: dict[What, int] = {}
    for key, size in sizes.items():
        if size:
            what = What(*named[key])
            live[what] = live.get(what, 0) + size
    return {what: size for what, size in live.items() if size}
