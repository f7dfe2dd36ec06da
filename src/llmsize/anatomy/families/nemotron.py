"""Nemotron-4 and Minitron: squared ReLU, LayerNorm with 1 + weight.

transformers v5.23, models/nemotron/modeling_nemotron.py.
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
    s = decoder.read(c, activation="relu2", rotary=0.5)
    bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, x, around, bias=bias),
            lambda x: decoder.plain(t, s, x, bias=mlp_bias),
            norm=norm,
        )

    return decoder.run(t, s, block, ["full"] * s.layers, norm=norm)


def norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """LayerNorm1P: scaled by 1 + weight."""
    weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
    bias = t.weight(f"{name}.bias", (x.shape[-1],), "norm")
    return ops.layer_norm(t, x, ops.shift(t, weight), bias)
