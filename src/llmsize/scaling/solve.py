"""A bracketed root and a bracketed minimum, for the few laws without a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

from llmsize.errors import LLMSizeError

ROOT_TOLERANCE = 1e-13
"""Relative width at which `root` stops."""

MINIMUM_TOLERANCE = 1e-8
"""Relative width at which `minimum` stops: below it a smooth loss no longer changes."""

_GOLDEN = (math.sqrt(5) - 1) / 2


def root(decreasing: Callable[[float], float], low: float, high: float) -> float:
    """Where a decreasing function of a positive number crosses zero, by bisection of its logarithm.

    Raises `LLMSizeError` if there is no sign change between `low` and `high`.
    """
    if not decreasing(low) >= 0 >= decreasing(high):
        raise LLMSizeError(
            "there is no optimum in the range of floating point",
            hint="check the budget and the constants of the law",
        )
    a, b = math.log(low), math.log(high)
    while b - a > ROOT_TOLERANCE:
        middle = (a + b) / 2
        if middle in (a, b):
            break
        if decreasing(math.exp(middle)) >= 0:
            a = middle
        else:
            b = middle
    return math.exp((a + b) / 2)


def minimum(unimodal: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of a positive number with one minimum has it, by golden section."""
    a, b = math.log(low), math.log(high)
    c, d = b - _GOLDEN * (b - a), a + _GOLDEN * (b - a)
    at_c, at_d = unimodal(math.exp(c)), unimodal(math.exp(d))
    while b - a > MINIMUM_TOLERANCE:
        if at_c < at_d:
            b, d, at_d = d, c, at_c
            c = b - _GOLDEN * (b - a)
            at_c = unimodal(math.exp(c))
        else:
            a, c, at_c = c, d, at_d
            d = a + _GOLDEN * (b - a)
            at_d = unimodal(math.exp(d))
    return math.exp((a + b) / 2)
