"""Recurrent layers by kernels, against real models whose kernels were stood in for.

The stand-ins allocate and save what the autograd functions of mamba-ssm v2.2, causal-conv1d v1.5
and flash-linear-attention v0.4 do by their source; everything around them is transformers 5.23 on
torch 2.13, followed tensor by tensor with benchmarks/measure_trace.py.
"""

import csv
import json
from pathlib import Path

import pytest

from llmsize import presets
from llmsize.anatomy import Setting, run_forward
from llmsize.architecture import Architecture
from llmsize.formats import BF16
from llmsize.memory.timeline import level, stretches
from llmsize.stack import Stack

REFERENCE = Path(__file__).parent / "reference"

with (REFERENCE / "kernel_traces.csv").open() as table:
    ROWS = list(csv.DictReader(table))


def kept(row: dict[str, str], *, fused: bool) -> int:
    """Bytes that the forward pass of a training step leaves alive."""
    config = json.loads((REFERENCE / row["config_file"]).read_text())
    model = Architecture("model", row["model_type"], config, source="")
    setting = Setting(
        batch=int(row["batch"]), sequence=int(row["seq"]), format=BF16, attention=row["attn"],
        training=True, fused_recurrence=fused,
    )  # type: ignore[arg-type]  # fmt: skip
    tape, _loss = run_forward(model, setting)
    return level([part for part in stretches(tape) if part.phase == "forward"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model_type"])
def test_a_kernel_keeps_what_its_source_saves(row: dict[str, str]) -> None:
    """What the forward pass leaves alive equals the traced step to the byte."""
    assert kept(row, fused=True) == int(row["kept_bytes"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model_type"])
def test_without_kernels_more_is_kept(row: dict[str, str]) -> None:
    """Only the operations of the reference keep states or matrices of every chunk."""
    assert kept(row, fused=False) > kept(row, fused=True)


def test_transformers_alone_has_no_kernels() -> None:
    """Without packages that are not its own, transformers falls back to its operations."""
    assert not presets.get(Stack, "transformers").fused_recurrence
    assert presets.get(Stack, "transformers-kernels").fused_recurrence
