"""Answers to the tables of models: exact parameter counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.answers import Answer
from llmsize import presets
from llmsize.anatomy import traced
from llmsize.anatomy.parameters import count
from llmsize.architecture import Architecture
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


OF_THE_CLASS = {
    "moonshotai/Kimi-Linear-48B-A3B-Instruct": {
        "layer_types": [
            "full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(27)
        ],
    },
}
"""Defaults of transformers that the Hub's configuration, and so the preset, has otherwise: the
class has full attention in six layers, the checkpoint in seven."""


def configured(row: Mapping[str, Any]) -> Architecture:
    """The model of a row; one without a configuration points to the defaults of transformers."""
    if isinstance(row["config"], dict):
        given = {"model_type": row["model_type"], **row["config"]}
        return architecture(given, "model_configs.json", row["hf_id"])
    preset = presets.get(Architecture, row["hf_id"])
    return replace(preset, config={**preset.config, **OF_THE_CLASS.get(row["hf_id"], {})})


def model_configs(rows: Iterable[Mapping[str, Any]]) -> Iterator[Answer]:
    """Totals and active parameters of published configurations."""
    for row in rows:
        try:
            counted = count(traced(configured(row)).weights.values())
        except LLMSizeError:
            counted = None
        yield Answer(row["hf_id"], "params_total", row["params_total"], counted and counted.total)
        if row["params_active"]:
            active = counted and counted.active
            yield Answer(row["hf_id"], "params_active", row["params_active"], active)
