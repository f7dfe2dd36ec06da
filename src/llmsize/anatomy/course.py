"""The layers of a model in turn: which repeat, and which few of them show what happens in all."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """Layers that are passed alike: one, or those in one place of a pattern that repeats."""

    kind: Any
    indices: Sequence[int]
    pattern: int
    """Number of the first turn of the pattern that repeats with it."""
    parts: Sequence[int] = ()
    """Numbers of the traced parts of layers that it consists of."""


MAX_PERIOD = 12
"""The longest pattern of layers that is looked for."""


def one_of_each(kinds: Sequence[Hashable]) -> list[Turn]:
    """An outline: one turn for each kind."""
    indices: dict[Hashable, list[int]] = {}
    for index, kind in enumerate(kinds):
        indices.setdefault(kind, []).append(index)
    return [Turn(kind, found, n) for n, (kind, found) in enumerate(indices.items())]


@lru_cache(maxsize=256)
def course(kinds: tuple[Hashable, ...]) -> tuple[Turn, ...]:
    """The layers of those `kinds` in turn.

    A pattern of `p` kinds that occurs `r` times in a row has `p` turns three times: once, once for
    the `r - 2` in the middle, once for the last. What a layer takes from its neighbours is then the
    same for all in a turn.
    """
    found: list[Turn] = []
    start = 0
    while start < len(kinds):
        period, times = _repetition(kinds, start)
        stop = start + period * times
        ends = [start, start + period, stop - period, stop]
        if times <= 3:
            ends = list(range(start, stop + 1, period))
        for begin, end in pairwise(ends):
            number = len(found)
            found += [
                Turn(kinds[begin + i], range(begin + i, end, period), number) for i in range(period)
            ]
        start = stop
    return tuple(found)


def shown_by(
    turns: Sequence[Turn], apart: int = 0, seen: Sequence[Hashable] | None = None
) -> tuple[int, ...]:
    """For each turn the number of one of its kind, between neighbours that look like its own.

    `seen` is what neighbours can tell of what is before the first turn, of each, and of what is
    after the last; without it they tell all. Few turns do for all, and follow each other as turns
    do. The first that stand `apart` are shown by none but themselves.
    """
    kinds = tuple([turn.kind for turn in turns])
    return _shown_by(kinds, None if seen is None else tuple(seen), apart)


@lru_cache(maxsize=256)
def _shown_by(
    kinds: tuple[Hashable, ...], seen: tuple[Hashable, ...] | None, apart: int
) -> tuple[int, ...]:
    marked = [(kind, number if number < apart else -1) for number, kind in enumerate(kinds)]
    seen = seen or (None, *marked, None)
    around = list(zip(seen, marked, seen[2:], strict=False))
    path: list[int] = []
    for number, turn in enumerate(around):
        path.append(number)
        for at, earlier in enumerate(path[:-1], 1):
            if seen[earlier + 1] == seen[number + 1] and around[earlier][2] == turn[2]:
                shown = {around[n] for n in path[:at]}
                if all(around[n] in shown for n in path[at:]):
                    del path[at:]  # a detour that shows nothing new
                    break
    first = {around[number]: number for number in reversed(path)}
    traced = set(path)
    return tuple([n if n in traced else first[turn] for n, turn in enumerate(around)])


def _repetition(kinds: tuple[Hashable, ...], start: int) -> tuple[int, int]:
    """The shortest pattern from `start` on that covers most layers, and how often it occurs."""
    best = (1, 1)
    for period in range(1, min(MAX_PERIOD, (len(kinds) - start) // 4) + 1):
        pattern = kinds[start : start + period]
        times = 1
        while kinds[start + times * period : start + (times + 1) * period] == pattern:
            times += 1
        if times > 3 and period * times > best[0] * best[1]:
            best = (period, times)
    return best
