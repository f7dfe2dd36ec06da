"""Parts of a checkpoint beside the language model that are not counted, by its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PREDICTORS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""Fields with the number of layers that predict the tokens after the next one."""

TOWERS = {
    "vision_config": "the vision tower",
    "vision_tower_config": "the vision tower",
    "audio_config": "the audio tower",
}
"""Fields that describe a tower for another kind of input."""


def left_out(config: Mapping[str, Any], *, tower: bool = False) -> tuple[str, ...]:
    """What the checkpoint of this configuration may hold besides, in words.

    With `tower`, the vision tower is counted and so not among them.
    """
    found = [name for field, name in TOWERS.items() if config.get(field)]
    found = [name for name in found if not (tower and name == "the vision tower")]
    counts = [config.get(field) for field in PREDICTORS]
    layers = max((n for n in counts if isinstance(n, int) and n > 0), default=0)
    if layers:
        found.append(f"{layers} multi-token-prediction layer{'s' if layers > 1 else ''}")
    return tuple(dict.fromkeys(found))
