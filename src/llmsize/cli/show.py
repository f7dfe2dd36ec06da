"""`llmsize show`: the facts that llmsize knows, and where each comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from llmsize import presets
from llmsize.answer import Absent, Cell, Estimate, Row, Scalar, Table
from llmsize.cli.declare import Argument, choosing, counting
from llmsize.cli.options import Commercial, Family
from llmsize.errors import LLMSizeError
from llmsize.quick_dataclasses import dataclass
from llmsize.record import Record
from llmsize.term import Number, fact

if TYPE_CHECKING:
    from llmsize.architecture import Architecture

EXAMPLES = (
    "llmsize show",
    "llmsize show optimizers",
    "llmsize show models llama-2-7b",
    "llmsize show models --max-params 8B --commercial",
    "llmsize show formats --format csv",
)

UNKNOWN = Absent("not published")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fact: its record class and the columns of its list."""

    record: str
    """Module and class, imported when asked for."""
    columns: Mapping[str, str]
    """Attribute by column title."""


KINDS: dict[str, Kind] = {
    "models": Kind(
        "llmsize.architecture:Architecture",
        {
            "parameters": "published_parameters",
            "context": "context_length",
            "family": "family",
            "licence": "licence",
            "released": "released",
        },
    ),
    "formats": Kind(
        "llmsize.formats:Format", {"bits per element": "bits_per_element", "title": "title"}
    ),
    "recipes": Kind("llmsize.memory.weights:Recipe", {"base": "base", "title": "title"}),
    "optimizers": Kind(
        "llmsize.optimizers:Optimizer",
        {"states": "bytes_per_parameter", "layout": "layout", "title": "title"},
    ),
    "precisions": Kind(
        "llmsize.optimizers:Precision",
        {"weights, gradients, optimizer": "bytes_per_parameter", "title": "title"},
    ),
    "methods": Kind("llmsize.memory.methods:Method", {"title": "title", "aliases": "aliases"}),
    "accelerators": Kind(
        "llmsize.hardware:Accelerator",
        {
            "label": "memory_gb_label",
            "visible": "visible_mib",
            "bandwidth": "bandwidth_gb_s",
            "title": "title",
        },
    ),
    "instances": Kind(
        "llmsize.hardware:Instance",
        {"count": "count", "accelerator": "accelerator", "cloud": "cloud", "title": "title"},
    ),
    "engines": Kind(
        "llmsize.engine:Engine",
        {"versions": "versions", "allocation": "allocation", "title": "title"},
    ),
    "stacks": Kind("llmsize.stack:Stack", {"loss": "loss", "title": "title"}),
    "laws": Kind(
        "llmsize.scaling.laws:ScalingLaw", {"form": "form", "N": "counts", "title": "title"}
    ),
    "utilizations": Kind(
        "llmsize.throughput:Utilization", {"median": "median", "runs": "runs", "title": "title"}
    ),
    "bandwidths": Kind(
        "llmsize.throughput:Bandwidth", {"median": "median", "runs": "runs", "title": "title"}
    ),
    "bands": Kind("llmsize.planning.fits:Band", {"error": "share", "runs": "cases"}),
    "defaults": Kind("llmsize.architecture:Default", {"fields": "fields"}),
    "ladders": Kind("llmsize.ladder:Ladder", {"source": "source"}),
}

UNITS = {
    "published_parameters": "parameters",
    "active_parameters": "parameters",
    "context_length": "tokens",
    "bits_per_element": "bits",
    "bytes_per_parameter": "bytes/parameter",
    "block_bytes": "bytes",
    "memory_gb_label": "GB",
    "visible_mib": "MiB",
    "bandwidth_gb_s": "GB/s",
    "tdp_watts": "W",
}
"""Units of the fields that have one."""

_LONGEST_VALUE = 2000
_SENTENCE = 40
"""Characters from which an entry of a list reads better in a row of its own."""


def _complete_name(ctx: Any, incomplete: str) -> list[str]:
    kind = ctx.params.get("kind") or ""
    known = presets.names(_record(kind)) if kind in KINDS else []
    return [name for name in known if name.startswith(incomplete.lower())]


KindName = Annotated[str | None, choosing(known=KINDS, what="kind of fact", metavar="KIND")]
Name = Annotated[str, Argument(help="One of them.", autocompletion=_complete_name, metavar="NAME")]
MaxParameters = Annotated[
    int | None,
    counting(
        "--max-params",
        what="parameter count",
        help="Only models of at most so many parameters, such as `8B`.",
        metavar="N",
        show_default=False,
    ),
]


class Filter(NamedTuple):
    """Which models are listed."""

    family: Family = ""
    max_params: MaxParameters = None
    commercial: Commercial = False

    def allows(self, record: Any) -> bool:
        """Whether a record is listed; what is not a model always is."""
        if self == Filter():
            return True
        return (
            self.family in ("", record.family)
            and (self.commercial is False or record.commercial is True)
            and (self.max_params is None or _parameters(record) <= self.max_params)
        )


