"""Searching the catalogue: which models fit, in which format, and which hardware is enough.

What a model needs is asked of a callable, so inference and every way of training are one search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, TypeVar

from llmsize.anatomy import traced
from llmsize.anatomy.parameters import count
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.planning.fits import Verdict, verdict
from llmsize.quick_dataclasses import dataclass

T = TypeVar("T")

Need = Callable[[Architecture, str], int | None]
"""Bytes that a model in a format needs; nothing where the format cannot hold it."""

Least = Callable[[Architecture, str], float]
"""A bound of them that costs next to nothing: no need is below it."""

Each = Callable[..., Iterable[Any]]
"""`map`, which works lazily, or something that does the work of all items at once."""

UNPUBLISHED = "proprietary"
"""The licence of models whose weights cannot be had."""
PEERS = 1.5
"""Models down to the largest that fits over this factor are of its class, where the newest is the
best: newer tokens and recipes are worth more than half as many parameters again (Qwen2.5-72B
competes with Llama 3 405B of the same year, five times as large: arXiv:2412.15115)."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which models of the catalogue are considered."""

    commercial: bool = False
    """Only licences that allow commercial use."""
    families: tuple[str, ...] = ()
    """Only these families, by `model_type`; all if empty."""
    context: int = 0
    """At least this many tokens of published context."""
    min_parameters: int = 0
    """At least so many parameters."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A model in the most precise format that fits."""

    model: Architecture
    parameters: int
    format: str
    need: int
    """Bytes on the fullest device."""
    verdict: Verdict
    headroom: int
    """Bytes of the budget that are left."""


@lru_cache(maxsize=1024)
def parameters(model: Architecture) -> int:
    """As published, or as the anatomy counts them; 0 for a family that is not known."""
    if model.published_parameters is not None:
        return model.published_parameters
    try:
        return count(traced(model).weights.values()).total
    except LLMSizeError:
        return 0


def wanted(model: Architecture, filter: Filter) -> bool:
    """Whether a model passes the filter; what is unknown about it does not pass."""
    return (
        model.licence != UNPUBLISHED
        and (model.commercial is True or not filter.commercial)
        and (not filter.families or model.family in filter.families)
        and (model.context_length or 0) >= filter.context
        and (not filter.min_parameters or parameters(model) >= filter.min_parameters)
    )


def by_size(model: Architecture, count: int) -> tuple[int, tuple[int, int], str]:
    """Sorts models of so many parameters largest first, then newest first, then by name."""
    return -count, newest_first(model), model.name


def largest_first(models: Iterable[Architecture]) -> list[Architecture]:
    """The models from the largest to the smallest, always in the same order."""
    return sorted(models, key=lambda model: by_size(model, parameters(model)))


def newest_first(model: Architecture) -> tuple[int, int]:
    """Newest first; a month that is not known is the first of its year."""
    year, _, month = model.released.partition("-")
    return -int(year or 0), -int(month or 0)


def best_first(model: Architecture) -> tuple[bool, tuple[int, int], int, str]:
    """Among models of one class: those that anyone may use, then the newest, then the largest."""
    return model.commercial is not True, newest_first(model), -parameters(model), model.name


def search(
    models: Iterable[Architecture],
    formats: Sequence[str],
    need: Need,
    budget: int,
    *,
    band: float,
    least: Least = lambda model, format: 0,
    certain: bool = False,
    each: Each = map,
) -> Iterator[Choice]:
    """Those of the models that fit, in their order, found lazily if `each` is.

    `formats` goes from the most precise to the smallest: each model takes the first that *fits*,
    or the first that is *tight* but within the budget if none does, unless it has to be `certain`.
    What needs at `least` more is not asked about.
    """
    limits = (budget * (1 - band), *([] if certain else [budget]))

    def first_within(model: Architecture) -> tuple[int, str, int] | None:
        asked, bound = lru_cache(maxsize=None)(partial(need, model)), partial(least, model)
        within = (_first_within(limit, formats, asked, bound) for limit in limits)
        found = next(filter(None, within), None)
        return found and (parameters(model), *found)  # counted where it has been traced

    models = list(models)
    for model, found in zip(models, each(first_within, models), strict=True):
        if found is not None:
            count, format, needed = found
            said = verdict(needed, budget, band=band)
            yield Choice(model, count, format, needed, said, budget - needed)


def _first_within(
    limit: float, formats: Sequence[str], need: Callable[[str], int | None],
    least: Callable[[str], float],
) -> tuple[str, int] | None:  # fmt: skip
    """The first format whose need is within the limit, and that need."""
    for format in formats:
        if least(format) <= limit:
            needed = need(format)
            if needed is not None and needed <= limit:
                return format, needed
    return None


def best(
    models: Sequence[Architecture], searched: Callable[..., Iterator[Choice]], shown: int
) -> list[Choice]:
    """The best of the class of the largest that fits.

    `searched` is `search` with everything given but the models.
    """
    largest = next(searched(largest_first(models)), None)
    if largest is None:
        return []
    limit = largest.parameters
    peers = [each for each in models if limit / PEERS <= parameters(each) <= limit]
    return list(islice(searched(sorted(peers, key=best_first)), shown))


def enough(
    offers: Iterable[tuple[T, int, int]], need: Callable[[int], int | None], *, band: float
) -> list[tuple[T, Verdict]]:
    """The hardware that is enough, smallest first: by all its memory, then by devices.

    An offer is (what it is, devices, usable bytes of each); `need` gives the bytes that the
    fullest of so many devices has to hold.
    """
    found = []
    for what, devices, usable in offers:
        needed = need(devices)
        if needed is not None and needed <= usable:
            said = verdict(needed, usable, band=band)
            found.append((devices * usable, devices, what, said))
    found.sort(key=lambda offer: offer[:2])
    return [(what, said) for _, _, what, said in found]
