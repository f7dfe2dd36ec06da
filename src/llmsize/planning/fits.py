"""Whether a need fits a budget, and the largest setting that still does.

The functions take plain numbers and plain callables: what is needed is the business of
`memory`, which setting is asked about that of the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest value of one setting, by the estimate and by its worst expected error."""

    setting: str
    unit: str
    estimated: int | None
    """The largest value whose estimated need fits; absent if not even the smallest does."""
    safe: int | None
    """The largest value that *fits* with the error band to spare."""


def verdict(need: float, budget: float, *, band: float) -> Verdict:
    """`fits` or `does not fit` where the error band leaves no doubt, and `tight` inside it.

    `band` is the relative error |need − real| / real that 95 % of such estimates stay within,
    so the real need is expected from need / (1 + band) to need / (1 − band).
    """
    if budget <= 0:
        raise LLMSizeError("the memory budget is nothing", hint="give some memory, such as `16GB`")
    if need <= budget * (1 - band):
        return "fits"
    return "tight" if need <= budget * (1 + band) else "does not fit"


def limits(
    setting: str, need: Callable[[int], float], budget: float, *, band: float,
    unit: str = "", lowest: int = 1, highest: int = HIGHEST,
) -> Limits:  # fmt: skip
    """The largest value of a setting that raises `need`, with and without the error band."""
    estimated = largest(lambda value: need(value) <= budget, lowest=lowest, highest=highest)
    if estimated is None:
        return Limits(setting, unit, None, None)
    certain = budget * (1 - band)
    safe = largest(lambda value: need(value) <= certain, lowest=lowest, highest=estimated)
    return Limits(setting, unit, estimated, safe)


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
    failed = min(good + step, highest + 1)
    while failed - good > 1:
        middle = (good + failed) // 2
        good, failed = (middle, failed) if holds(middle) else (good, middle)
    return good


def largest_near(
    holds: Callable[[int], bool], guess: int, *, lowest: int = 1, highest: int = HIGHEST
) -> int:
    """The same where a `guess` is at hand: the better, the fewer questions.

    It is `lowest` where that does not hold either.
    """
    guess, step = min(max(guess, lowest), highest), 1
    while guess > lowest and not holds(guess):
        guess, step, highest = max(guess - step, lowest), step * 2, guess - 1
    return largest(holds, lowest=guess, highest=highest) or guess


def approached(
    need: Callable[[int], float], budget: float, guess: int, each: float,
    *, lowest: int = 1, highest: int = HIGHEST,
) -> int:  # fmt: skip
    """A value that needs about the budget: three steps of the secant method from a `guess`.

    `each` is about what one more needs, above zero, and is corrected on the way.
    """
    needed = need(guess)
    for _ in range(3):
        last, before = guess, needed
        guess = min(max(guess + int((budget - needed) // each), lowest), highest)
        if guess == last:
            break
        needed = need(guess)
        slope = (needed - before) / (guess - last)
        each = slope if slope > 0 else each
    return guess


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
