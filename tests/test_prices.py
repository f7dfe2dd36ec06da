"""A user's price list: dated, checked, and found by accelerator or instance."""

from pathlib import Path

import pytest

from llmsize import presets
from llmsize.errors import LLMSizeError
from llmsize.hardware import Accelerator, Instance, machine, rented
from llmsize.sources.prices import price_of, read_prices

A10G = presets.get(Accelerator, "a10g")


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "prices.json"
    file.write_text(text)
    return file


def test_a_price_is_found_by_any_name(tmp_path: Path) -> None:
    """An accelerator's price is that of one; an instance's is shared by its devices."""
    file = written(tmp_path, '{"as_of": "2026-11-01", "per_hour": {"H100": 2.5, "g5.12xlarge": 6}}')
    prices = read_prices(file)
    four = rented(presets.get(Instance, "g5.12xlarge"), A10G)
    h100 = price_of(prices, machine(presets.get(Accelerator, "h100"), count=8))
    assert h100 and (h100.value, h100.source) == (2.5, "your prices of 2026-11-01")
    shared = price_of(prices, four)
    assert shared and shared.value == 1.5
    assert price_of(prices, machine(A10G)) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"per_hour": {}}', '{"as_of": "today", "per_hour": {}}',
     '{"as_of": "2026-11-01", "per_hour": {"h100": -1}}',
     '{"as_of": "2026-11-01", "per_hour": {"h100": "2"}}',
     '{"as_of": "2026-11-01", "per_hour": {"h100": 1e999}}',
     '{"as_of": "2026-11-01", "per_hour": {"h100": true}}',
     '{"as_of": "2026-11-01", "currency": 5, "per_hour": {}}'],
)  # fmt: skip
def test_anything_else_is_refused(tmp_path: Path, text: str) -> None:
    """A list without a date, or with a price that is none, is an error."""
    with pytest.raises(LLMSizeError):
        read_prices(written(tmp_path, text))
