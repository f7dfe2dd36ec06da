"""Optimizer states and precision recipes against their published sizes."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmsize import presets
from llmsize.anatomy import traced
from llmsize.formats import BF16, FP32, NATIVE
from llmsize.optimizers import Optimizer, Precision, projected, projection_bytes, state_bytes
from llmsize.sources.config import architecture

REFERENCE = Path(__file__).parent / "reference"
OPTIMIZERS = presets.every(Optimizer)
PRECISIONS = presets.every(Precision)
LARGE = (4096, 4096)


@pytest.mark.parametrize(
    "name", [name for name, known in OPTIMIZERS.items() if known.bytes_per_parameter is not None]
)
def test_an_optimizer_has_its_published_bytes_per_parameter(name: str) -> None:
    """A large matrix of fp32 weights takes what the source says, the step counter aside."""
    optimizer = OPTIMIZERS[name]
    kept = state_bytes(optimizer, LARGE) - optimizer.step_bytes
    assert kept / (4096 * 4096) == optimizer.bytes_per_parameter


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_has_its_published_bytes_per_parameter(name: str) -> None:
    """Weights, gradients, and AdamW with its master copy, for bf16."""
    precision = PRECISIONS[name]
    formats = NATIVE | {"dtype": BF16}
    states = state_bytes(OPTIMIZERS["adamw"], LARGE, stepped=formats[precision.stepped]) - 4
    master = formats[precision.master].block_bytes if precision.master else 0
    assert precision.bytes_per_parameter == (
        formats[precision.weights].block_bytes,
        formats[precision.gradients].block_bytes,
        master + states / (4096 * 4096),
    )


def fused_runs() -> list[dict[str, str]]:
    """One recorded run per model and format of the reference table (`foreach`: host)."""
    with (REFERENCE / "training_memory.csv").open() as table:
        rows = [row for row in csv.DictReader(table) if row["mode"] == "full"]
    families = ("llama", "mistral", "qwen2", "gpt2", "gpt_neox")
    found = {
        (row["model"], row["weight_dtype"], row["master_weights"]): row
        for row in rows
        if row["model_type"] in families and row["optimizer"] == "adamw_fused"
    }
    return list(found.values())


@pytest.mark.parametrize("row", fused_runs(), ids=lambda row: row["case_id"])
def test_adamw_has_the_bytes_of_recorded_runs(row: dict[str, str]) -> None:
    """Two moments in the format that is stepped on and a counter per tensor, to the byte."""
    config = json.loads((REFERENCE / row["config_file"]).read_text())
    weights = traced(architecture(config, row["config_file"], row["model"])).weights.values()
    stepped = FP32 if "fp32" in (row["weight_dtype"], row["master_weights"][:4]) else BF16
    states = sum(
        state_bytes(OPTIMIZERS["adamw"], tuple(map(int, w.shape)), stepped=stepped) * w.copies
        for w in weights
    )
    assert states == int(row["optim_bytes"])


def test_small_tensors_keep_fp32_states() -> None:
    """bitsandbytes quantizes the states of no tensor below 4096 elements."""
    eight_bit = OPTIMIZERS["adamw-8bit"]
    assert state_bytes(eight_bit, (4095,)) == 8 * 4095
    assert state_bytes(eight_bit, (4096,)) == 2 * 4096 + 2 * 4 * 16


def test_a_factored_matrix_keeps_its_rows_and_columns() -> None:
    """Adafactor keeps r + q numbers for a matrix of r × q, all of a vector's, and one of each."""
    assert state_bytes(OPTIMIZERS["adafactor"], (30, 70)) == 4 * (30 + 70 + 1)
    assert state_bytes(OPTIMIZERS["adafactor"], (30,)) == 4 * (30 + 1)


def test_galore_steps_with_a_decomposition_or_an_update() -> None:
    """Of 100 × 300 numbers in 16 bits, by jiaweizzhao/GaLore's own code: in fp32 the gradient, U of
    100 × 100 and V of 100 × 300; or the update twice over and three moments of the rank."""
    decomposed, updated = (
        projection_bytes(replace(OPTIMIZERS["galore"], rank=rank), (100, 300), "", BF16)
        for rank in (4, 100)
    )
    assert decomposed == 4 * (100 * 300 + 100 * 100 + 100 * 300)
    assert updated == 2 * (2 * 100 * 300 + 3 * 100 * 300)


def test_galore_keeps_a_projection_and_two_small_moments() -> None:
    """Table 1 of the paper, for m ≤ n: mr + 2nr numbers; in fp32 all m singular vectors stay."""
    m, n, r = 512, 2048, 128
    assert state_bytes(OPTIMIZERS["galore"], (m, n), stepped=BF16) == 2 * (m * r + 2 * n * r)
    assert state_bytes(OPTIMIZERS["galore"], (m, n)) == 4 * (m * m + 2 * n * r)
    assert state_bytes(OPTIMIZERS["galore"], (m, n), role="head") == 8 * m * n


def test_stacks_of_matrices_are_among_the_others() -> None:
    """Of 8 experts' matrices in one tensor torch.optim.Muon says that it `only supports 2D`, and
    GaLore is given linear layers alone: two moments, Muon's AdamW with an fp32 counter."""
    stack = (8, 64, 32)
    assert state_bytes(OPTIMIZERS["muon"], stack, stepped=BF16) == 2 * 2 * 8 * 64 * 32 + 4
    assert state_bytes(OPTIMIZERS["galore"], stack, stepped=BF16) == 2 * 2 * 8 * 64 * 32
    assert state_bytes(OPTIMIZERS["muon"], stack[1:], stepped=BF16) == 2 * 64 * 32


def test_what_galore_in_8_bit_does_not_project_has_scales_for_both_moments() -> None:
    """bitsandbytes: a byte for each number of a moment, and an fp32 scale for each block of 256."""
    optimizer = projected(OPTIMIZERS["adamw-8bit"], 128)
    assert state_bytes(optimizer, (512, 2048), role="head") == 2 * (512 * 2048 + 4 * 512 * 8)
