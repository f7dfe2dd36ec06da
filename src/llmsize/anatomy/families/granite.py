"""Granite: Llama's block, with embeddings, residuals and logits scaled by fixed numbers.

transformers v5.23, models/granite/modeling_granite.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: ops.scale(t, decoder.attention(t, s, x, around, bias=bias)),
            lambda x: ops.scale(t, decoder.gated(t, s, x, bias=mlp_bias)),
        )

    return decoder.run(
        t, s, block, ["full"] * s.layers, begin=lambda x: ops.scale(t, x), end=(ops.scale,)
    )
