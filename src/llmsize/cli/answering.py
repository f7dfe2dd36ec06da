"""One command, found by its name: its parameters, its answer, and how that is written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, signature
from types import ModuleType
from typing import Any, get_type_hints

from llmsize.answer import Drawn, Estimate
from llmsize.cli import options
from llmsize.errors import UndeterminedError
from llmsize.render import OutputFormat, Style, render

SHARED = [
    Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, annotation, default in (
        ("explain", options.Explain, False),
        ("format_", options.Output, ""),
        ("units_", options.Units, "GB"),
        ("presets_", options.PresetsDir, None),
    )
]
"""What every command has beside its own parameters."""


def load(name: str) -> tuple[ModuleType, Callable[..., Any]]:
    """The module of a command and the command itself."""
    module = import_module(f"llmsize.cli.{name}")
    return module, getattr(module, name)


def parameters(command: Callable[..., Any]) -> list[Parameter]:
    """The command's own parameters with their annotations evaluated, and the shared ones."""
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
        for parameter in signature(command).parameters.values()
    ]
    return own + SHARED


def answer(command: Callable[..., Any], values: Mapping[str, Any]) -> int:
    """Ask, write the answer, and return the exit code."""
    words = dict(values)
    explain, chosen = words.pop("explain"), words.pop("format_")
    binary = options.memory_unit(words.pop("units_"))
    words.pop("presets_")
    format = options.output_format(chosen) if chosen else options.default_format()
    found = command(**words)
    shown = style(explain=explain, binary=binary)
    if isinstance(found, Drawn):
        found = _drawn(found, format, shown)
    if isinstance(found, Estimate):
        write(render(found, format, shown))
        return 1 if found.verdict is False else 0
    write(found)
    return 0


def _drawn(found: Drawn, format: OutputFormat, style: Style) -> Estimate | str:
    """The charts themselves where people read, the numbers in them for every other format."""
    if format not in ("table", "plain"):
        return found.estimate
    from llmsize.render.chart import draw

    return "\n".join(draw(chart, style.width) for chart in found.charts)


def style(*, explain: bool, binary: bool) -> Style:
    """Width and colour as the terminal has them; nothing is wrapped where there is none."""
    terminal = sys.stdout.isatty()
    return Style(explain, binary, _width(terminal), _color(terminal))


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


def write(text: str) -> None:
    """Write to stdout; a character that its encoding does not have becomes `?`.

    Raises `BrokenPipeError` where the reader has left, `UndeterminedError` for a full disk.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
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
