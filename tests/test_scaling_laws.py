"""Laws: their answer keys, their inverses, and what holds for any of them."""

from __future__ import annotations

import math
import time
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import tried

from llmsize import presets
from llmsize.errors import LLMSizeError
from llmsize.scaling.laws import (
    FORMULAS,
    REDUCTIONS,
    Form,
    ScalingLaw,
    additive,
    answer,
    extrapolations,
    floor,
    loss,
    losses,
    non_embedding_parameters,
    relations,
    solve,
    total_parameters,
)
from llmsize.term import evaluate
from llmsize.units import PF_DAY

SETTINGS = {"experts": 8.0, "granularity": 8.0}
LAWS = {name: additive(law, **SETTINGS) for name, law in presets.every(ScalingLaw).items()}
NAMES = st.sampled_from(sorted(LAWS))
PARAMETERS = st.floats(1e6, 1e13)
TOKENS = st.floats(1e7, 1e15)
COMPUTE = st.floats(1e15, 1e28)
STRATEGY = {"N": PARAMETERS, "D": TOKENS, "U": TOKENS, "S": st.floats(1e2, 1e7),
            "S_min": st.floats(1e2, 1e7), "B": TOKENS, "B_crit": st.floats(1e3, 1e9)}  # fmt: skip


def _two_way() -> list[tuple[str, str, str]]:
    """Every (law, relation, inverse) where the law has both directions."""
    found = []
    for name, law in LAWS.items():
        for relation in relations(law):
            target, _, rest = relation.partition(" | ")
            if "L" in rest.split(", "):
                continue  # the other way round: a loss that the law reaches comes from the law
            for letter in rest.split(", "):
                kept = [each for each in rest.split(", ") if each != letter]
                inverse = f"{letter} | {', '.join([target, *kept])}"
                if inverse in relations(law):
                    found.append((name, relation, inverse))
    return found


@pytest.mark.parametrize("name", sorted(name for name, law in LAWS.items() if law.answer_keys))
def test_a_law_gives_what_its_source_prints(name: str) -> None:
    """Each answer key in a law's file is a result that its own paper prints."""
    law = LAWS[name]
    for key in law.answer_keys:
        given_ = {k: v for k, v in key.items() if k not in ("relation", "expected", "within")}
        got = solve(law, key["relation"], **given_)
        assert got == pytest.approx(key["expected"], rel=key["within"])


@pytest.mark.parametrize("name", sorted(presets.names(ScalingLaw)))
def test_a_law_is_of_a_known_form_and_has_all_its_constants(name: str) -> None:
    """A shipped law answers something, and names its source and what its N means."""
    law = presets.get(ScalingLaw, name)
    assert law.form in get_args(Form)
    assert law.source and law.title
    assert all(isinstance(value, int | float) for value in law.constants.values())
    assert relations(additive(law, **SETTINGS))
    assert all(len(limits) == 2 and limits[0] < limits[1] for limits in law.fitted.values())


def test_every_form_has_formulas_or_a_reduction() -> None:
    """The closed set of forms and the two tables that define them name the same forms."""
    assert set(get_args(Form)) == FORMULAS.keys() | REDUCTIONS.keys()


@pytest.mark.parametrize(("name", "relation", "inverse"), _two_way())
@tried(10)  # of each of some two hundred pairs
@given(data=st.data())
def test_the_law_of_its_inverse_is_what_went_in(
    name: str, relation: str, inverse: str, data: st.DataObject
) -> None:
    """Putting the result of an inverse back gives what was given, to 1e-9 relative."""
    law = LAWS[name]
    target = relation.partition(" | ")[0]
    letter = inverse.partition(" | ")[0]
    names = relation.partition(" | ")[2].split(", ")
    values = {each: data.draw(STRATEGY.get(each, COMPUTE)) for each in names}
    result = solve(law, relation, **values)
    others = {each: value for each, value in values.items() if each != letter}
    if target == "L" and result <= floor(law, **others) * (1 + 1e-9):
        return  # the law has flattened out: no double tells one input from another
    back = solve(law, inverse, **{target: result}, **others)
    again = solve(law, relation, **{**others, letter: back})
    assert again == pytest.approx(result, rel=1e-9)


@given(NAMES, PARAMETERS, TOKENS, COMPUTE, st.floats(1.01, 100))
def test_loss_falls_in_parameters_tokens_and_compute(
    name: str, n: float, d: float, c: float, more: float
) -> None:
    """More of anything never raises the loss; where floating point can tell, it lowers it."""
    law, known = LAWS[name], relations(LAWS[name])
    for relation, values, letter in (
        ("L | N, D", {"N": n, "D": d}, "N"), ("L | N, D", {"N": n, "D": d}, "D"),
        ("L | N", {"N": n}, "N"), ("L | D", {"D": d}, "D"), ("L | C", {"C": c}, "C"),
    ):  # fmt: skip
        if relation in known:
            before = solve(law, relation, **values)
            after = solve(law, relation, **{**values, letter: values[letter] * more})
            assert after <= before
            assert after < before or math.isclose(before, floor(law, **{
                k: v for k, v in values.items() if k != letter}), rel_tol=1e-9)  # fmt: skip


