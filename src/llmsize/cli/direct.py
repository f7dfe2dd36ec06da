"""Reading a plain command line without Typer, whose import alone takes as long as an estimate.

Only what can be read with certainty is: known options with their values, flags, arguments.
For all else (help, completion, abbreviations, mistakes) the answer is `None`, and Typer reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_origin

from llmsize.cli.declare import REQUIRED, Argument, Declared, Option, Parameter

PLAIN: tuple[type, ...] = (str, bool, int, float)
"""Types that need no parser."""

EMPTY_HINT = "give a value, or leave it out"
"""What to do about an empty word, which would be read as if nothing was said."""


def read(words: Sequence[str], parameters: Sequence[Parameter]) -> dict[str, Any] | None:
    """The value of every parameter, or `None` for a line that Typer should read."""
    if not all(_is_simple(parameter) for parameter in parameters):
        return None
    options = {name: p for p in parameters for name in _declared(p).names}
    arguments = [p for p in parameters if isinstance(_declared(p), Argument)]
    given: dict[str, list[str]] = {}
    rest = iter(words)
    for word in rest:
        if word.startswith("-"):
            name, equals, text = word.partition("=")
            parameter = options.get(name)
            if parameter is None or (parameter.name in given and not _repeats(parameter)):
                return None
            if not equals and value_type(parameter) is not bool:
                text = next(rest, "-")
            if text.startswith("-") or (equals and value_type(parameter) is bool):
                return None
            given.setdefault(parameter.name, []).append(text)
        elif arguments:
            given[arguments.pop(0).name] = [word]
        else:
            return None
    return _values(given, parameters)


def _values(
    given: Mapping[str, Sequence[str]], parameters: Sequence[Parameter]
) -> dict[str, Any] | None:
    values: dict[str, Any] = {}
    for parameter in sorted(parameters, key=lambda p: "callback" not in _declared(p).settings):
        value: Any = parameter.default
        if parameter.name in given:
            try:
                value = _parsed(parameter, given[parameter.name])
            except ValueError:
                return None
        if value is REQUIRED:
            return None
        callback = _declared(parameter).settings.get("callback")
        values[parameter.name] = callback(value) if callback else value
    return values


def _parsed(parameter: Parameter, texts: Sequence[str]) -> Any:
    """The value that is meant; a `ValueError` for one that Typer should refuse."""
    settings, kind = _declared(parameter).settings, value_type(parameter)
    if _repeats(parameter):
        kind = get_args(kind)[0]
    parse = settings.get("parser", (lambda text: True) if kind is bool else kind)
    values = [parse(text) for text in texts]
    if not all(settings.get("min", v) <= v <= settings.get("max", v) for v in values):
        raise ValueError(texts)
    return values if _repeats(parameter) else values[0]


def _is_simple(parameter: Parameter) -> bool:
    """Whether values in one known way are all that the parameter takes."""
    declared: object = _declared(parameter)
    if not isinstance(declared, Option | Argument):
        return False
    odd = declared.settings.keys() & {"envvar", "default_factory", "exists"}
    repeats = isinstance(declared, Option) and _repeats(parameter)
    return not odd and ("parser" in declared.settings or repeats or value_type(parameter) in PLAIN)


def _declared(parameter: Parameter) -> Declared:
    metadata: tuple[Declared, ...] = getattr(parameter.annotation, "__metadata__", ())
    return metadata[0] if metadata else Declared()


def _repeats(parameter: Parameter) -> bool:
    """Whether an option may be given several times."""
    kind = value_type(parameter)
    return get_origin(kind) is list and get_args(kind)[0] in PLAIN


def value_type(parameter: Parameter) -> Any:
    """The type of the value, `None` left aside."""
    kind = parameter.annotation.__origin__
    types = [one for one in get_args(kind) if one is not type(None)]
    return types[0] if len(types) == 1 and type(None) in get_args(kind) else kind
