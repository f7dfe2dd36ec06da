"""Verdicts, and the searches for the largest and the smallest setting."""

from math import isqrt

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llmsize.errors import LLMSizeError
from llmsize.planning.fits import (
    Band,
    band_for,
    largest,
    largest_below,
    most,
    smallest,
    verdict,
)
from llmsize.quick_dataclasses import replace

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


def test_a_band_is_of_its_own_runs_or_the_widest_of_the_job() -> None:
    """What was never measured is as uncertain as the worst that was, and says so by no cases."""
    of_vllm = Band("a", "inference", 0.02, 10, "t", "q", "made up", engines=("vllm",))
    of_llama_cpp = replace(of_vllm, name="b", share=0.05, engines=("llama.cpp",))
    training = Band("c", "training", 0.2, 30, "t", "q", "made up")
    known = [of_vllm, of_llama_cpp, training]
    assert band_for(known, "inference", "vllm") == of_vllm
    assert band_for(known, "inference", "mlx") == replace(of_llama_cpp, cases=0)
    assert band_for(known, "training", "any stack") == training


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


@given(
    slope=st.integers(0, 1000), curve=st.integers(0, 5), base=st.integers(0, 10**6),
    kink=st.integers(0, 10**4), step=st.sampled_from((1, 16, 256)),
    known=st.integers(1, 500), spare=st.integers(0, 10**9), block=st.sampled_from((1, 16, 256)),
)  # fmt: skip
def test_the_most_fits_and_one_more_does_not(
    slope: int, curve: int, base: int, kink: int, step: int, known: int, spare: int, block: int
) -> None:
    """Whether the need grows by a line, a parabola, in steps, or only from some value on."""

    def need(value: int) -> float:
        value = -(-value // step) * step
        return base + slope * value + curve * max(0, value - kink) ** 2

    highest = 2**20
    budget = need(known) + spare
    found = most(need, budget, known, block=block, highest=highest)
    assert need(found) <= budget
    assert found == highest or need(found + 1) > budget


def test_values_that_are_spared_a_copy_are_found() -> None:
    """Of contexts whose mask is padded unless they are a multiple of 8, the largest that fits."""

    def need(tokens: int) -> float:
        return 10 * tokens**2 * (1 if tokens % 8 == 0 else 2)

    assert most(need, 10 * 1000**2, 512, block=8) == 1000


def test_most_needs_are_met_at_once() -> None:
    """A need that is a line or a parabola is met without halving a range: each is a slow trace."""
    asked: list[int] = []

    def need(tokens: int) -> float:
        asked.append(tokens)
        return 10**9 + 10**5 * tokens + 80 * tokens**2

    root = (-(10**5) + isqrt(10**10 + 4 * 80 * 79 * 10**9)) // 160
    assert most(need, 80 * 10**9, 512) == root
    assert len(asked) <= 8


@given(st.integers(1, 10**6), st.sets(st.integers(2, 10**6)))
def test_the_largest_below_a_bound_holds_and_the_next_does_not(bound: int, bad: set[int]) -> None:
    """Whatever fails in between: both were asked about, but for the lowest."""
    asked: dict[int, bool] = {}

    def holds(value: int) -> bool:
        return asked.setdefault(value, value not in bad and value < bound)

    found = largest_below(holds, bound)
    assert found == 1 or asked[found]
    assert found == bound or not asked[found + 1]
