"""Granite-MoE: Granite's block with experts.

transformers v5.23, models/granitemoe/modeling_granitemoe.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around
from llmsize.anatomy.families.granite import scaled_residuals
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    m = mixture.read(c, scores="chosen", balanced=True)
    bias = c.flag("attention_bias")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return scaled_residuals(
            t,
            x,
            lambda x: decoder.attention(t, s, x, around, bias=bias),
            lambda x: mixture.feed(
                t, s, m, x, router="block_sparse_moe.router", experts="block_sparse_moe.experts"
            ),
        )

    return decoder.run(
        t, s, block, ["full"] * s.layers, begin=lambda x: ops.scale(t, x), end=(ops.scale,)
    )
