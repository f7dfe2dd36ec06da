"""One command, found by its name: its parameters, its answer, and how that is written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, Literal, get_type_hints

from llmsize import presets
from llmsize.answer import Drawn, Estimate
from llmsize.cli.declare import REQUIRED, Option, Parameter, choosing, defaults, headed, is_group
from llmsize.errors import UndeterminedError
from llmsize.render import OUTPUT_FORMATS, OutputFormat, Style, render
from llmsize.units import in_binary


def _search(directory: str | None) -> str | None:
    presets.search_first(directory)
    return directory


_PANEL = "Output"

Explain = Annotated[
    bool,
    Option(
        "--explain",
        help="Show formula, values, source and grade of every number.",
        rich_help_panel=_PANEL,
    ),
]
Format = Annotated[
    OutputFormat | None,
    choosing(
        "--format",
        known=OUTPUT_FORMATS,
        what="output format",
        help="A table in a terminal and plain in a pipe, or one of",
        metavar="FORMAT",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Units = Annotated[
    Literal["GB", "GiB"],
    choosing(
        "--units",
        known=("GB", "GiB"),
        what="memory unit",
        help="10⁹ or 2³⁰ bytes",
        metavar="UNIT",
        rich_help_panel=_PANEL,
    ),
]
PresetsDir = Annotated[
    str | None,
    Option(
        "--presets",
        help="Search your own presets in DIR first.",
        metavar="DIR",
        callback=_search,
        is_eager=True,
        rich_help_panel=_PANEL,
    ),
]
SHARED = [
    Parameter("explain", Explain, False),
    Parameter("format_", Format, None),
    Parameter("units_", Units, "GB"),
    Parameter("presets_", PresetsDir, None),
]
"""What every command has beside its own parameters."""


def load(name: str) -> tuple[ModuleType, Callable[..., Any]]:
    """The module of a command and the command itself."""
    module = import_module(f"llmsize.cli.{name}")
    return module, getattr(module, name)


def parameters(command: Callable[..., Any]) -> list[Parameter]:
    """The command's own parameters, those of its groups one by one, and the shared ones."""
    return [*_options(command), *SHARED]


def ask(command: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """What the command answers to values of its own parameters; those of a group are put in it."""
    return command(**{
        name: values[name] if group is None else ask(group, values)
        for name, group in _taken(command)
    })  # fmt: skip


@cache
def _taken(command: Callable[..., Any]) -> list[tuple[str, Callable[..., Any] | None]]:
    """The names of what a command or a group takes, and the group that it is, if it is one."""
    return [
        (name, annotation if is_group(annotation) else None)
        for name, annotation, _ in _evaluated(command)
    ]


@cache
def _evaluated(command: Callable[..., Any]) -> list[Parameter]:
    """The parameters as a command or a group is written, their annotations evaluated."""
    hints, given = get_type_hints(command, include_extras=True), defaults(command)
    return [
        Parameter(name, annotation, given.get(name, REQUIRED))
        for name, annotation in hints.items()
        if name != "return"
    ]


def _options(command: Callable[..., Any]) -> Iterator[Parameter]:
    """The parameters of a command or a group, and in place of a group its own.

    The first line of a group is the heading of its parameters in the help.
    """
    heading = (command.__doc__ or "").splitlines()[0].rstrip(".") if is_group(command) else ""
    for one in _evaluated(command):
        if is_group(one.annotation):
            yield from _options(one.annotation)
        elif heading:
            kind, declared = one.annotation.__origin__, one.annotation.__metadata__[0]
            yield one._replace(annotation=Annotated[kind, headed(declared, heading)])
        else:
            yield one


def answer(command: Callable[..., Any], values: Mapping[str, Any]) -> int:
    """Ask, write the answer, and return the exit code."""
    format = values["format_"] or default_format()
    shown = style(explain=values["explain"])
    with in_binary(values["units_"] == "GiB"):
        found = ask(command, values)
        if isinstance(found, Drawn):
            found = _drawn(found, format, shown)
        write(render(found, format, shown) if isinstance(found, Estimate) else found)
    return 1 if isinstance(found, Estimate) and found.verdict is False else 0


def default_format() -> OutputFormat:
    """A table in a terminal, plain text in a pipe."""
    return "table" if sys.stdout.isatty() else "plain"


def _drawn(found: Drawn, format: OutputFormat, style: Style) -> Estimate | str:
    """The charts themselves where people read, the numbers in them for every other format."""
    if format not in ("table", "plain"):
        return found.estimate
    from llmsize.render.chart import draw

    return "\n".join(draw(chart, style.width) for chart in found.charts)


def style(*, explain: bool) -> Style:
    """Width and colour as the terminal has them; nothing is wrapped where there is none."""
    terminal = sys.stdout.isatty()
    return Style(explain, _width(terminal), _color(terminal))


def _width(terminal: bool) -> int | None:
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size().columns or None if terminal else None
    except OSError:
        return None


def _color(terminal: bool) -> bool:
    """`NO_COLOR` beats `FORCE_COLOR`, and both beat what the terminal can do."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return terminal and os.environ.get("TERM") != "dumb"


SPELT = str.maketrans({
    "–": "-", "≈": "=", "×": "x", "·": "*", "…": "...", "█": "#", "─": "-", "²": "^2", "³": "^3",
})  # fmt: skip
"""Signs of answers for an encoding without them: as `?` they would all be marked as assumed."""


def _encodable(text: str, encoding: str) -> str:
    """The text in signs that the encoding has; the few others become `?`."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(SPELT).encode(encoding, "replace").decode(encoding)
    return text


def write(text: str) -> None:
    """Write to stdout, in signs that its encoding has.

    Raises `BrokenPipeError` where the reader has left, `UndeterminedError` for a full disk.
    """
    try:
        sys.stdout.write(_encodable(text, sys.stdout.encoding or "utf-8"))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as failure:
        abandon_stdout()
        raise UndeterminedError(
            f"cannot write the answer: {failure.strerror}", hint="send it somewhere else"
        ) from None


def abandon_stdout() -> None:
    """After a write failed: keep the interpreter from writing the rest once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
