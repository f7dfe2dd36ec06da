"""Recurrent layers by kernels, against real models whose kernels were stood in for.

The stand-ins allocate and save what the autograd functions of mamba-ssm v2.2, causal-conv1d v1.5
and flash-linear-attention v0.4 do by their source; everything around them is transformers 5.23 on
torch 2.13, followed tensor by tensor with benchmarks/measure_trace.py.
"""

import csv
from pathlib import Path

import pytest

from benchmarks.tables.traces import kept, kernel_traces
from llmsize import presets
from llmsize.stack import Stack

REFERENCE = Path(__file__).parent / "reference"

with (REFERENCE / "kernel_traces.csv").open() as table:
    ROWS = list(csv.DictReader(table))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model_type"])
def test_a_kernel_keeps_what_its_source_saves(row: dict[str, str]) -> None:
    """What the forward pass leaves alive equals the traced step to the byte."""
    assert [a.got for a in kernel_traces([row], REFERENCE)] == [int(row["kept_bytes"])]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model_type"])
def test_without_kernels_more_is_kept(row: dict[str, str]) -> None:
    """Only the operations of the reference keep states or matrices of every chunk."""
    assert kept(row, REFERENCE, fused=False) > int(row["kept_bytes"])


def test_transformers_alone_has_no_kernels() -> None:
    """Without packages that are not its own, transformers falls back to its operations."""
    assert not presets.get(Stack, "transformers").fused_recurrence
    assert presets.get(Stack, "transformers-kernels").fused_recurrence
