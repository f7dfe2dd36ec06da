"""Nemotron-4 and Minitron: squared ReLU, LayerNorm with 1 + weight.

transformers v5.23, models/nemotron/modeling_nemotron.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads
from llmsize.anatomy.rotary import Rotation
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, activation="relu2", rotary=0.5)
    bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")
    h = Heads(bias=bias, turn=turn)

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around),
            lambda x: decoder.plain(t, s, x, bias=mlp_bias),
            norm=norm,
        )

    return decoder.run(t, s, block, ["full"] * s.layers, Frame(norm=norm))


def norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """LayerNorm1P: scaled by 1 + weight; under autocast in 16 bit."""
    weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
    bias = t.weight(f"{name}.bias", (x.shape[-1],), "norm")
    autocast = t.autocast
    if autocast is None:
        return ops.layer_norm(t, x, ops.shift(t, weight), bias)
    parts = narrowed(t, x, ops.shift(t, weight), bias)
    t.autocast = None
    out = ops.layer_norm(t, *parts)
    t.autocast = autocast
    return out


def narrowed(t: Trace, *parts: Tensor) -> list[Tensor]:
    """The same in autocast's format."""
    return [ops.to(t, part, t.autocast or part.format) for part in parts]


def turn(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Rotary embedding of the first channels of each head; q and k are put together at the end."""
    cosines, sines = rotation
    size = cosines.shape[-1]
    q_turned, q_rest = (ops.slice_last(t, q, n) for n in (size, q.shape[-1] - size))
    k_turned, k_rest = (ops.slice_last(t, k, n) for n in (size, k.shape[-1] - size))
    q_turned = rotary.rotate(t, q_turned, cosines, sines)
    k_turned = rotary.rotate(t, k_turned, cosines, sines)
    return ops.cat(t, (q_turned, q_rest)), ops.cat(t, (k_turned, k_rest))
