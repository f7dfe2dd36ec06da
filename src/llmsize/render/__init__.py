"""An estimate as text: one function per output format, each imported when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Literal, NamedTuple, get_args

from llmsize.answer import Estimate

OutputFormat = Literal["table", "plain", "json", "csv", "markdown"]
OUTPUT_FORMATS: tuple[OutputFormat, ...] = get_args(OutputFormat)

_MODULES: dict[OutputFormat, str] = {
    "table": "terminal",
    "plain": "plain",
    "json": "as_json",
    "csv": "as_csv",
    "markdown": "markdown",
}


class Style(NamedTuple):
    """How to show an estimate."""

    explain: bool = False
    """Show formula, values, source and grade under every number."""
    width: int | None = None
    """Columns to stay within; `None` never wraps and never cuts."""
    color: bool = False


def render(estimate: Estimate, format: OutputFormat, style: Style | None = None) -> str:
    """The estimate as text in `format`, with a final newline."""
    module = import_module(f"llmsize.render.{_MODULES[format]}")
    text: str = module.render(estimate, style or Style())
    return text
