"""Apertus: normalised heads, and an ungated MLP of xIELU, an activation with two parameters.

transformers v5.23, models/apertus/modeling_apertus.py, activations.py (`XIELUActivation`).
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    if c.text("hidden_act", default="xielu") != "xielu":
        raise c.error("has an activation other than `xielu`", "no Apertus is known that has one")
    s = decoder.read(Config({**c.fields, "hidden_act": "silu"}, c.model))
    bias = c.flag("attention_bias")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        residual = x
        x = blocks.rms_norm(t, x, "attention_layernorm")
        x = decoder.attention(t, s, x, around, bias=bias, norm=blocks.rms_norm)
        x = ops.add(t, residual, x)
        residual = x
        x = blocks.rms_norm(t, x, "feedforward_layernorm")
        x = mlp(t, s, x)
        return ops.add(t, residual, x)

    return decoder.run(t, s, block, ["full"] * s.layers)


def mlp(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """Two linear layers around xIELU."""
    x = t.linear(x, "mlp.up_proj", s.intermediate, role="up")
    x = xielu(t, x)
    return t.linear(x, "mlp.down_proj", s.hidden, role="down")


def xielu(t: Trace, x: Tensor) -> Tensor:
    """A parabola above zero, an exponential below; written out in Python."""
    above = t.weight("mlp.act_fn.alpha_p", (1,), "activation")
    below = t.weight("mlp.act_fn.alpha_n", (1,), "activation")
    positive = ops.add(t, ops.mul(t, above, ops.power(t, x)), ops.scale(t, x))
    negative = ops.add(t, ops.mul(t, ops.unary(t, "expm1", x, keeps="output"), below), x)
    return ops.add(t, positive, negative)
