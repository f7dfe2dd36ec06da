"""`llmsize loss`: the loss that parameters, tokens or compute reach, and what reaches a loss."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llmsize import presets, units
from llmsize.answer import Absent, Cell, Estimate, Row, Table
from llmsize.cli import laws, options
from llmsize.cli.declare import Option, counting
from llmsize.errors import LLMSizeError, printable
from llmsize.quick_dataclasses import replace
from llmsize.scaling.calibration import Calibration, Observation, calibrate, interval
from llmsize.scaling.counting import counted, reading
from llmsize.scaling.laws import ScalingLaw, answer, relations
from llmsize.scaling.precision import effective_fraction
from llmsize.scaling.run import (
    Run,
    alone,
    complete,
    frontier,
    limited_by,
    loss_of,
    measures,
    overfit_limit,
    reach,
    warnings,
)
from llmsize.term import Term, fact
from llmsize.throughput import training_flop

if TYPE_CHECKING:
    from llmsize.anatomy.parameters import Parameters

EXAMPLES = (
    "llmsize loss --params 2B",
    "llmsize loss --params 7B --tokens 2T --law chinchilla",
    "llmsize loss --target-loss 2.5",
    "llmsize loss llama-3.1-8b --tokens 15T --law all",
    "llmsize loss --params 7B --tokens 1T --calibrate 1B,20B,2.71 --calibrate 3B,60B,2.45",
)

DEFAULT = "kaplan"
CALIBRATED = "chinchilla"
"""The law that is moved to someone's own runs unless another is asked for."""
REPEATING = "muennighoff"
"""The law that is asked when tokens repeat."""

NOT_COMPARABLE = (
    "Losses on different corpora and tokenizers are not comparable: compare the order and the "
    "shape of the laws, not their values."
)

Steps = Annotated[
    float | None,
    counting(
        "--steps", what="number of steps", kind=float, metavar="S",
        help="Optimizer steps, with --batch-tokens.", show_default=False,
    ),
]  # fmt: skip
BatchTokens = Annotated[
    float | None,
    counting(
        "--batch-tokens", what="batch", kind=float, metavar="TOKENS",
        help="Tokens per step: `512K`.", show_default=False,
    ),
]  # fmt: skip
Precision = Annotated[
    float | None,
    Option(
        "--precision", help="Bits of weights, activations and KV cache in training: experimental.",
        metavar="BITS", show_default=False,
    ),
]  # fmt: skip
Runs = Annotated[
    list[str] | None,
    Option(
        "--calibrate", metavar="N,D,LOSS", show_default=False,
        help="A run of your own, or a CSV of them; repeat for more. Moves the law to them.",
    ),
]  # fmt: skip


def loss(
    model: options.OptionalModel = None,
    *,
    params: options.Parameters = None,
    tokens: laws.Tokens = None,
    compute: laws.Compute = None,
    steps: Steps = None,
    batch: BatchTokens = None,
    unique_tokens: laws.UniqueTokens = None,
    target_loss: laws.TargetLoss = None,
    asked: laws.Asked,
    precision: Precision = None,
    calibrate: Runs = None,
) -> Estimate:
    """The loss that parameters, tokens or compute reach; or, with --target-loss, what reaches it.

    What is not given is unlimited: `--params` alone is a model trained on data without end.
    """
    shape = _model(model, params)
    run = Run(params, tokens, compute, unique_tokens, steps, batch)
    if asked.compared:
        if calibrate:
            raise LLMSizeError("`--calibrate` moves one law", hint="name it: `--law chinchilla`")
        return _all(laws.every(**asked.settings), run, shape, target_loss)
    default = REPEATING if unique_tokens is not None else CALIBRATED if calibrate else DEFAULT
    chosen = laws.law(asked, default)
    run = _counted(chosen, run, shape)
    if calibrate:
        return _calibrated(chosen, run, list(_observations(calibrate)))
    if target_loss is not None:
        return _target(chosen, run, target_loss)
    return _card(chosen, run, shape, precision)


def _model(model: str | None, params: int | None) -> Parameters | None:
    if model is None:
        return None
    if params is not None:
        raise LLMSizeError(
            "MODEL and `--params` both say how large it is", hint="leave one of them out"
        )
    from llmsize.anatomy import traced
    from llmsize.anatomy.parameters import count

    trace = traced(options.architecture(model))
    if not trace.caches:
        raise LLMSizeError(
            f"`{printable(model)}` is an encoder, which writes no text",
            hint="the laws are fitted to models that do; `--params` asks about any number",
        )
    return count(trace.weights.values())


def _counted(law: ScalingLaw, run: Run, shape: Parameters | None) -> Run:
    return run if shape is None else replace(run, parameters=counted(law, shape))


