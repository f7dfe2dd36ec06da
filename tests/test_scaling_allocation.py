"""Splitting a budget: the optimum beats its neighbours, and repetition and serving move it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import tried

from llmsize import presets
from llmsize.errors import LLMSizeError
from llmsize.scaling.allocation import (
    allocate,
    allocate_for_loss,
    allocate_for_params,
    allocate_for_tokens,
    allocate_unique,
    at_most,
    parameters_repeated,
    reach_unique,
    reach_with_inference,
    same_compute,
    same_loss,
    spend,
    spend_with_inference,
    tokens_repeated,
)
from llmsize.scaling.laws import ScalingLaw, additive, loss, relations, solve
from llmsize.scaling.precision import best_bits, effective_fraction

SETTINGS = {"experts": 8.0, "granularity": 8.0}
LAWS = {name: additive(law, **SETTINGS) for name, law in presets.every(ScalingLaw).items()}
ADDITIVE = sorted(name for name, law in LAWS.items() if law.form in ("additive", "repeated"))
OPTIMAL = sorted(name for name, law in LAWS.items() if "N | C" in relations(law))
COMPUTE = st.floats(1e18, 1e26)


@given(st.sampled_from(ADDITIVE), COMPUTE, st.sampled_from([0.5, 0.9, 1.1, 2]))
def test_the_optimum_beats_its_neighbours(name: str, c: float, factor: float) -> None:
    """No other size reaches a lower loss with the same compute."""
    law = LAWS[name]
    best = allocate(law, c)
    assert best.loss is not None
    assert best.compute == pytest.approx(6 * best.parameters * best.tokens, rel=1e-9)
    assert best.loss == pytest.approx(loss(law, best.parameters, best.tokens), rel=1e-9)
    other = spend(law, c, best.parameters * factor)
    assert other.loss is not None and other.loss > best.loss


@given(st.sampled_from(OPTIMAL), COMPUTE)
def test_the_optimum_is_the_same_from_either_side(name: str, c: float) -> None:
    """The budget for which N* is best is the budget it came from, and so for D*."""
    law = LAWS[name]
    best = allocate(law, c)
    assert allocate_for_params(law, best.parameters).compute == pytest.approx(c, rel=1e-9)
    if "C | D" in relations(law):
        assert allocate_for_tokens(law, best.tokens).compute == pytest.approx(c, rel=1e-9)


@given(COMPUTE, st.floats(0.1, 100), st.sampled_from([0.8, 1.25]))
def test_with_few_unique_tokens_the_optimum_beats_its_neighbours(
    c: float, scarcity: float, factor: float
) -> None:
    """The bracketed minimum over repeated data is a minimum."""
    law = LAWS["muennighoff"]
    unique = allocate(law, c).tokens / scarcity
    best = allocate_unique(law, c, unique)
    n = best.parameters * factor
    other = solve(law, "L | N, D, U", N=n, D=c / (6 * n), U=unique)
    assert best.loss is not None and other >= best.loss


def test_repeated_tokens_never_beat_fresh_ones() -> None:
    """Four epochs are worth 93 % of fresh tokens each, and no number of them more than 16.4."""
    law = LAWS["muennighoff"]
    assert solve(law, "D_eff | D, U", D=4, U=1) / 4 == pytest.approx(0.93, abs=0.005)
    assert solve(law, "D_eff | D, U", D=1e6, U=1) == pytest.approx(16.39, abs=0.01)


@given(st.floats(1.9, 2.4), st.floats(1e9, 1e14), st.sampled_from([0.7, 0.95, 1.05, 1.4]))
def test_serving_makes_smaller_models_best(target: float, served: float, factor: float) -> None:
    """The optimum over training and serving costs less in all than its neighbours of equal loss."""
    law = LAWS["hoffmann"]
    best = reach_with_inference(law, target, served)
    assert loss(law, best.parameters, best.tokens) == pytest.approx(target, rel=1e-9)
    assert best.parameters <= allocate_for_loss(law, target).parameters * (1 + 1e-9)
    for other in same_loss(law, best, [best.parameters * factor]):
        total = other.compute + 2 * other.parameters * served
        assert total >= best.total_compute * (1 - 1e-9)


@given(COMPUTE, st.floats(0, 1e13))
def test_a_budget_of_training_and_serving_is_spent_exactly(c: float, served: float) -> None:
    """Training and serving together cost the budget, and no neighbour has a lower loss."""
    law = LAWS["chinchilla"]
    best = spend_with_inference(law, c, served)
    assert best.total_compute == pytest.approx(c, rel=1e-6)
    for n in (best.parameters * 0.9, best.parameters * 1.1):
        d = c / (6 * n) - served / 3
        if d > 0:
            assert best.loss is not None and loss(law, n, d) >= best.loss * (1 - 1e-12)


def test_a_cap_on_parameters_trains_longer() -> None:
    """With a cap below the optimum the whole budget goes into tokens of the capped size."""
    law = LAWS["chinchilla"]
    best, capped = allocate(law, 1e22), at_most(law, 1e22, 1e9)
    assert capped.parameters == 1e9
    assert capped.tokens == 1e22 / 6e9
    assert best.loss is not None and capped.loss is not None and capped.loss > best.loss
    assert at_most(law, 1e22, 1e12) == best


def test_trades_keep_what_they_say_they_keep() -> None:
    """Rows of equal loss have equal loss, rows of equal compute have equal compute."""
    law = LAWS["chinchilla"]
    best = allocate(law, 1e22)
    sizes = [best.parameters * factor for factor in (0.01, 0.5, 1, 2)]
    rows = same_loss(law, best, sizes)
    assert len(rows) == 3, "a hundredth of the parameters never reaches the loss"
    assert [loss(law, row.parameters, row.tokens) for row in rows] == pytest.approx(
        [best.loss] * 3, rel=1e-9
    )
    assert [row.compute for row in same_compute(law, 1e22, sizes)] == [1e22] * len(sizes)


@pytest.mark.parametrize("compute", [0, -1e20, math.nan, math.inf])
def test_an_impossible_budget_is_refused(compute: float) -> None:
    """Zero, negative, NaN and infinite budgets are errors in every way of spending them."""
    for spend_it in (
        lambda: allocate(LAWS["chinchilla"], compute),
        lambda: allocate_unique(LAWS["muennighoff"], compute, 1e9),
        lambda: spend_with_inference(LAWS["chinchilla"], compute, 1e9),
    ):
        with pytest.raises(LLMSizeError):
            spend_it()


def test_a_law_without_repetition_says_so() -> None:
    """Unique tokens need a law that knows what repeating them is worth."""
    with pytest.raises(LLMSizeError, match="unique tokens"):
        allocate_unique(LAWS["chinchilla"], 1e22, 1e9)


def test_precision_refuses_what_its_runs_did_not_cover() -> None:
    """Below 3.11 bits the factor of activations would be negative; above 16 there are no runs."""
    law = presets.get(ScalingLaw, "kumar")
    for bits in (3.1, 2, 17, math.nan):
        with pytest.raises(LLMSizeError, match="says nothing"):
            effective_fraction(law, activations=bits)
    assert effective_fraction(law).value == 1
    assert 0 < effective_fraction(law, activations=3.12).value < 0.01
    assert best_bits(law) == pytest.approx(7.0, abs=0.01)


UNIQUE = st.floats(1e8, 1e12)


@tried(30)
@given(st.floats(1e7, 1e11), st.floats(0.1, 30), UNIQUE)
def test_repeated_tokens_and_parameters_invert(n: float, epochs: float, unique: float) -> None:
    """The loss of the tokens, or of the parameters, that reach a loss is that loss, to 1e-9."""
    law, d = LAWS["muennighoff"], epochs * unique
    target = solve(law, "L | N, D, U", N=n, D=d, U=unique)
    tokens = tokens_repeated(law, target, n, unique)
    assert solve(law, "L | N, D, U", N=n, D=tokens, U=unique) == pytest.approx(target, rel=1e-9)
    if target <= solve(law, "L | N, D, U", N=n * 100, D=d, U=unique) * (1 + 1e-9):
        return  # more parameters are worth nothing here: no double tells them apart
    found = parameters_repeated(law, target, d, unique)
    assert solve(law, "L | N, D, U", N=found, D=d, U=unique) == pytest.approx(target, rel=1e-9)


@tried(20)
@given(st.floats(1e18, 1e24), st.floats(0.3, 10))
def test_the_cheapest_way_to_a_loss_with_repetition_inverts(c: float, scarcity: float) -> None:
    """What reaches the loss of a budget with few unique tokens costs that budget and no more."""
    law = LAWS["muennighoff"]
    unique = allocate(law, c).tokens / scarcity
    best = allocate_unique(law, c, unique)
    assert best.loss is not None
    found = reach_unique(law, best.loss, unique)
    assert found.loss == pytest.approx(best.loss, rel=1e-9)
    assert found.compute == pytest.approx(c, rel=1e-6)


def test_what_repetition_never_reaches_is_refused() -> None:
    """Below the loss that endless repetition tends to, the error names that loss."""
    with pytest.raises(LLMSizeError, match="by repeating") as refused:
        reach_unique(LAWS["muennighoff"], 2.0, 1e9)
    assert "2.761" in refused.value.hint
