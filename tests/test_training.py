"""Training steps against real models that were followed tensor by tensor."""

import csv
from pathlib import Path

import pytest

from benchmarks.tables.traces import training_memory

REFERENCE = Path(__file__).parent / "reference"
with (REFERENCE / "training_memory.csv").open() as table:
    ROWS = list(csv.DictReader(table))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case_id"])
def test_a_step_agrees_with_the_traced_one_to_the_byte(row: dict[str, str]) -> None:
    """States, kept bytes and the peak of each phase equal what the real step allocated."""
    answers = list(training_memory([row], REFERENCE))
    assert {a.quantity for a in answers} >= {"act_end_fwd_bytes", "peak_total_bytes", "peak_phase"}
    assert {a.quantity: a.got for a in answers} == {a.quantity: a.expected for a in answers}
