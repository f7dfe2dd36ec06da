"""OPT: ReLU, biases, learned positions.

transformers v5.23, models/opt/modeling_opt.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, INT64
from llmsize.quick_dataclasses import dataclass

DECODER = "model.decoder"

EXTRA_POSITIONS = 2
"""Rows of the position table before the first position."""

HEAD = Head(f"{DECODER}.embed_tokens", casts=False)


@dataclass(frozen=True, slots=True)
class Block:
    """What one OPT does differently from another."""

    before: bool
    """Whether norms come before attention and feed-forward."""
    bias: bool
    dropout: float
    embedding: int
    """Width of the embeddings, which are projected if it is not that of the layers."""
    positions: int
    norm: decoder.Norm


def read(c: Config, hidden: int) -> Block:
    """The block from a `config.json`."""
    positions = c.size("max_position_embeddings", default=2048) + EXTRA_POSITIONS
    affine = c.flag("layer_norm_elementwise_affine", default=True)
    return Block(
        before=c.flag("do_layer_norm_before", default=True),
        bias=c.flag("enable_bias", default=True),
        dropout=c.number("dropout", default=0.1),
        embedding=Dim(c.size("word_embed_proj_dim", default=hidden), "embedding"),
        positions=Dim(positions, "positions"),
        norm=blocks.layer_norm if affine else norm_without_weights,
    )


def norm_without_weights(t: Trace, x: Tensor, name: str) -> Tensor:
    """LayerNorm that neither scales nor shifts."""
    return ops.layer_norm(t, x, None, None)


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, tied=True, activation="relu", rotary=0.0)
    x = model(t, s, read(c, s.hidden))
    return lm_head.causal_lm(t, x, s.vocabulary, HEAD, tied=s.tied)


def model(t: Trace, s: Sizes, b: Block) -> Tensor:
    """Token and position embeddings, blocks, final norm."""
    embeddings = blocks.embed(t, f"{DECODER}.embed_tokens", s.vocabulary, b.embedding)
    seen, position_ids = positions(t)
    mask = blocks.mask(t)
    places = embedded(t, s, b, position_ids)
    if b.embedding != s.hidden:
        embeddings = t.linear(embeddings, f"{DECODER}.project_in", s.hidden, role="projection")

    x = t.layers(
        f"{DECODER}.layers",
        partial(layer, t, s, b, mask),
        ops.add(t, embeddings, places),
        ["full"] * s.layers,
        position_ids,
        mask,
    )
    del seen
    if b.before:
        x = b.norm(t, x, f"{DECODER}.final_layer_norm")
    if b.embedding != s.hidden:
        x = t.linear(x, f"{DECODER}.project_out", b.embedding, role="projection")
    return x


def layer(t: Trace, s: Sizes, b: Block, mask: Tensor | None, x: Tensor, kind: str) -> Tensor:
    """Attention and feed-forward, norms before or behind; the MLP sees tokens of no sequence."""
    residual = x
    if b.before:
        x = b.norm(t, x, "self_attn_layer_norm")
    x = attention(t, s, b, x, mask)
    x = ops.dropout(t, x, b.dropout)
    x = ops.add(t, residual, x)
    if not b.before:
        x = b.norm(t, x, "self_attn_layer_norm")
    x = ops.reshape(t, x, t.batch * t.sequence, s.hidden)
    residual = x
    if b.before:
        x = b.norm(t, x, "final_layer_norm")
    x = t.linear(x, "fc1", s.intermediate, bias=b.bias, role="up")
    x = s.activation(t, x)
    x = t.linear(x, "fc2", s.hidden, bias=b.bias, role="down")
    x = ops.dropout(t, x, b.dropout)
    x = ops.reshape(t, ops.add(t, residual, x), t.batch, t.sequence, s.hidden)
    return x if b.before else b.norm(t, x, "final_layer_norm")


def positions(t: Trace) -> tuple[Tensor | None, Tensor]:
    """The mask that positions are counted from, unless it is given, and the positions."""
    total = t.sequence + t.setting.past
    shape = (t.batch, total)
    format = INT64 if t.setting.padded else FP32
    seen = None if t.setting.padded else t.new("ones", shape, FP32)
    counted, product = t.new("cumsum", shape, format), t.new("mul", shape, format)
    moved = t.new("sub", shape, format)
    del product
    position_ids = moved if format is INT64 else t.new("to", shape, INT64)
    del counted, moved
    return seen, position_ids


def embedded(t: Trace, s: Sizes, b: Block, position_ids: Tensor) -> Tensor:
    """The positions' rows of the table."""
    indices = t.new("add", (t.batch, t.sequence), INT64)
    table = t.weight(f"{DECODER}.embed_positions.weight", (b.positions, s.hidden), "position")
    return ops.embedding(t, table, t.batch, t.sequence, indices=indices)


def attention(t: Trace, s: Sizes, b: Block, x: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with scaled queries."""
    q = ops.scale(t, t.linear(x, "self_attn.q_proj", s.hidden, bias=b.bias, role="q"))
    q = ops.split_heads(t, q, s.heads)
    k = t.linear(x, "self_attn.k_proj", s.hidden, bias=b.bias, role="k")
    v = t.linear(x, "self_attn.v_proj", s.hidden, bias=b.bias, role="v")
    k, v = ops.split_heads(t, k, s.heads), ops.split_heads(t, v, s.heads)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, mask, dropout=s.attention_dropout)
    return t.linear(out, "self_attn.out_proj", s.hidden, bias=b.bias, role="o")
