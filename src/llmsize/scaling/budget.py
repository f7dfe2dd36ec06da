"""One budget, whatever it is stated in, and the best way to spend it."""

from __future__ import annotations

from llmsize.errors import LLMSizeError
from llmsize.quick_dataclasses import dataclass, replace
from llmsize.scaling.allocation import (
    Allocation,
    allocate,
    allocate_for_loss,
    allocate_for_params,
    allocate_for_tokens,
    allocate_unique,
    at_most,
    reach_unique,
    reach_with_inference,
    same_loss,
    spend_with_inference,
    tokens_repeated,
)
from llmsize.scaling.laws import ScalingLaw, solve
from llmsize.units import format_count


@dataclass(frozen=True, slots=True)
class Budget:
    """What is fixed: exactly one of the first four, and what else the answer must respect."""

    compute: float | None = None
    """FLOP of training, or of training and inference if `inference_tokens` are given."""
    parameters: float | None = None
    tokens: float | None = None
    target_loss: float | None = None
    inference_tokens: float | None = None
    """Tokens that the model will serve."""
    unique_tokens: float | None = None
    """Tokens that there are; more are had by repeating them."""
    largest: float | None = None
    """Parameters that the model may have at most."""


def best(law: ScalingLaw, budget: Budget) -> Allocation:
    """The best model and tokens for a budget.

    Raises `LLMSizeError` for a budget that is stated twice or not at all, for conditions that do
    not go together, or where the law says nothing of them.
    """
    stated = (budget.compute, budget.parameters, budget.tokens, budget.target_loss)
    if sum(value is not None for value in stated) != 1:
        raise LLMSizeError(
            "an optimum needs exactly one thing to start from",
            hint="give `--compute`, `--gpu-hours`, `--params`, `--tokens` or `--target-loss`",
        )
    if budget.target_loss is not None:
        return _for_loss(law, budget, budget.target_loss)
    if budget.compute is not None:
        return _for_compute(law, budget, budget.compute)
    if budget.inference_tokens or budget.unique_tokens or budget.largest:
        raise LLMSizeError(
            "a model or its tokens already decide the rest",
            hint="state the budget as `--compute` or `--target-loss` to add conditions",
        )
    if budget.parameters is not None:
        return allocate_for_params(law, budget.parameters)
    assert budget.tokens is not None
    return allocate_for_tokens(law, budget.tokens)


def _for_loss(law: ScalingLaw, budget: Budget, target: float) -> Allocation:
    served = budget.inference_tokens
    if budget.unique_tokens:
        return _for_loss_repeated(law, budget, target, budget.unique_tokens)
    found = reach_with_inference(law, target, served) if served else allocate_for_loss(law, target)
    if budget.largest is None or found.parameters <= budget.largest:
        return found
    smaller = same_loss(law, replace(found, loss=target), [budget.largest])
    if not smaller:
        raise LLMSizeError(
            f"{format_count(budget.largest)} parameters never reach a loss of {target:g}",
            hint="allow a larger model or a higher loss",
        )
    return replace(smaller[0], inference_tokens=served or 0.0)


def _for_loss_repeated(law: ScalingLaw, budget: Budget, target: float, unique: float) -> Allocation:
    if budget.inference_tokens:
        raise LLMSizeError(
            "serving and repeating tokens are not solved for together", hint="give one of them"
        )
    found = reach_unique(law, target, unique)
    if budget.largest is None or found.parameters <= budget.largest:
        return found
    n = budget.largest
    d = tokens_repeated(law, target, n, unique)
    return Allocation(n, d, target, 6 * n * d, unique_tokens=unique)


def _for_compute(law: ScalingLaw, budget: Budget, c: float) -> Allocation:
    if sum(map(bool, (budget.inference_tokens, budget.unique_tokens))) == 2:
        raise LLMSizeError(
            "serving and repeating tokens are not solved for together", hint="give one of them"
        )
    if budget.unique_tokens:
        found = allocate_unique(law, c, budget.unique_tokens)
        if budget.largest is None or found.parameters <= budget.largest:
            return found
        n = budget.largest
        loss = solve(law, "L | N, D, U", N=n, D=c / (6 * n), U=budget.unique_tokens)
        return Allocation(n, c / (6 * n), loss, c, unique_tokens=budget.unique_tokens)
    if budget.inference_tokens:
        found = spend_with_inference(law, c, budget.inference_tokens)
        if budget.largest is None or found.parameters <= budget.largest:
            return found
        n, served = budget.largest, budget.inference_tokens
        d = c / (6 * n) - served / 3
        return Allocation(n, d, solve(law, "L | N, D", N=n, D=d), 6 * n * d, None, served)
    return at_most(law, c, budget.largest) if budget.largest else allocate(law, c)
