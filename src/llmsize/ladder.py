"""Known models by size: a shape to assume where only a parameter count is given."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, log

from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.quick_dataclasses import dataclass

SPAN = 1.25
"""Models whose counts differ by less than this factor are of one size."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """Published parameter counts of models that differ mostly in size."""

    name: str
    rungs: Mapping[str, int]
    """Parameters by model preset."""
    source: str


def nearest(ladder: Ladder, parameters: int) -> str:
    """The model whose count has the smallest ratio to `parameters`.

    Raises `LLMSizeError` for a ladder without rungs, or with one of no parameters.
    """
    if not ladder.rungs or min(ladder.rungs.values()) < 1:
        raise LLMSizeError(
            f"ladder `{ladder.name}` has no rungs, or one of no parameters",
            hint="give its models, each with its published count",
        )
    return min(ladder.rungs, key=lambda name: abs(log(ladder.rungs[name] / parameters)))


def of_size(ladder: Ladder, parameters: int) -> list[str]:
    """The models within a factor of `SPAN`, smallest first; none if the size is unusual."""
    least, most = parameters / SPAN, parameters * SPAN
    near = [name for name, count in ladder.rungs.items() if least <= count <= most]
    return sorted(near, key=ladder.rungs.__getitem__)


HEAD = 128
"""Channels of a head in nearly every model of a billion parameters and more, …"""
KEYS = 8
"""… and heads of keys (Llama 3, Qwen 2.5 and 3, Mistral)."""
BLOCK = 256
"""Widths of feed-forward layers are multiples of it (meta-llama/llama, model.py: `multiple_of`)."""


def typical_depth(parameters: int) -> float:
    """Layers of a decoder of about so many parameters, as a number between whole depths.

    Width is 128 × depth, and 12 × depth × width² parameters are in the layers (Kaplan et al. 2020,
    arXiv:2001.08361, section 2.1; Llama 2 7B has 32 layers of 4096).
    """
    return float((parameters / (12 * HEAD**2)) ** (1 / 3))


def typical(layers: int) -> Architecture:
    """A decoder of that depth with the usual proportions, for no model in particular.

    It has 8 heads of keys. A depth that is a multiple of 8, as nearly all are, lets heads and
    quantized blocks come out even.
    """
    return Architecture(
        name=f"typical-{layers}-layers",
        family="llama",
        config={
            "num_hidden_layers": layers,
            "hidden_size": HEAD * layers,
            "num_attention_heads": layers,
            "num_key_value_heads": KEYS,
            "head_dim": HEAD,
            "intermediate_size": ceil(8 * HEAD * layers / 3 / BLOCK) * BLOCK,
            "vocab_size": 32_000,
        },
        source="Kaplan et al. 2020, arXiv:2001.08361, section 2.1",
        grade="assumed",
    )
