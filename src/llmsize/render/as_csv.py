"""One line per number, for spreadsheets."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import StringIO

from llmsize.answer import Absent, Cell, Estimate
from llmsize.render import Style
from llmsize.render.values import safe
from llmsize.term import Term

HEADER = ("answer", "row", "column", "value", "unit", "grade", "formula", "source", "note")

_STARTS_A_FORMULA = ("=", "+", "-", "@")


def render(estimate: Estimate, style: Style) -> str:
    """Values in full precision; a dash has an empty value and its reason as the note."""
    written = StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows([_inert(field) for field in line] for line in _lines(estimate))
    return written.getvalue()


def _lines(estimate: Estimate) -> Iterator[list[object]]:
    for part in estimate.answer:
        if isinstance(part, Term):
            yield ["", part.name, "", *_fields(part)]
            continue
        for row in part.rows:
            for column, cell in row.cells.items():
                yield [part.title, row.name, column, *_fields(cell)]


def _fields(cell: Cell) -> list[object]:
    if isinstance(cell, Term):
        return [cell.value, cell.unit, cell.grade, cell.formula, cell.source, cell.note]
    if isinstance(cell, Absent):
        return ["", "", "", "", "", cell.reason]
    return [cell, "", "", "", "", ""]


def _inert(field: object) -> object:
    """Text that a spreadsheet would run as a formula gets an apostrophe before it."""
    if not isinstance(field, str):
        return field
    shown = safe(field)
    return f"'{shown}" if shown.startswith(_STARTS_A_FORMULA) else shown
