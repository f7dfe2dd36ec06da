"""Reading a plain command line without Typer, whose import alone takes as long as an estimate.

Only what can be read with certainty is: known long options with their values, flags, arguments.
For all else (help, completion, short options, mistakes) the answer is `None`, and Typer reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any, get_args

from llmsize.cli.declare import Argument, Declared, Option

PLAIN: tuple[type, ...] = (str, bool, Path)
"""Types that need no parser."""


def read(words: Sequence[str], parameters: Sequence[Parameter]) -> dict[str, Any] | None:
    """The value of every parameter, or `None` for a line that Typer should read."""
    if not all(_is_simple(parameter) for parameter in parameters):
        return None
    options = {name: p for p in parameters for name in _declared(p).names}
    arguments = [p for p in parameters if isinstance(_declared(p), Argument)]
    given: dict[str, str | bool] = {}
    rest = iter(words)
    for word in rest:
        if word.startswith("-"):
            name, equals, text = word.partition("=")
            parameter = options.get(name)
            if parameter is None or parameter.name in given:
                return None
            if not equals and _type(parameter) is not bool:
                text = next(rest, "-")
            if text.startswith("-") or (equals and _type(parameter) is bool):
                return None
            given[parameter.name] = text or True
        elif arguments:
            given[arguments.pop(0).name] = word
        else:
            return None
    return _values(given, parameters)


def _values(
    given: Mapping[str, str | bool], parameters: Sequence[Parameter]
) -> dict[str, Any] | None:
    values: dict[str, Any] = {}
    for parameter in sorted(parameters, key=lambda p: "callback" not in _declared(p).settings):
        settings = _declared(parameter).settings
        value: Any = given.get(parameter.name, parameter.default)
        if value is Parameter.empty:
            return None
        if parameter.name in given:
            if "parser" in settings:
                value = settings["parser"](value)
            elif _type(parameter) is Path:
                value = Path(value)
        if "callback" in settings:
            value = settings["callback"](value)
        values[parameter.name] = value
    return values


def _is_simple(parameter: Parameter) -> bool:
    """Whether one value in one known way is all that the parameter takes."""
    declared: object = _declared(parameter)
    if not isinstance(declared, Option | Argument):
        return False
    if isinstance(declared, Option) and not all(n.startswith("--") for n in declared.names):
        return False
    settings = declared.settings
    odd = settings.keys() & {"min", "max", "envvar", "default_factory", "exists"}
    return not odd and ("parser" in settings or _type(parameter) in PLAIN)


def _declared(parameter: Parameter) -> Declared:
    metadata: tuple[Declared, ...] = getattr(parameter.annotation, "__metadata__", ())
    return metadata[0] if metadata else Declared()


def _type(parameter: Parameter) -> object:
    """The type of one value, `None` left aside."""
    kind = parameter.annotation.__origin__
    types = [one for one in get_args(kind) if one is not type(None)]
    return types[0] if len(types) == 1 and type(None) in get_args(kind) else kind
