"""What a table of reference data expects, what llmsize gives, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

LEVELS = (0.001, 0.01, 0.03, 0.05, 0.1)
EXACT = 5e-10
"""A float that agrees to nine digits counts as exact; whole numbers must be equal."""
WORST = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """What a row expects and what llmsize gives; `got` is None where it has no answer."""

    id: str
    quantity: str
    expected: float
    got: float | None
    tolerance: float | None = None
    """How precisely the row itself is printed, where that is known."""


def error(answer: Answer) -> float:
    """|got − expected| / |expected|; infinite where there is no answer."""
    if answer.got is None or not math.isfinite(answer.got):
        return math.inf
    if answer.expected == 0:
        return 0.0 if answer.got == 0 else math.inf
    return abs(answer.got - answer.expected) / abs(answer.expected)


def ledger(answers: Iterable[Answer]) -> dict[str, dict[str, Any]]:
    """The statistics of each quantity, in the order in which they occur."""
    by_quantity: dict[str, list[Answer]] = {}
    for answer in answers:
        by_quantity.setdefault(answer.quantity, []).append(answer)
    return {quantity: statistics(found) for quantity, found in by_quantity.items()}


def statistics(answers: Sequence[Answer]) -> dict[str, Any]:
    """Errors of one quantity; a case without an answer is a miss of infinite error (`None`)."""
    errors = sorted(map(error, answers))
    signed = [(a.got - a.expected) / abs(a.expected) for a in answers if a.got and a.expected]
    return {
        "cases": len(answers),
        "answered": sum(answer.got is not None for answer in answers),
        "median": quantile(errors, 0.5),
        "p90": quantile(errors, 0.9),
        "p95": quantile(errors, 0.95),
        "max": _finite(errors[-1]),
        "bias": sum(signed) / len(signed) if signed else None,
        "exact": sum(_exact(answer) for answer in answers),
        "within": {str(level): _share(errors, level) for level in LEVELS},
        "worst": [_case(answer) for answer in sorted(answers, key=error, reverse=True)[:WORST]],
    }


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest error that at least `share` of the cases stay within."""
    return _finite(ordered[max(0, math.ceil(share * len(ordered)) - 1)])


def _share(errors: Sequence[float], level: float) -> float:
    return sum(e <= level for e in errors) / len(errors)


def _exact(answer: Answer) -> bool:
    if isinstance(answer.got, int) and float(answer.expected).is_integer():
        return answer.got == answer.expected
    return error(answer) <= EXACT


def _case(answer: Answer) -> dict[str, Any]:
    return {
        "id": answer.id,
        "expected": answer.expected,
        "got": answer.got,
        "error": _finite(error(answer)),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
