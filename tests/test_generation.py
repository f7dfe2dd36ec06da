"""Prefill and decode against real models that were followed tensor by tensor."""

import csv
from pathlib import Path

import pytest

from benchmarks.tables.traces import inference_memory

REFERENCE = Path(__file__).parent / "reference"

TABLES = {"inference_memory.csv": 0.0, "generation_traces.csv": 2e-5}
"""The reference, which peaks are to the byte, and further families with few layers each, to a few
kilobytes per gigabyte (transformers 5.23, torch 2.13)."""

ROWS = [
    pytest.param(row, off, id=row["case_id"])
    for name, off in TABLES.items()
    for row in csv.DictReader((REFERENCE / name).read_text().splitlines())
]


@pytest.mark.parametrize(("row", "off"), ROWS)
def test_generation_agrees_with_the_traced_model(row: dict[str, str], off: float) -> None:
    """Weights and cache are exact, and so are the peaks of a prompt and of a token, or nearly."""
    answers = list(inference_memory([row], REFERENCE))
    assert len(answers) >= 4
    for answer in answers:
        exact = answer.quantity in ("param_bytes", "kv_cache_bytes")
        assert answer.got == pytest.approx(answer.expected, rel=0 if exact else off, abs=0), answer
