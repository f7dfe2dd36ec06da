"""Training steps of further families against real models that were followed tensor by tensor.

The rows have few layers and the formats, kernels, adapters and recomputation of
`training_memory.csv`; benchmarks/measure_trace.py made them (transformers 5.23, peft 0.21,
torch 2.13) and says what it does not count.
"""

import csv
from pathlib import Path

import pytest
from training_runs import check_traced

REFERENCE = Path(__file__).parent / "reference"
QUANTITIES = ("grad_bytes", "act_end_fwd_bytes", "peak_fwd_bytes", "peak_bwd_bytes")

with (REFERENCE / "training_traces.csv").open() as table:
    ROWS = list(csv.DictReader(table))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case_id"])
def test_a_family_keeps_and_peaks_as_traced(row: dict[str, str]) -> None:
    """All gradients, what the forward pass leaves alive and both peaks, to the byte."""
    check_traced(row, REFERENCE, QUANTITIES)
