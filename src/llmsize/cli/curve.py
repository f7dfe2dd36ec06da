"""`llmsize curve`: the picture, in the terminal or as a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, get_args

from llmsize import presets, units
from llmsize.anatomy import traced
from llmsize.anatomy.parameters import count
from llmsize.answer import Cell, Drawn, Estimate, Row, Scalar, Table
from llmsize.architecture import Architecture
from llmsize.chart import Axis, Chart, Mark, Series, extent, spaced
from llmsize.cli import laws, options
from llmsize.cli.declare import Argument, Option, choosing, counting
from llmsize.errors import LLMSizeError
from llmsize.formats import Format, stored_bytes
from llmsize.memory.kv_cache import kv_cache
from llmsize.quick_dataclasses import replace
from llmsize.scaling.counting import counted
from llmsize.scaling.curves import isoflop, isoloss, loss_by
from llmsize.scaling.laws import ScalingLaw, relations, solve
from llmsize.term import Grade, fact
from llmsize.units import PF_DAY

EXAMPLES = (
    "llmsize curve kaplan",
    "llmsize curve loss-vs-compute --law kaplan --law chinchilla",
    "llmsize curve loss-vs-params llama-2-7b llama-2-70b --law chinchilla -o loss.svg",
    "llmsize curve isoflop --compute 1e21 --compute 1e22",
    "llmsize curve memory-vs-context llama-3.1-8b --to 1M",
)

Picture = Literal[
    "kaplan", "loss-vs-params", "loss-vs-data", "loss-vs-compute", "isoflop", "isoloss",
    "memory-vs-context", "memory-vs-batch",
]  # fmt: skip
PICTURES: tuple[Picture, ...] = get_args(Picture)

LETTERS = {"loss-vs-params": "N", "loss-vs-data": "D", "loss-vs-compute": "C"}
RANGES = {"N": (1e7, 1e12), "D": (1e8, 1e14), "C": (1e17, 1e26)}
BUDGETS = (1e20, 1e21, 1e22, 1e23)
CONTEXTS = (1024.0, 131_072.0)
BATCHES = (1.0, 256.0)
DEFAULT = "chinchilla"
CONTEXT = 4096

USES: dict[Picture, tuple[str, ...]] = {
    "kaplan": ("--law",), "loss-vs-params": ("MODEL", "--law"), "loss-vs-data": ("--law",),
    "loss-vs-compute": ("--law",), "isoflop": ("--law", "--compute"),
    "isoloss": ("--law", "--compute"), "memory-vs-context": ("MODEL", "--dtype"),
    "memory-vs-batch": ("MODEL", "--dtype", "--context"),
}  # fmt: skip
"""What each picture is drawn of, beside the ends of its axis. Models are marked by parameters:
their tokens and their compute are not known."""

What = Annotated[
    Picture, choosing(known=PICTURES, what="picture", metavar="PICTURE", show_default=False)
]
Models = Annotated[
    list[str] | None,
    Argument(metavar="[MODEL]...", help="Models to draw or to mark.", show_default=False,
             autocompletion=options.completing("models")),
]  # fmt: skip
Laws = Annotated[
    list[str] | None,
    Option("--law", help="A scaling law; repeat for more.", metavar="NAME",
           autocompletion=options.completing("laws"), show_default="chinchilla"),
]  # fmt: skip
Budgets = Annotated[
    list[str] | None,
    Option("--compute", help="Budgets of isoflop and isoloss; repeat for more.",
                 metavar="C", show_default=False),
]  # fmt: skip
From = Annotated[
    str | None,
    Option("--from", help="Where the x axis begins.", metavar="X", show_default=False),
]
To = Annotated[
    str | None,
    Option("--to", help="Where the x axis ends.", metavar="X", show_default=False),
]
Context = Annotated[
    int,
    counting("--context", what="context", metavar="TOKENS",
            help="Tokens per sequence, for memory-vs-batch."),
]  # fmt: skip


def curve(
    what: What,
    models: Models = None,
    law: Laws = None,
    compute: Budgets = None,
    from_: From = None,
    to: To = None,
    dtype: options.Dtype = "bf16",
    context: Context = CONTEXT,
    output: options.Into = None,
) -> Drawn | str:
    """Draw losses by scaling laws, or memory by context or batch."""
    _check_used(what, {
        "MODEL": models, "--law": law, "--compute": compute,
        "--dtype": dtype != "bf16", "--context": context != CONTEXT,
    })  # fmt: skip
    ends = (from_, to)
    question = {
        "picture": what, "models": _joined(models), "law": _joined(law),
        "compute": _joined(compute), "from": from_, "to": to, "dtype": dtype, "context": context,
    }  # fmt: skip
    if what in ("memory-vs-context", "memory-vs-batch"):
        charts = [_memory(what, models or [], presets.get(Format, dtype), ends, context)]
    else:
        charts = _losses(what, models or [], law or [], compute or [], ends)
    if output is not None:
        return options.drawn_into(charts, output)
    return Drawn(_numbers(question, charts), tuple(charts))


def _check_used(picture: Picture, given: Mapping[str, object]) -> None:
    """Raise `LLMSizeError` for what is given and the picture says nothing about."""
    for option, value in given.items():
        if value and option not in USES[picture]:
            having = ", ".join(name for name, used in USES.items() if option in used)
            raise LLMSizeError(
                f"{option} changes nothing in `{picture}`", hint=f"pictures that use it: {having}"
            )


def _joined(given: Sequence[str] | None) -> str | None:
    return ", ".join(given) if given else None


def _range(ends: tuple[str | None, str | None], default: tuple[float, float]) -> list[float]:
    """Points between the ends as written, or as they are by default."""
    low, high = (
        units.parse_flop(text, "end of the axis") if "PF" in text.upper()
        else float(units.parse_count(text, "end of the axis")) if _is_count(text)
        else units.parse_flop(text, "end of the axis")
        for text in (end or f"{value:.17g}" for end, value in zip(ends, default, strict=True))
    )  # fmt: skip
    return spaced(low, high)


def _is_count(text: str) -> bool:
    return text[-1:].upper() in ("K", "M", "B", "T")


def _losses(
    picture: Picture,
    models: Sequence[str],
    names: Sequence[str],
    budgets: Sequence[str],
    ends: tuple[str | None, str | None],
) -> list[Chart]:
    if picture == "kaplan":
        drawn = [presets.get(ScalingLaw, name) for name in names or ["kaplan"]]
        return [loss_by(drawn, letter, _range(ends, KAPLAN[letter])) for letter in ("C", "D", "N")]
    drawn = [laws.named(name) for name in names or [DEFAULT]]
    if picture in LETTERS:
        letter = LETTERS[picture]
        chart = loss_by(drawn, letter, _range(ends, RANGES[letter]))
        return [replace(chart, marks=_marks(models, drawn[0], chart))]
    if len(drawn) > 1:
        raise LLMSizeError(f"`{picture}` is of one law", hint="give one `--law`")
    spent = [units.parse_flop(text) for text in budgets] or list(BUDGETS)
    draw = isoflop if picture == "isoflop" else isoloss
    best = [solve(drawn[0], "N | C", C=c) for c in spent]
    sizes = _range(ends, (min(best) / 30, max(best) * 30))
    return [_trimmed(draw(drawn[0], spent, sizes), WALLS[picture])]


KAPLAN = {"C": (1e-8 * PF_DAY, 1e2 * PF_DAY), "D": (2e7, 1e10), "N": (1e4, 1e9)}
"""The panels of Figure 1 of Kaplan et al. 2020."""

WALLS = {"isoflop": 1.25, "isoloss": 30.0}
"""How far above its lowest point a curve is drawn, as a factor; the far walls hide the rest."""


def _trimmed(chart: Chart, factor: float) -> Chart:
    """Each curve without what is above `factor` times its lowest point."""
    kept = []
    for each in chart.series:
        limit = factor * min((y for _, y in each.points), default=0.0)
        kept.append(Series(each.name, tuple(p for p in each.points if p[1] <= limit)))
    return replace(chart, series=tuple(kept))


def _marks(models: Sequence[str], law: ScalingLaw, chart: Chart) -> tuple[Mark, ...]:
    """Models on the first curve, by their parameters as its law counts them."""
    marks = []
    low, high, _, _ = extent(chart)
    for name in models:
        architecture = options.architecture(name)
        n = counted(law, count(traced(architecture).weights.values()))
        if low <= n <= high and "L | N" in relations(law):
            marks.append(Mark(architecture.name, n, solve(law, "L | N", N=n)))
    return tuple(marks)


def _memory(
    picture: Picture,
    models: Sequence[str],
    format: Format,
    ends: tuple[str | None, str | None],
    context: int,
) -> Chart:
    """Weights and KV cache of each model, by context or by sequences at once."""
    if not models:
        raise LLMSizeError("no model to draw", hint=f"name one: `llmsize curve {picture} gpt2`")
    by_context = picture == "memory-vs-context"
    counts = sorted({round(x) for x in _range(ends, CONTEXTS if by_context else BATCHES)})
    loads = [(x, 1) if by_context else (context, x) for x in counts]
    series = []
    for name in models:
        architecture = options.architecture(name)
        used = _used(architecture, format, loads)
        points = tuple((float(x), y) for x, y in zip(counts, used, strict=True))
        series.append(Series(architecture.name, points))
    axis = Axis("context", "tokens") if by_context else Axis("sequences", "sequences")
    title = f"Weights and KV cache in {format.name}"
    return Chart(title, axis, Axis("memory", "bytes"), tuple(series))


def _used(
    architecture: Architecture, format: Format, loads: Sequence[tuple[int, int]]
) -> list[float]:
    """Bytes of weights and cache for each (context, sequences)."""
    trace = traced(architecture)
    weights = stored_bytes(format, count(trace.weights.values()).total)
    layers = trace.layer_caches()
    return [
        float(weights + kv_cache(
            layers, context=context, sequences=sequences, keys=format, values=format
        ).value)
        for context, sequences in loads
    ]  # fmt: skip


def _numbers(question: Mapping[str, Scalar], charts: Sequence[Chart]) -> Estimate:
    """The points of the charts, for formats that are not pictures."""
    tables = []
    for chart in charts:
        xs = sorted({x for each in chart.series for x, _ in each.points})
        values = [dict(each.points) for each in chart.series]
        grade: Grade = "exact" if chart.y.unit == "bytes" else "fitted"
        rows = []
        for x in xs:
            cells: dict[str, Cell] = {
                each.name: fact(
                    each.name, found[x], unit=chart.y.unit, source=chart.title, grade=grade
                )
                for each, found in zip(chart.series, values, strict=True)
                if x in found
            }
            rows.append(Row(f"{x:.12g}", cells))
        names = tuple(each.name for each in chart.series)
        tables.append(Table(chart.title, names, tuple(rows), heading=chart.x.label))
    titles = ", ".join(chart.title for chart in charts)
    return Estimate("curve", question, titles, tuple(tables))
