"""What a law says of one training run: its loss, what goes with it, and what limits it."""

from __future__ import annotations

import math

from llmsize.errors import LLMSizeError
from llmsize.quick_dataclasses import dataclass, replace
from llmsize.scaling.allocation import parameters_repeated, reach_unique, tokens_repeated
from llmsize.scaling.laws import (
    ScalingLaw,
    answer,
    extrapolations,
    floor,
    function,
    relations,
    solve,
)
from llmsize.scaling.solve import ROOT_TOLERANCE, root
from llmsize.term import Term, term


@dataclass(frozen=True, slots=True)
class Run:
    """What is known of a training run; the rest is unlimited, or follows from C = 6ND."""

    parameters: float | None = None
    """As the law counts them."""
    tokens: float | None = None
    compute: float | None = None
    """FLOP."""
    unique_tokens: float | None = None
    """Tokens that differ, where the rest are repetitions of them."""
    steps: float | None = None
    """Optimizer steps, with `batch`."""
    batch: float | None = None
    """Tokens per step."""


def complete(run: Run) -> Run:
    """The run with what follows from the rest: D = steps × batch, and C, N or D by C = 6ND.

    Raises `LLMSizeError` for a run with more known than agrees, or with nothing known.
    """
    run = _tokens_of_steps(run)
    n, d, c = run.parameters, run.tokens, run.compute
    if n and d and c and not math.isclose(6 * n * d, c, rel_tol=0.01):
        raise LLMSizeError(
            f"{n:g} parameters on {d:g} tokens take {6 * n * d:.3g} FLOP, not {c:.3g}",
            hint="leave out one of the three; compute is 6 × parameters × tokens",
        )
    if not (n or d or c):
        raise LLMSizeError(
            "nothing to predict a loss from", hint="give `--params`, `--tokens` or `--compute`"
        )
    if n and d:
        return replace(run, compute=c or 6 * n * d)
    if n and c:
        return replace(run, tokens=c / (6 * n))
    if d and c:
        return replace(run, parameters=c / (6 * d))
    return run


def _tokens_of_steps(run: Run) -> Run:
    if run.steps is None and run.batch is None:
        return run
    if run.steps is None or run.batch is None:
        raise LLMSizeError(
            "steps and their batch go together",
            hint="give both: `--steps 250k --batch-tokens 512K`",
        )
    tokens = run.steps * run.batch
    if run.tokens and not math.isclose(run.tokens, tokens, rel_tol=0.01):
        raise LLMSizeError(
            f"{run.steps:g} steps of {run.batch:g} tokens are {tokens:.3g} tokens, not "
            f"{run.tokens:.3g}",
            hint="leave out one of the three; tokens are steps × batch",
        )
    return run if run.tokens or run.compute else replace(run, tokens=tokens)


def loss_of(law: ScalingLaw, run: Run) -> Term:
    """The loss of a run, what is not known of it being unlimited or, for compute alone, optimal.

    Raises `LLMSizeError` where the law says nothing of such a run.
    """
    run = complete(run)
    if run.steps and run.batch and "L | N, S_min" in relations(law):
        return _loss_after_steps(law, run)
    if run.unique_tokens and run.tokens and run.parameters:
        if run.unique_tokens < run.tokens:
            check_repeats(law)
        if "L | N, D, U" in relations(law):
            return answer(law, "L | N, D, U", N=run.parameters, D=run.tokens, U=run.unique_tokens)
    if run.parameters and run.tokens:
        if "L | N, D" not in relations(law) and "L | C" in relations(law):
            return answer(law, "L | C", C=6 * run.parameters * run.tokens)
        return answer(law, "L | N, D", N=run.parameters, D=run.tokens)
    if run.parameters:
        return answer(law, "L | N", N=run.parameters)
    if run.tokens:
        return answer(law, "L | D", D=run.tokens)
    assert run.compute is not None
    return answer(law, "L | C", C=run.compute)


def _loss_after_steps(law: ScalingLaw, run: Run) -> Term:
    """Kaplan's L(N, S_min), where S_min depends on the critical batch and that on the loss."""
    n, steps, batch = run.parameters, run.steps, run.batch
    assert steps and batch
    if n is None:
        raise LLMSizeError("`--steps` need a model", hint="give `--params` as well")
    after, critical = function(law, "L | N, S_min"), function(law, "B_crit | L")
    fewest = function(law, "S_min | S, B, B_crit")

    def surplus(loss: float) -> float:
        return after(n, fewest(steps, batch, critical(loss))) - loss

    loss = root(surplus, after(n, math.inf), after(n, steps * 1e-9) + 1e3)
    at = fewest(steps, batch, critical(loss))
    found = answer(law, "L | N, S_min", N=n, S_min=at)
    said = f"{steps:,.0f} steps at this batch are worth {at:,.0f} at a large one"
    return replace(found, note="; ".join(filter(None, (said, found.note))))


