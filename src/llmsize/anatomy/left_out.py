"""Parts of a checkpoint beside the language model that are not counted, by its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsize.anatomy.towers import towers

PREDICTORS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""Fields with the number of layers that predict the tokens after the next one."""


def left_out(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the checkpoint of this configuration may hold besides, in words."""
    found = [f"the {name}" for name, parameters in towers(config, "") if parameters is None]
    counts = [config.get(field) for field in PREDICTORS]
    layers = max((n for n in counts if isinstance(n, int) and n > 0), default=0)
    if layers:
        found.append(f"{layers} multi-token-prediction layer{'s' if layers > 1 else ''}")
    return tuple(dict.fromkeys(found))
