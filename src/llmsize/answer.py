"""What every command produces: the question, its answer, and what was assumed on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from llmsize import __version__
from llmsize.quick_dataclasses import dataclass
from llmsize.term import Term

if TYPE_CHECKING:
    from llmsize.chart import Chart

SCHEMA_VERSION = 1
"""Raised when a field of the JSON document is renamed, removed or changes its meaning."""

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Absent:
    """A cell without a number, and why it has none."""

    reason: str


Cell = Term | Absent | str
"""A number that explains itself, a dash with its reason, or words."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    name: str
    cells: Mapping[str, Cell]
    """By column; a column that is left out stays empty."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows by columns of terms, dashes and words."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    heading: str = ""
    """What the names of the rows are: `model`, `format`, …"""
    total: bool = False
    """Whether the last row is the sum of those above it."""

    def column(self, name: str) -> dict[str, Cell]:
        """The cells of one column by row name."""
        return {row.name: row.cells[name] for row in self.rows if name in row.cells}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A question and its answer, ready to be rendered or written as one JSON document."""

    command: str
    question: Mapping[str, Scalar]
    """The knobs as they were understood, defaults included."""
    headline: str
    """The answer in one sentence, units included."""
    answer: tuple[Term | Table, ...]
    assumptions: tuple[str, ...] = ()
    """What was not asked for and not known: shapes guessed, defaults that matter."""
    notes: tuple[str, ...] = ()
    """Warnings and explanations; none changes a number."""
    verdict: bool | None = None
    """The answer to a yes-or-no question; `False` makes the command exit with 1."""
    schema_version: int = SCHEMA_VERSION
    llmsize_version: str = __version__

    def terms(self) -> list[Term]:
        """Every term that the answer shows, without the terms below them."""
        return [
            cell
            for part in self.answer
            for cell in ([part] if isinstance(part, Term) else _cells(part))
            if isinstance(cell, Term)
        ]


class Later(Estimate):
    """An estimate whose question has been checked, and which is worked out when it is first read.

    To know what an allocator reserves takes several times as long as all the rest.
    """

    __slots__ = ("_make",)

    @classmethod
    def of(cls, make: Callable[[], Estimate]) -> Estimate:
        """What `make` answers."""
        later = cls.__new__(cls)
        object.__setattr__(later, "_make", make)
        return later

    def __getattr__(self, name: str) -> Any:
        """A field that is not there yet; all are from now on."""
        if name not in self.__match_args__:
            raise AttributeError(f"an estimate has no `{name}`")
        made = self._make()
        for field in self.__match_args__:
            object.__setattr__(self, field, getattr(made, field))
        return getattr(made, name)


class Drawn(NamedTuple):
    """Charts, and the estimate with the numbers in them for formats that are not pictures."""

    estimate: Estimate
    charts: tuple[Chart, ...]


def _cells(table: Table) -> list[Cell]:
    return [cell for row in table.rows for cell in row.cells.values()]


def document(estimate: Estimate) -> dict[str, Any]:
    """The estimate as plain JSON values: `schema` describes it."""
    return {
        "schema_version": estimate.schema_version,
        "llmsize_version": estimate.llmsize_version,
        "command": estimate.command,
        "question": dict(estimate.question),
        "headline": estimate.headline,
        "verdict": estimate.verdict,
        "answer": [_part(part) for part in estimate.answer],
        "assumptions": list(estimate.assumptions),
        "notes": list(estimate.notes),
    }


def schema() -> dict[str, Any]:
    """The JSON Schema of `document`."""
    adapter = import_module("pydantic").TypeAdapter(Estimate)
    made: dict[str, Any] = adapter.json_schema(mode="serialization")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def _part(part: Term | Table) -> dict[str, Any]:
    if isinstance(part, Term):
        return _term(part)
    return {
        "title": part.title,
        "columns": list(part.columns),
        "rows": [
            {"name": row.name, "cells": {name: _cell(cell) for name, cell in row.cells.items()}}
            for row in part.rows
        ],
        "heading": part.heading,
        "total": part.total,
    }


def _cell(cell: Cell) -> dict[str, Any] | str:
    if isinstance(cell, Term):
        return _term(cell)
    return cell if isinstance(cell, str) else {"reason": cell.reason}


def _term(term: Term) -> dict[str, Any]:
    """Only the fields that say something: a fact has no formula, a leaf no parts."""
    said: dict[str, Any] = {
        "name": term.name,
        "value": term.value,
        "unit": term.unit,
        "grade": term.grade,
    }
    for name in ("formula", "source", "note"):
        if value := getattr(term, name):
            said[name] = value
    if term.inputs:
        said["inputs"] = dict(term.inputs)
    if term.parts:
        said["parts"] = [_term(part) for part in term.parts]
    return said
