"""Qwen3: Llama's block with each head of q and k normalised.

transformers v5.23, models/qwen3/modeling_qwen3.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around
from llmsize.anatomy.families.llama import windows
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    bias = c.flag("attention_bias")

    def block(x: Tensor, window: int, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(
                t,
                s,
                x,
                around,
                window=window,
                bias=bias,
                norm=blocks.rms_norm,
                normed_at_once=True,
            ),
            lambda x: decoder.gated(t, s, x),
        )

    return decoder.run(t, s, block, windows(c, s.layers), rope=rotary.read(c))
