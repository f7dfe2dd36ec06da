"""Llama and the many that share its block: Mistral, Qwen2, Yi, SmolLM, Seed-OSS, …

transformers v5.23, models/llama/modeling_llama.py, and the same of the types in `BIASED`.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32

BIASED = {
    "qwen2_vl": ("", True, False),
    "qwen2_vl_text": ("", True, False),
    "qwen2_5_vl": ("", True, False),
    "qwen2_5_vl_text": ("", True, False),
    "qwen2_5_omni_text": ("", True, False),
    "qwen2": ("", True, False),
    "seed_oss": ("attention_out_bias", True, False),
    "mimo": ("", True, False),
    "internlm3": ("bias", False, False),
}
"""Types whose output projection has no bias, or one of its own name, beside those of q, k and v:
its field, and what is true of q, k, v and of it where the configuration does not say."""

TIED = ("smollm3", "ernie4_5", "paddleocr_vl_text")
"""Types that tie their embeddings unless the configuration says otherwise."""

TURNS: dict[str, rotary.Turn] = {
    "ernie4_5": rotary.turn_neighbours_in_fp32,
    "paddleocr_vl_text": rotary.turn,
    "helium": rotary.turn_neighbours,
    "ministral3": rotary.turn_and_temper,
}
"""Types that rotate in a way of their own."""

WIDE_TABLES = ("ernie4_5",)
"""Types whose cosines and sines stay in fp32."""

BOTH_MASKS = ("cwm", "ministral")
"""Types that make the masks of layers with and without a window, whether or not they have both."""

DROPOUT = {"seed_oss": 0.1}
"""Types that leave out a share of weights and results in training unless told otherwise."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    family = c.text("model_type")
    s = decoder.read(c, tied=family in TIED, attention_dropout=DROPOUT.get(family, 0.0))
    dropout = c.number("residual_dropout", default=DROPOUT.get(family, 0.0))
    output_field, biased, output_biased = BIASED.get(family, ("attention_bias", False, False))
    bias = c.flag("attention_bias", "qkv_bias", "use_bias", default=biased)
    output_bias = family != "helium" and c.flag(output_field, "use_bias", default=output_biased)
    mlp_bias = c.flag("mlp_bias", "use_bias", "bias")
    h = Heads(bias=bias, output_bias=output_bias, turn=TURNS.get(family, rotary.turn))
    attend = partial(decoder.attention, t, s, h)
    norm = partial(decoder.fp32_norm, cast=True) if family == "helium" else blocks.rms_norm

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, position = kind
        return decoder.pre_norm(
            t,
            x,
            lambda x: ops.dropout(t, attend(x, around, window, position=position), dropout),
            lambda x: ops.dropout(t, decoder.gated(t, s, x, bias=mlp_bias), dropout),
            norm=norm,
        )

    kinds = list(zip(windows(c, s.layers), rotates(c, s.layers), strict=True))
    frame = Frame(
        windows=[window for window, _ in kinds],
        rope=rotary.read(c, FP32 if family in WIDE_TABLES else None),
        norm=norm,
        masks=(0, s.window) if family in BOTH_MASKS else (),
    )
    return decoder.run(t, s, block, kinds, frame)


def rotates(c: Config, layers: int) -> list[bool]:
    """Which layers rotate: all, but in SmolLM3 every fourth one."""
    if c.text("model_type") != "smollm3":
        return [True] * layers
    listed = c.each_layer(layers, "no_rope_layers")
    period = c.size("no_rope_layer_interval", default=4)
    if listed is None:
        return [(layer + 1) % period > 0 for layer in range(layers)]
    return [bool(rotated) for rotated in listed]


EVERYWHERE = ("mistral", "ministral", "mixtral", "phimoe", "qwen3_moe")
"""Types that have their window, if they have one and use it, in every layer."""


def windows(c: Config, layers: int) -> list[int]:
    """The window of each layer: Mistral's of all, Qwen2's of the upper ones if it is in use,
    Qwen2-MoE's of every other lower one, Qwen3-MoE's of all, CWM's of all but every fourth one."""
    family = c.text("model_type")
    if family == "mistral" and "sliding_window" not in c.fields:
        return [4096] * layers
    if family.startswith("qwen") or family == "mimo":
        first = c.count("max_window_layers", default=28)
        in_use = c.flag("use_sliding_window")
        if family == "qwen2_moe":
            return decoder.windows(c, layers, lambda i: in_use and i % 2 == 0 and i < first)
        first = 0 if family in EVERYWHERE else first
        return decoder.windows(c, layers, lambda layer: in_use and layer >= first)
    if family == "cwm":
        return decoder.windows(c, layers, lambda layer: layer % 4 > 0)
    return decoder.windows(c, layers, lambda layer: family in EVERYWHERE)
