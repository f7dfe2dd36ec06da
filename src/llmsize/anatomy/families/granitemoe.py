"""Granite-MoE: Granite's block with experts.

transformers v5.23, models/granitemoe/modeling_granitemoe.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads
from llmsize.anatomy.families.granite import scaled_residuals
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    m = mixture.read(c, scores="chosen", balanced=True)
    h = Heads(bias=c.flag("attention_bias"))

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return scaled_residuals(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around),
            lambda x: mixture.feed(
                t, s, m, x, router="block_sparse_moe.router", experts="block_sparse_moe.experts"
            ),
        )

    frame = Frame(begin=ops.scale, head=Head(end=(ops.scale,)))
    return decoder.run(t, s, block, ["full"] * s.layers, frame)
