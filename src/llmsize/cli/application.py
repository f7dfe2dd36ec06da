"""The Typer application, made of the commands that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Signature
from math import isnan
from typing import Annotated, Any, get_args

import typer

from llmsize import __version__
from llmsize.cli.answering import answer, load, parameters, write
from llmsize.cli.declare import Declared, Option, Parameter, for_python
from llmsize.errors import LLMSizeError

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def application(names: Sequence[str]) -> typer.Typer:
    """An application with the commands `names`, each imported from its own file."""
    app = typer.Typer(
        no_args_is_help=True, pretty_exceptions_enable=False, context_settings=SETTINGS
    )
    app.callback()(_llmsize)
    for name in names:
        module, command = load(name)
        app.command(name, epilog=_examples(module))(_for_typer(command))
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


def _for_typer(command: Callable[..., Any]) -> Callable[..., int]:
    """`command` with the options that every command has; its answer is written."""

    def shared(**values: Any) -> int:
        for name, value in values.items():
            if isinstance(value, float) and isnan(value):  # which is in every range of click
                raise LLMSizeError(
                    f"the value of `{options[name]}` is not a number", hint="write digits"
                )
        return answer(command, values)

    options = {p.name: " ".join(get_args(p.annotation)[1].names) for p in parameters(command)
               if isinstance(get_args(p.annotation)[1], Declared)}  # fmt: skip
    typed = [p._replace(annotation=_annotation(p)) for p in parameters(command)]
    shared.__name__, shared.__doc__ = command.__name__, command.__doc__
    shared.__annotations__ = {p.name: p.annotation for p in typed}
    shared.__signature__ = Signature([for_python(p, p.name) for p in typed])  # type: ignore[attr-defined]
    return shared


def _annotation(parameter: Parameter) -> object:
    """The annotation with what is declared made into Typer's own."""
    kind, *metadata = get_args(parameter.annotation)
    declared = metadata[0]
    if not isinstance(declared, Declared):
        return parameter.annotation
    make = typer.Option if isinstance(declared, Option) else typer.Argument
    return Annotated[kind, make(*declared.names, **declared.settings)]
