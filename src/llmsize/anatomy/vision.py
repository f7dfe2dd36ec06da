"""Parameters of vision towers, from the `vision_config` of a checkpoint.

transformers v5.23.0, models/{siglip,clip,pixtral,qwen2_vl,qwen2_5_vl,qwen3_vl}. Of the layers
between tower and language model, those are counted that are inside the tower (Qwen's mergers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmsize.anatomy.config import Config

COLOURS = 3


def tower_parameters(config: Mapping[str, Any], model: str) -> int | None:
    """Parameters of the vision tower; `None` where there is none that llmsize knows.

    Raises `LLMSizeError` for a tower whose configuration is not well formed.
    """
    given = config.get("vision_config")
    if not isinstance(given, Mapping):
        return None
    kind = str(given.get("model_type", "")) or str(config.get("model_type", ""))
    counted = KINDS.get(kind)
    return counted(Config(given, model)) if counted else None


def _linear(inputs: int, outputs: int) -> int:
    """With a bias."""
    return (inputs + 1) * outputs


def _encoder(c: Config) -> int:
    """Attention and a plain MLP, each behind a layer norm."""
    hidden, width = c.size("hidden_size", default=768), c.size("intermediate_size", default=3072)
    each = 4 * hidden + 4 * _linear(hidden, hidden) + _linear(hidden, width)
    return c.few("num_hidden_layers", default=12) * (each + _linear(width, hidden))


def _siglip(c: Config) -> int:
    hidden, patch = c.size("hidden_size", default=768), c.size("patch_size", default=16)
    patches = (c.size("image_size", default=224) // patch) ** 2
    embedded = _linear(COLOURS * patch * patch, hidden) + patches * hidden
    pooled = 0
    if c.flag("vision_use_head", default=True):
        width = c.size("intermediate_size", default=3072)
        pooled = hidden + 4 * _linear(hidden, hidden) + 2 * hidden
        pooled += _linear(hidden, width) + _linear(width, hidden)
    return embedded + _encoder(c) + 2 * hidden + pooled


def _clip(c: Config) -> int:
    hidden, patch = c.size("hidden_size", default=768), c.size("patch_size", default=32)
    patches = (c.size("image_size", default=224) // patch) ** 2
    embedded = COLOURS * patch * patch * hidden + (patches + 2) * hidden
    return embedded + _encoder(c) + 4 * hidden


def _pixtral(c: Config) -> int:
    hidden, width = c.size("hidden_size", default=1024), c.size("intermediate_size", default=4096)
    patch = c.size("patch_size", default=16)
    each = 2 * hidden + 4 * hidden * hidden + 3 * hidden * width
    layers = c.few("num_hidden_layers", default=24)
    return COLOURS * patch * patch * hidden + hidden + layers * each


def _qwen2(c: Config) -> int:
    hidden, ratio = c.size("embed_dim", default=1280), c.size("mlp_ratio", default=4)
    each = 4 * hidden + _linear(hidden, 3 * hidden) + _linear(hidden, hidden)
    each += _linear(hidden, ratio * hidden) + _linear(ratio * hidden, hidden)
    merger = 2 * hidden + _merger(c, hidden, c.size("hidden_size", default=3584))
    return _patches(c, hidden, 14) + c.few("depth", default=32) * each + merger


def _qwen2_5(c: Config) -> int:
    hidden, width = c.size("hidden_size", default=3584), c.size("intermediate_size", default=3420)
    each = 2 * hidden + _linear(hidden, 3 * hidden) + _linear(hidden, hidden)
    each += 2 * _linear(hidden, width) + _linear(width, hidden)
    merger = hidden + _merger(c, hidden, c.size("out_hidden_size", default=3584))
    return _patches(c, hidden, 14) + c.few("depth", default=32) * each + merger


def _qwen3(c: Config) -> int:
    hidden, width = c.size("hidden_size", default=1152), c.size("intermediate_size", default=4304)
    each = 4 * hidden + _linear(hidden, 3 * hidden) + _linear(hidden, hidden)
    each += _linear(hidden, width) + _linear(width, hidden)
    merger = _merger(c, hidden, c.size("out_hidden_size", default=3584))
    deep = c.sequence("deepstack_visual_indexes")
    deeper = 3 if deep is None else len(deep)
    merged = c.size("spatial_merge_size", default=2) ** 2 * hidden
    positions = c.size("num_position_embeddings", default=2304) * hidden
    patches = _patches(c, hidden, 16) + hidden + positions
    layers = c.few("depth", default=27) * each
    return patches + layers + merger + 2 * hidden + deeper * (merger + 2 * merged)


def _patches(c: Config, hidden: int, patch: int) -> int:
    """A convolution over patches of two frames."""
    side = c.size("patch_size", default=patch)
    return COLOURS * c.size("temporal_patch_size", default=2) * side * side * hidden


def _merger(c: Config, hidden: int, out: int) -> int:
    """An MLP from a square of patches to one token."""
    merged = c.size("spatial_merge_size", default=2) ** 2 * hidden
    return _linear(merged, merged) + _linear(merged, out)


KINDS: Mapping[str, Callable[[Config], int]] = {
    "siglip_vision_model": _siglip, "clip_vision_model": _clip, "pixtral": _pixtral,
    "qwen2_vl": _qwen2, "qwen2_5_vl": _qwen2_5, "qwen3_vl": _qwen3, "qwen3_vl_moe": _qwen3,
}  # fmt: skip
"""`model_type` of the tower, or of the model where the tower states none."""
