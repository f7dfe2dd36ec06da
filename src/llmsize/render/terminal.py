"""The answer for a terminal, with rich."""

from __future__ import annotations

from io import StringIO

from rich import box
from rich.console import Console, ConsoleRenderable
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llmsize.estimate import Estimate
from llmsize.render import Style
from llmsize.render.explain import Kind, explanations
from llmsize.render.grid import MARKS, Grid, grids, legend
from llmsize.render.values import safe

UNBOUNDED = 10_000
"""Columns where nothing may be cut: output that does not go to a terminal."""

_KINDS: dict[Kind, str] = {"name": "bold", "formula": "cyan", "source": "dim", "note": "italic"}


def render(estimate: Estimate, style: Style) -> str:
    """The headline, the answer, what was assumed, and with `explain` where it comes from.

    Everything is `Text`, never markup, so that names from files are shown as they are.
    """
    written = StringIO()
    console = Console(
        file=written, width=style.width or UNBOUNDED, force_terminal=style.color,
        color_system="standard" if style.color else None, no_color=not style.color,
        highlight=False, markup=False, emoji=False, legacy_windows=False,
    )  # fmt: skip
    console.print(Text(safe(estimate.headline), style="bold"))
    for grid in grids(estimate, style):
        console.print()
        if grid.title:
            console.print(_hanging(Text(grid.title, style="bold"), 1))
        console.print(_table(grid, console.width))
        for reason in grid.reasons:
            console.print(_hanging(Text(reason, style="dim"), 1))
    if marks := legend(estimate):
        console.print(_hanging(Text(marks, style="dim"), 1))
    _remarks(console, estimate)
    if style.explain:
        console.print()
        for line in explanations(estimate, style):
            console.print(_hanging(Text(line.text, style=_KINDS[line.kind]), 1 + 2 * line.indent))
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def _table(grid: Grid, width: int) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD if any(grid.header) else None, show_header=any(grid.header),
        show_edge=False, pad_edge=True, header_style="dim",
    )  # fmt: skip
    needed = sum(max(map(len, column)) + 3 for column in zip(grid.header, *grid.lines, strict=True))
    for name, numeric in zip(grid.header, grid.numeric, strict=True):
        table.add_column(
            Text(name),
            justify="right" if numeric else "left",
            no_wrap=numeric and needed <= width,
            overflow="fold",
        )
    for index, cells in enumerate(grid.lines):
        last = index == len(grid.lines) - 1
        if last and grid.total:
            table.add_section()
        shown = [_cell(cell, numeric) for cell, numeric in zip(cells, grid.numeric, strict=True)]
        table.add_row(*shown, style="bold" if last and grid.total else "")
    return table


def _cell(text: str, numeric: bool) -> Text:
    shown = Text(text)
    if numeric and text[-1:] in MARKS.values():
        shown.stylize("dim", len(text) - 1)
    return shown


def _remarks(console: Console, estimate: Estimate) -> None:
    remarks = [("assumed", "yellow", text) for text in estimate.assumptions]
    remarks += [("note", "blue", text) for text in estimate.notes]
    if remarks:
        console.print()
    for label, color, text in remarks:
        console.print(_hanging(Text.assemble((f"{label}: ", color), safe(text)), 1))


def _hanging(text: Text, indent: int) -> ConsoleRenderable:
    """A paragraph that keeps its indentation when it wraps."""
    return Padding(text, (0, 0, 0, indent), expand=False)
