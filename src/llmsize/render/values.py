"""Values, names and formulas as text: units always, control characters never."""

from __future__ import annotations

import re

from llmsize import units
from llmsize.errors import printable
from llmsize.term import Number, Term

DASH = "–"
ROUNDED = ("bytes", "parameters", "tokens", "elements")
"""Units of whole numbers that are shown with three or four digits; an explanation has all."""
LONGEST = 10_000
"""Characters; longer text is a mistake or an attack."""

_EXACT_UPTO = 10**15
_NAME = re.compile(r"\b[A-Za-z_]\w*\b")
_SIGNS = (("**", "^"), ("*", "×"), ("//", "div"))


def value(number: Number, unit: str, *, bare: bool = False, digits: int = 5) -> str:
    """A number with its unit, rounded for reading: `13.48 GB`, `6.74B parameters`.

    `bare` leaves the unit to a heading, but for a prefix such as that of `GB`. `digits` are of what
    has no digits of its own, as bytes and counts have.
    """
    if unit == "bytes":
        return units.format_bytes(number)
    if unit == "seconds":
        return units.format_duration(number)
    if unit == "FLOP":
        shown = units.format_flop(number)
        return shown.replace(" FLOP", "").replace(" PF-days", "") if bare else shown
    if unit.startswith("FLOP/"):
        return f"{units.format_prefixed(number)}{'' if bare else unit}".rstrip()
    shown = units.format_count(number) if unit in ROUNDED else plain_number(number, digits)
    return shown if bare else f"{shown} {safe(unit)}".rstrip()


def exact(number: Number) -> str:
    """Every digit of a whole number, twelve significant digits of another."""
    if isinstance(number, int):
        return f"{number:,}" if abs(number) < _EXACT_UPTO else f"{float(number):.6g}"
    return f"{number:.12g}"


def plain_number(number: Number, digits: int = 5) -> str:
    """So many significant digits or all before the point, no exponent between 10⁻⁴ and 10¹⁵."""
    if isinstance(number, int) or (number.is_integer() and abs(number) < _EXACT_UPTO):
        return exact(int(number))
    if 1000 <= abs(number) < _EXACT_UPTO:
        return f"{number:,.{1 if digits > 4 and abs(number) < 10_000 else 0}f}"
    return f"{number:.{digits}g}"


def formula(term: Term) -> str:
    """The formula in the field's notation: `2 × layers × kv_heads`."""
    text = term.formula
    for sign, shown in _SIGNS:
        text = text.replace(sign, shown)
    return text.replace(" ^ ", "^")


def substituted(term: Term) -> str:
    """The formula with the values in place of the names."""
    return _NAME.sub(
        lambda name: exact(term.inputs[name[0]]) if name[0] in term.inputs else name[0],
        formula(term),
    )


def safe(text: str) -> str:
    """Text that may come from a file or an argument, without control characters."""
    return printable(text, LONGEST)
