"""Grok-1: a norm before and after each half, experts in every layer, tied embeddings.

xai-org/grok-1, model.py (`DecoderLayer`); names as the Hub's conversion to transformers has them.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, tied=True, activation="gelu")
    m = mixture.read(c)
    h = Heads(name="attn")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        residual = x
        x = blocks.rms_norm(t, x, "pre_attn_norm")
        x = decoder.attention(t, s, h, x, around)
        x = blocks.rms_norm(t, x, "post_attn_norm")
        x = ops.add(t, residual, x)
        residual = x
        x = blocks.rms_norm(t, x, "pre_moe_norm")
        x = mixture.feed(t, s, m, x, router="moe_block.gate", experts="moe_block.experts")
        x = blocks.rms_norm(t, x, "post_moe_norm")
        return ops.add(t, residual, x)

    return decoder.run(t, s, block, ["full"] * s.layers, Frame(begin=ops.scale))
