"""BitNet: Llama's block, whose output and down projections read normalised inputs.

transformers v5.23, models/bitnet/modeling_bitnet.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Heads, Sizes
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, activation="relu2")
    bias = c.flag("attention_bias")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t, x, lambda x: attention(t, s, x, around, bias), lambda x: feed(t, s, x)
        )

    return decoder.run(t, s, block, ["full"] * s.layers)


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, bias: bool) -> Tensor:
    """Grouped-query attention, normalised before the output projection."""
    q, k, v = decoder.projections(t, s, Heads(bias=bias), x)
    q, k = decoder.turn(t, q, k, around)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, around.mask, dropout=s.attention_dropout)
    out = blocks.rms_norm(t, out, "self_attn.attn_sub_norm")
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def feed(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """The gated MLP, normalised before the projection down."""
    gate = s.activation(t, t.linear(x, "mlp.gate_proj", s.intermediate, role="gate"))
    product = ops.mul(t, gate, t.linear(x, "mlp.up_proj", s.intermediate, role="up"))
    del gate
    product = blocks.rms_norm(t, product, "mlp.ffn_sub_norm")
    return t.linear(product, "mlp.down_proj", s.hidden, role="down")
