"""Persimmon, the language model of Fuyu: squared ReLU, normalised heads, half of them rotated.

transformers v5.23, models/persimmon/modeling_persimmon.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Names, Sizes
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

FEED = {"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
NORM = "model.final_layernorm"


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c.changed(head_dim=None), activation="relu2", rotary=0.5)
    normed, dropout = c.flag("qk_layernorm", default=True), c.number("hidden_dropout")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, normed),
            lambda x: ops.dropout(t, decoder.plain(t, s, x, **FEED, bias=True), dropout),
            norm=blocks.layer_norm,
        )

    frame = Frame(norm=blocks.layer_norm, names=Names(norm=NORM))
    return decoder.run(t, s, block, ["full"] * s.layers, frame)


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, normed: bool) -> Tensor:
    """Attention over one fused projection, in which each head has its q, k and v together."""
    fused = t.linear(x, "self_attn.query_key_value", 3 * s.hidden, bias=True, role="qkv")
    fused = ops.reshape(t, fused, t.batch, t.sequence, s.heads, 3, s.head_dim)
    q, k, v = (ops.select(t, fused, 3) for _ in range(3))
    if normed:
        q = blocks.layer_norm(t, q, "self_attn.q_layernorm")
        k = blocks.layer_norm(t, k, "self_attn.k_layernorm")
    q, v, k = (ops.transpose(t, part, 1, 2) for part in (q, v, k))
    rotation = around.rotation
    assert rotation is not None
    parts: list[Tensor] = []
    q, k = rotary.turn_in_place(parts, t, q, k, rotation)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, around.mask, dropout=s.attention_dropout)
    out = t.linear(out, "self_attn.dense", s.hidden, bias=True, role="o")
    del parts
    return out
