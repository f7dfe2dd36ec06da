"""AFM: Llama's block with an ungated MLP of squared ReLU.

transformers v5.23, models/arcee/modeling_arcee.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, activation="relu2")
    bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, x, around, bias=bias),
            lambda x: decoder.plain(t, s, x, bias=mlp_bias),
        )

    return decoder.run(t, s, block, ["full"] * s.layers)
