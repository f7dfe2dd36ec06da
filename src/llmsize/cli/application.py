"""The Typer application, made of the commands that are asked for."""

from __future__ import annotations

import inspect
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any, get_type_hints

import typer

from llmsize import __version__
from llmsize.cli import options
from llmsize.estimate import Drawn, Estimate
from llmsize.render import OutputFormat, Style, render

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def application(names: Sequence[str]) -> typer.Typer:
    """An application with the commands `names`, each imported from its own file."""
    app = typer.Typer(
        no_args_is_help=True, pretty_exceptions_enable=False, context_settings=SETTINGS
    )
    app.callback()(_llmsize)
    for name in names:
        module = import_module(f"llmsize.cli.{name}")
        command = getattr(module, name)
        app.command(name, epilog=_examples(module))(_with_shared_options(command))
    return app


def _show_version(asked: bool) -> None:
    if asked:
        write(f"llmsize {__version__}\n")
        raise typer.Exit


def _llmsize(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Memory, compute, time and loss of large language models, before anything is rented."""


def _examples(module: object) -> str | None:
    """The examples of a command, one a line, for the end of its help."""
    examples = getattr(module, "EXAMPLES", ())
    return "\n\n".join(("Examples:", *(f"  {line}" for line in examples))) if examples else None


def _with_shared_options(command: Callable[..., Any]) -> Callable[..., int]:
    """`command` with the options that every command has; its answer is printed."""

    def shared(**words: Any) -> int:
        explain, chosen = words.pop("explain"), words.pop("format_")
        binary = options.memory_unit(words.pop("units_"))
        words.pop("presets_")
        format = options.output_format(chosen) if chosen else options.default_format()
        answer = command(**words)
        if isinstance(answer, Drawn):
            answer = _drawn(answer, format, style(explain=explain, binary=binary))
        if isinstance(answer, Estimate):
            write(render(answer, format, style(explain=explain, binary=binary)))
            return 1 if answer.verdict is False else 0
        write(answer)
        return 0

    own = get_type_hints(command, include_extras=True)
    parameters = [
        parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=own[parameter.name])
        for parameter in inspect.signature(command).parameters.values()
    ]
    parameters += _SHARED
    shared.__name__, shared.__doc__ = command.__name__, command.__doc__
    shared.__annotations__ = {p.name: p.annotation for p in parameters}
    shared.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return shared


_SHARED = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    for name, annotation, default in (
        ("explain", options.Explain, False),
        ("format_", options.Output, ""),
        ("units_", options.Units, "GB"),
        ("presets_", options.PresetsDir, None),
    )
]


def _drawn(answer: Drawn, format: OutputFormat, style: Style) -> Estimate | str:
    """The charts themselves where people read, the numbers in them for every other format."""
    if format not in ("table", "plain"):
        return answer.estimate
    from llmsize.render.chart import draw

    return "\n".join(draw(chart, style.width) for chart in answer.charts)


def style(*, explain: bool, binary: bool) -> Style:
    """Width and colour as the terminal has them; nothing is wrapped where there is none."""
    terminal = sys.stdout.isatty()
    columns = os.environ.get("COLUMNS", "")
    width = shutil.get_terminal_size().columns if terminal or columns.isdecimal() else None
    return Style(explain, binary, width, _color(terminal))


def _color(terminal: bool) -> bool:
    """`NO_COLOR` beats `FORCE_COLOR`, and both beat what the terminal can do."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return terminal and os.environ.get("TERM") != "dumb"


def write(text: str) -> None:
    """Write to stdout; a character that its encoding does not have becomes `?`."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
