"""Parameters of audio towers, from the `audio_config` of a checkpoint.

transformers v5.23.0, models/*/modeling_*.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmsize.anatomy.config import Config
from llmsize.anatomy.vision import encoder, linear

EXPANSION = 4
"""Width of a conformer's MLPs over its hidden size."""


def _encoder(c: Config) -> int:
    """Whisper's layers, whose keys have no bias, and the norm behind the last."""
    hidden = _hidden(c)
    layers = c.few("encoder_layers", "num_hidden_layers", default=32)
    width = c.size("encoder_ffn_dim", "intermediate_size", default=5120)
    return encoder(layers, hidden, width) - layers * hidden + 2 * hidden


def _hidden(c: Config) -> int:
    return c.size("d_model", "hidden_size", default=1280)


def _convolutions(c: Config) -> int:
    """Two over three frames of the spectrum."""
    hidden = _hidden(c)
    return linear(3 * c.size("num_mel_bins", default=128), hidden) + linear(3 * hidden, hidden)


def _whisper(c: Config) -> int:
    positions = c.size("max_source_positions", default=1500)
    return _convolutions(c) + positions * _hidden(c) + _encoder(c)


def _qwen2_5_omni(c: Config) -> int:
    """Computed positions; embeddings for begin and end; a projection."""
    out = c.size("output_dim", default=3584)
    return _convolutions(c) + 2 * out + _encoder(c) + linear(_hidden(c), out)


def _qwen3_omni(c: Config) -> int:
    """Three convolutions in two dimensions, each halving the bins; keys have a bias."""
    hidden, channels = _hidden(c), c.size("downsample_hidden_size", default=480)
    bins = c.size("num_mel_bins", default=128)
    for _ in range(3):
        bins = (bins + 1) // 2
    convolutions = linear(9, channels) + 2 * linear(9 * channels, channels)
    layers = c.few("encoder_layers", "num_hidden_layers", default=32)
    width = c.size("encoder_ffn_dim", "intermediate_size", default=5120)
    ends = linear(hidden, hidden) + linear(hidden, c.size("output_dim", default=3584))
    return (
        convolutions
        + channels * bins * hidden
        + encoder(layers, hidden, width)
        + (2 * hidden + ends)
    )


def _conformer(hidden: int, heads: int, kernel: int) -> int:
    """One layer: an MLP, attention with relative positions, a convolution, an MLP, norms."""
    mlp = 2 * EXPANSION * hidden * hidden + 2 * hidden
    attention = 5 * hidden * hidden + hidden // heads + 2 * hidden
    convolution = 3 * hidden * hidden + kernel * hidden + 2 * hidden
    return 2 * mlp + attention + convolution + hidden


def _subsampled(c: Config, field: str, bins: int, hidden: int) -> int:
    """Two convolutions of 3 × 3, each halving the bins, and a projection of what is left."""
    first, second = _pair(c, field)
    convolutions = 9 * first + first + 9 * first * second + second
    return convolutions + second * (bins // 4) * hidden


def _pair(c: Config, field: str) -> tuple[int, int]:
    given = c.sequence(field) or (128, 32)
    if len(given) != 2:
        raise c.error(f"has {len(given)} values in `{field}`", "give two numbers of channels")
    first, second = (Config({field: value}, c.model).size(field) for value in given)
    return first, second


def _gemma3n(c: Config) -> int:
    hidden, bins = c.size("hidden_size", default=1536), c.size("input_feat_size", default=128)
    layer = _conformer(
        hidden,
        c.few("conf_num_attention_heads", default=8),
        c.size("conf_conv_kernel_size", default=5),
    )
    layers = c.few("conf_num_hidden_layers", default=12)
    return _subsampled(c, "sscp_conv_channel_size", bins, hidden) + layers * layer


def _gemma4(c: Config) -> int:
    hidden = c.size("hidden_size", default=1024)
    layer = _conformer(
        hidden, c.few("num_attention_heads", default=8), c.size("conv_kernel_size", default=5)
    )
    first, _ = _pair(c, "subsampling_conv_channels")
    layers = c.few("num_hidden_layers", default=12)
    projected = linear(hidden, c.size("output_proj_dims", default=1536))
    return _subsampled(c, "subsampling_conv_channels", first, hidden) + layers * layer + projected


KINDS: Mapping[str, Callable[[Config], int]] = {
    "qwen2_audio_encoder": _whisper, "voxtral_encoder": _whisper, "whisper": _whisper,
    "qwen2_5_omni_audio_encoder": _qwen2_5_omni, "qwen3_omni_moe_audio_encoder": _qwen3_omni,
    "gemma3n_audio": _gemma3n, "gemma4_audio": _gemma4,
}  # fmt: skip
"""`model_type` of the tower."""
