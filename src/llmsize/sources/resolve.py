"""From what a user writes for a model to the model."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError, did_you_mean, printable
from llmsize.sources import hub
from llmsize.sources.config import read_stdin
from llmsize.sources.local import SUFFIXES, Source, read_path
from llmsize.sources.reading import kind_of

STDIN = "-"
HUB_PREFIX = "hf:"
_COUNT = re.compile(r"\d[\d._]{,20}[kmbt]?", re.IGNORECASE | re.ASCII)
"""A parameter count where a model is asked for: `7B`."""


def resolve(text: str) -> Source:
    """The model that `text` stands for, from the nearest place that has it.

    `-` is a `config.json` on standard input; `hf:organisation/name@revision` a model of the Hub; a
    path is a file or folder; a bare name is a preset. `organisation/name` without `hf:` is a folder
    of that name, the Hub's cache, a preset with that Hub id, or the Hub, in this order.

    Raises `LLMSizeError` for a text that stands for nothing, and for a broken file.
    """
    if text == STDIN:
        return Source("standard input", read_stdin())
    if text.startswith(HUB_PREFIX):
        model = hub.parse(text.removeprefix(HUB_PREFIX))
        return hub.cached(model) or hub.fetch(model)
    if _is_written_as_path(text):
        return read_path(Path(text))
    is_hub_id = hub.is_hub_id(text)
    if not is_hub_id and (preset := _preset(text)):
        return preset
    if text.strip() and kind_of(Path(text)):
        return read_path(Path(text))
    if is_hub_id:
        model = hub.parse(text)
        return hub.cached(model) or _preset(text) or hub.fetch(model)
    raise LLMSizeError(f"unknown model `{printable(text)}`", hint=_hint(text))


def _is_written_as_path(text: str) -> bool:
    separators = (os.sep, os.altsep or os.sep)
    return text.startswith((".", "~", *separators)) or text.endswith((*SUFFIXES, *separators))


def _preset(text: str) -> Source | None:
    preset = presets.find(Architecture, text)
    return Source(f"preset `{preset.name}`", preset) if preset else None


def _hint(text: str) -> str:
    if _COUNT.fullmatch(text.strip()):
        return f"for a model of any such size: `llmsize estimate --params {text.strip()}`"
    return did_you_mean(
        text.strip(),
        presets.names(Architecture),
        otherwise="give a preset (`llmsize show models`), a path or `organisation/name`",
    )
