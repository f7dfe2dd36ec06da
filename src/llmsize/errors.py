"""The one error that users see: what was wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable

MISUSE = 2
UNDETERMINED = 3


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
    """A hint that offers up to three known names close to `name`, or `otherwise`."""
    import difflib

    close = difflib.get_close_matches(name.lower(), list(known), n=3, cutoff=0.6)
    if not close:
        return otherwise
    return "did you mean " + " or ".join(f"`{match}`" for match in close) + "?"


def printable(text: str, limit: int = 80) -> str:
    """`text` from outside, safe to show: control characters escaped, length bounded."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
