"""Options and arguments as data, so that a command line can be read without importing Typer.

They take what `typer.Option` and `typer.Argument` take, and become those where Typer is needed.
Options that go together are the annotated fields of a named tuple, a *group*: a command takes the
group as one parameter, the command line has every field of it, and the help shows them together
below the first line of its docstring. A field may be a group itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from llmsize import units
from llmsize.errors import one_of, quoted

if TYPE_CHECKING:
    import inspect


class Declared:
    """What an annotated parameter of a command is called, and how Typer shows it."""

    __slots__ = ("names", "settings")

    def __init__(self, *names: str, **settings: Any) -> None:
        """Names with their dashes, and settings of Typer."""
        self.names = names
        self.settings = settings


class Option(Declared):
    """`--name VALUE`, or a flag."""

    __slots__ = ()


class Argument(Declared):
    """A word without a name, told by its place."""

    __slots__ = ()


REQUIRED: Any = object()
"""In place of a default: a value has to be given."""


class Parameter(NamedTuple):
    """A parameter of a command, its annotation evaluated, and its default if it has one."""

    name: str
    annotation: Any
    default: Any = REQUIRED


def for_python(parameter: Parameter, word: str, *, positional: bool = False) -> inspect.Parameter:
    """The parameter `word` of a function, which has a name alone unless it is `positional`."""
    import inspect  # slow

    kinds = inspect.Parameter
    return inspect.Parameter(
        word,
        kinds.POSITIONAL_OR_KEYWORD if positional else kinds.KEYWORD_ONLY,
        default=kinds.empty if parameter.default is REQUIRED else parameter.default,
        annotation=parameter.annotation,
    )


def defaults(command: Callable[..., Any]) -> Mapping[str, Any]:
    """The defaults of a command's parameters, or of the fields of a group, by name."""
    if is_group(command):
        return command._field_defaults  # type: ignore[attr-defined, no-any-return]
    code, given = command.__code__, command.__defaults__ or ()
    last = code.co_varnames[code.co_argcount - len(given) : code.co_argcount]
    return dict(zip(last, given, strict=True)) | (command.__kwdefaults__ or {})


def counting(*names: str, what: str, kind: type[float] = int, **settings: Any) -> Option:
    """An option that takes a whole number above zero: `4096`, `8k`, `7B`.

    `what` it counts is said where the number cannot be read.
    """
    return Option(*names, parser=lambda text: kind(units.parse_count(str(text), what)), **settings)


def choosing(
    *names: str, known: Collection[str], what: str, help: str = "", **settings: Any
) -> Declared:
    """An option, or without names an argument, that takes one of the names in `known`.

    The names end its help and complete it; one that is none of them is an unknown `what`.
    """

    def name(text: str) -> str:  # the help shows a parser's own name
        return one_of(text, known, what)

    make = Option if names else Argument
    return make(
        *names,
        parser=name,
        autocompletion=lambda incomplete: [
            name for name in known if name.lower().startswith(incomplete.lower())
        ],
        help=f"{help}: {quoted(known)}." if help else f"{quoted(known)}.",
        **settings,
    )


def headed(declared: Declared, heading: str) -> Declared:
    """The same below a heading in the help."""
    return type(declared)(*declared.names, **declared.settings | {"rich_help_panel": heading})


def is_group(annotation: object) -> bool:
    """Whether a parameter so annotated stands for the options that its fields are."""
    return isinstance(annotation, type) and hasattr(annotation, "_fields")
