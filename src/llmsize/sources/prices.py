"""A user's own snapshot of prices: dated, because prices change and llmsize keeps none.

    {"as_of": "2026-11-01", "currency": "$", "per_hour": {"h100": 2.5, "g5.xlarge": 1.006}}

A key is an accelerator (for one) or an instance (for the whole machine), by name or alias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from llmsize.errors import LLMSizeError, printable
from llmsize.hardware import Machine
from llmsize.quick_dataclasses import dataclass
from llmsize.sources.reading import parse_json, read_own
from llmsize.term import Term, fact

MAX_FILE = 1024 * 1024
HINT = 'write {"as_of": "2026-11-01", "per_hour": {"h100": 2.5}}'
HIGHEST = 1e6
"""No device costs more for an hour."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What an hour cost on one day."""

    as_of: str
    currency: str
    per_hour: Mapping[str, float]


def read_prices(path: Path) -> Prices:
    """The snapshot in a JSON file. Raises `LLMSizeError` for anything else."""
    value = parse_json(read_own(path, MAX_FILE, hint=HINT), str(path))
    if not isinstance(value, dict) or not isinstance(value.get("per_hour"), dict):
        raise _refused(path, "it has no `per_hour`")
    as_of, currency = value.get("as_of"), value.get("currency", "$")
    if not isinstance(as_of, str) or not re.fullmatch(r"\d{4}-\d{2}-\d{2}", as_of):
        raise _refused(path, "it has no date `as_of`")
    if not isinstance(currency, str) or not 0 < len(currency) <= 8:
        raise _refused(path, "its `currency` is no short text")
    for name, price in value["per_hour"].items():
        number = isinstance(price, int | float) and not isinstance(price, bool)
        if not number or not 0 <= price <= HIGHEST:
            raise _refused(path, f"the price of `{printable(name)}` is no number of an hour")
    prices = {name.lower(): float(price) for name, price in value["per_hour"].items()}
    return Prices(as_of, printable(currency), prices)


def price_of(prices: Prices, machine: Machine) -> Term | None:
    """What one device of `machine` costs for an hour, if the snapshot says so."""
    for record, shared in ((machine.instance, machine.devices), (machine.accelerator, 1)):
        for name in (record.name, *record.aliases) if record else ():
            if name.lower() in prices.per_hour:
                return fact(
                    "price", prices.per_hour[name.lower()] / shared,
                    unit=f"{prices.currency}/GPU-hour", source=f"your prices of {prices.as_of}",
                )  # fmt: skip
    return None


def _refused(path: Path, reason: str) -> LLMSizeError:
    return LLMSizeError(
        f"`{printable(str(path))}` is no price list: {reason}",
        hint=HINT,
    )
