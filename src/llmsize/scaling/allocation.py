"""How to split a budget between parameters and tokens.

Compute is 6ND, and at inference 2N for each token served. Closed forms where a law has them; a
bracketed solver with a stated tolerance where not; never a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import overload

from llmsize.errors import LLMSizeError
from llmsize.quick_dataclasses import dataclass
from llmsize.scaling.laws import ScalingLaw, additive, floor, function, relations, solve
from llmsize.scaling.solve import minimum, root
from llmsize.units import format_count

TINY, HUGE = 1.0, 1e30
"""Bracket of parameter counts and of tokens for the solvers."""

MOST_WASTE = 1e9
"""Times the compute that a loss takes with fresh tokens: beyond it, repetition has come to its end.
"""


@dataclass(frozen=True, slots=True)
class Allocation:
    """One way to spend a budget."""

    parameters: float
    tokens: float
    loss: float | None
    """In the law's unit; absent for a law that gives an optimum but no loss."""
    compute: float
    """Training FLOP: 6ND, or what the law counts."""
    unique_tokens: float | None = None
    """Tokens that differ, if they are fewer than `tokens`."""
    inference_tokens: float = 0.0

    @property
    def tokens_per_parameter(self) -> float:
        """Training tokens for each parameter."""
        return self.tokens / self.parameters

    @property
    def total_compute(self) -> float:
        """Training and inference FLOP: `compute` and 2N for each token served."""
        return self.compute + 2 * self.parameters * self.inference_tokens


@overload
def allocate(law: ScalingLaw, c: float) -> Allocation: ...
@overload
def allocate(law: ScalingLaw, c: Sequence[float]) -> list[Allocation]: ...
def allocate(law: ScalingLaw, c: Sequence[float] | float) -> list[Allocation] | Allocation:
    """The best model and its tokens for `c` training FLOP; a sequence gives a list.

    Kaplan's tokens are those at the critical batch, where half the compute is C_min.
    Raises `LLMSizeError` for a law without an optimum or a compute that is not positive.
    """
    if isinstance(c, int | float):
        return _optimum(law, N=solve(law, "N | C", C=c), D=solve(law, "D | C", C=c), C=c)
    return [allocate(law, each) for each in c]


def allocate_for_params(law: ScalingLaw, n: float) -> Allocation:
    """The tokens and compute at which `n` parameters are the best choice."""
    return _optimum(law, N=n, D=solve(law, "D | N", N=n), C=solve(law, "C | N", N=n))


def allocate_for_tokens(law: ScalingLaw, d: float) -> Allocation:
    """The parameters and compute for which `d` tokens are the best choice."""
    return _optimum(law, N=solve(law, "N | D", D=d), D=d, C=solve(law, "C | D", D=d))


def allocate_for_loss(law: ScalingLaw, target: float) -> Allocation:
    """The cheapest way to reach a loss. Raises `LLMSizeError` at or below the irreducible loss."""
    return allocate(law, solve(law, "C | L", L=target))


def _optimum(law: ScalingLaw, *, N: float, D: float, C: float) -> Allocation:
    known = relations(law)
    if "L | C" in known:
        return Allocation(N, D, solve(law, "L | C", C=C), C)
    return Allocation(N, D, solve(law, "L | N, D", N=N, D=D) if "L | N, D" in known else None, C)


def allocate_unique(law: ScalingLaw, c: float, unique: float) -> Allocation:
    """The best split of `c` FLOP when only `unique` tokens differ and the rest repeat.

    Muennighoff et al. 2023; a bracketed minimum, to 1e-8 relative in the parameters' logarithm.
    Raises `LLMSizeError` for a law that says nothing of repetition.
    """
    at = function(law, "L | N, D, U")
    _positive(c, "compute")
    _positive(unique, "unique tokens")
    best = solve(law, "N | C", C=c)

    def loss_of(n: float) -> float:
        return at(n, c / (6 * n), unique)

    n = minimum(loss_of, best * 1e-4, best * 1e4)
    return Allocation(n, c / (6 * n), loss_of(n), c, unique_tokens=unique)


def reach_unique(law: ScalingLaw, target: float, unique: float) -> Allocation:
    """The least compute that reaches a loss when only `unique` tokens differ and the rest repeat.

    A bracketed root in compute, to 1e-13 relative, around `allocate_unique`. Raises `LLMSizeError`
    for a law that says nothing of repetition, or below what repetition can reach.
    """
    _positive(unique, "unique tokens")
    check_reachable(law, target, U=unique)
    least = solve(law, "C | L", L=target)  # repeated tokens are never worth more than new ones

    def surplus(c: float) -> float:
        return (allocate_unique(law, c, unique).loss or 0.0) - target

    return allocate_unique(law, root(surplus, least * (1 - 1e-6), least * MOST_WASTE), unique)


def tokens_repeated(law: ScalingLaw, target: float, n: float, unique: float) -> float:
    """Tokens, repetitions included, that bring `n` parameters to a loss; a bracketed root."""
    check_reachable(law, target, N=n, U=unique)
    at = function(law, "L | N, D, U")
    return root(lambda d: at(n, d, unique) - target, TINY, HUGE)


