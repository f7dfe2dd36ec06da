"""Parameters of vision towers, from the `vision_config` of a checkpoint.

transformers v5.23.0, models/*/modeling_*.py. Of the layers between tower and language model, those
are counted that are inside the tower (Qwen's mergers, Llama 4's adapter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmsize.anatomy.config import Config

COLOURS = 3


def linear(inputs: int, outputs: int) -> int:
    """A matrix and a bias."""
    return (inputs + 1) * outputs


def encoder(layers: int, hidden: int, width: int) -> int:
    """Layers of attention and a plain MLP, each behind a layer norm, biases everywhere."""
    each = 4 * hidden + 4 * linear(hidden, hidden) + linear(hidden, width)
    return layers * (each + linear(width, hidden))


def _encoder(c: Config, layers: int = 12, hidden: int = 768, width: int = 3072) -> int:
    return encoder(
        c.few("num_hidden_layers", default=layers),
        c.size("hidden_size", default=hidden),
        c.size("intermediate_size", default=width),
    )


def _side(c: Config, name: str, default: int) -> int:
    """Of an image or a patch, which is a square or given by height and width, both the same."""
    value = c.value(name)
    if isinstance(value, list | tuple) and value:
        return Config({name: value[0]}, c.model).size(name)
    return c.size(name, default=default)


def _siglip(c: Config) -> int:
    hidden, patch = c.size("hidden_size", default=768), _side(c, "patch_size", 16)
    patches = (_side(c, "image_size", 224) // patch) ** 2
    pooled = 0
    if c.flag("vision_use_head", default=True):
        width = c.size("intermediate_size", default=3072)
        pooled = hidden + 4 * linear(hidden, hidden) + 2 * hidden
        pooled += linear(hidden, width) + linear(width, hidden)
    return _embedded(hidden, patch, patches) + _encoder(c) + 2 * hidden + pooled


def _idefics3(c: Config) -> int:
    """SigLIP without its head."""
    hidden, patch = c.size("hidden_size", default=1152), _side(c, "patch_size", 32)
    patches = (_side(c, "image_size", 224) // patch) ** 2
    return _embedded(hidden, patch, patches) + _encoder(c, 12, 1152) + 2 * hidden


def _embedded(hidden: int, patch: int, positions: int) -> int:
    """Patches through a convolution with a bias, and learned positions."""
    return linear(COLOURS * patch * patch, hidden) + positions * hidden


def _clip(c: Config) -> int:
    hidden, patch = c.size("hidden_size", default=768), _side(c, "patch_size", 32)
    patches = (_side(c, "image_size", 224) // patch) ** 2
    embedded = COLOURS * patch * patch * hidden + (patches + 2) * hidden
    return embedded + _encoder(c) + 4 * hidden


def _pixtral(c: Config) -> int:
    hidden, width = c.size("hidden_size", default=1024), c.size("intermediate_size", default=4096)
    patch = _side(c, "patch_size", 16)
    each = 2 * hidden + 4 * hidden * hidden + 3 * hidden * width
    layers = c.few("num_hidden_layers", default=24)
    return COLOURS * patch * patch * hidden + hidden + layers * each


def _internvl(c: Config) -> int:
    """Two scales and two norms a layer; the larger tower norms queries and keys, too."""
    hidden, width = c.size("hidden_size", default=1024), c.size("intermediate_size", default=4096)
    patch = _side(c, "patch_size", 14)
    positions = 0
    if c.flag("use_absolute_position_embeddings", default=True):
        positions = (_side(c, "image_size", 448) // patch) ** 2 + 1
    norm = hidden if c.text("norm_type", default="layer_norm") == "rms_norm" else 2 * hidden
    each = 3 * hidden * (hidden + c.flag("attention_bias")) + linear(hidden, hidden)
    each += linear(hidden, width) + linear(width, hidden) + 2 * norm + 2 * hidden
    each += 2 * hidden * c.flag("use_qk_norm")
    first = hidden * (1 + c.flag("use_mask_token"))
    last = 0 if c.flag("use_mean_pooling", default=True) else 2 * hidden
    layers = c.few("num_hidden_layers", default=24)
    return _embedded(hidden, patch, positions) + first + layers * each + last


def _llama4(c: Config) -> int:
    """With the adapter behind it, an MLP without biases."""
    hidden, patch = c.size("hidden_size", default=768), _side(c, "patch_size", 14)
    positions = (_side(c, "image_size", 448) // patch) ** 2 + 1
    outside = COLOURS * patch * patch * hidden + (positions + 1) * hidden + 4 * hidden
    width = c.size("intermediate_size", default=5632)
    inner, out = (
        c.size("projector_input_dim", default=4096),
        c.size("projector_output_dim", default=4096),
    )
    return outside + _encoder(c, 34, 768, 5632) + width * inner + out * out


def _gemma4(c: Config) -> int:
    """A gated MLP, norms before and behind, positions for rows and for columns."""
    hidden, width = c.size("hidden_size", default=768), c.size("intermediate_size", default=3072)
    heads, kv_heads = (
        c.few("num_attention_heads", default=12),
        c.few("num_key_value_heads", default=12),
    )
    channels, patch = c.size("head_dim", default=64), _side(c, "patch_size", 16)
    each = 4 * hidden + 2 * channels + 3 * hidden * width
    each += 2 * hidden * channels * (heads + kv_heads)
    positions = 2 * c.size("position_embedding_size", default=10_240)
    return (COLOURS * patch * patch + positions) * hidden + (
        c.few("num_hidden_layers", default=16) * each
    )


TIMM = {"mobilenetv5_300m_enc": 294_126_912}
"""Encoders of timm 1.0.31 by name: their shape is code, not configuration."""


def _gemma3n(c: Config) -> int | None:
    return TIMM.get(c.text("architecture", default="mobilenetv5_300m_enc"))


def _mllama(c: Config) -> int:
    """Positions of their own for every tile of every aspect ratio; some layers have gates."""
    hidden, width = c.size("hidden_size", default=1280), c.size("intermediate_size", default=5120)
    patch = _side(c, "patch_size", 14)
    positions = (_side(c, "image_size", 448) // patch) ** 2 + 1
    ratios = c.sequence("supported_aspect_ratios")
    tiles = (1 + (8 if ratios is None else len(ratios))) * c.size("max_num_tiles", default=4)
    each = 4 * hidden + 4 * hidden * hidden + linear(hidden, width) + linear(width, hidden)
    gated = c.few("num_global_layers", default=8)
    layers = (c.few("num_hidden_layers", default=32) + gated) * each + 2 * gated
    embedded = (COLOURS * patch * patch + 1 + positions + tiles * positions + 2 * tiles) * hidden
    return embedded + 3 + 4 * hidden + layers


def _glm4v(c: Config) -> int:
    """Layers as wide as the language model, a convolution over squares of patches, a gated MLP."""
    hidden, out = c.size("hidden_size", default=1536), c.size("out_hidden_size", default=4096)
    patch, merged = c.size("patch_size", default=14), c.size("spatial_merge_size", default=2) ** 2
    positions = (_side(c, "image_size", 336) // patch) ** 2
    each = 2 * hidden + 3 * hidden * (hidden + c.flag("attention_bias")) + hidden * hidden
    each += 3 * hidden * out
    merger = out * out + 2 * out + 3 * out * c.size("intermediate_size", default=13_696)
    outside = _patches(c, hidden, 14) + hidden + positions * hidden + 2 * hidden
    return outside + c.few("depth", default=24) * each + linear(merged * hidden, out) + merger


def _kimi(c: Config) -> int:
    hidden, patch = c.size("hidden_size", default=1152), _side(c, "patch_size", 14)
    positions = c.size("pos_emb_height", default=64) * c.size("pos_emb_width", default=64)
    return _embedded(hidden, patch, positions) + _encoder(c, 27, 1152, 4304) + 2 * hidden


def _qwen2(c: Config) -> int:
    hidden, ratio = c.size("embed_dim", default=1280), c.size("mlp_ratio", default=4)
    merger = 2 * hidden + _merger(c, hidden, c.size("hidden_size", default=3584))
    layers = encoder(c.few("depth", default=32), hidden, ratio * hidden)
    return _patches(c, hidden, 14) + layers + merger


def _qwen2_5(c: Config) -> int:
    hidden, width = c.size("hidden_size", default=3584), c.size("intermediate_size", default=3420)
    each = 2 * hidden + 4 * linear(hidden, hidden)
    each += 2 * linear(hidden, width) + linear(width, hidden)
    merger = hidden + _merger(c, hidden, c.size("out_hidden_size", default=3584))
    return _patches(c, hidden, 14) + c.few("depth", default=32) * each + merger


def _qwen3(c: Config) -> int:
    """Some layers' results are merged for layers of the language model, too."""
    deep = c.sequence("deepstack_visual_indexes")
    hidden = c.size("hidden_size", default=1152)
    merger = _merger(c, hidden, c.size("out_hidden_size", default=3584))
    merged = c.size("spatial_merge_size", default=2) ** 2 * hidden
    deeper = 3 if deep is None else len(deep)
    return _qwen3_5(c) + deeper * (merger + 2 * merged)


