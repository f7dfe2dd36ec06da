"""Moving a law to someone's own runs, with the error that a few runs leave.

The exponents stay the law's. One to four runs shift its irreducible loss, which is where corpora
and tokenizers differ most; five or more refit E, A and B by linear least squares.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from llmsize.errors import LLMSizeError
from llmsize.quick_dataclasses import dataclass, replace
from llmsize.scaling.laws import ScalingLaw, additive, solve

ENOUGH_TO_REFIT = 5
"""Three constants and two degrees of freedom."""

DRAWS = 1000
SEED = 0
MOST_RUNS = 10_000


@dataclass(frozen=True, slots=True)
class Observation:
    """One run: parameters as the law counts them, tokens, and the loss it ended with."""

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """A law moved to some runs, and how it fits them."""

    law: ScalingLaw
    method: str
    """`shift` or `refit`."""
    runs: tuple[Observation, ...]
    residuals: tuple[float, ...]
    """Observed minus calibrated loss, by run."""
    draws: tuple[ScalingLaw, ...]
    """The law calibrated to resampled runs; empty for a single run, which leaves no spread."""


def calibrate(law: ScalingLaw, runs: Sequence[Observation]) -> Calibration:
    """`law` moved to `runs`, with bootstrap draws from a fixed seed.

    Raises `LLMSizeError` without runs, for a run that is not positive and finite, for a law that is
    not E + A/N^alpha + B/D^beta, or for runs below what the law can be shifted to.
    """
    law = additive(law)
    if law.form != "additive":
        raise LLMSizeError(
            f"`{law.name}` has no irreducible loss to move",
            hint="calibrate a law of the form E + A/N^alpha + B/D^beta, such as `--law chinchilla`",
        )
    _check(runs)
    method = "refit" if len(runs) >= ENOUGH_TO_REFIT and _refitted(law, runs) else "shift"
    moved = _moved(law, runs, method)
    rng = random.Random(SEED)  # noqa: S311 - resampling, not secrets
    draws = [] if len(runs) == 1 else [
        _moved(law, rng.choices(runs, k=len(runs)), method) for _ in range(DRAWS)
    ]  # fmt: skip
    told = replace(moved, source=f"{law.source}; {method} to {len(runs)} runs of your own")
    return Calibration(told, method, tuple(runs), _residuals(moved, runs), tuple(draws))


def interval(
    calibration: Calibration, n: float, d: float, *, within: float = 0.95
) -> tuple[float, float] | None:
    """The middle share `within` of the draws' losses at (n, d); nothing for a single run."""
    if not calibration.draws:
        return None
    found = sorted(solve(law, "L | N, D", N=n, D=d) for law in calibration.draws)
    outside = (1 - within) / 2 * (len(found) - 1)
    return found[round(outside)], found[round(len(found) - 1 - outside)]


def _check(runs: Sequence[Observation]) -> None:
    if not 1 <= len(runs) <= MOST_RUNS:
        raise LLMSizeError(
            f"{len(runs)} runs to calibrate with", hint=f"give 1 to {MOST_RUNS:,} runs as N,D,loss"
        )
    for run in runs:
        if not all(v > 0 and math.isfinite(v) for v in (run.parameters, run.tokens, run.loss)):
            raise LLMSizeError(
                f"a run of {run.parameters:g} parameters, {run.tokens:g} tokens and loss "
                f"{run.loss:g} is impossible",
                hint="all three must be positive and finite",
            )


def _moved(law: ScalingLaw, runs: Sequence[Observation], method: str) -> ScalingLaw:
    refitted = _refitted(law, runs) if method == "refit" else None
    return refitted or _shifted(law, runs)


def _shifted(law: ScalingLaw, runs: Sequence[Observation]) -> ScalingLaw:
    shift = sum(_residuals(law, runs)) / len(runs)
    floor = law.constants["E"] + shift
    if floor <= 0:
        raise LLMSizeError(
            f"these losses are {-shift:.3g} below `{law.name}`, which leaves nothing irreducible",
            hint="check the unit: the law is in nats per token",
        )
    return replace(law, constants={**law.constants, "E": floor})


def _residuals(law: ScalingLaw, runs: Sequence[Observation]) -> tuple[float, ...]:
    return tuple(run.loss - solve(law, "L | N, D", N=run.parameters, D=run.tokens) for run in runs)


def _refitted(law: ScalingLaw, runs: Sequence[Observation]) -> ScalingLaw | None:
    """E, A and B by least squares; nothing if the runs do not determine them or one is negative."""
    k = law.constants
    rows = [
        (1.0, run.parameters ** -k["alpha"] * k["A"], run.tokens ** -k["beta"] * k["B"], run.loss)
        for run in runs
    ]
    solution = _least_squares(rows)
    if solution is None or min(solution) <= 0:
        return None
    e, a, b = solution
    return replace(law, constants={**k, "E": e, "A": a * k["A"], "B": b * k["B"]})


def _least_squares(rows: Sequence[tuple[float, ...]]) -> list[float] | None:
    """The solution of the normal equations of rows (x…, y), or nothing if they are singular."""
    size = len(rows[0]) - 1
    matrix = [[math.fsum(r[i] * r[j] for r in rows) for j in range(size + 1)] for i in range(size)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda row: abs(matrix[row][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        if abs(matrix[i][i]) < 1e-9 * len(rows):
            return None
        for row in range(size):
            if row != i:
                factor = matrix[row][i] / matrix[i][i]
                matrix[row] = [x - factor * y for x, y in zip(matrix[row], matrix[i], strict=True)]
    return [matrix[i][size] / matrix[i][i] for i in range(size)]
