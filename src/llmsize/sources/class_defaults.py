"""What a model's class takes for a field that its `config.json` does not state."""

from __future__ import annotations

from collections.abc import Mapping

from llmsize import presets
from llmsize.architecture import Default, Value

BASICS = frozenset((
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
))  # fmt: skip
"""What the configuration of a whole model states itself: without it, something is wrong. Models
for several media are published with only those fields of their language model that differ."""

SYNONYMS = (
    frozenset(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")),
    frozenset((
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k",
        "top_k_experts",
    )),
    frozenset(("n_shared_experts", "num_shared_experts", "num_shared_expert")),
)  # fmt: skip
"""Fields that say the same in configurations of different age."""


def absent(family: str, config: Mapping[str, object], *, nested: bool) -> Mapping[str, Value]:
    """The fields that the class of that `model_type` adds to `config`, with their values.

    `nested` says that it is the language model's part of a configuration.
    """
    default = presets.find(Default, family)
    return {
        field: value
        for field, value in (default.fields if default else {}).items()
        if (nested or field not in BASICS) and not _states(config, field)
    }


def _states(config: Mapping[str, object], field: str) -> bool:
    alike = next((group for group in SYNONYMS if field in group), frozenset((field,)))
    return not alike.isdisjoint(config)
