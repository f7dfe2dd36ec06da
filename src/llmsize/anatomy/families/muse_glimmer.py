"""Muse Glimmer's language model: Gemma 2's block around gated attention that rotates in windows.

transformers v5.23, models/muse_glimmer/modeling_muse_glimmer.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes, gemma_norm
from llmsize.anatomy.families.gemma4 import power_norm
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

PERIOD = 4
"""Every so many layers, counted from the last, one attends to all tokens and does not rotate."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    bias = c.flag("attention_bias")

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, rotates = kind
        return decoder.sandwich(
            t,
            x,
            lambda x: attention(t, s, x, around, window, bias, rotates),
            lambda x: decoder.gated(t, s, x),
            norm=gemma_norm,
        )

    reach = decoder.windows(c, s.layers, lambda i: (s.layers - 1 - i) % PERIOD > 0)
    kinds = list(zip(reach, rotating(c, s.layers), strict=True))
    frame = Frame(
        windows=reach,
        norm=power_norm,
        begin=power_norm,
        masks=(0, s.window),
        head=Head(end=(ops.scale, *lm_head.SOFTCAP)),
    )
    return decoder.run(t, s, block, kinds, frame)


def rotating(c: Config, layers: int) -> list[bool]:
    """Which layers rotate q and k: those with a base that is not zero, if these are listed."""
    bases = c.each_layer(layers, "layer_rope_theta")
    if bases is None:
        return [(layers - 1 - i) % PERIOD > 0 for i in range(layers)]
    return [bool(base) for base in bases]


def attention(
    t: Trace, s: Sizes, x: Tensor, around: Around, window: int, bias: bool, rotates: bool
) -> Tensor:
    """Grouped-query attention, its heads normalised without weights, its output gated."""
    q, k, v = decoder.projections(t, s, Heads(bias=bias), x)
    q = ops.scale(t, power_norm(t, q))
    k = power_norm(t, k)
    if rotates:
        q, k = decoder.turn(t, q, k, around, window)
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window], dropout=s.attention_dropout)
    gate = t.linear(x, "self_attn.gate_proj", s.heads * s.head_dim, role="gate_attention")
    out = ops.mul(t, out, ops.sigmoid(t, gate))
    del gate
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")
