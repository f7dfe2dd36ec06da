"""A number that remembers how it came about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from types import CodeType
from typing import Any, Literal

from llmsize.errors import LLMSizeError
from llmsize.quick_dataclasses import dataclass, field

Grade = Literal["exact", "formula", "fitted", "assumed"]
"""How far to trust a number: counted, from a published formula or a trace, from a fit, or from a
guess."""

GRADES: tuple[Grade, ...] = ("exact", "formula", "fitted", "assumed")

Number = int | float

LARGE_PART = 0.01
"""A part below this share of its total does not lower the total's grade."""

_FUNCTIONS: dict[str, Callable[..., object]] = {
    "ceil": math.ceil, "min": min, "max": max, "exp": math.exp, "log": math.log
}  # fmt: skip
_KNOWN = {"__builtins__": {}, **_FUNCTIONS}


@dataclass(frozen=True, slots=True)
class Term:
    """A value with its unit and its origin: a formula over named inputs, or a sum of parts."""

    name: str
    """What it is, in the field's words."""
    value: Number
    """Bytes and counts are `int`."""
    unit: str
    """`bytes`, `parameters`, `nats/token`, …"""
    formula: str = ""
    """The arithmetic that ran, over the names in `inputs`; empty for a sum or a fact."""
    inputs: Mapping[str, Number] = field(default_factory=dict)
    """The value of every name in `formula`."""
    source: str = ""
    """Paper and section, file and commit, or preset."""
    grade: Grade = "exact"
    parts: tuple[Term, ...] = ()
    """The summands, for a total."""
    note: str = ""
    """What is assumed or not counted, in a few words."""

    def walk(self) -> Iterator[Term]:
        """This term and every term below it, depth first."""
        yield self
        for part in self.parts:
            yield from part.walk()

    def part(self, name: str) -> Term:
        """The first term of that name below this one. Raises `KeyError`."""
        for candidate in self.walk():
            if candidate.name == name:
                return candidate
        raise KeyError(name)


def term(
    name: str,
    formula: str,
    *,
    unit: str,
    source: str = "",
    grade: Grade = "exact",
    note: str = "",
    **inputs: Number,
) -> Term:
    """Evaluate `formula` over `inputs`; a missing or a spare input is a `ValueError`."""
    value = evaluate(formula, inputs)
    return Term(name, value, unit, formula, inputs, source, grade, (), note)


def fact(name: str, value: Number, *, unit: str, source: str, grade: Grade = "exact") -> Term:
    """A number that was read, not computed."""
    # by place, here and in `total`: an answer makes many terms, and names take longer
    return Term(name, value, unit, "", {}, source, grade, (), "")


def total(name: str, *parts: Term, unit: str = "", note: str = "") -> Term:
    """The sum of `parts`, graded as its weakest large part.

    Raises `ValueError` if the parts do not share a unit.
    """
    units = {part.unit for part in parts} | ({unit} if unit else set())
    if len(units) != 1:
        raise ValueError(f"{name}: cannot add {sorted(units)}")
    value = sum([part.value for part in parts])
    least = LARGE_PART * abs(value)
    large = [part.grade for part in parts if abs(part.value) >= least]
    grade = max(large, key=GRADES.index, default=GRADES[0])
    return Term(name, value, units.pop(), "", {}, "", grade, parts, note)


def evaluate(formula: str, inputs: Mapping[str, Number]) -> Number:
    """The value of an arithmetic formula. Whole inputs divide exactly; whole results are `int`.

    Raises `LLMSizeError` where it has none, as where it divides by nothing.
    """
    code, names, divides = _compiled(formula)
    if names != inputs.keys():
        missing, spare = names - inputs.keys(), inputs.keys() - names
        raise ValueError(f"`{formula}`: missing {sorted(missing)}, spare {sorted(spare)}")
    try:
        result: Any = eval(code, _KNOWN, _exact(inputs) if divides else inputs)  # noqa: S307
    except ArithmeticError as failure:
        raise LLMSizeError(
            f"`{formula}` has no value: {failure}",
            hint=f"one of these is impossible: {', '.join(inputs)}",
        ) from None
    if divides and not isinstance(result, int | float):
        return int(result) if result.denominator == 1 else float(result)
    assert isinstance(result, int | float)
    return result


def _exact(inputs: Mapping[str, Number]) -> dict[str, object]:
    """Whole numbers as fractions, so that a division loses nothing."""
    from fractions import Fraction  # few formulas divide

    return {name: Fraction(v) if isinstance(v, int) else v for name, v in inputs.items()}


_SIGNS = str.maketrans("+-*/%(),", "        ")
_DIGITS = frozenset("0123456789_.e")


@lru_cache(maxsize=512)
def _compiled(formula: str) -> tuple[CodeType, frozenset[str], bool]:
    """Its code, its inputs, and whether it divides; a `ValueError` if it is not arithmetic.

    Between the signs of arithmetic stand numbers and what the code looks up, and no other word.
    """
    words = formula.translate(_SIGNS).split()
    names = frozenset(word for word in words if not word[0].isdigit())
    numbers = "".join(word for word in words if word[0].isdigit())
    # numbers first: Python warns of a word that begins with a digit when it compiles it
    code = compile(formula, formula, "eval") if _DIGITS.issuperset(numbers) else None
    if code is None or names != frozenset(code.co_names):
        raise ValueError(f"`{formula}` is not arithmetic")
    return code, names - _FUNCTIONS.keys(), "/" in formula.replace("//", "")
