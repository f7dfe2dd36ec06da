"""Numbers that remember how they came about."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsize.term import evaluate, fact, term, total

WHOLE = st.integers(1, 10**12)


@given(WHOLE, WHOLE, WHOLE)
def test_whole_numbers_stay_whole(a: int, b: int, c: int) -> None:
    """Bytes are exact however large they are, and a division that comes out even is an `int`."""
    assert evaluate("a * b + c", {"a": a, "b": b, "c": c}) == a * b + c
    assert evaluate("a * b / a", {"a": a, "b": b}) == b
    assert isinstance(evaluate("a * b / a", {"a": a, "b": b}), int)


@given(st.lists(WHOLE, min_size=1, max_size=8))
def test_a_total_is_the_sum_of_its_parts(values: list[int]) -> None:
    """Every part is there, and walking finds each of them."""
    parts = [fact(f"part {i}", value, unit="bytes", source="x") for i, value in enumerate(values)]
    whole = total("whole", *parts)
    assert whole.value == sum(values)
    assert len(list(whole.walk())) == len(values) + 1


def test_a_total_has_the_grade_of_its_weakest_large_part() -> None:
    """A guess of less than a hundredth does not make an exact sum a guess."""
    exact = fact("exact", 10**6, unit="bytes", source="x")
    assert total("t", exact, fact("g", 10**5, unit="bytes", source="x", grade="assumed")).grade == (
        "assumed"
    )
    assert total("t", exact, fact("g", 10**3, unit="bytes", source="x", grade="assumed")).grade == (
        "exact"
    )


def test_units_are_not_mixed() -> None:
    """Bytes and parameters have no sum."""
    with pytest.raises(ValueError, match="cannot add"):
        total("t", fact("a", 1, unit="bytes", source="x"), fact("b", 1, unit="tokens", source="x"))


def test_a_formula_has_exactly_its_inputs() -> None:
    """A missing or a spare input is a mistake in the program, noticed at once."""
    with pytest.raises(ValueError, match="missing"):
        term("t", "a * b", unit="bytes", a=1)
    with pytest.raises(ValueError, match="spare"):
        term("t", "a", unit="bytes", a=1, b=2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "formula",
    [
        "__import__('os')",
        "a.b",
        "a[0]",
        "lambda: 1",
        "[a for a in b]",
        "'x'",
        "a if b else c",
        "1.0.real",
        "a1.b",
        "1or a",
        "not a",
        "a and b",
        "min(a for a in b)",
        "a, b",
        "True",
        "(a).real",
        "a < b",
        "{a}",
        "f'{a}'",
        "(a := 1)",
        "0x1f",
        "a @ b",
        "a if 1else b",
    ],
)
def test_only_arithmetic_is_evaluated(formula: str) -> None:
    """No name but the inputs and five functions, no attribute, no text."""
    with pytest.raises((ValueError, AssertionError)):
        evaluate(formula, dict.fromkeys("abc", 1))