@given(NAMES, PARAMETERS, TOKENS)
def test_a_term_recomputes_from_its_own_text(name: str, n: float, d: float) -> None:
    """The formula that is shown, over the inputs shown, gives the value shown."""
    law = LAWS[name]
    for relation, values in (("L | N, D", {"N": n, "D": d}), ("N | C", {"C": n * d})):
        if relation in relations(law):
            shown = answer(law, relation, **values)
            assert shown.value == pytest.approx(evaluate(shown.formula, shown.inputs), rel=1e-12)
            assert shown.value == pytest.approx(solve(law, relation, **values), rel=1e-12)


@given(st.floats(1e5, 1e13))
def test_pearce_and_song_convert_both_ways(n: float) -> None:
    """Non-embedding parameters of the total of N are N (arXiv:2406.12907)."""
    assert non_embedding_parameters(total_parameters(n)) == pytest.approx(n, rel=1e-9)


def test_kaplan_card_of_two_billion() -> None:
    """Table 5 of Kaplan et al. by hand: (8.8e13/2e9)^0.076 and what follows from it."""
    law = presets.get(ScalingLaw, "kaplan")
    nats = solve(law, "L | N", N=2e9)
    assert round(nats, 4) == 2.2537
    assert f"{solve(law, 'D | L', L=nats):.2e}" == "1.04e+10"
    assert f"{solve(law, 'D_overfit | N', N=2e9):.2e}" == "3.82e+10"
    assert round(solve(law, "C_min | L", L=nats) / PF_DAY, 1) == 27.1
    figure = presets.get(ScalingLaw, "kaplan-figure1")
    assert round(solve(figure, "C_min | L", L=nats) / PF_DAY, 1) == 20.1
    assert round(solve(law, "C_min | N", N=2e9) / PF_DAY, 2) == 1.80


def test_the_joint_fit_of_kaplan_is_not_its_limit() -> None:
    """Tables 2 and 5 are separate fits: 2e10 tokens appear to beat unlimited ones at 1e9."""
    law = presets.get(ScalingLaw, "kaplan")
    assert round(loss(law, 1e9, 2e10), 4) == 2.3739
    assert round(solve(law, "L | N", N=1e9), 4) == 2.3756


def test_a_million_losses_take_less_than_two_seconds() -> None:
    """Vectorised over plain sequences, a million evaluations stay below 2 s."""
    law = presets.get(ScalingLaw, "chinchilla")
    n = [1e8 + 9e3 * i for i in range(1_000_000)]
    start = time.process_time()
    result = loss(law, n, 1e11)
    assert time.process_time() - start < 2
    assert result[12_345] == loss(law, n[12_345], 1e11)
    assert losses(law, "L | N, D", n[:3], 1e11) == result[:3]


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_what_is_not_a_positive_number_is_refused(value: float) -> None:
    """Zero, negative, NaN and infinite values are errors, alone or in a sequence."""
    law = presets.get(ScalingLaw, "chinchilla")
    with pytest.raises(LLMSizeError):
        solve(law, "L | N, D", N=value, D=1e10)
    with pytest.raises(LLMSizeError):
        loss(law, value, 1e10)
    if value != math.inf:
        with pytest.raises(LLMSizeError):
            loss(law, [1e9, value, 2e9], 1e10)


@pytest.mark.parametrize("name", ["chinchilla", "cerebras", "muennighoff"])
def test_a_loss_below_the_irreducible_one_is_refused(name: str) -> None:
    """A target at or below E is an error that names E."""
    law = presets.get(ScalingLaw, name)
    relation = "C | L"
    with pytest.raises(LLMSizeError, match="cannot reach") as refused:
        solve(law, relation, L=floor(law) * 0.999)
    assert f"{floor(law):.4g}" in refused.value.hint


def test_a_loss_that_these_tokens_cannot_reach_is_refused() -> None:
    """With D fixed the lowest loss is that of an infinite model, and the hint says so."""
    law = presets.get(ScalingLaw, "chinchilla")
    lowest = floor(law, D=1e9)
    with pytest.raises(LLMSizeError) as refused:
        solve(law, "N | L, D", L=lowest * 0.99, D=1e9)
    assert f"{lowest:.4g}" in refused.value.hint


def test_a_law_without_the_quantity_says_what_it_has() -> None:
    """A curve of compute has no parameters in it, and a law of experts asks for its setting."""
    with pytest.raises(LLMSizeError, match="does not give") as refused:
        solve(presets.get(ScalingLaw, "gpt3"), "L | N", N=1e9)
    assert "compute" in refused.value.hint
    with pytest.raises(LLMSizeError, match="needs the setting `experts`"):
        additive(presets.get(ScalingLaw, "ludziejewski"))


def test_extrapolation_is_told() -> None:
    """A value outside the fitted range is named with the end of that range."""
    law = presets.get(ScalingLaw, "kaplan")
    assert extrapolations(law, N=1e9) == []
    (warning,) = extrapolations(law, N=2e9)
    assert "1.5e+09" in warning
    assert answer(law, "L | N", N=2e9).note == "outside the fitted range"
