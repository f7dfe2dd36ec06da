"""Baichuan: Llama's block with q, k and v in one projection; the 13B has ALiBi for rotation.

baichuan-inc/Baichuan2-7B-Base and Baichuan2-13B-Base, modeling_baichuan.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Sizes
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    alibi = c.value("model_max_length") is not None and c.value("max_position_embeddings") is None
    s = decoder.read(c, rotary=0.0 if alibi else 1.0)

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around),
            lambda x: decoder.gated(t, s, x),
        )

    frame = Frame(masking="eager" if alibi else "as needed")
    return decoder.run(t, s, block, ["full"] * s.layers, frame)


def attention(t: Trace, s: Sizes, x: Tensor, around: Around) -> Tensor:
    """Attention over one fused projection, which q, k and v are slices of."""
    fused = t.linear(x, "self_attn.W_pack", 3 * s.hidden, role="qkv")
    q, k, v = (ops.split_heads(t, part, s.heads) for part in ops.split(t, fused, *[s.hidden] * 3))
    del fused
    if around.rotation is None:
        out = decoder.attend_eager(t, q, k, v, around.mask)
    else:
        q, k = decoder.turn(t, q, k, around)
        k, v = blocks.remember(t, k, v)
        out = blocks.attend(t, q, k, v, around.mask)
    return t.linear(out, "self_attn.o_proj", s.hidden, role="o")
