"""Commands as functions: the public API of llmsize."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cache, cached_property, wraps
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, NamedTuple, get_origin

from llmsize.answer import Drawn, Estimate
from llmsize.cli import answering
from llmsize.cli.answering import SHARED, load, parameters
from llmsize.cli.declare import REQUIRED, Argument, Declared, Parameter, for_python
from llmsize.cli.direct import EMPTY_HINT, value_type
from llmsize.collector import collector_paused
from llmsize.errors import LLMSizeError

if TYPE_CHECKING:
    import inspect


class Word(NamedTuple):
    """A parameter of a command, by the word that it is in Python."""

    name: str
    parameter: Parameter
    kind: Any
    """The type of its value."""
    settings: Mapping[str, Any]
    """What its option has: a parser, the least value, …"""
    positional: bool
    """Whether it may be given without its name."""


class Shown:
    """What `inspect` and `help` find behind a function: the command, and the words it takes here.

    Those are shown when somebody looks: to import `inspect` takes as long as some questions.
    """

    def __init__(self, command: Callable[..., Any], words: Collection[Word]) -> None:
        """In the order in which the words are shown."""
        self.__wrapped__ = command
        self._words = words

    @cached_property
    def __signature__(self) -> inspect.Signature:
        from inspect import Signature

        words = sorted(self._words, key=lambda word: not word.positional)
        return Signature([*map(_for_python, words)], return_annotation=Estimate)


@cache
def function(name: str) -> Callable[..., Estimate]:
    """The command `name` as a function of the command's words: `--seq-len` is `seq_len`.

    Values are numbers or the text that the command line takes: `24 * 10**9` or `"24GB"`. Raises
    `LLMSizeError` for what the command refuses, `TypeError` for unknown words.
    """
    _, command = load(name)
    known = {word.name: word for word in map(_word, parameters(command)[: -len(SHARED)])}
    usual = {word.parameter.name: word.parameter.default for word in known.values()}
    places = [word.name for word in known.values() if word.positional]
    required = {word.name for word in known.values() if word.parameter.default is REQUIRED}
    shown = Shown(command, known.values())

    @wraps(command)
    def ask(*arguments: Any, **words: Any) -> Estimate:
        asked = dict(zip(places, arguments, strict=False)) | words
        if len(asked) < len(arguments) + len(words) or not required <= asked.keys() <= known.keys():
            shown.__signature__.bind(*arguments, **words)  # which says what is wrong
        values = dict(usual)
        for word, given in asked.items():
            if given == "":
                raise LLMSizeError(f"`{word}` is empty", hint=EMPTY_HINT)
            values[known[word].parameter.name] = _value(known[word], given)
        with collector_paused():
            found = answering.ask(command, values)
        answer: Estimate = found.estimate if isinstance(found, Drawn) else found
        return answer

    ask.__wrapped__ = shown  # type: ignore[assignment]
    ask.__doc__ = f"{command.__doc__}\n\n    Words:\n{_described(known)}"
    return ask


def _word(parameter: Parameter) -> Word:
    """By its name on the command line without its dashes, where Python takes it for a name."""
    declared = _declared(parameter)
    long = [name for name in declared.names if name.startswith("--")]
    word = long[0].split("/")[0].lstrip("-").replace("-", "_") if long else parameter.name
    name = parameter.name if iskeyword(word) else word
    positional = isinstance(declared, Argument)
    return Word(name, parameter, value_type(parameter), declared.settings, positional)


def _declared(parameter: Parameter) -> Declared:
    declared: Declared = parameter.annotation.__metadata__[0]
    return declared


def _for_python(word: Word) -> inspect.Parameter:
    """As a signature shows it: with the bare type."""
    parameter = word.parameter
    plain = parameter._replace(annotation=parameter.annotation.__origin__)
    return for_python(plain, word.name, positional=word.positional)


def _described(known: Mapping[str, Word]) -> str:
    """What every word means, a line each, as the help of the command line has it."""
    return "".join(
        f"        {name}: {word.settings.get('help', '')}\n" for name, word in known.items()
    )


def _value(word: Word, given: Any) -> Any:
    """What a word means, as the command line would take it."""
    if given is word.parameter.default:
        return given
    several = list(given) if isinstance(given, list | tuple) else [given]
    if get_origin(word.kind) is list:
        value: Any = [_single(word, str, one) for one in several]
    elif word.kind is str and len(several) > 1:
        value = ",".join(_single(word, str, one) for one in several)
    else:
        value = _single(word, word.kind, given)
    callback = word.settings.get("callback")
    return callback(value) if callback else value


def _single(word: Word, kind: Any, given: Any) -> Any:
    """One value, read by the option's own parser if it has one, else as its type is written.

    Raises `LLMSizeError` for what no command line could say.
    """
    settings = word.settings
    parse = settings.get("parser")
    try:
        if parse:
            value = _number(parse, given) if _is_number(given) else parse(_written(given))
        elif kind is bool:
            value = {True: True, False: False}[given]
        else:
            value = kind(_written(given))
    except (KeyError, TypeError, ValueError):
        raise LLMSizeError(
            f"`{word.name}` is a {type(given).__name__}, {given!r:.40}",
            hint=f"it takes what the command line does: {settings.get('help', '')}",
        ) from None
    if _is_number(value):
        least, most = settings.get("min", value), settings.get("max", value)
        if not least <= value <= most:
            beyond = f"below {least}" if value < least else f"above {most}"
            raise LLMSizeError(f"`{word.name}` of {value} is {beyond}", hint="give one that is not")
    return value


def _written(given: Any) -> str:
    """A text, a number or a path as the command line has it. `TypeError` for anything else."""
    return _text(given) if _is_number(given) else os.fspath(given)


def _number(parse: Callable[[str], Any], given: int | float) -> Any:
    """A number as its text would be read; one that needs a unit of memory is bytes."""
    try:
        return parse(_text(given))
    except LLMSizeError:
        with suppress(LLMSizeError):
            return parse(f"{given / 1000:.3f}KB")  # of counts, `B` would be billions
        raise


def _text(number: int | float) -> str:
    return str(int(number)) if number == number // 1 else str(number)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