def _parameters(model: Architecture) -> int:
    """As published, or as counted."""
    from llmsize.anatomy import traced
    from llmsize.anatomy.parameters import count

    return model.published_parameters or count(traced(model).weights.values()).total


def show(kind: KindName = None, name: Name = "", *, wanted: Filter) -> Estimate:
    """Facts with their sources: models, formats, optimizers, laws, hardware, …"""
    if wanted != Filter() and (kind != "models" or name):
        raise LLMSizeError(
            "`--family`, `--max-params` and `--commercial` choose among models",
            hint="`llmsize show models --family llama`",
        )
    if not kind:
        return _kinds()
    return _one(kind, name) if name else _list(kind, wanted)


def _record(kind: str) -> type[Record]:
    module, _, name = KINDS[kind].record.partition(":")
    record: type[Record] = getattr(import_module(module), name)
    return record


def _kinds() -> Estimate:
    rows = []
    for kind in KINDS:
        count = fact("entries", len(presets.names(_record(kind))), unit="", source="presets")
        rows.append(Row(kind, {"entries": count, "more": f"llmsize show {kind}"}))
    table = Table("", ("entries", "more"), tuple(rows), heading="facts")
    return Estimate("show", {"kind": "", "name": ""}, "what llmsize knows", (table,))


def _list(kind: str, wanted: Filter) -> Estimate:
    columns = KINDS[kind].columns
    rows = []
    for name, record in presets.every(_record(kind)).items():
        if wanted.allows(record):
            cells = {
                title: _cell(attribute, getattr(record, attribute), record.source)
                for title, attribute in columns.items()
            }
            rows.append(Row(name, cells))
    if not rows:
        raise LLMSizeError(
            "no model is like that", hint="ask for less; `llmsize show models` lists all"
        )
    table = Table("", tuple(columns), tuple(rows), heading="name")
    found = f"{len(rows)} {kind if len(rows) > 1 else kind.removesuffix('s')}"
    headline = f"{found}; `llmsize show {kind} NAME` shows one with its source"
    question: dict[str, Scalar] = {"kind": kind, "name": ""}
    if kind == "models":
        question |= wanted._asdict()
    return Estimate("show", question, headline, (table,))


def _one(kind: str, name: str) -> Estimate:
    record = presets.get(_record(kind), name)
    rows = [Row(field, {"value": cell}) for field, cell in _fields(record)]
    rows.append(Row("file", {"value": presets.origin(type(record), record.name)}))
    table = Table("", ("value",), tuple(rows), heading="field")
    title = getattr(record, "title", "")
    headline = f"{record.name}: {title}" if title else record.name
    question = {"kind": kind, "name": record.name}
    return Estimate("show", question, headline, (table, *_derived(record)))


def _fields(record: Record) -> Iterator[tuple[str, Cell]]:
    """What a record says, one line for each entry of a mapping.

    What is empty or has the default is left out.
    """
    for field in fields(record):
        value = getattr(record, field.name)
        if value in (field.default, None, "", (), {}) or field.name in ("name", "title"):
            continue
        if callable(value):  # what a method does is code
            continue
        said = field.name.replace("_", " ")
        for key, entry in _entries(value):
            yield f"{said}: {key}" if key else said, _cell(field.name, entry, record.source)


def _entries(value: object) -> Iterator[tuple[str, object]]:
    """The entries of a mapping by their names, sentences one by one, and anything else whole."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple) and any(len(str(entry)) > _SENTENCE for entry in value):
        yield from ((str(number), entry) for number, entry in enumerate(value, 1))
    else:
        yield "", value


def _derived(record: Record) -> tuple[Table, ...]:
    """What llmsize counts from the record: a model's parameters by what they mean."""
    from llmsize.architecture import Architecture

    if not isinstance(record, Architecture):
        return ()
    from llmsize.anatomy import traced
    from llmsize.anatomy.parameters import count

    try:
        counted = count(traced(record).weights.values())
    except LLMSizeError as unknown:
        return (Table("counted", ("value",), (Row("parameters", {"value": unknown.message}),)),)
    names = ("total", "active", "non_embedding", "embedding", "position", "head", "experts")
    rows = tuple(
        Row(
            name.replace("_", "-"),
            {
                "value": fact(
                    name, getattr(counted, name), unit="parameters", source="the forward pass"
                )
            },
        )
        for name in names
        if getattr(counted, name)
    )
    return (Table("parameters, counted from the forward pass", ("value",), rows),)


def _cell(attribute: str, value: Any, source: str) -> Cell:
    if value is None or value == "":
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Number):
        return fact(attribute, value, unit=UNITS.get(attribute, ""), source=source)
    return _words(value)[:_LONGEST_VALUE]


def _words(value: object) -> str:
    if isinstance(value, tuple):
        entries = any(isinstance(entry, Mapping | tuple) for entry in value)
        return ("; " if entries else ", ").join(map(_words, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_words(entry)}" for key, entry in value.items())
    return str(value)
