"""StarCoder2: Llama's attention, LayerNorm, an ungated MLP, biases.

transformers v5.23, models/starcoder2/modeling_starcoder2.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, tied=True, activation="gelu_pytorch_tanh")
    bias = c.flag("use_bias", default=True)
    dropout, first_dropout = c.number("residual_dropout"), c.number("embedding_dropout")
    h = Heads(bias=bias)

    def feed(x: Tensor) -> Tensor:
        x = decoder.plain(t, s, x, up="mlp.c_fc", down="mlp.c_proj", bias=bias)
        return ops.dropout(t, x, dropout)

    def block(x: Tensor, window: int, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: ops.dropout(t, decoder.attention(t, s, h, x, around, window), dropout),
            feed,
            norm=blocks.layer_norm,
        )

    kinds = decoder.windows(c, s.layers, lambda layer: True)
    frame = Frame(norm=blocks.layer_norm, begin=lambda t, x: ops.dropout(t, x, first_dropout))
    return decoder.run(t, s, block, kinds, frame)
