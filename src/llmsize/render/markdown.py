"""Markdown for issues, pull requests and notebooks."""

from __future__ import annotations

import re

from llmsize.answer import Estimate
from llmsize.render import Style
from llmsize.render.explain import explanations
from llmsize.render.grid import Grid, grids, legend
from llmsize.render.plain import remarks
from llmsize.render.values import safe

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~])")


def render(estimate: Estimate, style: Style) -> str:
    """Tables as pipe tables, explanations as nested lists."""
    blocks = [f"**{escape(safe(estimate.headline))}**", *map(_grid, grids(estimate))]
    blocks += [escape(legend(estimate)), "\n".join(f"- {escape(r)}" for r in remarks(estimate))]
    if style.explain:
        lines = explanations(estimate)
        blocks += ["\n".join(f"{'  ' * e.indent}- {escape(e.text)}" for e in lines)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    return _SPECIAL.sub(r"\\\1", text)


def _grid(grid: Grid) -> str:
    rule = ("---:" if right else ":---" for right in grid.numeric)
    rows = (_row(*map(escape, cells)) for cells in (grid.header, *grid.lines))
    head, *body = rows
    title = [f"**{escape(grid.title)}**", ""] if grid.title else []
    reasons = ["", *(f"{escape(reason)}  " for reason in grid.reasons)] if grid.reasons else []
    return "\n".join([*title, head, _row(*rule), *body, *reasons])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.strip() for cell in cells)} |"
