"""A chart as data: curves, marks and axes, before anyone decides how to draw it."""

from __future__ import annotations

import math

from llmsize.errors import LLMSizeError
from llmsize.quick_dataclasses import dataclass

POINTS = 97
"""Points along a curve; enough for a straight-looking line in any picture."""


@dataclass(frozen=True, slots=True)
class Axis:
    """What is measured along one side."""

    title: str
    unit: str = ""
    log: bool = True

    @property
    def label(self) -> str:
        """The title with its unit, where that says more."""
        return f"{self.title} ({self.unit})" if self.unit not in ("", self.title) else self.title


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: its points in order of x."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """One named point, such as a real model."""

    name: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over one pair of axes."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    fitted: tuple[float, float] | None = None
    """The range of x that the first curve was fitted to."""


def spaced(low: float, high: float, count: int = POINTS) -> list[float]:
    """`count` numbers from `low` to `high`, evenly spaced in their logarithm.

    Raises `LLMSizeError` unless 0 < low < high.
    """
    if not 0 < low < high < math.inf:
        raise LLMSizeError(
            f"a curve from {low:g} to {high:g} is impossible",
            hint="give a range above zero that ends above its beginning",
        )
    step = math.log(high / low) / (count - 1)
    return [low * math.exp(step * index) for index in range(count - 1)] + [high]


def extent(chart: Chart) -> tuple[float, float, float, float]:
    """Smallest and largest x, smallest and largest y of everything drawn.

    Raises `LLMSizeError` for a chart with nothing in it.
    """
    points = [point for each in chart.series for point in each.points]
    points += [(mark.x, mark.y) for mark in chart.marks]
    if not points:
        raise LLMSizeError(
            "nothing to draw in that range", hint="widen it with `--from` and `--to`"
        )
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return min(xs), max(xs), min(ys), max(ys)
