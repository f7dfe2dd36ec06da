"""nanochat: norms without weights, heads normalised after they are rotated, limited logits.

transformers v5.23, models/nanochat/modeling_nanochat.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes
from llmsize.anatomy.families.llama4 import norm_without_weights
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.rotary import Rotation
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, activation="relu2")
    bias = c.flag("attention_bias")
    capped = bool(c.fields.get("final_logit_softcapping", True))

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, bias),
            lambda x: decoder.plain(t, s, x, up="mlp.fc1", down="mlp.fc2"),
            norm=norm,
        )

    frame = Frame(
        norm=norm,
        begin=norm_without_weights,
        holds_tokens=True,
        head=Head(end=lm_head.SOFTCAP if capped else ()),
    )
    return decoder.run(t, s, block, ["full"] * s.layers, frame)


def norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """RMSNorm, which has no weights to be named."""
    return norm_without_weights(t, x)


def turn(t: Trace, x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding the other way round: the second half of the channels becomes the first."""
    half = x.shape[-1] // 2
    lower, upper = ops.slice_last(t, x, half), ops.slice_last(t, x, half)
    plain = ops.mul(t, x, rotation.cosines)
    return ops.add(t, plain, ops.mul(t, ops.cat(t, (upper, ops.neg(t, lower))), rotation.sines))


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, bias: bool) -> Tensor:
    """Grouped-query attention."""
    q, k, v = decoder.projections(t, s, Heads(bias=bias), x)
    rotation = around.rotation
    assert rotation is not None
    q, k = turn(t, q, rotation), turn(t, k, rotation)
    q = norm_without_weights(t, q)
    k = norm_without_weights(t, k)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, around.mask, dropout=s.attention_dropout)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")
