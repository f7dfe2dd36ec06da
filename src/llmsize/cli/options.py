"""Options that commands share, and what a command line's words become."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from llmsize import presets, units
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError, did_you_mean, printable
from llmsize.formats import Format
from llmsize.record import Record
from llmsize.render import OUTPUT_FORMATS, OutputFormat


def output_format(text: str) -> OutputFormat:
    """One of `OUTPUT_FORMATS`. Raises `LLMSizeError`."""
    for known in OUTPUT_FORMATS:
        if text.strip().lower() == known:
            return known
    raise LLMSizeError(
        f"unknown output format `{printable(text)}`",
        hint=did_you_mean(
            text, OUTPUT_FORMATS, otherwise=f"choose from {', '.join(OUTPUT_FORMATS)}"
        ),
    )


def memory_unit(text: str) -> bool:
    """Whether memory is shown in GiB. Raises `LLMSizeError` for anything but GB and GiB."""
    if text.strip().lower() not in ("gb", "gib"):
        raise LLMSizeError(f"unknown memory unit `{printable(text)}`", hint="write `GB` or `GiB`")
    return text.strip().lower() == "gib"


def default_format() -> OutputFormat:
    """A table in a terminal, plain text in a pipe."""
    return "table" if sys.stdout.isatty() else "plain"


def completing(kind: type[Record]) -> Callable[[str], list[str]]:
    """Shell completion of the names of presets of `kind`."""
    return lambda incomplete: [n for n in presets.names(kind) if n.startswith(incomplete.lower())]


def _search(directory: Path | None) -> Path | None:
    presets.search_first(directory)
    return directory


def _positive(text: str) -> int:
    return units.parse_count(text, "number")


_GENERAL = "Output"

Explain = Annotated[
    bool,
    typer.Option(
        "--explain",
        help="Show formula, values, source and grade of every number.",
        rich_help_panel=_GENERAL,
    ),
]
Output = Annotated[
    str,
    typer.Option(
        "--format",
        help=f"{', '.join(OUTPUT_FORMATS)}; a table in a terminal, plain in a pipe.",
        autocompletion=lambda: list(OUTPUT_FORMATS),
        show_default=False,
        metavar="FORMAT",
        rich_help_panel=_GENERAL,
    ),
]
Units = Annotated[
    str,
    typer.Option(
        "--units",
        help="GB (10⁹ bytes) or GiB (2³⁰ bytes).",
        autocompletion=lambda: ["GB", "GiB"],
        rich_help_panel=_GENERAL,
    ),
]
PresetsDir = Annotated[
    Path | None,
    typer.Option(
        "--presets",
        help="Search your own presets in DIR first.",
        metavar="DIR",
        callback=_search,
        is_eager=True,
        rich_help_panel=_GENERAL,
    ),
]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A preset, a `config.json`, or a folder that holds one.",
        autocompletion=completing(Architecture),
        show_default=False,
    ),
]
Parameters = Annotated[
    int | None,
    typer.Option(
        "--params",
        help="Parameter count: `7B`, `1.3b`, `124M`.",
        metavar="N",
        parser=lambda text: units.parse_count(text, "parameter count"),
        show_default=False,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Format of the weights: `fp32`, `fp16`, `bf16`, `int8`, …",
        metavar="FORMAT",
        autocompletion=completing(Format),
    ),
]
Batch = Annotated[
    int, typer.Option("--batch", help="Sequences at once.", metavar="N", parser=_positive)
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        help="Tokens per sequence.",
        metavar="TOKENS",
        parser=lambda text: units.parse_count(text, "context"),
        show_default=False,
    ),
]
