"""Where a model's shape and stored bytes come from: presets, files, folders, the Hub."""

from __future__ import annotations

from llmsize.sources.local import Source
from llmsize.sources.resolve import resolve

__all__ = ["Source", "resolve"]
