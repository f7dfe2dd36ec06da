"""Options and arguments as data, so that a command line can be read without importing Typer.

They take what `typer.Option` and `typer.Argument` take, and become those where Typer is needed.
"""

from __future__ import annotations

from typing import Any


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