def _question(law: str, run: Run) -> dict[str, str | float | None]:
    return {"law": law, "parameters": run.parameters, "tokens": run.tokens, "compute": run.compute,
            "unique_tokens": run.unique_tokens, "steps": run.steps, "batch": run.batch}  # fmt: skip


def _card(law: ScalingLaw, run: Run, shape: Parameters | None, precision: float | None) -> Estimate:
    """One run by one law: the loss, other ways to reach it, and what limits it."""
    found = loss_of(law, run)
    full = complete(run)
    terms = [found, *measures(law, found), *_beside(law, full, float(found.value))]
    if precision is not None:
        terms.append(_effective(precision))
    said = limited_by(law, full)
    headline = f"loss {found.value:.4f} {law.loss_unit} by {law.title}"
    return Estimate(
        "loss",
        _question(law.name, run),
        f"{headline}; {said}" if said else headline,
        tuple(terms),
        assumptions=_assumptions(law, run, shape),
        notes=tuple(_notes(law, full)),
    )


def _beside(law: ScalingLaw, run: Run, loss: float) -> list[Term]:
    """What belongs beside a loss: for a model alone, all that reaches it and its own optimum."""
    if run.parameters and run.tokens:
        return [training_flop(run.parameters, run.tokens)]
    beside = [term for term in alone(law, loss) if run.parameters is None
              or not term.name.startswith("parameters")]  # fmt: skip
    if run.parameters:
        beside = [*_figure1(law, loss, beside), *overfit_limit(law, run.parameters)]
        return beside + frontier(law, run.parameters)
    if run.compute and "N | C" in relations(law):
        best = [answer(law, "N | C", "parameters, optimal", C=run.compute)]
        if "D | C" in relations(law):
            best.append(answer(law, "D | C", "tokens, optimal", C=run.compute))
        return best
    return beside


def _figure1(law: ScalingLaw, loss: float, beside: list[Term]) -> list[Term]:
    """Kaplan's compute by the text is followed by the compute by the label of Figure 1."""
    if law.name != "kaplan":
        return beside
    other = presets.get(ScalingLaw, "kaplan-figure1")
    return [*beside, answer(other, "C_min | L", "the same with the constant of Figure 1", L=loss)]


def _effective(bits: float) -> Term:
    law = presets.get(ScalingLaw, "kumar")
    return effective_fraction(law, weights=bits, activations=bits, kv=bits)


def _target(law: ScalingLaw, run: Run, target: float) -> Estimate:
    terms = tuple(reach(law, target, run))
    if not terms:
        raise LLMSizeError(
            f"`{law.name}` gives no loss to invert", hint="try `--law kaplan` or `--law chinchilla`"
        )
    return Estimate(
        "loss",
        {**_question(law.name, run), "target_loss": target},
        f"a loss of {target:g} {law.loss_unit} by {law.title}",
        terms,
        notes=tuple(_notes(law, run)),
    )


def _all(
    known: Sequence[ScalingLaw], run: Run, shape: Parameters | None, target: float | None
) -> Estimate:
    """The same question to every law, with the unit and corpus that its answer is about."""
    reached = [(law, _asked(law, _counted(law, run, shape), target)) for law in known]
    answered = [(law, cells) for law, cells in reached if cells]
    columns = tuple(dict.fromkeys(name for _, cells in answered for name in cells))
    rows = [Row(law.name, {**cells, "N counts": law.counts, "unit": law.loss_unit,
                           "corpus": law.corpus or Absent("not published")})
            for law, cells in answered]  # fmt: skip
    if not rows:
        raise LLMSizeError("no law answers that", hint="give `--params`, `--tokens` or `--compute`")
    comparable = [
        cells["loss"].value
        for law, cells in answered
        if "loss" in cells and law.loss_unit == "nats/token" and not law.experimental
    ]
    spread = f": {min(comparable):.3f} to {max(comparable):.3f} nats/token" if comparable else ""
    return Estimate(
        "loss",
        {**_question("all", run), "target_loss": target},
        f"{len(rows)} laws{spread}",
        (Table("", (*columns, "N counts", "unit", "corpus"), tuple(rows), heading="law"),),
        notes=(NOT_COMPARABLE, *_left_out(answered)),
    )


def _left_out(answered: Sequence[tuple[ScalingLaw, dict[str, Term]]]) -> Iterator[str]:
    """Laws in the table that the range of the headline is not about."""
    tried = [law.name for law, cells in answered if law.experimental and "loss" in cells]
    if tried:
        yield f"The range leaves out what is experimental: {', '.join(tried)}."


