"""What a multimodal checkpoint has beside its language model: towers and projectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from llmsize.anatomy.config import Config

WHOLE = "multimodal_config"
"""Where a language model's configuration keeps the plain fields of the model that it is part of."""

FIELDS = (
    ("vision_config", "vision tower"),
    ("vision_tower_config", "vision tower"),
    ("audio_config", "audio tower"),
)
"""Field that describes a tower, and what it is called."""


class Part(NamedTuple):
    """A part beside the language model."""

    name: str
    parameters: int | None
    """`None` where llmsize does not know that kind."""


def towers(config: Mapping[str, Any], model: str) -> tuple[Part, ...]:
    """Towers and projectors of a checkpoint, by the configuration of its language model.

    Raises `LLMSizeError` for one whose configuration is not well formed; `model` is named in it.
    """
    found = list(_towers(config, model))
    between = [part for part in found if part.name == "projector"]
    parts = [part for part in found if part.name != "projector"]
    if between:
        counts = [part.parameters for part in between if part.parameters is not None]
        whole = sum(counts) if len(counts) == len(between) else None
        parts += [Part("projector", whole)] if whole != 0 else []
    return tuple(parts)


def _towers(config: Mapping[str, Any], model: str) -> Iterator[Part]:
    """Each tower and what is between it and the language model."""
    described = [(name, config[field]) for field, name in FIELDS if config.get(field)]
    if not described:
        return  # most models have none
    from llmsize.anatomy import audio, projector, vision

    given = config.get(WHOLE)
    whole = Config(given if isinstance(given, Mapping) else config, model)
    for name, fields in described:
        tower = Config(fields if isinstance(fields, Mapping) else {}, model)
        kind = tower.text("model_type") or whole.text("model_type")
        count = (audio if name == "audio tower" else vision).KINDS.get(kind)
        parameters = count(tower) if count else None
        yield Part(name, parameters)
        if parameters is not None and kind not in vision.MERGING:
            between = projector.KINDS.get(whole.text("model_type"))
            width = Config(config, model).size("hidden_size", "n_embd", "d_model") if between else 0
            yield Part("projector", between(whole, tower, width) if between else None)
