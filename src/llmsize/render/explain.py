"""Where each number comes from: formula, values, source and grade, as a tree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from llmsize.answer import Estimate, Table
from llmsize.render import values
from llmsize.term import Number, Term

Kind = Literal["name", "formula", "source", "note"]

Key = tuple[str, Number, str, int]
"""What tells one explanation from another: name, value, formula, number of parts."""

MOST_PARTS = 24
"""Parts of one sum that are listed; the rest is one line. JSON always has every part."""


class Line(NamedTuple):
    """One line of an explanation; `indent` is its depth in the tree."""

    indent: int
    kind: Kind
    text: str


def explanations(estimate: Estimate) -> Iterator[Line]:
    """Every term of the answer with what is below it, each once; later mentions are one line."""
    explained: set[Key] = set()
    for part in estimate.answer:
        if isinstance(part, Term):
            yield from _lines(part, part.name, 0, explained)
        else:
            for title, term in _titled(part):
                yield from _lines(term, title, 0, explained)


def _titled(table: Table) -> Iterator[tuple[str, Term]]:
    """The distinct terms of a table, named by their row and the columns that show them."""
    for row in table.rows:
        same: list[tuple[Term, list[str]]] = []
        for column in table.columns:
            cell = row.cells.get(column)
            if not isinstance(cell, Term):
                continue
            columns = next((known for term, known in same if term is cell or term == cell), None)
            if columns is None:
                same.append((cell, columns := []))
            columns.append(column)
        for term, columns in same:
            yield f"{row.name}, {', '.join(columns)}", term


def _lines(term: Term, title: str, indent: int, explained: set[Key]) -> Iterator[Line]:
    shown = values.value(term.value, term.unit)
    if term.unit in values.ROUNDED:
        shown += f" ({values.exact(term.value)})"
    yield Line(indent, "name", values.safe(f"{title}: {shown} · {term.grade}"))
    key = (term.name, term.value, term.formula, len(term.parts))
    if key in explained:
        return
    explained.add(key)
    if term.formula:
        yield Line(indent + 1, "formula", f"= {values.safe(values.formula(term))}")
        if values.substituted(term) != values.formula(term):
            yield Line(indent + 1, "formula", f"= {values.safe(values.substituted(term))}")
    if term.note:
        yield Line(indent + 1, "note", values.safe(term.note))
    if term.source:
        yield Line(indent + 1, "source", values.safe(f"source: {term.source}"))
    for part in term.parts[:MOST_PARTS]:
        yield from _lines(part, part.name, indent + 1, explained)
    if rest := term.parts[MOST_PARTS:]:
        amount = values.value(sum(part.value for part in rest), term.unit)
        yield Line(indent + 1, "name", f"and {len(rest)} more: {amount}")
