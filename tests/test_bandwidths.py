"""Measured decoding: published tokens per second against the bandwidth that they use."""

import csv
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import median

import pytest

from llmsize import presets
from llmsize.anatomy import traced
from llmsize.architecture import Architecture
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError
from llmsize.formats import Format
from llmsize.hardware import Accelerator
from llmsize.memory.serving import Serving, serving
from llmsize.memory.weights import Recipe
from llmsize.planning.serving import tokens_per_second
from llmsize.throughput import Bandwidth, efficiency, measured_bandwidth

Row = dict[str, str]

with (Path(__file__).parent / "reference" / "decode_speed.csv").open() as file:
    ROWS = list(csv.DictReader(file))
KNOWN = presets.every(Bandwidth)


def reached(row: Row) -> float:
    """The share of the published bandwidth of one device."""
    card = presets.get(Accelerator, row["accelerator"])
    used = float(row["gb_s"] or float(row["read_gb"]) * float(row["tokens_per_second"]))
    return used * card.devices / (card.bandwidth_gb_s or 0)


@pytest.mark.parametrize("name", KNOWN)
def test_a_share_of_bandwidth_follows_from_the_published_runs(name: str) -> None:
    """Median, spread and number of those on its devices with its weights."""
    entry = KNOWN[name]
    alike = [row for row in ROWS if int(row["bits"]) == entry.bits]
    shares = [reached(r) for r in alike if r["accelerator"].startswith(entry.accelerators or "")]
    said = (entry.median, entry.low, entry.high)
    assert said == pytest.approx((median(shares), min(shares), max(shares)), abs=0.0051)
    assert entry.runs == len(shares)


@lru_cache
def served(model: str, quant: str) -> Serving:
    """llama.cpp at the middle of 512 tokens."""
    known = presets.get(Architecture, model)
    recipe = presets.get(Recipe, {"f16": "gguf-f16"}.get(quant, quant))
    half = presets.get(Format, "fp16")
    made = serving(
        known, traced(known), presets.get(Engine, "llama.cpp"), recipe,
        lambda name: presets.get(Format, name), format=half, keys=half, values=half,
    )  # fmt: skip
    return replace(made, context=256)


SHOWN = [row for row in ROWS if row["quant"] in ("f16", "q4_0", "q4_k_m")
         and presets.get(Accelerator, row["accelerator"]).peak_tflops]  # fmt: skip


@pytest.mark.parametrize("row", SHOWN, ids=lambda row: f"{row['accelerator']} {row['model']}")
def test_no_published_run_was_faster_than_the_bound(row: Row) -> None:
    """And at the measured share of its kind the estimate is within the spread of the runs."""
    card = presets.get(Accelerator, row["accelerator"])
    asked, measured = served(row["model"], row["quant"]), float(row["tokens_per_second"])
    assert measured < tokens_per_second(asked, card).value
    entry = measured_bandwidth(KNOWN.values(), card, float(row["bits"]))
    said = tokens_per_second(asked, card, efficiency(entry)).value
    slack = 0.05  # the cache, which the table leaves out
    assert (1 - slack) * entry.median / entry.high < said / measured
    assert said / measured < (1 + slack) * entry.median / entry.low


def test_the_runs_on_the_devices_of_that_kind_come_first() -> None:
    """Then those on any device; 8 bits are read as 16, and nothing is made up."""
    assert measured_bandwidth(KNOWN.values(), presets.get(Accelerator, "rtx-4090"), 16).bits == 16
    chosen = measured_bandwidth(KNOWN.values(), presets.get(Accelerator, "h100-sxm-80gb"), 8.1)
    assert (chosen.name, chosen.bits) == ("hopper-16-bit", 16)
    other = measured_bandwidth(KNOWN.values(), presets.get(Accelerator, "l4"), 4.5)
    assert other.name == "any-4-bit"
    assert efficiency(other).grade == "assumed"
    with pytest.raises(LLMSizeError, match="no measured bandwidth"):
        measured_bandwidth([], presets.get(Accelerator, "l4"), 16)
