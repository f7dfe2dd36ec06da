"""The reference tables of scaling laws, compute and utilization, row by row."""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tables import scaling as tables
from llmsize import presets
from llmsize.scaling.allocation import allocate
from llmsize.scaling.laws import ScalingLaw, additive, loss
from llmsize.throughput import Utilization

REFERENCE = Path(__file__).parent / "reference"


def _rows(name: str) -> list[dict[str, str]]:
    with (REFERENCE / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _misses(name: str) -> list[str]:
    answers = list(getattr(tables, name)(_rows(name)))
    assert answers
    return [
        f"{a.id} {a.quantity}: expected {a.expected}, got {a.got}"
        for a in answers
        if a.tolerance is not None
        and (a.got is None or abs(a.got - a.expected) > a.tolerance * abs(a.expected))
        and not a.id.startswith(tuple(tables.KNOWN_WRONG))
    ]


@pytest.mark.parametrize("name", ["scaling_examples", "training_compute", "mfu_observed"])
def test_every_row_is_reproduced_or_its_cause_is_named(name: str) -> None:
    """Published and computed rows are within their tolerance, or contradict themselves."""
    assert _misses(name) == []


def test_gpt3_table_is_complete() -> None:
    """Every row kept of Table D.1 of Brown et al. 2020 has its FLOP and its PF-days."""
    rows = [row for row in _rows("training_compute") if "Table D.1" in row["source"]]
    answered = [a.quantity for a in tables.training_compute(rows)]
    assert answered.count("published_flops") == answered.count("published_pf_days") == len(rows)


def test_the_coarse_grid_of_nanogpt_is_not_the_optimum() -> None:
    """The grid point that the notebook prints has a higher loss than the closed form."""
    law = presets.get(ScalingLaw, "hoffmann")
    best = allocate(law, 2.21e19)
    assert best.loss is not None
    assert loss(law, 316.23e6, 2.21e19 / (6 * 316.23e6)) > best.loss


def test_rounding_of_the_constants_explains_the_expert_row() -> None:
    """Constants within the rounding of Table 3 give the 13.9e9 tokens that Table 1 prints."""
    law = presets.get(ScalingLaw, "ludziejewski")
    reached = []
    for signs in itertools.product((-1, 1), repeat=4):
        moved = dict(law.constants)
        for name, sign in zip(("alpha", "beta", "gamma", "zeta"), signs, strict=True):
            moved[name] += sign * 0.00005
        variant = replace(law, constants=moved)
        reached.append(allocate(additive(variant, experts=4), 1e20).tokens)
    assert any(round(tokens, -8) == 13.9e9 for tokens in reached)


@pytest.mark.parametrize("name", sorted(presets.names(Utilization)))
def test_measured_utilization_lies_within_its_spread(name: str) -> None:
    """The defaults are medians between the extremes of their runs, with a source."""
    entry = presets.get(Utilization, name)
    assert 0 < entry.low <= entry.median <= entry.high < 1
    assert entry.runs > 1 and entry.source


@pytest.mark.parametrize(
    ("name", "gpu", "precision"),
    [("a100-bf16", "a100", "bf16"), ("h100-bf16", "h100", "bf16"), ("h100-fp8", "h100", "fp8")],
)
def test_default_utilization_is_the_median_of_the_benchmark(
    name: str, gpu: str, precision: str
) -> None:
    """Over the rows kept of llm-foundry's table the medians are the shipped ones, within 0.02."""
    shares = sorted(
        float(row["mfu_pct"]) / 100
        for row in _rows("mfu_observed")
        if row["framework"] == "llm-foundry" and row["gpu"].startswith(gpu)
        and precision in row["precision"]
    )  # fmt: skip
    entry = presets.get(Utilization, name)
    assert entry.median == pytest.approx(shares[len(shares) // 2], abs=0.02)
    assert entry.low <= shares[0] + 0.01 and shares[-1] <= entry.high + 0.01
