"""Quantized formats against what was measured on one matrix and what ggml declares."""

import csv
from pathlib import Path

import pytest

from benchmarks.format_names import preset_of
from llmsize import presets
from llmsize.errors import LLMSizeError
from llmsize.formats import NATIVE, Format, matrix_bytes, stored_bytes

TABLE = Path(__file__).parent / "reference" / "quant_formats.csv"
SIDE = 4096
"""Rows and columns of the measured layer."""


def table() -> list[dict[str, str]]:
    with TABLE.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", table(), ids=lambda row: row["format"])
def test_a_matrix_takes_the_measured_bits(row: dict[str, str]) -> None:
    """Bits per weight of a 4096 × 4096 layer agree with the table to its last digit."""
    bits, _, per_row = row["bits_per_weight"].partition(" + ")
    expected = float(bits) + (32 / SIDE if per_row else 0)
    stored = matrix_bytes(presets.get(Format, preset_of(row["format"])), SIDE, SIDE)
    assert 8 * stored / SIDE**2 == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize("name", NATIVE)
def test_a_format_of_tensors_has_the_bits_of_its_name(name: str) -> None:
    """As its library stores it: tf32 as fp32 (NVIDIA's A100 whitepaper), a bool in a byte."""
    digits = "".join(filter(str.isdigit, name.partition("_")[0]))
    bits = {"tf32": 32, "bool": 8}.get(name) or int(digits)
    format = NATIVE[name]
    assert format.bits_per_element == bits
    assert stored_bytes(format, 1000) * 8 == 1000 * bits
    assert format.block_elements == (2 if bits < 8 else 1)


def test_a_side_tensor_that_cannot_be_read_is_an_error() -> None:
    """A misspelt extent would silently span the whole matrix."""
    wrong = Format("x", 1, 1, "none", beside={"scale": {"bytes": 4, "row": 1}})
    with pytest.raises(LLMSizeError, match="scale"):
        matrix_bytes(wrong, 8, 8)


def test_a_last_group_is_stored_whole() -> None:
    """GPTQ keeps one scale for the 32 columns that are left over of 160 in groups of 128."""
    gptq = presets.get(Format, "gptq-int4-g128")
    qweight, scales, qzeros, g_idx = 160 * 8 // 2, 2 * 2 * 8, 4 * 2, 4 * 160
    assert matrix_bytes(gptq, 8, 160) == qweight + scales + qzeros + g_idx
