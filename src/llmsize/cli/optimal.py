"""`llmsize optimal`: how to split a budget between parameters and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Annotated

from llmsize import presets, units
from llmsize.answer import Absent, Cell, Estimate, Row, Table
from llmsize.cli import laws, machines, options
from llmsize.cli.declare import Option, counting
from llmsize.errors import LLMSizeError
from llmsize.hardware import Accelerator, peak, slug
from llmsize.quick_dataclasses import replace
from llmsize.scaling.allocation import Allocation, allocate, same_loss, spend
from llmsize.scaling.budget import Budget, best
from llmsize.scaling.laws import ScalingLaw, extrapolations
from llmsize.scaling.tuning import hints
from llmsize.term import Grade, Term, fact
from llmsize.throughput import affordable_flop

EXAMPLES = (
    "llmsize optimal --compute 1e22",
    "llmsize optimal --gpu-hours 5760 --gpu h100-sxm-80gb",
    "llmsize optimal --target-loss 2.1 --inference-tokens 2T",
    "llmsize optimal --compute 3640PF-days --law all",
)

DEFAULT = "chinchilla"
REPEATING = "muennighoff"
TWENTY = "twenty"
TRADES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
"""Sizes of model, as shares of the best one, at which the iso-loss trade is shown."""

GpuHours = Annotated[
    float | None,
    Option("--gpu-hours", help="Hours × GPUs, with --gpu.", metavar="H", min=0, show_default=False),
]
InferenceTokens = Annotated[
    float | None,
    counting(
        "--inference-tokens", what="count of inference tokens", kind=float, metavar="D",
        help="Tokens to serve afterwards.", show_default=False,
    ),
]  # fmt: skip
MaxParams = Annotated[
    int | None,
    counting(
        "--max-params", what="parameter count", metavar="N",
        help="The largest model that is allowed.", show_default=False,
    ),
]  # fmt: skip


def optimal(
    *,
    compute: laws.Compute = None,
    gpu_hours: GpuHours = None,
    gpu: machines.Gpu = None,
    mfu: machines.Mfu = None,
    params: options.Parameters = None,
    tokens: laws.Tokens = None,
    target_loss: laws.TargetLoss = None,
    inference_tokens: InferenceTokens = None,
    unique_tokens: laws.UniqueTokens = None,
    max_params: MaxParams = None,
    asked: laws.Asked,
) -> Estimate:
    """The best parameters and tokens for a budget, or the budget for which a size is best."""
    assumptions: tuple[str, ...] = ()
    if gpu_hours is not None:
        if compute is not None:
            raise LLMSizeError(
                "`--gpu-hours` and `--compute` both give the budget", hint="give one"
            )
        found = _affordable(gpu_hours, gpu, mfu)
        compute, assumptions = float(found.value), (found.note,)
    elif gpu is not None or mfu is not None:
        raise LLMSizeError(
            "`--gpu` and `--mfu` say what `--gpu-hours` are worth",
            hint="add `--gpu-hours`, or leave them out",
        )
    budget = Budget(
        compute, params, tokens, target_loss, inference_tokens, unique_tokens, max_params
    )
    if asked.compared:
        return _all(laws.every(**asked.settings), budget, assumptions)
    chosen = laws.law(asked, DEFAULT if unique_tokens is None else REPEATING)
    return _one(chosen, budget, assumptions)


def _affordable(gpu_hours: float, gpu: str | None, mfu: float | None) -> Term:
    """FLOP that so many hours of an accelerator do in 16 bit, and by which utilization."""
    if gpu is None:
        raise LLMSizeError("`--gpu-hours` need an accelerator", hint="add `--gpu h100-sxm-80gb`")
    accelerator = presets.get(Accelerator, slug(gpu))
    format = machines.sixteen_bit(accelerator)
    share = machines.efficiency(accelerator, format, mfu)
    flop = affordable_flop(
        devices=1, seconds=gpu_hours * 3600, peak=peak(accelerator, format), efficiency=share
    )
    said = f"{units.format_share(share.value)} of the {format} peak of {accelerator.title}"
    return replace(flop, note=f"{said} ({share.note or 'given'})")


def _question(law: str, budget: Budget) -> dict[str, str | float | None]:
    return {"law": law, **asdict(budget)}


def _one(law: ScalingLaw, budget: Budget, assumptions: tuple[str, ...]) -> Estimate:
    found = best(law, budget)
    if min(found.parameters, found.tokens) < 1:
        raise LLMSizeError(
            f"{found.compute:g} FLOP are less than a parameter and a token take",
            hint="runs that laws were fitted to took from about 1e17 FLOP",
        )
    tables = [_allocation(law, found), _trade(law, found), _hints(found)]
    outside = extrapolations(law, N=found.parameters, D=found.tokens, C=found.compute)
    reached = f", loss {found.loss:.4f} {law.loss_unit}" if found.loss else ""
    return Estimate(
        "optimal",
        _question(law.name, budget),
        f"{units.format_count(found.parameters)} parameters on "
        f"{units.format_count(found.tokens)} tokens{reached} by {law.title}",
        tuple(table for table in tables if table.rows),
        assumptions=(*assumptions, *_covered(law, budget)),
        notes=(*(f"Extrapolated: {each}." for each in outside), *_remarks(law)),
    )


def _covered(law: ScalingLaw, budget: Budget) -> Iterator[str]:
    """What is counted: which parameters, and which work."""
    yield f"parameters are {law.counts}; compute is 6ND"
    if budget.inference_tokens is not None and budget.compute is not None:
        yield "the budget covers training and serving, at 2N FLOP for each token served"


def _remarks(law: ScalingLaw) -> tuple[str, ...]:
    if not law.name.startswith("kaplan"):
        return ()
    return ("At the critical batch: half of the compute is C_min, and the tokens are those of "
            "Table 6, 1.8 times C_min / 6N.",)  # fmt: skip


def _cells(law: ScalingLaw, found: Allocation) -> dict[str, Cell]:
    def made(name: str, value: float, unit: str) -> Term:
        grade: Grade = "assumed" if law.experimental else "fitted"
        return fact(name, value, unit=unit, source=law.source, grade=grade)

    cells: dict[str, Cell] = {
        "parameters": made("parameters", found.parameters, "parameters"),
        "tokens": made("tokens", found.tokens, "tokens"),
        "per parameter": made("tokens per parameter", found.tokens_per_parameter, ""),
        "compute": made("training compute", found.compute, "FLOP"),
        "loss": made("loss", found.loss, law.loss_unit)
        if found.loss
        else Absent("the law gives an optimum but no loss"),
    }
    if found.inference_tokens:
        cells["with inference"] = made("total compute", found.total_compute, "FLOP")
    if found.unique_tokens:
        cells["epochs"] = made("epochs", max(1.0, found.tokens / found.unique_tokens), "")
    return cells


def _columns(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row.cells))


def _allocation(law: ScalingLaw, found: Allocation) -> Table:
    """The answer, and 20 tokens per parameter for the same training compute beside it."""
    rows = [Row(law.name, _cells(law, found))]
    if law.name != TWENTY and not found.unique_tokens:
        size = allocate(presets.get(ScalingLaw, TWENTY), found.compute).parameters
        other = replace(spend(law, found.compute, size), inference_tokens=found.inference_tokens)
        cells = _cells(law, other)
        if law.form != "additive":
            del cells["loss"]
        rows.append(Row("20 tokens per parameter", cells))
    return Table("", _columns(rows), tuple(rows), heading="law")


def _trade(law: ScalingLaw, found: Allocation) -> Table:
    """What the same loss costs with a smaller model trained longer, or a larger one shorter."""
    if law.form != "additive":  # Kaplan's fits are separate, and repetition changes the trade
        return Table("", (), ())
    rows = [
        Row(f"{each.parameters / found.parameters:.2f} ×", {
            **{name: cell for name, cell in _cells(law, each).items() if name != "loss"},
            "compute ratio": fact("compute ratio", each.compute / found.compute, unit="×",
                                  source="compute over that of the answer", grade="fitted"),
        })
        for each in same_loss(law, found, [found.parameters * share for share in TRADES])
    ]  # fmt: skip
    return Table("the same loss with another size", _columns(rows), tuple(rows), heading="size")


def _hints(found: Allocation) -> Table:
    known = presets.every(ScalingLaw).values()
    rows = []
    for hint in hints(known, parameters=found.parameters, tokens=found.tokens):
        cells: dict[str, Cell] = {"learning rate": hint.learning_rate or Absent("not fitted"),
                                  "batch": hint.batch or Absent("not fitted")}  # fmt: skip
        rows.append(Row(hint.law.name, cells))
    title = "learning rate and batch, as published fits suggest and disagree"
    return Table(title, ("learning rate", "batch"), tuple(rows), heading="law")


def _all(known: Sequence[ScalingLaw], budget: Budget, assumptions: tuple[str, ...]) -> Estimate:
    rows = []
    for law in known:
        try:
            rows.append(Row(law.name, {**_cells(law, best(law, budget)), "N counts": law.counts}))
        except LLMSizeError:
            continue  # this law does not answer such a budget
    if not rows:
        raise LLMSizeError("no law answers that", hint="give `--compute` alone")
    return Estimate(
        "optimal",
        _question("all", budget),
        f"{len(rows)} laws divide it differently",
        (Table("", _columns(rows), tuple(rows), heading="law"),),
        assumptions=assumptions,
        notes=("Losses on different corpora and tokenizers are not comparable.",),
    )
