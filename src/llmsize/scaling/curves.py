"""Curves of scaling laws: loss by parameters, data or compute, and its contours."""

from __future__ import annotations

from collections.abc import Sequence

from llmsize.chart import Axis, Chart, Series
from llmsize.errors import LLMSizeError
from llmsize.scaling.allocation import Allocation, allocate, same_compute, same_loss
from llmsize.scaling.laws import ScalingLaw, losses, relations

PARAMETERS = Axis("parameters", "parameters")
TOKENS = Axis("tokens", "tokens")
COMPUTE = Axis("compute", "FLOP")
AXES = {"N": PARAMETERS, "D": TOKENS, "C": COMPUTE}
WORDS = {"N": "parameters", "D": "data", "C": "compute"}


def loss_by(laws: Sequence[ScalingLaw], letter: str, xs: Sequence[float]) -> Chart:
    """The loss of each law by N, D or C alone, the rest unlimited or, for C, optimal."""
    series = [
        Series(law.name, tuple(zip(xs, losses(law, f"L | {letter}", xs), strict=True)))
        for law in laws
    ]
    low_high = laws[0].fitted.get(letter)
    fitted = (low_high[0], low_high[1]) if low_high else None
    title = f"Loss by {WORDS[letter]}"
    return Chart(title, AXES[letter], Axis("loss", _unit(laws)), tuple(series), (), fitted)


def isoflop(law: ScalingLaw, budgets: Sequence[float], sizes: Sequence[float]) -> Chart:
    """The valley of each budget: the loss of every size of model that it can train."""
    _check_loss(law)
    series = [
        Series(f"{c:.2g} FLOP", _points(same_compute(law, c, sizes), "loss")) for c in budgets
    ]
    y = Axis("loss", law.loss_unit)
    return Chart(f"Loss at equal compute, {law.name}", PARAMETERS, y, tuple(series))


def isoloss(law: ScalingLaw, budgets: Sequence[float], sizes: Sequence[float]) -> Chart:
    """The trade at the loss of each budget's optimum: tokens that each size of model needs."""
    _check_loss(law)
    best = [allocate(law, c) for c in budgets]
    series = [
        Series(f"loss {found.loss:.3f}", _points(same_loss(law, found, sizes), "tokens"))
        for found in best
    ]
    return Chart(f"Equal loss, {law.name}", PARAMETERS, TOKENS, tuple(series))


def _check_loss(law: ScalingLaw) -> None:
    if "L | N, D" not in relations(law):
        raise LLMSizeError(
            f"`{law.name}` has no loss of parameters and tokens", hint="try `--law chinchilla`"
        )


def _points(found: Sequence[Allocation], what: str) -> tuple[tuple[float, float], ...]:
    return tuple((each.parameters, getattr(each, what)) for each in found)


def _unit(laws: Sequence[ScalingLaw]) -> str:
    """The unit that the laws share. Raises `LLMSizeError` for laws of different units."""
    (first, *others) = dict.fromkeys(law.loss_unit for law in laws)
    if others:
        raise LLMSizeError(
            f"losses in {first} and in {others[0]} do not share an axis",
            hint="draw laws of one unit together",
        )
    return first
