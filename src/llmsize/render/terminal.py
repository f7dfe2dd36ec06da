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
SHORTEST, LONGEST_WORD = 8, 24
"""Characters: a column of words may get as narrow as its longest word, or a longer one is broken;
broken words keep so many together while numbers have room."""
INDENT = 4
"""Characters before what stands below its row."""

Look = Literal["", "bold", "dim", "italic", "yellow", "blue", "cyan"]
Paint = Callable[[str, Look], str]

_CODES: dict[Look, int] = {"bold": 1, "dim": 2, "italic": 3, "yellow": 33, "blue": 34, "cyan": 36}
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
    for grid in grids(estimate):
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
        for line in explanations(estimate):
            yield from said(line.text, _KINDS[line.kind], 1 + 2 * line.indent)


def _remarks(estimate: Estimate, paint: Paint, width: int) -> Iterator[str]:
    labels: tuple[tuple[str, Look, tuple[str, ...]], ...] = (
        ("assumed:", "yellow", estimate.assumptions),
        ("note:", "blue", estimate.notes),
    )
    if estimate.assumptions or estimate.notes:
        yield ""
    for label, color, texts in labels:
        for text in texts:
            first, *more = _wrapped(f"{label} {safe(text)}", max(width - 1, 1))
            yield f" {paint(first[: len(label)], color)}{first[len(label) :]}"
            yield from (f" {line}" for line in more)


def _table(grid: Grid, paint: Paint, width: int) -> Iterator[str]:
    count = _abreast(grid, width)
    beside = grid._replace(
        header=grid.header[:count],
        numeric=grid.numeric[:count],
        lines=tuple(cells[:count] for cells in grid.lines),
    )
    widths, gap = _widths(beside, width)
    if any(beside.header):
        yield from _row(beside.header, widths, beside, gap, lambda text, _: paint(text, "dim"))
        yield "─" * min(2 + sum(widths) + gap * (len(widths) - 1), width)
    for number, cells in enumerate(grid.lines, 1):
        last = grid.total and number == len(grid.lines)
        if last:
            yield ""
        look = (lambda text, look: paint(text, look or "bold")) if last else paint
        yield from _row(cells[:count], widths, beside, gap, look)
        for name, cell in zip(grid.header[count:], cells[count:], strict=True):
            if cell:
                yield from _below(f"{name}: {cell}" if name else cell, paint, width)


def _abreast(grid: Grid, width: int) -> int:
    """How many columns stand side by side: long words at the end that have no room go below.

    What a row is of and the first thing said about it stay together.
    """
    columns = list(zip(grid.header, *grid.lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    count = len(columns)
    while 1 + sum(widths[:count]) + 2 * (count - 1) > width:
        if count <= 2 or grid.numeric[count - 1] or widths[count - 1] <= LONGEST_WORD:
            break
        count -= 1
    return count


def _below(text: str, paint: Paint, width: int) -> Iterator[str]:
    """What a row says on lines of its own."""
    for line in _wrapped(text, max(width - INDENT, 1)):
        yield " " * INDENT + paint(line, "dim")


def _widths(grid: Grid, width: int) -> tuple[list[int], int]:
    """The width of every column, and of the gaps between them.

    Where room is short gaps yield first, then headings, then words; numbers are broken last.
    """
    columns = list(zip(grid.header, *grid.lines, strict=True))
    widths = [max(1, *map(len, column)) for column in columns]
    usual = 3 if any(grid.header) else 2
    room = {gap: width - 1 - gap * (len(widths) - 1) for gap in (usual, 2, 1)}
    for gap in (usual, 2):
        if sum(widths) <= room[gap]:
            return widths, gap
    least = [_least(column, number) for column, number in zip(columns, grid.numeric, strict=True)]
    gap = 2 if sum(least) <= room[2] else 1
    while sum(widths) > max(room[gap], len(widths)):
        ready = [_readiness(*each) for each in zip(widths, least, grid.numeric, strict=True)]
        widths[ready.index(max(ready))] -= 1
    return widths, gap


def _readiness(width: int, least: int, number: bool) -> tuple[int, int]:
    """What yields first: a long heading over numbers, then words, then words in the middle."""
    if width > least:
        return (3 if number else 2), width
    return (0 if number or width <= SHORTEST else 1), width


def _least(column: Sequence[str], number: bool) -> int:
    """How narrow a column may get before words or numbers are broken."""
    import textwrap

    heading, *cells = column
    words = [word for text in (heading, *([] if number else cells))
             for word in textwrap.wrap(text, 1, break_long_words=False)]  # fmt: skip
    least = [min(len(word), LONGEST_WORD) for word in words]
    return max(1, *least, *(len(cell) for cell in cells if number))


def _row(
    cells: Sequence[str], widths: Sequence[int], grid: Grid, gap: int, paint: Paint
) -> Iterator[str]:
    """The lines of one row: a cell that is too long for its column goes on below."""
    folded = [_folded(cell, width) for cell, width in zip(cells, widths, strict=bool(cells))]
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


def _folded(cell: str, width: int) -> list[str]:
    """The lines of a cell: names go on behind a hyphen, too."""
    if len(cell) <= width:
        return [cell]
    import textwrap  # compiles patterns, which few answers need

    return textwrap.wrap(cell, width) or [""]


def _wrapped(text: str, width: int) -> list[str]:
    if len(text) <= width:
        return [text]
    import textwrap

    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]
