"""Prefill and decode against real models that were followed tensor by tensor."""

import csv
from pathlib import Path

import pytest

from benchmarks.answers import error
from benchmarks.tables.traces import inference_memory

REFERENCE = Path(__file__).parent / "reference"

ROWS = [
    row
    for name in ("inference_memory.csv", "generation_traces.csv")
    for row in csv.DictReader((REFERENCE / name).read_text().splitlines())
]
"""The reference, and further families with few layers each (transformers 5.23, torch 2.13)."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case_id"])
def test_generation_agrees_with_the_traced_model(row: dict[str, str]) -> None:
    """Weights and cache are exact, peaks within a few kilobytes per gigabyte."""
    for answer in inference_memory([row], REFERENCE):
        exact = answer.quantity in ("param_bytes", "kv_cache_bytes")
        assert error(answer) <= (0 if exact else 2e-5), answer