def measures(law: ScalingLaw, loss: Term) -> list[Term]:
    """The loss as perplexity and as bits; nothing for a law in another unit than nats per token."""
    if law.loss_unit != "nats/token":
        return []
    return [
        term("perplexity", "exp(loss)", unit="", source="definition", grade=loss.grade,
             note="", loss=loss.value),
        term("bits", "loss / log(2)", unit="bits/token", source="definition", grade=loss.grade,
             note="", loss=loss.value),
    ]  # fmt: skip


def alone(law: ScalingLaw, loss: float) -> list[Term]:
    """What reaches a loss if nothing else limits: tokens, parameters, and compute well spent."""
    names = {
        "N | L": "parameters that alone reach it",
        "D | L": "tokens that alone reach it",
        "C_min | L": "compute that reaches it, C_min",
    }
    if "C_min | L" not in relations(law):
        names["C | L"] = "compute that reaches it"
    return [
        answer(law, each, name, L=loss) for each, name in names.items() if each in relations(law)
    ]


def frontier(law: ScalingLaw, n: float) -> list[Term]:
    """The budget for which `n` parameters are the best choice, and the loss reached there.

    For Kaplan it is C_min, half of what a run at the critical batch takes.
    """
    known = relations(law)
    if "C_min | N" in known:
        compute = answer(law, "C_min | N", "compute at which that size is optimal, C_min", N=n)
        reached = answer(law, "L | C_min", "loss reached there", C_min=compute.value)
        return [compute, replace(reached, note="tokens are what limits it there")]
    if "C | N" not in known:
        return []
    found = [answer(law, "C | N", "compute at which that size is optimal", N=n)]
    if "D | N" in known:
        found.append(answer(law, "D | N", "tokens at which that size is optimal", N=n))
    if "L | C" in known:
        found.append(answer(law, "L | C", "loss reached there", C=found[0].value))
    return found


def overfit_limit(law: ScalingLaw, n: float) -> list[Term]:
    """Tokens below which `n` parameters overfit, for a law that says so."""
    if "D_overfit | N" not in relations(law):
        return []
    return [answer(law, "D_overfit | N", "tokens that prevent overfitting", N=n)]


def limited_by(law: ScalingLaw, run: Run) -> str:
    """Which of parameters and data costs the run more loss; empty if the law cannot tell."""
    run = complete(run)
    if not (run.parameters and run.tokens and "L | N, D" in relations(law)):
        return ""
    loss = solve(law, "L | N, D", N=run.parameters, D=run.tokens)
    by_data = loss - floor(law, N=run.parameters)
    by_parameters = loss - floor(law, D=run.tokens)
    if math.isclose(by_data, by_parameters, rel_tol=0.1):
        return "parameters and data limit it alike"
    what, costs = ("data", by_data) if by_data > by_parameters else ("parameters", by_parameters)
    return f"{what} limit it: without that limit the loss would be {costs:.3g} lower"


def reach(law: ScalingLaw, target: float, run: Run) -> list[Term]:
    """What reaches a loss: with the parameters or tokens of `run` fixed, or with either alone.

    Raises `LLMSizeError` for a loss that the law never reaches.
    """
    if run.unique_tokens:
        return _reach_repeated(law, target, run, run.unique_tokens)
    if run.parameters:
        return [answer(law, "D | L, N", "tokens", L=target, N=run.parameters)]
    if run.tokens:
        return [answer(law, "N | L, D", "parameters", L=target, D=run.tokens)]
    return alone(law, target)


def _reach_repeated(law: ScalingLaw, target: float, run: Run, unique: float) -> list[Term]:
    """The same where only `unique` tokens differ; the roots have no closed form."""
    check_repeats(law)
    if run.parameters:
        tokens = tokens_repeated(law, target, run.parameters, unique)
        return [_solved(law, "tokens", tokens, "tokens"), _epochs(law, tokens, unique)]
    if run.tokens:
        needed = parameters_repeated(law, target, run.tokens, unique)
        return [_solved(law, "parameters", needed, "parameters")]
    found = reach_unique(law, target, unique)
    return [
        _solved(law, "compute that reaches it", found.compute, "FLOP"),
        _solved(law, "parameters", found.parameters, "parameters"),
        _solved(law, "tokens", found.tokens, "tokens"),
        _epochs(law, found.tokens, unique),
    ]


def _epochs(law: ScalingLaw, tokens: float, unique: float) -> Term:
    return _solved(law, "epochs", max(1.0, tokens / unique), "epochs")


def _solved(law: ScalingLaw, name: str, value: float, unit: str) -> Term:
    return Term(name, value, unit, source=law.source, grade="fitted", note=SOLVED)


SOLVED = f"a bracketed root, to {ROOT_TOLERANCE:.0e}"


def check_repeats(law: ScalingLaw) -> None:
    """Raise `LLMSizeError` for a law that says nothing of repeated tokens."""
    if "L | N, D, U" not in relations(law):
        raise LLMSizeError(
            f"`{law.name}` does not know what repeated tokens are worth",
            hint="ask a law that does: `--law muennighoff`",
        )


def warnings(law: ScalingLaw, run: Run) -> list[str]:
    """Where the run lies outside what the law was fitted to."""
    letters = {"N": run.parameters, "D": run.tokens, "C": run.compute}
    return extrapolations(law, **{name: value for name, value in letters.items() if value})