def _qwen3_5(c: Config) -> int:
    hidden, width = c.size("hidden_size", default=1152), c.size("intermediate_size", default=4304)
    positions = c.size("num_position_embeddings", default=2304) * hidden
    merger = 2 * hidden + _merger(c, hidden, c.size("out_hidden_size", default=3584))
    layers = encoder(c.few("depth", default=27), hidden, width)
    return _patches(c, hidden, 16) + hidden + positions + layers + merger


def _patches(c: Config, hidden: int, patch: int) -> int:
    """A convolution over patches of two frames."""
    side = c.size("patch_size", default=patch)
    return COLOURS * c.size("temporal_patch_size", default=2) * side * side * hidden


def _merger(c: Config, hidden: int, out: int) -> int:
    """An MLP from a square of patches to one token."""
    merged = c.size("spatial_merge_size", default=2) ** 2 * hidden
    return linear(merged, merged) + linear(merged, out)


MERGING: Mapping[str, Callable[[Config], int]] = {
    "qwen2_vl": _qwen2, "qwen2_vl_vision": _qwen2,
    "qwen2_5_vl": _qwen2_5, "qwen2_5_vl_vision": _qwen2_5, "qwen2_5_omni_vision_encoder": _qwen2_5,
    "qwen3_vl": _qwen3, "qwen3_vl_vision": _qwen3, "qwen3_vl_moe": _qwen3,
    "qwen3_vl_moe_vision": _qwen3, "qwen3_omni_moe_vision_encoder": _qwen3,
    "qwen3_5": _qwen3_5, "qwen3_5_vision": _qwen3_5, "qwen3_5_moe": _qwen3_5,
    "qwen3_5_moe_vision": _qwen3_5, "glm4v": _glm4v, "glm4v_vision": _glm4v,
    "glm4v_moe": _glm4v, "glm4v_moe_vision": _glm4v, "glm46v": _glm4v,
}  # fmt: skip
"""Towers whose results are as wide as the language model: nothing is between the two."""

KINDS: Mapping[str, Callable[[Config], int | None]] = {
    **MERGING, "siglip_vision_model": _siglip, "clip_vision_model": _clip, "pixtral": _pixtral,
    "internvl_vision": _internvl, "llama4_vision_model": _llama4, "gemma3n_vision": _gemma3n,
    "gemma4_vision": _gemma4, "kimi_k25_vision": _kimi, "idefics3": _idefics3,
    "mllama_vision_model": _mllama, "idefics3_vision": _idefics3, "smolvlm_vision": _idefics3,
}  # fmt: skip
"""`model_type` of the tower, or of the model where the tower states none."""
