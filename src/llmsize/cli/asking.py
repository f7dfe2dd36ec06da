"""Commands as functions: the public API of llmsize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, wraps
from inspect import Signature
from keyword import iskeyword
from typing import Any

from llmsize.answer import Drawn, Estimate
from llmsize.cli import answering
from llmsize.cli.answering import SHARED, load, parameters
from llmsize.cli.declare import Argument, Declared, Parameter, for_python
from llmsize.cli.direct import EMPTY_HINT, value_type
from llmsize.errors import LLMSizeError


@cache
def function(name: str) -> Callable[..., Estimate]:
    """The command `name` as a function of the command's words: `--seq-len` is `seq_len`.

    Values are numbers or the text that the command line takes: `24 * 10**9` or `"24GB"`. Raises
    `LLMSizeError` for what the command refuses, `TypeError` for unknown words.
    """
    _, command = load(name)
    known = {_word(parameter): parameter for parameter in parameters(command)[: -len(SHARED)]}
    shape = Signature(
        sorted(
            (
                for_python(p, word, positional=isinstance(_declared(p), Argument))
                for word, p in known.items()
            ),
            key=lambda p: p.kind,
        )
    )

    @wraps(command)
    def ask(*arguments: Any, **words: Any) -> Estimate:
        bound = shape.bind(*arguments, **words)
        for word, given in bound.arguments.items():
            if given == "":
                raise LLMSizeError(f"`{word}` is empty", hint=EMPTY_HINT)
        bound.apply_defaults()
        values = {known[word].name: _value(known[word], v) for word, v in bound.arguments.items()}
        found = answering.ask(command, values)
        answer: Estimate = found.estimate if isinstance(found, Drawn) else found
        return answer

    ask.__signature__ = shape  # type: ignore[attr-defined]
    return ask


def _declared(parameter: Parameter) -> Declared:
    declared: Declared = parameter.annotation.__metadata__[0]
    return declared


def _word(parameter: Parameter) -> str:
    """The name on the command line without its dashes, where Python takes it for a name."""
    long = [name for name in _declared(parameter).names if name.startswith("--")]
    word = long[0].split("/")[0].lstrip("-").replace("-", "_") if long else parameter.name
    return parameter.name if iskeyword(word) else word


def _value(parameter: Parameter, given: Any) -> Any:
    """What a word means, as the command line would take it."""
    settings = _declared(parameter).settings
    if _is_number(given) and value_type(parameter) is str and "parser" not in settings:
        given = _text(given)
    if isinstance(given, Sequence) and not isinstance(given, str):
        value: Any = [_single(settings, _word(parameter), one) for one in given]
    else:
        value = _single(settings, _word(parameter), given)
    callback = settings.get("callback")
    return callback(value) if callback else value


def _single(settings: dict[str, Any], word: str, given: Any) -> Any:
    parse, number = settings.get("parser"), _is_number(given)
    if parse and number:
        value = _number(parse, given)
    else:
        value = parse(given) if parse and isinstance(given, str) else given
    if _is_number(value):
        least, most = settings.get("min", value), settings.get("max", value)
        if not least <= value <= most:
            raise LLMSizeError(
                f"`{word}` of {value} is not between {least} and {most}", hint="give one that is"
            )
    return value


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
