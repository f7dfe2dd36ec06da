"""Aligned text without colour or boxes: for pipes, logs and screen readers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from llmsize.answer import Estimate
from llmsize.render import Style
from llmsize.render.explain import explanations
from llmsize.render.grid import Grid, grids, legend
from llmsize.render.values import safe


def render(estimate: Estimate, style: Style) -> str:
    """The headline, the answer, what was assumed, and with `explain` where it comes from."""
    blocks = [safe(estimate.headline), *map(_grid, grids(estimate)), legend(estimate)]
    blocks += ["\n".join(remarks(estimate))]
    if style.explain:
        blocks += ["\n".join("  " * e.indent + e.text for e in explanations(estimate))]
    text = "\n\n".join(block for block in blocks if block)
    return "\n".join(_wrapped(text.splitlines(), style.width)) + "\n"


def remarks(estimate: Estimate) -> Iterator[str]:
    """Assumptions and notes, one line each."""
    yield from (f"assumed: {safe(text)}" for text in estimate.assumptions)
    yield from (f"note: {safe(text)}" for text in estimate.notes)


def _grid(grid: Grid) -> str:
    shown = [grid.header, *grid.lines] if any(grid.header) else list(grid.lines)
    widths = [max(len(line[i]) for line in shown) for i in range(len(grid.header))]
    text = [_line(line, widths, grid.numeric) for line in shown]
    if grid.total:
        text.insert(-1, "-" * max(map(len, text)))
    return "\n".join([*([grid.title] if grid.title else []), *text, *grid.reasons])


def _line(cells: tuple[str, ...], widths: list[int], numeric: tuple[bool, ...]) -> str:
    aligned = (
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, numeric, strict=True)
    )
    return "  ".join(aligned).rstrip()


def _wrapped(lines: list[str], width: int | None) -> Iterator[str]:
    """Prose that is too long continues on an indented line; tables stay whole."""
    for line in lines:
        if width is None or len(line) <= width or "  " in line.strip():
            yield line
        else:
            indent = " " * (len(line) - len(line.lstrip()) + 2)
            yield from textwrap.wrap(
                line, max(width, 20), subsequent_indent=indent, break_on_hyphens=False
            )
