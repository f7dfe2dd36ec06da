"""What to change when something does not fit: the cheapest single change, or combination.

A question is any frozen record; a change makes another question of it. What counts as cheap is
said by whoever lists the changes: nothing lost first, then time, then quality.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from math import inf
from typing import Generic, TypeVar

from llmsize.errors import LLMSizeError
from llmsize.quick_dataclasses import dataclass
from llmsize.term import Term

Q = TypeVar("Q")

MAX_CHANGES = 10
"""Combinations are tried one by one, so only so many changes are combined."""


@dataclass(frozen=True, slots=True)
class Change(Generic[Q]):
    """One thing that could be done differently."""

    name: str
    """What to do, as an imperative: `recompute activations`."""
    price: float
    """How much it hurts, compared with the others; 0 for nothing at all."""
    costs: str
    """What is given up for it, `half of the context`; empty where that is time alone."""
    apply: Callable[[Q], Q]
    """The question with the change made; the same question where it changes nothing."""


@dataclass(frozen=True, slots=True)
class Saving(Generic[Q]):
    """What one change alone does."""

    change: Change[Q]
    then: Term
    """What is needed with it."""
    saved: int
    """How much less that is."""


def ranked(
    question: Q, changes: Sequence[Change[Q]], need: Callable[[Q], Term]
) -> tuple[Saving[Q], ...]:
    """What every change saves that saves anything, the most first.

    A change for which `need` raises `LLMSizeError` is impossible here, and left out.
    """
    now, found = need(question).value, []
    for change in changes:
        changed = change.apply(question)
        if changed == question:
            continue
        try:
            then = need(changed)
        except LLMSizeError:
            continue
        if then.value < now:
            found.append(Saving(change, then, int(now - then.value)))
    return tuple(sorted(found, key=lambda saving: -saving.saved))


def single(
    question: Q, changes: Sequence[Change[Q]], enough: Callable[[Q], bool]
) -> Change[Q] | None:
    """The cheapest change that alone is `enough`."""
    for change in sorted(changes, key=lambda change: change.price):
        changed = change.apply(question)
        if changed != question and enough(changed):
            return change
    return None


def combination(
    question: Q,
    changes: Sequence[Change[Q]],
    enough: Callable[[Q], bool],
    below: float = inf,
) -> tuple[Change[Q], ...] | None:
    """The cheapest set of changes that together are `enough`, fewest first among equal prices.

    None, too, where the prices of no such set come to less than `below`.
    """
    cheap = [change for change in changes if change.price < below]
    useful = [change for change in cheap if change.apply(question) != question][:MAX_CHANGES]
    sets = [chosen for size in range(1, len(useful) + 1) for chosen in combinations(useful, size)]
    sets.sort(key=lambda chosen: (_price(chosen), len(chosen)))
    for chosen in sets:
        if _price(chosen) >= below:
            break
        if not _idle(question, chosen) and enough(applied(question, chosen)):
            return chosen
    return None


def _price(chosen: Sequence[Change[Q]]) -> float:
    return sum(change.price for change in chosen)


def _idle(question: Q, chosen: Sequence[Change[Q]]) -> bool:
    """Whether one of `chosen` changes nothing beside the others: a cheaper set does the same."""
    whole = applied(question, chosen)
    return len(chosen) > 1 and any(
        applied(question, [other for other in chosen if other is not change]) == whole
        for change in chosen
    )


def applied(question: Q, changes: Sequence[Change[Q]]) -> Q:
    """The question with all of `changes` made, in their order."""
    for change in changes:
        question = change.apply(question)
    return question
