"""A chart in a terminal: braille curves, a letter for each, readable without colour."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from string import ascii_lowercase, digits

from llmsize import units
from llmsize.chart import Axis, Chart, extent
from llmsize.quick_dataclasses import dataclass, field
from llmsize.render.values import safe

WIDTH, HEIGHT = 80, 20
NARROWEST = 40
_MARGIN = 9
"""Columns for the labels of the y axis."""

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bits of a braille cell, by row and column."""
_BLANK = 0x2800
_STEPS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)


@dataclass(frozen=True, slots=True)
class _Scale:
    """From values to dots."""

    low: float
    high: float
    log: bool
    dots: int

    def dot(self, value: float) -> int:
        """The dot that a value falls on, 0 at `low`."""
        a, b, v = ((math.log(each) if self.log else each) for each in (self.low, self.high, value))
        share = (v - a) / (b - a) if b > a else 0.5
        return round(share * (self.dots - 1))


@dataclass(slots=True)
class _Canvas:
    """Cells of 2 × 4 dots, and letters over them."""

    columns: int
    rows: int
    dots: dict[tuple[int, int], int] = field(default_factory=dict)
    letters: dict[tuple[int, int], str] = field(default_factory=dict)

    def light(self, x: int, y: int) -> None:
        """Light one dot; (0, 0) is at the bottom left."""
        if 0 <= x < 2 * self.columns and 0 <= y < 4 * self.rows:
            down = 4 * self.rows - 1 - y
            cell = (down // 4, x // 2)
            self.dots[cell] = self.dots.get(cell, 0) | _DOTS[down % 4][x % 2]

    def line(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        """Light the dots between two points."""
        steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for step in range(steps + 1):
            along = step / steps
            self.light(
                round(start[0] + along * (end[0] - start[0])),
                round(start[1] + along * (end[1] - start[1])),
            )

    def write(self, x: int, y: int, letter: str) -> None:
        """Put a letter over the cell of a dot, unless there is one already."""
        cell = ((4 * self.rows - 1 - y) // 4, x // 2)
        self.letters.setdefault(cell, letter)

    def lines(self) -> Iterator[str]:
        """The rows from the top."""
        for row in range(self.rows):
            yield "".join(self._cell((row, column)) for column in range(self.columns)).rstrip()

    def _cell(self, cell: tuple[int, int]) -> str:
        dots = self.dots.get(cell, 0)
        return self.letters.get(cell) or (chr(_BLANK + dots) if dots else " ")


def draw(chart: Chart, width: int | None = None, height: int = HEIGHT) -> str:
    """The chart as lines of at most `width` columns (80 unless given), with a final newline."""
    across = max(NARROWEST, min(width or WIDTH, 200))
    columns = across - _MARGIN - 1
    low_x, high_x, low_y, high_y = extent(chart)
    x = _Scale(low_x, high_x, chart.x.log, 2 * columns)
    y = _Scale(low_y, high_y, chart.y.log, 4 * height)
    canvas = _Canvas(columns, height)
    for number, mark in enumerate(chart.marks[: len(digits) - 1], start=1):
        canvas.write(x.dot(mark.x), y.dot(mark.y), str(number))
    for index, series in enumerate(chart.series):
        dots = [(x.dot(at), y.dot(value)) for at, value in series.points]
        for start, end in pairwise(dots):
            canvas.line(start, end)
        for place in _places(len(dots), index, len(chart.series)):
            canvas.write(*dots[place], _letter(index))
    labels = _rows(chart.y, y, height)
    body = [_gutter(label) + line for label, line in zip(labels, canvas.lines(), strict=True)]
    foot = [f"{'':>{_MARGIN - 1}}└{_base(chart, x, columns)}", *_columns(chart.x, x, columns)]
    title = textwrap.wrap(safe(chart.title), across)
    legend = [line for text in _legend(chart) for line in textwrap.wrap(text, across)]
    return "\n".join([*title, *body, *foot, *legend]) + "\n"


def _gutter(label: str) -> str:
    """The label of a row and the y axis."""
    return f"{label:>{_MARGIN - 2}} ┤" if label else f"{'':>{_MARGIN - 1}}│"


def _places(points: int, index: int, count: int) -> list[int]:
    """Where a curve carries its letter: thrice, and not where its neighbours carry theirs."""
    if points < 4:
        return [0] if points else []
    shift = (index + 0.5) / count / 3
    return [round((third / 3 + shift) * (points - 1)) for third in range(3)]


def _letter(index: int) -> str:
    return ascii_lowercase[index % len(ascii_lowercase)]


def _ticks(axis: Axis, scale: _Scale) -> list[float]:
    """Round values along an axis: powers of ten, or steps between them where it is short."""
    low, high = scale.low, scale.high
    if not axis.log or high / low < 1:
        step = 10 ** math.floor(math.log10((high - low) or 1))
        first = math.ceil(low / step)
        return [step * each for each in range(first, math.floor(high / step) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps: Sequence[float] = (1,) if high / low > 100 else (1, 2, 5) if high / low > 8 else _STEPS
    return [each * 10.0**power for power in decades for each in steps
            if low <= each * 10.0**power <= high]  # fmt: skip


def _rows(axis: Axis, scale: _Scale, height: int) -> list[str]:
    """The label beside each row, from the top."""
    labels = [""] * height
    for tick in _ticks(axis, scale) or [scale.low]:
        row = (4 * height - 1 - scale.dot(tick)) // 4
        labels[row] = labels[row] or _shown(tick, axis)
    return labels


def _columns(axis: Axis, scale: _Scale, columns: int) -> list[str]:
    """The labels below the x axis, and its title."""
    line = [" "] * (columns + _MARGIN)
    for tick in _ticks(axis, scale) or [scale.low]:
        label = _shown(tick, axis)
        start = max(
            0, min(_MARGIN + scale.dot(tick) // 2 - len(label) // 2, len(line) - len(label))
        )
        around = line[max(0, start - 1) : start + len(label) + 1]
        if all(cell == " " for cell in around):
            line[start : start + len(label)] = label
    return ["".join(line).rstrip(), f"{axis.label:^{columns + _MARGIN}}".rstrip()]


def _shown(value: float, axis: Axis) -> str:
    if axis.unit == "bytes":
        return units.format_bytes(value).replace(".00", "")
    if axis.unit in ("parameters", "tokens", "sequences"):
        return units.format_count(value).replace(".00", "").replace(".0", "")
    return f"{value:.0e}".replace("+", "") if value >= 1e5 else f"{value:g}"


def _base(chart: Chart, scale: _Scale, columns: int) -> str:
    """The x axis, doubled over the range that the law was fitted to."""
    if chart.fitted is None:
        return "─" * columns
    low, high = (max(scale.low, min(each, scale.high)) for each in chart.fitted)
    start, end = scale.dot(low) // 2, scale.dot(high) // 2
    return "".join("═" if start <= at <= end else "─" for at in range(columns))


def _legend(chart: Chart) -> Iterator[str]:
    names = [f"{_letter(index)} {safe(each.name)}" for index, each in enumerate(chart.series)]
    yield f"{chart.y.label}: {'   '.join(names)}"
    if chart.marks:
        yield "   ".join(f"{n} {safe(mark.name)}" for n, mark in enumerate(chart.marks[:9], 1))
    if chart.fitted is not None:
        yield f"═ fitted range of {safe(chart.series[0].name)}"
