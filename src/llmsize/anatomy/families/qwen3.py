"""Qwen3: Llama's block with each head of q and k normalised.

transformers v5.23, models/qwen3/modeling_qwen3.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads
from llmsize.anatomy.families.llama import windows
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    h = Heads(bias=c.flag("attention_bias"), norm=blocks.rms_norm, normed_at_once=True)

    def block(x: Tensor, window: int, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around, window),
            lambda x: decoder.gated(t, s, x),
        )

    return decoder.run(t, s, block, windows(c, s.layers), Frame(rope=rotary.read(c)))
