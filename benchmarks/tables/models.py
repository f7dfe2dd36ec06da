"""Answers to the tables of models: exact parameter counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from benchmarks.answers import Answer
from llmsize.anatomy import traced
from llmsize.anatomy.parameters import count
from llmsize.errors import LLMSizeError
from llmsize.sources.config import architecture

Row = Mapping[str, str]

_FIELDS = {
    "total_params": "total",
    "active_params": "active",
    "embedding_params": "embedding",
    "lm_head_params": "head",
}


def param_counts(rows: Iterable[Row], directory: Path) -> Iterator[Answer]:
    """Totals, active, embedding and head parameters of every configuration."""
    for row in rows:
        try:
            config = json.loads((directory / row["config_file"]).read_text())
            model = architecture(config, row["config_file"], row["model"])
            counted = count(traced(model).weights.values())
        except (LLMSizeError, OSError):
            counted = None
        for column, field in _FIELDS.items():
            if row[column]:
                got = getattr(counted, field) if counted else None
                yield Answer(row["model"], column, int(row[column]), got)
