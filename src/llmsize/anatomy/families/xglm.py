"""XGLM: scaled embeddings, positions of sines that are computed, a GELU, biases.

transformers v5.23, models/xglm/modeling_xglm.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP16, FP32, INT64

EMBEDDING = "model.embed_tokens"

EXTRA_POSITIONS = 2
"""Rows of the position table before the first position."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, tied=True, activation="gelu", rotary=0.0, attention_dropout=0.1)
    x = model(t, s, c)
    return lm_head.causal_lm(t, x, s.vocabulary, Head(EMBEDDING, casts=False), tied=s.tied)


def model(t: Trace, s: Sizes, c: Config) -> Tensor:
    """Embeddings with their positions, blocks, final norm."""
    dropout = c.number("dropout", default=0.1)
    inner_dropout = c.number("activation_dropout")
    rows = c.size("max_position_embeddings", default=2048) + EXTRA_POSITIONS
    t.buffers += rows * s.hidden * t.setting.format.block_bytes
    embeddings = blocks.embed(t, EMBEDDING, s.vocabulary, s.hidden)
    embeddings = blocks.scaled_embeddings(t, embeddings)
    mask = blocks.mask(t, masking="eager")
    assert mask is not None
    position_ids = t.new("arange", (1, t.sequence), INT64)

    def block(x: Tensor, kind: str) -> Tensor:
        residual = x
        x = blocks.layer_norm(t, x, "self_attn_layer_norm")
        x, weights = attention(t, s, x, mask)
        x = ops.dropout(t, x, dropout)
        x = ops.add(t, residual, x)
        residual = x
        x = blocks.layer_norm(t, x, "final_layer_norm")
        x = s.activation(t, t.linear(x, "fc1", s.intermediate, bias=True, role="up"))
        x = ops.dropout(t, x, inner_dropout)
        x = t.linear(x, "fc2", s.hidden, bias=True, role="down")
        x = ops.dropout(t, x, dropout)
        x = ops.add(t, residual, x)
        del weights
        return x

    x = t.layers(
        "model.layers",
        block,
        ops.dropout(t, ops.add(t, embeddings, sinusoids(t, s)), dropout),
        ["full"] * s.layers,
        mask,
    )
    del position_ids
    return blocks.layer_norm(t, x, "model.layer_norm")


def sinusoids(t: Trace, s: Sizes) -> Tensor:
    """The positions' rows of the buffer."""
    return t.new("index_select", (1, t.sequence, s.hidden), t.setting.format)


def attention(t: Trace, s: Sizes, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with scaled queries, and its weights beside."""
    batch, sequence, _ = x.shape
    q = ops.scale(t, t.linear(x, "self_attn.q_proj", s.hidden, bias=True, role="q"))
    k = t.linear(x, "self_attn.k_proj", s.hidden, bias=True, role="k")
    v = t.linear(x, "self_attn.v_proj", s.hidden, bias=True, role="v")
    k, v = ops.split_heads(t, k, s.heads), ops.split_heads(t, v, s.heads)
    k, v = blocks.remember(t, k, v)
    total, rows = k.shape[2], batch * s.heads
    q = ops.split_heads(t, q, s.heads)
    q = ops.reshape(t, q, rows, sequence, s.head_dim)
    k = ops.reshape(t, k, rows, total, s.head_dim)
    v = ops.reshape(t, v, rows, total, s.head_dim)
    scores = ops.matmul(t, q, ops.transpose(t, k, -1, -2))
    scores = ops.add(t, ops.reshape(t, scores, batch, s.heads, sequence, total), mask)
    scores = ops.limited(t, scores, t.new("full", (), FP32), "maximum")
    scores = ops.reshape(t, scores, rows, sequence, total)
    if scores.format is FP16:
        weights = ops.to(t, ops.softmax(t, scores, FP32), FP16)
    else:
        weights = ops.softmax(t, scores)
    del scores
    dropped = ops.dropout(t, weights, s.attention_dropout)
    out = ops.matmul(t, dropped, v)
    out = ops.merge_heads(t, ops.reshape(t, out, batch, s.heads, sequence, s.head_dim))
    return t.linear(out, "self_attn.out_proj", s.hidden, bias=True, role="o"), weights
