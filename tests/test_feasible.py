"""Runs that are known to have fitted or to have failed, and what `fits` says of them."""

import csv
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from benchmarks.answers import Answer
from benchmarks.tables.training import feasible_training, measured_training
from llmsize import presets
from llmsize.planning.fits import Band

HERE = Path(__file__).parent
FITTED = "fitted, not said not to fit"
FAILED = "ran out of memory, not said to fit"


def right(
    table: Callable[[list[dict[str, str]]], Iterable[Answer]], quantity: str
) -> list[float | None]:
    """1 for every verdict of a table that is not wrong."""
    with (HERE / "reference" / f"{table.__name__}.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] not in ("measured", "analytic")]
    return [answer.got for answer in table(rows) if answer.quantity == quantity]


def test_no_benchmark_that_fitted_is_said_not_to_fit() -> None:
    """138 runs of llm-foundry's benchmarks on 40 and 80 GB cards: at least 97 % are not refused."""
    verdicts = right(feasible_training, FITTED)
    assert len(verdicts) > 130
    assert sum(verdict == 1 for verdict in verdicts) >= 0.97 * len(verdicts)


def test_published_runs_that_fitted_and_that_did_not() -> None:
    """At least 97 % that fitted are not refused, at least 90 % that failed are not said to fit."""
    fitted, failed = right(measured_training, FITTED), right(measured_training, FAILED)
    assert len(fitted) > 15 and len(failed) > 4
    assert sum(verdict == 1 for verdict in fitted) >= 0.97 * len(fitted)
    assert sum(verdict == 1 for verdict in failed) >= 0.9 * len(failed)


@pytest.mark.parametrize("name", presets.names(Band))
def test_an_error_band_is_what_the_ledger_holds(name: str) -> None:
    """The band that decides what is tight is the 95th percentile that is held in `--check`."""
    band = presets.get(Band, name)
    held = tomllib.loads((HERE.parent / "benchmarks" / "thresholds.toml").read_text())
    assert held[band.table][band.quantity]["p95"] == band.share
