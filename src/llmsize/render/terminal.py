"""The answer for a terminal: aligned columns, a little colour, nothing wider than the screen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Literal

from llmsize.answer import Estimate
from llmsize.render import Style
from llmsize.render.explain import Kind, explanations
from llmsize.render.grid import MARKS, Grid, grids, legend
from llmsize.render.values import safe

UNBOUNDED = 10_000
"""Columns where nothing may be cut: output that does not go to a terminal."""
NARROW = 12
"""A column of words does not get narrower than this while another is wider."""

Look = Literal["", "bold", "dim", "italic", "yellow", "blue", "cyan"]
Paint = Callable[[str, Look], str]

_CODES: dict[Look, int] = {
    "bold": 1, "dim": 2, "italic": 3, "yellow": 33, "blue": 34, "cyan": 36
}  # fmt: skip
"""ECMA-48, select graphic rendition."""
_KINDS: dict[Kind, Look] = {"name": "bold", "formula": "cyan", "source": "dim", "note": "italic"}


def render(estimate: Estimate, style: Style) -> str:
    """The headline, the answer, what was assumed, and with `explain` where it comes from."""
    paint = _painted if style.color else _bare
    lines = _lines(estimate, style, paint, style.width or UNBOUNDED)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _painted(text: str, look: Look) -> str:
    return f"\x1b[{_CODES[look]}m{text}\x1b[0m" if look and text.strip() else text


def _bare(text: str, look: Look) -> str:
    return text


def _lines(estimate: Estimate, style: Style, paint: Paint, width: int) -> Iterator[str]:
    def said(text: str, look: Look, indent: int = 1) -> Iterator[str]:
        for line in _wrapped(text, max(width - indent, 1)):
            yield " " * indent + paint(line, look)

    yield from said(safe(estimate.headline), "bold", 0)
    for grid in grids(estimate, style):
        yield ""
        if grid.title:
            yield from said(grid.title, "bold")
        yield from _table(grid, paint, width)
        for reason in grid.reasons:
            yield from said(reason, "dim")
    if marks := legend(estimate):
        yield from said(marks, "dim")
    yield from _remarks(estimate, paint, width)
    if style.explain:
        yield ""
        for line in explanations(estimate, style):
            yield from said(line.text, _KINDS[line.kind], 1 + 2 * line.indent)


def _remarks(estimate: Estimate, paint: Paint, width: int) -> Iterator[str]:
    labels: tuple[tuple[str, Look, tuple[str, ...]], ...] = (
        ("assumed:", "yellow", estimate.assumptions), ("note:", "blue", estimate.notes),
    )  # fmt: skip
    if estimate.assumptions or estimate.notes:
        yield ""
    for label, color, texts in labels:
        for text in texts:
            first, *more = _wrapped(f"{label} {safe(text)}", max(width - 1, 1))
            yield f" {paint(first[: len(label)], color)}{first[len(label) :]}"
            yield from (f" {line}" for line in more)


def _table(grid: Grid, paint: Paint, width: int) -> Iterator[str]:
    gap = 3 if any(grid.header) else 2
    widths = _widths(grid, width - 2 - gap * (len(grid.header) - 1))
    if any(grid.header):
        yield from _row(grid.header, widths, grid, gap, lambda text, _: paint(text, "dim"))
        yield "─" * (2 + sum(widths) + gap * (len(widths) - 1))
    *lines, last = grid.lines or ((),)
    for cells in lines:
        yield from _row(cells, widths, grid, gap, paint)
    if grid.total:
        yield ""
        yield from _row(last, widths, grid, gap, lambda text, look: paint(text, look or "bold"))
    else:
        yield from _row(last, widths, grid, gap, paint)


def _widths(grid: Grid, room: int) -> list[int]:
    """The width of every column; the widest columns of words yield first where room is short."""
    columns = zip(grid.header, *grid.lines, strict=True)
    widths = [max(1, *map(len, column)) for column in columns]
    while sum(widths) > max(room, len(widths)):
        yielding = [(not number and width > NARROW, width)
                    for number, width in zip(grid.numeric, widths, strict=True)]  # fmt: skip
        widths[yielding.index(max(yielding))] -= 1
    return widths


def _row(
    cells: Sequence[str], widths: Sequence[int], grid: Grid, gap: int, paint: Paint
) -> Iterator[str]:
    """The lines of one row: a cell that is too long for its column goes on below."""
    folded = [_wrapped(cell, width) for cell, width in zip(cells, widths, strict=bool(cells))]
    for texts in zip_longest(*folded, fillvalue=""):
        shown = (
            _cell(text.rjust(width) if number else text.ljust(width), number, paint)
            for text, width, number in zip(texts, widths, grid.numeric, strict=True)
        )
        yield " " + (" " * gap).join(shown)


def _cell(text: str, number: bool, paint: Paint) -> str:
    """A number's mark is dimmer than the number."""
    mark = text[-1] if number and text[-1] in MARKS.values() else ""
    return paint(text.removesuffix(mark), "") + paint(mark, "dim")


def _wrapped(text: str, width: int) -> list[str]:
    if len(text) <= width:
        return [text]
    import textwrap  # compiles patterns, which few answers need

    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]
