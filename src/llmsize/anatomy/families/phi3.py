"""Phi-3 and Phi-4: Llama's block with q, k and v in one projection, and gate and up in another.

transformers v5.23, models/phi3/modeling_phi3.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes
from llmsize.anatomy.rotary import Rotation
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    dropout = c.number("resid_pdrop")

    def block(x: Tensor, window: int, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: ops.dropout(t, attention(t, s, x, around, window), dropout),
            lambda x: ops.dropout(t, decoder.gated_fused(t, s, x), dropout),
        )

    return decoder.run(t, s, block, decoder.windows(c, s.layers, lambda layer: True))


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, window: int) -> Tensor:
    """Grouped-query attention over one fused projection, which q, k and v are slices of."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    fused = blocks.queries_keys_values(t, x, "self_attn.qkv_proj", queries, keys)
    q = ops.split_heads(t, ops.slice_last(t, fused, queries), s.heads)
    k = ops.split_heads(t, ops.slice_last(t, fused, keys), s.kv_heads)
    v = ops.split_heads(t, ops.slice_last(t, fused, keys), s.kv_heads)
    rotation = around.tables[window]
    if rotation is not None:
        q, k = turn(t, q, k, rotation)
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window], dropout=s.attention_dropout)
    return t.linear(out, "self_attn.o_proj", s.hidden, role="o")


def turn(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Rotary embedding of the first channels, then a copy with the rest, even if there is none."""
    cosines, sines = rotation
    size = cosines.shape[-1]
    q_turned, q_rest = (ops.slice_last(t, q, n) for n in (size, q.shape[-1] - size))
    k_turned, k_rest = (ops.slice_last(t, k, n) for n in (size, k.shape[-1] - size))
    q = ops.cat(t, (rotary.rotate(t, q_turned, cosines, sines), q_rest))
    k = ops.cat(t, (rotary.rotate(t, k_turned, cosines, sines), k_rest))
    return q, k
