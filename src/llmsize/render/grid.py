"""A table as a grid of strings, the same for every format that people read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llmsize.answer import Absent, Cell, Estimate, Table
from llmsize.render import values
from llmsize.term import Grade, Term

MARKS: dict[Grade, str] = {"exact": "", "formula": "≈", "fitted": "~", "assumed": "?"}
"""What follows a number; one that is counted exactly needs no mark."""

SHORT = 16
"""Characters of a word among numbers, such as a verdict."""
SCALED = ("bytes", "seconds")
"""Units that change from value to value: `MB` and `GB`, `minutes` and `days`."""
LOSSES = ("nats/token", "bits/token")
"""Units of what differs in its fourth digit after the point; other estimates show four digits."""
HEADINGS = {"FLOP": "FLOP (PF-days)"}
"""Units that a heading says with another beside it."""
MOST_PLACES = 4
"""Cells that are named after a reason; where there are more, the reason speaks for itself."""

_LEGEND: dict[Grade, str] = {
    "exact": "",
    "formula": "≈ by a published formula or a trace",
    "fitted": "~ fitted to measurements",
    "assumed": "? assumed",
}


class Grid(NamedTuple):
    """Cells as text; the first column names the rows."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    """Which columns hold numbers and are aligned right."""
    total: bool
    reasons: tuple[str, ...]
    """Why there are dashes."""


def grids(estimate: Estimate) -> list[Grid]:
    """The answer as grids; terms that follow one another share one."""
    made: list[Grid] = []
    terms: list[Term] = []
    for part in estimate.answer:
        if isinstance(part, Term):
            terms.append(part)
            continue
        made += [_of_terms(terms)] if terms else []
        terms = []
        made.append(_of_table(part))
    return made + ([_of_terms(terms)] if terms else [])


def legend(estimate: Estimate) -> str:
    """What the marks in the answer mean; empty if there are none."""
    grades = {term.grade for term in estimate.terms()}
    return "   ".join(text for grade, text in _LEGEND.items() if text and grade in grades)


def _of_terms(terms: list[Term]) -> Grid:
    shown = _column(list(terms), "")
    lines = tuple(
        (values.safe(term.name), text, values.safe(term.note))
        for term, text in zip(terms, shown, strict=True)
    )
    return Grid("", ("", "", ""), lines, (False, True, False), False, ())


def _of_table(table: Table) -> Grid:
    columns = [[row.cells.get(name) for row in table.rows] for name in table.columns]
    names = [values.safe(row.name) for row in table.rows]
    headings = _headings(table, columns)
    shown = (_column(column, f"{table.title} {heading}")
             for column, heading in zip(columns, headings, strict=True))  # fmt: skip
    lines = tuple(zip(names, *shown, strict=True))
    numeric = (False, *map(_is_numeric, columns))
    header = tuple(values.safe(name) for name in (table.heading, *headings))
    return Grid(values.safe(table.title), header, lines, numeric, table.total, _reasons(table))


def _headings(table: Table, columns: Sequence[Sequence[Cell | None]]) -> list[str]:
    """The names of the columns, each with the unit of all its numbers unless that is said.

    Where the rows of a column have units of their own, all rows of the table keep theirs.
    """
    found = [{cell.unit for cell in column if isinstance(cell, Term)} for column in columns]
    if any(len(units) > 1 for units in found):
        return list(table.columns)
    named = zip(table.columns, map("".join, found), strict=True)
    return [
        f"{name}, {HEADINGS.get(unit, unit)}".removeprefix(", ")
        if unit and unit not in SCALED and unit not in f"{table.title} {name}"
        else name
        for name, unit in named
    ]


def _is_numeric(cells: Sequence[Cell | None]) -> bool:
    """Whether a column reads as numbers: it has some or their dashes, and no long words."""
    words = max((len(cell) for cell in cells if isinstance(cell, str)), default=0)
    return words <= SHORT and any(isinstance(cell, Term | Absent) for cell in cells)


def _column(cells: Sequence[Cell | None], said: str) -> list[str]:
    """Cells as text; where one number of a column has a mark, the others leave room for it.

    A unit that the title or the heading has `said` is not repeated in every cell.
    """
    marks = [MARKS[cell.grade] if isinstance(cell, Term) else "" for cell in cells]
    texts = [_text(cell, said) for cell in cells]
    if not any(marks):
        return texts
    return [f"{text} {mark or ' '}" for text, mark in zip(texts, marks, strict=True)]


def _text(cell: Cell | None, said: str) -> str:
    if isinstance(cell, Term):
        known = bool(cell.unit) and cell.unit in said
        finely = cell.grade == "exact" or cell.unit in LOSSES
        return values.value(cell.value, cell.unit, bare=known, digits=5 if finely else 4)
    if isinstance(cell, Absent):
        return values.DASH
    return values.safe(cell or "")


def _reasons(table: Table) -> tuple[str, ...]:
    """Each reason once, with the cells it stands for."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in table.rows:
        for column, cell in row.cells.items():
            if isinstance(cell, Absent):
                found.setdefault(cell.reason, {}).setdefault(row.name, []).append(column)
    return tuple(
        values.safe(f"{values.DASH} {_where(table, rows)}{reason}")
        for reason, rows in found.items()
    )


def _where(table: Table, rows: dict[str, list[str]]) -> str:
    if len(rows) > MOST_PLACES:
        return ""
    places = (
        row if len(columns) == len(table.columns) else f"{row}, {', '.join(columns)}"
        for row, columns in rows.items()
    )
    return f"{'; '.join(places)}: "
