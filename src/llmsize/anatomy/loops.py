"""Loops of a reference implementation whose turns are alike: few are traced and stand for all.

Mamba goes through every token, a delta rule through every chunk. From the third turn on such a loop
repeats itself, forward as well as backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

from llmsize.anatomy.autograd import Mark
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Label, Later

APART = 2
"""Turns at either end that are unlike the others."""


def turns(t: Tape, count: int) -> Iterator[int]:
    """The turns of a loop to trace: two at either end, and one for all in the middle.

    What the middle one leaves alive is then alive as often as the turns that it stands for.
    """
    times = count - 2 * APART - 1
    if times < 1:
        yield from range(count)
        return
    yield from range(APART)
    start = _begin(t)
    _mark(t, partial(_end_backward, times=times))
    yield APART
    _mark(t, _begin_backward)
    _end(t, start, times)
    yield from range(count - APART, count)


def _mark(t: Tape, action: Callable[[Tape], None]) -> None:
    if t.grad and not t.replaying:
        t.nodes.append(Mark(action, t.layer))


def _begin(t: Tape) -> int:
    t.touched = {}
    return len(t.events)


def _end(t: Tape, start: int, times: int) -> None:
    """Let what the turn has left alive stand for that of `times` more turns."""
    touched, t.touched = t.touched or {}, None
    left: Counter[Label] = Counter()
    for change, label in t.events[start:]:
        left[label] += change
    for storage in [found for found in (entry() for entry in touched.values()) if found]:
        if left[storage.label] >= storage.bytes:
            left[storage.label] -= storage.bytes
            storage.repeat(times)


def _begin_backward(t: Tape) -> None:
    t.turn_start = _begin(t)


def _end_backward(t: Tape, times: int) -> None:
    """The same on the way back; what goes in later turns goes at the end."""
    start = t.turn_start
    _end(t, start, times)
    later = [event for event in t.events[start:] if type(event[0]) is Later]
    t.events[start:] = [event for event in t.events[start:] if type(event[0]) is not Later]
    t.events += [(int(change), label) for change, label in later]
