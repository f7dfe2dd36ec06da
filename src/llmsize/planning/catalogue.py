"""Searching the catalogue: which models fit, in which format, and which hardware is enough.

What a model needs is asked of a callable, so inference and every way of training are one search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from llmsize.architecture import Architecture
from llmsize.planning.fits import Verdict, verdict

T = TypeVar("T")

Need = Callable[[Architecture, str], int | None]
"""Bytes that a model in a format needs; nothing where the format cannot hold it."""


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


@dataclass(frozen=True, slots=True)
class Choice:
    """A model in the most precise format that fits."""

    model: Architecture
    format: str
    need: int
    """Bytes on the fullest device."""
    verdict: Verdict
    headroom: int
    """Bytes of the budget that are left."""


def wanted(model: Architecture, filter: Filter) -> bool:
    """Whether a model passes the filter; what is unknown about it does not pass."""
    count = model.published_parameters or 0
    return (
        (model.commercial is True or not filter.commercial)
        and (not filter.families or model.family in filter.families)
        and (model.context_length or 0) >= filter.context
        and count >= filter.min_parameters
    )


def search(
    models: Iterable[Architecture],
    formats: Sequence[str],
    need: Need,
    budget: int,
    *,
    band: float,
) -> Iterator[Choice]:
    """The models that fit, largest first and newest first among equals, found lazily.

    `formats` goes from the most precise to the smallest: each model takes the first that *fits*,
    or the first that is *tight* but within the budget if none does.
    """
    for model in sorted(models, key=_rank):
        choice = _choice(model, formats, need, budget, band)
        if choice is not None:
            yield choice


def _choice(
    model: Architecture, formats: Sequence[str], need: Need, budget: int, band: float
) -> Choice | None:
    tight = None
    for format in formats:
        needed = need(model, format)
        if needed is None:
            continue
        said = verdict(needed, budget, band=band)
        choice = Choice(model, format, needed, said, budget - needed)
        if said == "fits":
            return choice
        if said == "tight" and needed <= budget and tight is None:
            tight = choice
    return tight


def _rank(model: Architecture) -> tuple[int, tuple[int, ...], str]:
    """Largest first, then newest, then by name, so that the order is always the same."""
    newest = tuple(-int(part) for part in model.released.split("-") if part.isdigit())
    return -(model.published_parameters or 0), newest, model.name


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
