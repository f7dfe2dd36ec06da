"""The plain part of YAML, in which the shipped presets are written.

Importing PyYAML takes as long as an estimate. Here are mappings and sequences, by indentation or
in brackets, words, numbers, text in double quotes, folded text (`>-`) and comments. Anything else
is left to PyYAML and never guessed: the tests read every shipped preset both ways, and damage them
at random.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import dropwhile
from typing import Any, NamedTuple


def read(text: str) -> Any:
    """The value of a plain document, or `None` for one that PyYAML should read."""
    try:
        return _block([_line(line) for line in text.removesuffix("\n").split("\n")])
    except _NotPlainError:
        return None


class _NotPlainError(ValueError):
    """Something that only PyYAML should read."""


class _Line(NamedTuple):
    indent: int
    text: str

    @property
    def is_comment(self) -> bool:
        return self.text.startswith("#")


_INDICATORS = frozenset("-+.?:,[]{}#&*!|>'\"%@`")
"""What a plain word does not begin with here; YAML has a meaning for some of it."""
_DOCUMENT = ("---", "...", "%")
_NUMERIC = frozenset("-0123456789")
_WORDS = {"true": True, "false": False, "null": None}
_RESERVED = frozenset({"true", "false", "null", "yes", "no", "on", "off", "~", "=", "<<"})
_INTEGER = re.compile(r"-?(?:0|[1-9](?:_?[0-9])*)")
_FLOAT = re.compile(r"-?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?")
_OTHER_NUMBER = re.compile(r"[0-9][-+0-9_.:eEtTzZ ]*|0[bx].*")
"""What may be a number or a date in one of YAML's other notations."""
_QUOTED = re.compile(r'"(?:[^"\\]|\\")*"')
_TOKEN = re.compile(_QUOTED.pattern + r'|[\[\]{},]|: |[^\[\]{},:"#\t]+|.')


def _line(line: str) -> _Line:
    text = line.lstrip(" ")
    if not text or not line.isprintable() or text[-1] == " " or text.startswith(_DOCUMENT):
        raise _NotPlainError(line)
    return _Line(len(line) - len(text), text)


def _block(lines: Sequence[_Line]) -> Any:
    """The value of some lines: a sequence, a mapping, or what is written inline."""
    lines = list(dropwhile(lambda line: line.is_comment, lines))
    if not lines:
        raise _NotPlainError
    if lines[0].text.startswith("- "):
        return [_block(_item(entry)) for entry in _entries(lines)]
    if _key(lines[0].text)[0] is None:
        return _inline(lines)
    made: dict[str, Any] = {}
    for (_, text), *below in _entries(lines):
        key, value = _key(text)
        if key is None or key in made:
            raise _NotPlainError(text)
        made[key] = _value(value, below)
    return made


def _entries(lines: Sequence[_Line]) -> list[list[_Line]]:
    """Each line that is indented like the first, with those below it that belong to it."""
    found: list[list[_Line]] = []
    for line in lines:
        if line.text == "-" or (line.indent < lines[0].indent and not line.is_comment):
            raise _NotPlainError(line.text)
        if line.indent == lines[0].indent and not line.is_comment:
            found.append([])
        found[-1].append(line)
    return found


def _item(entry: Sequence[_Line]) -> list[_Line]:
    """An entry of a sequence without its dash; what follows the dash is indented by two."""
    indent, text = entry[0]
    if not text.startswith("- ") or text.startswith("-  "):
        raise _NotPlainError(text)
    return [_Line(indent + 2, text[2:]), *entry[1:]]


def _key(text: str) -> tuple[str | None, str]:
    """The key of a line of a mapping and the text beside it; no key if it is not such a line."""
    key, colon, value = text.partition(": ")
    if not colon and text.endswith(":"):
        key, colon = text[:-1], ":"
    if not colon or key.startswith(('"', "'", "[", "{")):
        return None, ""
    if " #" in key:
        raise _NotPlainError(text)
    return _word(key.rstrip(" ")), value.strip(" ")


def _value(text: str, below: Sequence[_Line]) -> Any:
    said = _shortened(text).strip()
    if not said:
        return _block(below)
    return _folded(below) if said == ">-" else _inline([_Line(0, text), *below])


def _folded(lines: Sequence[_Line]) -> str:
    """Lines of one indentation as one line of text."""
    if not lines or any(line.indent != lines[0].indent or "#" in line.text for line in lines):
        raise _NotPlainError
    return " ".join(line.text for line in lines)


def _inline(lines: Sequence[_Line]) -> Any:
    """A scalar, or a collection in brackets, perhaps over several lines."""
    text = "\n".join(_shortened(line.text) for line in lines).rstrip()
    if not text.startswith(("[", "{")):
        return _scalar(text)
    tokens = [
        found if found == ": " else found.lstrip().rstrip(" ") for found in _TOKEN.findall(text)
    ]
    value, rest = _flow([token for token in tokens if token])
    if rest:
        raise _NotPlainError(rest)
    return value


def _shortened(text: str) -> str:
    """A line with a tab for its comment, because a word ends there."""
    if "#" not in text:
        return text
    if text.startswith("#"):
        return "\t"
    before, comment, _ = text.partition(" #")
    if comment and (before.count('"') % 2 or before.startswith("'")):
        raise _NotPlainError(text)
    return before.rstrip(" ") + "\t" if comment else text


def _flow(tokens: Sequence[str]) -> tuple[Any, Sequence[str]]:
    """The value that the tokens begin with, and those after it."""
    if not tokens:
        raise _NotPlainError
    first, rest = tokens[0], tokens[1:]
    if first == "[":
        return _flow_sequence(rest)
    return _flow_mapping(rest) if first == "{" else (_scalar(first), rest)


def _flow_sequence(rest: Sequence[str]) -> tuple[list[Any], Sequence[str]]:
    made: list[Any] = []
    while rest[:1] != ["]"]:
        value, rest = _flow(rest)
        made.append(value)
        rest = _after_comma(rest, "]")
    return made, rest[1:]


def _flow_mapping(rest: Sequence[str]) -> tuple[dict[str, Any], Sequence[str]]:
    made: dict[str, Any] = {}
    while rest[:1] != ["}"]:
        if rest[1:2] != [": "] or rest[0] in made:
            raise _NotPlainError(rest)
        key = _word(rest[0])
        made[key], rest = _flow(rest[2:])
        rest = _after_comma(rest, "}")
    return made, rest[1:]


def _after_comma(rest: Sequence[str], end: str) -> Sequence[str]:
    if rest[:1] not in ([","], [end]):
        raise _NotPlainError(rest)
    return rest[1:] if rest[0] == "," else rest


def _scalar(text: str) -> str | int | float | bool | None:
    """A word, a number, or text in double quotes; its lines are joined."""
    text = text.rstrip().replace("\n", " ")
    if text[:1] in _NUMERIC:
        if _INTEGER.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
    elif _QUOTED.fullmatch(text):
        return text[1:-1].replace('\\"', '"')
    elif text in _WORDS:
        return _WORDS[text]
    return _word(text)


def _word(text: str) -> str:
    """Text without quotes that YAML takes as it stands."""
    if not text or text[0] in _INDICATORS or text[-1] == ":":
        raise _NotPlainError(text)
    if ": " in text or "\t" in text or "\n" in text or text.lower() in _RESERVED:
        raise _NotPlainError(text)
    if text[0] in _NUMERIC and _OTHER_NUMBER.fullmatch(text):
        raise _NotPlainError(text)
    return text
