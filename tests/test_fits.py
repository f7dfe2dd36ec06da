"""Verdicts, and the searches for the largest and the smallest setting."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llmsize.errors import LLMSizeError
from llmsize.planning.fits import largest, limits, smallest, verdict

ORDER = ["does not fit", "tight", "fits"]

needs = st.integers(1, 10**15)
bands = st.floats(0, 0.5)


@given(needs, needs, needs, bands)
def test_more_memory_never_fits_less(need: int, budget: int, more: int, band: float) -> None:
    """A larger budget gives the same verdict or a better one."""
    before = ORDER.index(verdict(need, budget, band=band))
    assert ORDER.index(verdict(need, budget + more, band=band)) >= before


@given(needs, st.floats(0.5, 2), st.floats(0.01, 0.5))
def test_inside_the_band_is_tight(budget: int, ratio: float, band: float) -> None:
    """Only a need that the error could push across the budget is tight."""
    assume(abs(abs(ratio - 1) - band) > 1e-9)
    assert (verdict(ratio * budget, budget, band=band) == "tight") == (abs(ratio - 1) < band)


def test_no_memory_is_an_error() -> None:
    """A budget of nothing is a mistake, not a verdict."""
    with pytest.raises(LLMSizeError, match="nothing"):
        verdict(1, 0, band=0.1)


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 10**6))
def test_the_largest_holds_and_the_next_does_not(bound: int, highest: int, lowest: int) -> None:
    """The search finds the boundary of any monotone condition, or the end of the range."""
    highest += lowest
    found = largest(lambda value: value <= bound, lowest=lowest, highest=highest)
    assert found == (None if bound < lowest else min(bound, highest))


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 10**6))
def test_the_smallest_holds_and_the_one_before_does_not(
    bound: int, highest: int, lowest: int
) -> None:
    """The search upwards finds the first value that is enough, or none."""
    highest += lowest
    found = smallest(lambda value: value >= bound, lowest=lowest, highest=highest)
    assert found == (None if bound > highest else max(bound, lowest))


def test_a_search_is_short() -> None:
    """Asking 2·log₂ times is enough, so a slow estimate can be inverted."""
    asked: list[int] = []

    def holds(value: int) -> bool:
        asked.append(value)
        return value <= 131_072

    assert largest(holds) == 131_072
    assert len(asked) <= 2 * 18


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 10**9), bands)
def test_limits_are_what_fits(slope: int, base: int, budget: int, band: float) -> None:
    """The safe limit fits; the value after the estimated limit needs more than there is."""

    def need(value: int) -> int:
        return base + slope * value

    found = limits("context", need, budget, band=band)
    if found.safe is not None:
        assert verdict(need(found.safe), budget, band=band) == "fits"
        assert verdict(need(found.safe + 1), budget, band=band) != "fits"
    if found.estimated is not None:
        assert need(found.estimated) <= budget < need(found.estimated + 1)
