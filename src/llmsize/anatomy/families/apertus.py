"""Apertus: normalised heads, and an ungated MLP of xIELU, an activation with two parameters.

transformers v5.23, models/apertus/modeling_apertus.py, activations.py (`XIELUActivation`).
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Heads, Sizes
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    if c.text("hidden_act", default="xielu") != "xielu":
        raise c.error("has an activation other than `xielu`", "no Apertus is known that has one")
    s = decoder.read(c.changed(hidden_act="silu"))
    t.buffers += s.layers * 2 * t.setting.format.block_bytes  # xIELU's slope and bound
    h = Heads(bias=c.flag("attention_bias"), norm=blocks.rms_norm)

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        residual = x
        x = blocks.rms_norm(t, x, "attention_layernorm")
        x = decoder.attention(t, s, h, x, around)
        x = ops.add(t, residual, x)
        residual = x
        x = blocks.rms_norm(t, x, "feedforward_layernorm")
        x = mlp(t, s, x)
        return ops.add(t, residual, x)

    return decoder.run(t, s, block, ["full"] * s.layers)


def mlp(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """Two linear layers around xIELU."""
    return t.linear(
        xielu(t, t.linear(x, "mlp.up_proj", s.intermediate, role="up")),
        "mlp.down_proj",
        s.hidden,
        role="down",
    )


def xielu(t: Trace, x: Tensor) -> Tensor:
    """A parabola above zero, an exponential below; written out in Python."""
    above = softplus(t, t.weight("mlp.act_fn.alpha_p", (1,), "activation"))
    below = ops.shift(t, softplus(t, t.weight("mlp.act_fn.alpha_n", (1,), "activation")))
    bound = Tensor((), x.format, None)
    return ops.where(
        t,
        t.new("gt", x.shape, BOOL),
        ops.add(t, ops.mul(t, ops.mul(t, above, x), x), ops.scale(t, x)),
        ops.add(
            t,
            ops.mul(t, ops.sub(t, ops.expm1(t, ops.limited(t, x, bound, "minimum")), x), below),
            ops.scale(t, x),
        ),
    )


def softplus(t: Trace, x: Tensor) -> Tensor:
    """Keeps its input. Under autocast it runs in fp32."""
    x = ops.to(t, x, FP32) if t.autocast else x
    return ops.unary(t, "softplus", x, keeps="input")