def _asked(law: ScalingLaw, run: Run, target: float | None) -> dict[str, Term]:
    try:
        if target is None:
            return {"loss": loss_of(law, run)}
        return {term.name: term for term in reach(law, target, run)}
    except LLMSizeError:
        return {}


def _assumptions(law: ScalingLaw, run: Run, shape: Parameters | None) -> tuple[str, ...]:
    said = []
    if run.parameters and shape is None:
        said.append(reading(law, run.parameters))
    elif run.parameters:
        said.append(f"N is {law.counts}, {run.parameters:,.0f} parameters by the model's anatomy")
    if run.parameters and not (run.tokens or run.compute):
        said.append("trained on unlimited data until the loss no longer falls")
    return tuple(said)


def _notes(law: ScalingLaw, run: Run) -> Iterator[str]:
    where = [law.corpus, law.tokenizer]
    yield f"Fitted to {', '.join(filter(None, where)) or 'an unpublished corpus'}."
    for warning in warnings(law, run):
        yield f"Extrapolated: {warning}."
    if law.experimental:
        yield "Experimental: use its ratios, not its values."
    if law.name.startswith("kaplan"):
        yield ("C_min is compute at a batch far below the critical one; at the critical batch a "
               "run takes twice as much.")  # fmt: skip


def _observations(texts: Sequence[str]) -> Iterator[Observation]:
    for text in texts:
        if text.lower().endswith(".csv"):
            yield from _from_file(Path(text))
        else:
            yield _observation(text.split(","), text)


def _from_file(path: Path) -> Iterator[Observation]:
    from llmsize.sources.reading import read_own

    data = read_own(path, 10**6, hint="give a CSV of parameters, tokens and loss")
    for line in csv.reader(data.decode("utf-8", "replace").splitlines()):
        if line and line[0].strip()[:1].isdigit():  # a header has no number in it
            yield _observation(line, ",".join(line))


def _observation(fields: Sequence[str], text: str) -> Observation:
    if len(fields) != 3:
        raise LLMSizeError(
            f"cannot read the run `{printable(text)}`",
            hint="write parameters, tokens and loss: `1B,20B,2.71`",
        )
    try:
        measured = float(fields[2])
    except ValueError:
        raise LLMSizeError(
            f"cannot read the loss `{printable(fields[2])}`", hint="write a number, such as `2.71`"
        ) from None
    return Observation(
        units.parse_count(fields[0], "parameter count"),
        units.parse_count(fields[1], "token count"),
        measured,
    )


def _calibrated(law: ScalingLaw, run: Run, runs: Sequence[Observation]) -> Estimate:
    """The law moved to the user's runs: prediction with its interval, and how well it fits."""
    moved = calibrate(law, runs)
    answers: list[Term | Table] = []
    headline = f"{law.name} moved to {len(runs)} run{'s' if len(runs) > 1 else ''} ({moved.method})"
    full = complete(run) if run.parameters or run.tokens or run.compute else run
    if full.parameters and full.tokens:
        predicted = loss_of(moved.law, replace(full, unique_tokens=None))
        answers += [replace(predicted, name="calibrated loss"), loss_of(law, run)]
        headline = f"loss {predicted.value:.4f}, {headline}"
        spread = interval(moved, full.parameters, full.tokens)
        if spread:
            headline += f"; 95 % of resamples within {spread[0]:.4f} to {spread[1]:.4f}"
    answers += [_constants(law, moved), _fit(moved)]
    notes = list(_notes(law, full))
    if len(runs) == 1:
        notes.append("One run fixes the level but leaves no spread: there is no interval.")
    return Estimate("loss", _question(law.name, run), headline, tuple(answers), notes=tuple(notes))


def _constants(law: ScalingLaw, moved: Calibration) -> Table:
    def of(source: ScalingLaw, name: str) -> Cell:
        return fact(name, source.constants[name], unit="", source=source.source, grade="fitted")

    rows = [Row(name, {"published": of(law, name), "calibrated": of(moved.law, name)})
            for name in moved.law.constants]  # fmt: skip
    return Table("constants", ("published", "calibrated"), tuple(rows))


def _fit(moved: Calibration) -> Table:
    def cells(run: Observation, residual: float) -> dict[str, Cell]:
        make: Callable[[str, float], Term] = lambda name, value: fact(  # noqa: E731
            name, value, unit="nats/token", source="given"
        )
        return {"loss": make("loss", run.loss), "residual": make("residual", residual)}

    rows = [
        Row(f"{units.format_count(run.parameters)} on {units.format_count(run.tokens)} tokens",
            cells(run, residual))
        for run, residual in zip(moved.runs, moved.residuals, strict=True)
    ]  # fmt: skip
    return Table("your runs", ("loss", "residual"), tuple(rows), heading="run")
