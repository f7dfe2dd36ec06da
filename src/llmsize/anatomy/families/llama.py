"""Llama and the many that share its block: Mistral, Qwen2, Yi, SmolLM, Seed-OSS, …

transformers v5.23, models/llama/modeling_llama.py, and the same of the types in `BIASED`.
"""

from __future__ import annotations

from llmsize.anatomy import decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

BIASED = {
    "qwen2_vl": ("", True, False),
    "qwen2_vl_text": ("", True, False),
    "qwen2_5_vl": ("", True, False),
    "qwen2_5_vl_text": ("", True, False),
    "qwen2": ("", True, False),
    "seed_oss": ("attention_out_bias", True, False),
    "mimo": ("", True, False),
    "internlm3": ("bias", False, False),
}
"""Types whose output projection has no bias, or one of its own name, beside those of q, k and v:
its field, and what is true of q, k, v and of it where the configuration does not say."""

TIED = ("smollm3", "ernie4_5")
"""Types that tie their embeddings unless the configuration says otherwise."""

DROPOUT = {"seed_oss": 0.1}
"""Types that leave out a share of weights and results in training unless told otherwise."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    family = c.text("model_type")
    s = decoder.read(c, tied=family in TIED, attention_dropout=DROPOUT.get(family, 0.0))
    dropout = c.number("residual_dropout", default=DROPOUT.get(family, 0.0))
    output_field, biased, output_biased = BIASED.get(family, ("attention_bias", False, False))
    bias = c.flag("attention_bias", "qkv_bias", "use_bias", default=biased)
    output_bias = c.flag(output_field, "use_bias", default=output_biased)
    mlp_bias = c.flag("mlp_bias", "use_bias")

    def block(x: Tensor, window: int, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: ops.dropout(
                t,
                decoder.attention(
                    t, s, x, around, window=window, bias=bias, output_bias=output_bias
                ),
                dropout,
            ),
            lambda x: ops.dropout(t, decoder.gated(t, s, x, bias=mlp_bias), dropout),
        )

    return decoder.run(t, s, block, windows(c, s.layers))


EVERYWHERE = ("mistral", "ministral", "mixtral", "phimoe")
"""Types that have their window, if they have one, in every layer."""


def windows(c: Config, layers: int) -> list[int]:
    """The window of each layer: Mistral's of all, Qwen2's of the upper ones if it is in use."""
    family = c.text("model_type")
    if family == "mistral" and "sliding_window" not in c.fields:
        return [4096] * layers
    if family.startswith("qwen") or family == "mimo":
        first = c.count("max_window_layers", default=28)
        in_use = c.flag("use_sliding_window")
        return decoder.windows(c, layers, lambda layer: in_use and layer >= first)
    return decoder.windows(c, layers, lambda layer: family in EVERYWHERE)
