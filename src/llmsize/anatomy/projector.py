"""Parameters between a tower and the language model, from a multimodal configuration.

transformers v5.23.0, models/*/modeling_*.py, classes `*MultiModalProjector`, `*MultimodalEmbedder`
and `*Connector`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmsize.anatomy.config import Config
from llmsize.anatomy.vision import linear

Projector = Callable[[Config, Config, int], int]
"""From the configurations of the whole and of the tower, and the language model's width."""


def _features(whole: Config) -> int:
    """Layers of the tower whose results are taken, side by side."""
    value = whole.value("vision_feature_layer")
    return max(len(value), 1) if isinstance(value, list | tuple) else 1


def _gemma3(whole: Config, tower: Config, width: int) -> int:
    hidden = tower.size("hidden_size", default=768)
    return hidden * width + hidden


def _gemma3n(whole: Config, tower: Config, width: int) -> int:
    """Embeddings of its own for begin, end and the like, and a norm for each of the two ways in."""
    vision = tower.text("model_type") == "gemma3n_vision"
    hidden = tower.size("hidden_size", default=2048 if vision else 1536)
    return (tower.size("vocab_size", default=128) + 2 + width) * hidden


def _gemma4(whole: Config, tower: Config, width: int) -> int:
    vision = tower.text("model_type") == "gemma4_vision"
    if vision:
        return tower.size("hidden_size", default=768) * width
    return tower.size("output_proj_dims", default=1536) * width


def _llama4(whole: Config, tower: Config, width: int) -> int:
    return tower.size("vision_output_dim", default=7680) * width


def _llava(whole: Config, tower: Config, width: int) -> int:
    hidden = tower.size("hidden_size", default=768) * _features(whole)
    bias = 2 * width * whole.flag("multimodal_projector_bias", default=True)
    return hidden * width + width * width + bias


def _llava_next(whole: Config, tower: Config, width: int) -> int:
    """With the embedding of a line's end."""
    return _llava(whole, tower, width) + width


def _mistral3(whole: Config, tower: Config, width: int) -> int:
    """A norm, a square of patches merged into one, and two layers."""
    hidden = tower.size("hidden_size", default=1024)
    merged = whole.size("spatial_merge_size", default=2) ** 2
    bias = 2 * width * whole.flag("multimodal_projector_bias")
    return (
        hidden + merged * hidden * hidden + _features(whole) * hidden * width + width * width + bias
    )


def _internvl(whole: Config, tower: Config, width: int) -> int:
    ratio = whole.number("downsample_ratio", default=0.5)
    if not 0.01 <= ratio <= 1:
        raise whole.error(f"has `downsample_ratio` = {ratio:g}", "it must be a share, such as 0.5")
    hidden = tower.size("hidden_size", default=1024) * int(1 / ratio) ** 2
    return 2 * hidden + linear(hidden, width) + linear(width, width)


def _kimi(whole: Config, tower: Config, width: int) -> int:
    own = tower.size("hidden_size", default=1152)
    down, across = tower.sequence("merge_kernel_size") or (2, 2)
    sides = Config({"down": down, "across": across}, tower.model)
    hidden = own * sides.size("down") * sides.size("across")
    normed = whole.size("projection_hidden_size", default=own)
    return 2 * normed + linear(hidden, hidden) + linear(hidden, width)


def _idefics3(whole: Config, tower: Config, width: int) -> int:
    return (
        tower.size("hidden_size", default=1152) * whole.size("scale_factor", default=2) ** 2 * width
    )


def _one_layer(whole: Config, tower: Config, width: int) -> int:
    return linear(tower.size("d_model", "hidden_size"), width)


def _mllama(whole: Config, tower: Config, width: int) -> int:
    return linear(tower.size("vision_output_dim", default=7680), width)


def _voxtral(whole: Config, tower: Config, width: int) -> int:
    """Four frames side by side, which are as wide as the tower's MLPs."""
    return tower.size("intermediate_size", default=5120) * width + width * width


KINDS: Mapping[str, Projector] = {
    "gemma3": _gemma3, "gemma3n": _gemma3n, "gemma4": _gemma4, "llama4": _llama4, "llava": _llava,
    "llava_next": _llava_next, "llava_onevision": _llava_next, "mistral3": _mistral3,
    "mllama": _mllama, "internvl": _internvl, "kimi_k25": _kimi, "idefics3": _idefics3,
    "smolvlm": _idefics3, "paligemma": _one_layer, "qwen2_audio": _one_layer, "voxtral": _voxtral,
    **dict.fromkeys(
        ("qwen2_5_omni_thinker", "qwen2_5_omni", "qwen3_omni_moe_thinker", "qwen3_omni_moe"),
        lambda whole, tower, width: 0,
    ),
}  # fmt: skip
"""`model_type` of the whole model."""
