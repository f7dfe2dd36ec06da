"""Whether a need fits a budget, and the largest setting that still does.

The functions take plain numbers and plain callables: what is needed is the business of
`memory`, which setting is asked about that of the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from math import inf, sqrt
from typing import Literal

from llmsize.errors import LLMSizeError
from llmsize.quick_dataclasses import dataclass, replace

Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True, slots=True)
class Band:
    """How far off the estimates of one job are, against runs that others have measured."""

    name: str
    job: Literal["inference", "training"]
    share: float
    """Relative error |got − measured| / measured that 95 % of the runs stay within."""
    cases: int
    """Runs that it was measured on."""
    table: str
    """The reference table with those runs, and …"""
    quantity: str
    """… what they are called in it."""
    source: str
    engines: tuple[str, ...] = ()
    """What ran, by name; empty for all that do the job."""
    title: str = ""
    note: str = ""
    aliases: tuple[str, ...] = ()


def band_for(bands: Iterable[Band], job: str, runtime: str) -> Band:
    """The band of runs of that `runtime`; without any, the widest of the others', of no cases."""
    of_job = [band for band in bands if band.job == job]
    own = (band for band in of_job if not band.engines or runtime in band.engines)
    return next(own, None) or replace(max(of_job, key=lambda band: band.share), cases=0)


HIGHEST = 2**40
"""Where a search stops: beyond it a setting is unbounded for every practical purpose."""


def verdict(need: float, budget: float, *, band: float) -> Verdict:
    """`fits` or `does not fit` where the error band leaves no doubt, and `tight` inside it.

    `band` is the relative error |need − real| / real that 95 % of such estimates stay within,
    so the real need is expected from need / (1 + band) to need / (1 − band). Need and budget are in
    bytes. Raises `LLMSizeError` for a budget of nothing.
    """
    if budget <= 0:
        raise LLMSizeError("the memory budget is nothing", hint="give some memory, such as `16GB`")
    if need <= budget * (1 - band):
        return "fits"
    return "tight" if need <= budget * (1 + band) else "does not fit"


def largest(holds: Callable[[int], bool], *, lowest: int = 1, highest: int = HIGHEST) -> int | None:
    """The largest integer from `lowest` to `highest` that `holds`, if `lowest` does.

    `holds` is true up to some value and false from there on. It is asked about
    2·log₂(answer) times: the step doubles until it fails, then halves.
    """
    if not holds(lowest):
        return None
    good, step = lowest, 1
    while good + step <= highest and holds(good + step):
        good, step = good + step, step * 2
    return _last(holds, good, min(good + step, highest + 1))


def largest_near(
    holds: Callable[[int], bool], guess: int, *, lowest: int = 1, highest: int = HIGHEST
) -> int:
    """The same where a `guess` is at hand: the better, the fewer questions.

    It is `lowest` where that does not hold either.
    """
    guess, step = min(max(guess, lowest), highest), 1
    failed = guess + 1
    while guess > lowest and not holds(guess):
        guess, step, failed = max(guess - step, lowest), step * 2, guess
    if step > 1:
        return _last(holds, guess, failed)
    return largest(holds, lowest=guess, highest=highest) or guess


def _last(holds: Callable[[int], bool], good: int, failed: int) -> int:
    """The last that `holds` from one that does to one that does not, by halves."""
    while failed - good > 1:
        middle = (good + failed) // 2
        good, failed = (middle, failed) if holds(middle) else (good, middle)
    return good


NEAR = 16
"""By how many parts of a bound a search of what may hold close below it steps down at first."""


def largest_below(holds: Callable[[int], bool], bound: int, *, lowest: int = 1) -> int:
    """The `bound` if it `holds`, or a smaller value that does where the next one does not.

    It is for what may hold and fail in turns below the bound: both were asked about, unless the
    answer is the `lowest`.
    """
    if bound <= lowest or holds(bound):
        return bound
    failed, step = bound, max(1, bound // NEAR)
    while failed - step > lowest and not holds(failed - step):
        failed, step = failed - step, step * 2
    return _last(holds, max(failed - step, lowest), failed)


def most(
    need: Callable[[int], float], budget: float, known: int,
    *, block: int = 1, highest: int = HIGHEST,
) -> int:  # fmt: skip
    """The largest value of a setting whose `need` is within the budget, as that of `known` is.

    Multiples of a `block` are tried first: where memory is given in blocks, or spared by whole
    ones, needs rise with the blocks and not with every value.
    """
    asked = lru_cache(maxsize=None)(need)

    def searched(first: int, second: int, last: int, unit: int = 1) -> int:
        in_units = partial(_scaled, asked, unit)
        guess = approached(in_units, budget, first, second, lowest=first, highest=last)
        return unit * largest_near(
            lambda units: in_units(units) <= budget, guess, lowest=first, highest=last
        )

    blocks = -(-known // block)
    fits = asked(blocks * block) <= budget
    found = searched(blocks, 2 * blocks, highest // block, block) if fits else known
    return searched(found, found + 1, min(found + block - 1, highest))


def _scaled(need: Callable[[int], float], unit: int, units: int) -> float:
    return need(units * unit)


def approached(
    need: Callable[[int], float], budget: float, first: int, second: int,
    *, lowest: int = 1, highest: int = HIGHEST,
) -> int:  # fmt: skip
    """A value that needs about the budget, from two guesses, in few questions.

    Most needs grow by a line, that of attention may by a parabola: Muller's method meets both.
    """
    points, guess = [(first, need(first))], min(second, highest)
    for _ in range(STEPS):
        if guess in dict(points) or need(guess) == inf:
            break
        points.append((guess, need(guess)))
        guess = min(max(_meeting(points[-3:], budget, highest), lowest), highest)
    return guess


STEPS = 4
"""Values that are asked about on the way to one whose need is near the budget."""


def _meeting(points: Sequence[tuple[int, float]], budget: float, last: int) -> int:
    """Where the line or the parabola through (value, need) meets the budget; the `last` for none.

    Muller 1956, doi:10.1090/S0025-5718-1956-0083822-0.
    """
    (x0, y0), (x1, y1), (x, y) = points[0], points[-2], points[-1]
    line = (y - y1) / (x - x1)
    curve = (line - (y1 - y0) / (x1 - x0)) / (x - x0) if x1 != x0 else 0.0
    slope = line + curve * (x - x1)
    root = slope**2 + 4 * curve * (budget - y)
    if slope <= 0 or root < 0:
        slope, root = line, line**2
    return x + int(2 * (budget - y) / (slope + sqrt(root))) if slope > 0 else last


def smallest(
    holds: Callable[[int], bool], *, lowest: int = 1, highest: int = HIGHEST
) -> int | None:
    """The smallest integer from `lowest` to `highest` that `holds`, if one does.

    `holds` is false up to some value and true from there on.
    """
    short = largest(lambda value: not holds(value), lowest=lowest, highest=highest)
    if short is None:
        return lowest
    return short + 1 if short < highest else None
