"""The ledger of errors: what `benchmarks/accuracy.py` counts and how."""

import math
from pathlib import Path

import pytest

from benchmarks.accuracy import measure, missed, page, report
from benchmarks.answers import Answer, error, statistics


def answers(*pairs: tuple[float, float | None]) -> list[Answer]:
    """One case for each pair of what is expected and what is given."""
    return [Answer(f"case {i}", "bytes", *pair) for i, pair in enumerate(pairs)]


def test_a_case_without_an_answer_is_a_miss() -> None:
    """It counts in every share and has an infinite error, which JSON writes as null."""
    found = statistics(answers((100, 100), (100, None)))
    assert (found["cases"], found["answered"], found["exact"]) == (2, 1, 1)
    assert found["within"]["0.1"] == 0.5
    assert found["max"] is None
    assert found["worst"][0]["got"] is None


def test_errors_are_relative_and_the_bias_is_signed() -> None:
    """Ten per cent too much and ten too little have no bias."""
    found = statistics(answers((100, 110), (100, 90)))
    assert found["median"] == pytest.approx(0.1)
    assert found["bias"] == pytest.approx(0)


def test_an_expected_zero_is_met_by_zero_alone() -> None:
    """There is no relative error to speak of."""
    assert error(Answer("a", "bytes", 0, 0)) == 0
    assert error(Answer("a", "bytes", 0, 1)) == math.inf


def test_the_page_begins_with_what_is_furthest_off() -> None:
    """A case without an answer, then the largest errors; what is met is not among them."""
    tables = {
        f"{name}.csv": {"rows": 1, "quantities": {"bytes": statistics(answers((100, got)))}}
        for name, got in (("near", 101.0), ("met", 100.0), ("none", None), ("far", 150.0))
    }
    told = page({"tables": tables})
    beginning = told[: told.index("## near.csv")]
    rows = [line.split(" | ") for line in beginning.splitlines() if ".csv |" in line]
    assert [(row[0], row[5]) for row in rows] == [
        ("| none.csv", "no answer"), ("| far.csv", "50.0%"), ("| near.csv", "1.0%"),
    ]  # fmt: skip


def test_a_table_that_nothing_answers_is_reported(tmp_path: Path) -> None:
    """A new reference table is not passed over in silence."""
    (tmp_path / "unheard_of.csv").write_text("a,b\n1,2\n")
    measured = measure(tmp_path)
    assert measured == {"tables": {"unheard_of.csv": {"rows": 1, "quantities": {}}}}
    assert "not answered" in report(measured)
    assert list(missed(measured, {"unheard_of.csv": {"bytes": {"max": 0.1}}}))


def test_a_breakdown_is_no_miss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row without the columns of its table fails the check, whatever the thresholds say."""
    (tmp_path / "quant_formats.csv").write_text("format\nbf16\n")
    measured = measure(tmp_path)
    assert list(missed(measured, {})) == ["quant_formats.csv: 1 rows made its function fail"]
    assert "quant_formats, line 2: KeyError" in capsys.readouterr().err