def parameters_repeated(law: ScalingLaw, target: float, d: float, unique: float) -> float:
    """Parameters that reach a loss on `d` tokens of which `unique` differ; a bracketed root."""
    check_reachable(law, target, D=d, U=unique)
    at = function(law, "L | N, D, U")
    return root(lambda n: at(n, d, unique) - target, TINY, HUGE)


def check_reachable(law: ScalingLaw, target: float, **given: float) -> None:
    """Raise `LLMSizeError` if repetition cannot bring the loss down to `target`.

    `given` has the unique tokens U, and N or D where they are fixed.
    """
    at = function(law, "L | N, D, U")
    lowest = at(given.get("N", math.inf), given.get("D", math.inf), given["U"])
    if not lowest < target < math.inf:
        raise LLMSizeError(
            f"`{law.name}` cannot reach a loss of {target:g} {law.loss_unit} by repeating "
            f"{format_count(given['U'])} tokens",
            hint=f"it tends to {lowest:.4g} and never below; ask for a higher loss or more text",
        )


def reach_with_inference(law: ScalingLaw, target: float, inference_tokens: float) -> Allocation:
    """The least total compute that reaches a loss and then serves that many tokens.

    Sardana et al. 2024: along the curve of equal loss, α A N^-α / (β B D^-β) = 1 + D_inf / 3D. A
    bracketed root, to 1e-13 relative.
    """
    law = _additive_only(law)
    smallest = solve(law, "N | L", L=target)
    tokens = function(law, "D | L, N")

    def tokens_of(n: float) -> float:
        return tokens(target, n)

    n = root(_balance(law, tokens_of, inference_tokens), smallest * (1 + 1e-9), HUGE)
    d = tokens_of(n)
    return Allocation(n, d, target, 6 * n * d, inference_tokens=inference_tokens)


def spend_with_inference(law: ScalingLaw, total: float, inference_tokens: float) -> Allocation:
    """The lowest loss for `total` FLOP of training and of serving that many tokens together."""
    law = _additive_only(law)
    _positive(total, "compute")

    def tokens_of(n: float) -> float:
        return total / (6 * n) - inference_tokens / 3

    largest = min(HUGE, total / (2 * inference_tokens)) if inference_tokens else HUGE
    n = root(_balance(law, tokens_of, inference_tokens), TINY, largest * (1 - 1e-12))
    d = tokens_of(n)
    loss = solve(law, "L | N, D", N=n, D=d)
    return Allocation(n, d, loss, 6 * n * d, inference_tokens=inference_tokens)


def _balance(
    law: ScalingLaw, tokens_of: Callable[[float], float], inference_tokens: float
) -> Callable[[float], float]:
    """Positive while another parameter is worth more than the tokens that it costs."""
    k = law.constants
    parameters_worth = math.log(k["alpha"] * k["A"] / (k["beta"] * k["B"]))

    def balance(n: float) -> float:
        d = tokens_of(n)
        if d <= 0:
            return -math.inf
        worth = parameters_worth - k["alpha"] * math.log(n) + k["beta"] * math.log(d)
        return worth - math.log1p(inference_tokens / (3 * d))

    return balance


def _additive_only(law: ScalingLaw) -> ScalingLaw:
    law = additive(law)
    if law.form != "additive":
        raise LLMSizeError(
            f"`{law.name}` does not separate parameters from tokens",
            hint="use a law of the form E + A/N^alpha + B/D^beta, such as `--law chinchilla`",
        )
    return law


def at_most(law: ScalingLaw, c: float, largest: float) -> Allocation:
    """The best split of `c` FLOP with at most `largest` parameters: a smaller model, longer."""
    best = allocate(law, c)
    _positive(largest, "largest model")
    if best.parameters <= largest:
        return best
    return spend(law, c, largest)


def spend(law: ScalingLaw, c: float, n: float) -> Allocation:
    """`c` FLOP on `n` parameters, whether or not that is the best size."""
    d = c / (6 * n)
    known = "L | N, D" in relations(law)
    return Allocation(n, d, solve(law, "L | N, D", N=n, D=d) if known else None, c)


def same_loss(law: ScalingLaw, best: Allocation, sizes: Sequence[float]) -> list[Allocation]:
    """The trade at equal loss: each size of model with the tokens that bring it to `best.loss`.

    `sizes` are parameters; one too small ever to reach the loss is left out.
    """
    if best.loss is None:
        return []
    reached = []
    for n in sizes:
        if floor(law, N=n) < best.loss:
            d = solve(law, "D | L, N", L=best.loss, N=n)
            reached.append(Allocation(n, d, best.loss, 6 * n * d))
    return reached


def same_compute(law: ScalingLaw, c: float, sizes: Sequence[float]) -> list[Allocation]:
    """The valley of equal compute: each size of model with the tokens that `c` FLOP buy it."""
    return [spend(law, c, n) for n in sizes]


def _positive(value: float, what: str) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise LLMSizeError(
            f"{what} must be positive and finite, not {value}", hint="write a number above zero"
        )
