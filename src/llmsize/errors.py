"""The one error that users see: what was wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeVar

MISUSE = 2
UNDETERMINED = 3

Name = TypeVar("Name", bound=str)


class LLMSizeError(Exception):
    """A mistake in the input, noticed where it is made.

    The CLI prints `error: message` and `hint: hint` and exits with `exit_code`.
    """

    exit_code = MISUSE

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UndeterminedError(LLMSizeError):
    """The question is sound but cannot be answered here (no network, no such data)."""

    exit_code = UNDETERMINED


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str) -> str:
    """A hint that offers up to three known names close to `name`, or `otherwise`.

    First those that go on where it stops, whatever is between its words: `llama3`, `Llama 3`.
    """
    import difflib

    names = list(dict.fromkeys(known))
    longer = sorted((other for other in names if _goes_on(name, other)), key=len)
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.6)
    offered = list(dict.fromkeys((*longer, *close)))[:3]
    if not offered:
        return otherwise
    return "did you mean " + " or ".join(f"`{match}`" for match in offered) + "?"


def _goes_on(name: str, other: str) -> bool:
    """Whether `other` begins with the letters and digits of `name`, and not within a number."""
    wanted = [c for c in name.lower() if c.isalnum()]
    if len(wanted) < 3:
        return False
    places = [at for at, c in enumerate(other) if c.isalnum()][: len(wanted)]
    rest = other[places[-1] + 1 :] if places else ""
    return [other[at] for at in places] == wanted and not (
        wanted[-1].isdigit() and rest[:1].isdigit()
    )


def one_of(text: str, known: Collection[Name], what: str) -> Name:
    """The one of a closed set of names that `text` means, in whatever case.

    Raises `LLMSizeError` for an unknown `what`, with close names or else with all of them.
    """
    wanted = text.strip().lower()
    for name in known:
        if name.lower() == wanted:
            return name
    raise LLMSizeError(
        f"unknown {what} `{printable(text)}`",
        hint=did_you_mean(text, known, otherwise=f"choose from {quoted(known)}"),
    )


def quoted(names: Iterable[str]) -> str:
    """Names as a text lists them: `fp32`, `bf16`."""
    return ", ".join(f"`{name}`" for name in names)


def printable(text: str, limit: int = 80) -> str:
    """`text` from outside, safe to show: control characters escaped, length bounded."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
