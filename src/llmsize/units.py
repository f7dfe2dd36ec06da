"""Reading and writing counts, memory, compute and time.

GB is 10⁹ bytes and GiB is 2³⁰; both parse, both print, and they are never mixed. A byte is always
`B`; `7B` as a *count* is seven billion. Every parser matches the whole text or refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from llmsize.errors import LLMSizeError, printable

if TYPE_CHECKING:
    from decimal import Decimal

MIB, GIB = 2**20, 2**30
PF_DAY = 86_400 * 10**15
"""FLOP in one petaFLOP/s-day (Kaplan et al. 2020, section 1.3)."""

MAX_COUNT = 10**18
MAX_BYTES = 10**21
LARGE = 10**6
"""Of the largest unit of bytes: from there on, a power of ten is easier to read than digits."""

_NUMBER = r"(\d+(?:_\d+)*(?:\.\d+)?(?:[eE][+-]?\d{1,3})?|\.\d+)"
_COUNT = rf"\s*{_NUMBER}\s*([kKmMbBgGtT]?)\s*"
_BYTES = rf"\s*{_NUMBER}\s*([kKmMgGtTpP]?)(i?)[bB]\s*"
_FLOP = rf"\s*{_NUMBER}\s*([a-zA-Z-]*)\s*"
_DURATION = rf"\s*{_NUMBER}\s*([a-zA-Z]+)\s*"
"""Text, compiled by `re` when it is first used: a command line seldom has one of each."""

_COUNT_SCALE = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_PREFIX_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_FLOP_SCALE = {
    "": 1, "flop": 1, "flops": 1, "gflop": 10**9, "tflop": 10**12, "pflop": 10**15,
    "eflop": 10**18, "zflop": 10**21, "pf-days": PF_DAY, "pf-day": PF_DAY, "pfdays": PF_DAY,
    "pfday": PF_DAY, "pfd": PF_DAY, "pf-d": PF_DAY,
}  # fmt: skip
_DURATION_SCALE = {
    "s": 1, "sec": 1, "second": 1, "seconds": 1, "m": 60, "min": 60, "minute": 60, "minutes": 60,
    "h": 3600, "hr": 3600, "hour": 3600, "hours": 3600, "d": 86_400, "day": 86_400,
    "days": 86_400, "w": 604_800, "week": 604_800, "weeks": 604_800,
    "month": 2_629_800, "months": 2_629_800, "y": 31_557_600, "year": 31_557_600,
    "years": 31_557_600,
}  # fmt: skip


def parse_count(text: str, what: str = "count") -> int:
    """A positive whole number: `7B`, `1.3b`, `124M`, `15T`, `6_738_415_616`, `1e9`.

    Raises `LLMSizeError` for anything else, for zero, and above 10¹⁸.
    """
    match = re.fullmatch(_COUNT, text, re.ASCII)
    if not match:
        raise LLMSizeError(
            f"cannot read the {what} `{printable(text)}`",
            hint="write a whole number above zero, such as `8`, `4K`, `124M` or `7B`",
        )
    value = _exact(match[1], text, what) * _COUNT_SCALE[match[2].lower()]
    if not 0 < value <= MAX_COUNT:
        raise LLMSizeError(
            f"the {what} `{printable(text)}` is out of range",
            hint="it must be from 1 to 1e18",
        )
    if value % 1:
        raise LLMSizeError(
            f"the {what} `{printable(text)}` is not a whole number",
            hint="leave out the fraction, or add a suffix: `1.5K` is 1,500",
        )
    return int(value)


def parse_bytes(text: str, what: str = "memory") -> int:
    """Bytes with a unit: `16GB` = 16·10⁹, `80GiB`, `24564MiB`, `512 B`.

    Raises `LLMSizeError` without a unit, for zero, and above 10²¹ bytes.
    """
    match = re.fullmatch(_BYTES, text, re.ASCII)
    if not match:
        raise LLMSizeError(
            f"cannot read the {what} `{printable(text)}`",
            hint="write a number and a unit, such as `16GB` (16·10⁹ bytes) or `16GiB` (16·2³⁰)",
        )
    base = 1024 if match[3] else 1000
    power = _PREFIX_POWER[match[2].lower()]
    if match[3] and not power:
        raise LLMSizeError(f"unknown unit in `{printable(text)}`", hint="write `B`, `KiB` or `GiB`")
    value = _exact(match[1], text, what) * base**power
    if not 0 < value <= MAX_BYTES:
        raise LLMSizeError(
            f"the {what} `{printable(text)}` is out of range",
            hint="it must be above zero and at most 1e21 bytes",
        )
    return int(value)


def write_bytes(size: int) -> str:
    """The same bytes as an option of a command line, none of them lost: `16GB`, `80GiB`."""
    scales = {"GB": 10**9, "GiB": GIB, "MB": 10**6, "MiB": MIB, "B": 1}
    unit = next(unit for unit, scale in scales.items() if size % scale == 0)
    return f"{size // scales[unit]}{unit}"


def parse_flop(text: str, what: str = "compute") -> float:
    """Compute in FLOP: `1e21`, `3.8e25 FLOP`, `2 EFLOP`, `3640 PF-days`."""
    return _scaled(_FLOP, _FLOP_SCALE, text, what, "`1e21` (FLOP) or `3640PF-days`")


def parse_duration(text: str, what: str = "duration") -> float:
    """Seconds: `30d`, `3h`, `90 min`, `2 weeks`."""
    return _scaled(_DURATION, _DURATION_SCALE, text, what, "`30d`, `3h` or `90min`")


def _scaled(pattern: str, scales: dict[str, int], text: str, what: str, example: str) -> float:
    match = re.fullmatch(pattern, text, re.ASCII)
    scale = scales.get(match[2].lower()) if match else None
    if match is None or scale is None:
        raise LLMSizeError(
            f"cannot read the {what} `{printable(text)}`", hint=f"write it like {example}"
        )
    value = _exact(match[1], text, what) * scale
    if not 0 < value <= 10**40:
        raise LLMSizeError(
            f"the {what} `{printable(text)}` is out of range",
            hint="it must be above zero and at most 1e40",
        )
    return float(value)


LONGEST = 60
"""Digits before the point of a number that is read at all."""


def _exact(number: str, text: str, what: str) -> Decimal | int:
    if number.isdecimal() and len(number) <= LONGEST:
        return int(number)
    from decimal import Decimal, InvalidOperation  # few numbers have a point

    try:
        value = Decimal(number)
    except InvalidOperation:  # pragma: no cover - the pattern admits only what Decimal reads
        raise LLMSizeError(f"cannot read the {what} `{text}`", hint="write a number") from None
    if value.adjusted() >= LONGEST:
        raise LLMSizeError(f"the {what} `{printable(text)}` is out of range", hint="too large")
    return value


def format_count(value: float) -> str:
    """Three significant digits and a suffix: `6.74B`, `124M`, `52,000` below a million.

    What nobody counts in trillions has an exponent.
    """
    if abs(value) < 10**6:
        return f"{value:,.0f}"
    if abs(value) > MAX_COUNT:
        return f"{value:.3g}"
    for suffix, scale in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if abs(value) >= scale * 0.9995 or suffix == "M":
            return f"{_significant(value / scale)}{suffix}"
    raise AssertionError("unreachable")


_binary: ContextVar[bool] = ContextVar("binary", default=False)


@contextmanager
def in_binary(wanted: bool) -> Iterator[None]:
    """Bytes are written in units of 2³⁰ where that is `wanted`, else of 10⁹, in all words alike."""
    token = _binary.set(wanted)
    try:
        yield
    finally:
        _binary.reset(token)


def format_bytes(value: float) -> str:
    """Bytes in the largest fitting unit: `13.48 GB`, or `12.55 GiB` within `in_binary`."""
    base, names = (
        (1024, ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))
        if _binary.get()
        else (1000, ("KB", "MB", "GB", "TB", "PB", "EB"))
    )
    if abs(value) < base:
        return f"{value:.0f} B"
    power = 1
    while abs(value) >= base ** (power + 1) * 0.99995 and power < len(names):
        power += 1
    scaled = value / base**power
    shown = f"{scaled:,.2f}" if abs(scaled) < LARGE else f"{scaled:.3g}"
    return f"{shown} {names[power - 1]}"


def format_flop(value: float) -> str:
    """FLOP with PF-days beside it: `5.76e+23 FLOP (6,670 PF-days)`."""
    return f"{value:.3g} FLOP ({_significant(value / PF_DAY)} PF-days)"


def format_share(value: float) -> str:
    """A share in whole percent: `63 %`."""
    return f"{100 * value:.0f} %"


def format_prefixed(value: float) -> str:
    """Three significant digits and the prefix of a unit: `989 T`, `17.2 G`."""
    for prefix, scale in (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6)):
        if abs(value) >= scale:
            return f"{_significant(value / scale)} {prefix}"
    return f"{_significant(value)} "


def format_duration(seconds: float) -> str:
    """A duration in the unit a person would choose: `62.3 ms`, `3.0 hours`, `21.4 days`."""
    for name, scale in (("years", 31_557_600), ("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= scale * (2 if name != "minutes" else 1):
            return f"{seconds / scale:,.1f} {name}"
    if 0 < seconds < 1:
        return f"{_significant(seconds * 1000)} ms"
    return f"{_significant(seconds)} seconds"


def _significant(value: float) -> str:
    """Three significant digits without an exponent where that reads well."""
    magnitude = abs(value)
    if magnitude >= 1000:
        return f"{value:,.0f}" if magnitude < 10**7 else f"{value:.3g}"
    if magnitude >= 100:
        return f"{value:.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    return f"{value:.3g}" if magnitude < 1 else f"{value:.2f}"
