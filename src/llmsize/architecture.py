"""What a model is: a family and the numbers its published configuration gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsize.quick_dataclasses import dataclass, field
from llmsize.term import Grade


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model's shape, as its `config.json` states it, and what is known of it."""

    name: str
    family: str
    """The `model_type`; it selects the forward pass in `anatomy/families/`."""
    config: Mapping[str, Any] = field(hash=False)
    """The fields of `config.json` in Hugging Face naming; a nested text model is unfolded."""
    source: str
    title: str = ""
    hub_id: str = ""
    """`organisation/name` on the Hugging Face Hub."""
    aliases: tuple[str, ...] = ()
    """Other names it answers to; fine-tunes of the same shape among them."""
    published_parameters: int | None = None
    """The count of the checkpoint or the model card: the answer key of the anatomy."""
    active_parameters: int | None = None
    """Published parameters that one token uses, for a mixture of experts."""
    context_length: int | None = None
    """Tokens, as published."""
    licence: str = ""
    commercial: bool | None = None
    """Whether the licence allows commercial use; absent where it depends."""
    released: str = ""
    """Year and month."""
    grade: Grade = "exact"
    """`assumed` where the shape was guessed."""
    note: str = ""
    stored: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """`quantization_config` of the checkpoint, if it has one."""


Value = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Default:
    """What the class of a `model_type` takes for fields that a `config.json` does not state."""

    name: str
    """The `model_type`."""
    fields: Mapping[str, Value] = field(hash=False)
    """Those that shape the model, by name."""
    source: str
