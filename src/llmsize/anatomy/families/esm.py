"""ESM-1b and ESM-2: BERT for proteins, whose norms come first and which may rotate.

transformers v5.23, models/esm/modeling_esm.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.families import bert, modernbert_decoder
from llmsize.anatomy.families.bert import Layer, Shape, Type
from llmsize.anatomy.rotary import Rotation
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32, INT64
from llmsize.quick_dataclasses import dataclass


def gelu(t: Trace, x: Tensor) -> Tensor:
    """GELU written out in Python."""
    return ops.mul(t, ops.scale(t, x), ops.shift(t, ops.erf(t, ops.scale(t, x))))


ESM = Type(
    prefix="esm", before=True, final_norm="esm.encoder.emb_layer_norm_after", has_kinds=False,
    gelu=False, activation=gelu,
    layer=Layer(attention_norm="attention.LayerNorm", norm="LayerNorm", holds_normed="all"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Embedding:
    """What is done to tokens before the first layer."""

    rotary: bool
    """Whether layers rotate; if not, each position has a vector."""
    normed: bool
    token_dropout: bool
    """Whether masked tokens are zeros, and the others larger for it."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    bert.check(t, c)
    if c.flag("is_folding_model"):
        raise c.error("is of ESMFold, which folds proteins", "`inspect` the checkpoint's folder")
    s = bert.read(c, ESM)
    e = Embedding(
        rotary=c.text("position_embedding_type", default="absolute") == "rotary",
        normed=c.flag("emb_layer_norm_before"),
        token_dropout=c.flag("token_dropout"),
    )
    contact = "esm.contact_head.regression"  # which nothing passes
    t.bare_weight(contact, 1, s.layers * s.heads, "contact")
    t.weight(f"{contact}.bias", (1,), "bias")
    return bert.headed(t, s, encoder(t, s, e), told)


def encoder(t: Trace, s: Shape, e: Embedding) -> Tensor:
    """Embeddings, layers, final norm."""
    embeddings = embed(t, s, e)
    mask = blocks.mask(t, format=embeddings.format) if t.setting.padded else None
    rotation = position_ids = None
    if e.rotary:
        position_ids = t.new("arange", (1, t.sequence), INT64)
        head_dim = s.hidden // s.heads
        t.buffers += FP32.block_bytes * (head_dim // 2)
        rotation = rotary.tabulated(t, head_dim, embeddings.format)
    attend = partial(attention, t, s, rotation, mask)

    def block(x: Tensor, kind: int) -> Tensor:
        return bert.layer(t, s, x, attend)

    kinds = [0] * s.layers
    x = t.layers("esm.encoder.layer", block, embeddings, kinds, mask, *(rotation or ()))
    x = blocks.layer_norm(t, x, s.family.final_norm)
    del position_ids, mask, embeddings
    return x


def embed(t: Trace, s: Shape, e: Embedding) -> Tensor:
    """Tokens, which a vector for each position may join; padding is zero."""
    t.buffers += INT64.block_bytes * s.positions
    places = bert.counted(t)
    x = tokens = blocks.embed(t, s.table, s.vocabulary, s.embedding)
    if e.token_dropout:
        masked = t.new("eq", (t.batch, t.sequence, 1), BOOL)
        x = ops.masked_fill(t, x, masked)
        share = t.new("sub", (t.batch, 1, 1), FP32)
        x = ops.to(t, ops.mul(t, ops.scale(t, x), share), tokens.format)
        del masked, share
    if not e.rotary:
        name = "esm.embeddings.position_embeddings"
        placed = bert.looked_up(t, name, s.positions, s, t.batch, places)
        x = ops.add(t, x, placed)
    x = blocks.layer_norm(t, x, "esm.embeddings.layer_norm") if e.normed else x
    if t.setting.padded:
        x = ops.mul(t, x, Tensor((t.batch, t.sequence, 1), BOOL, None))
    del tokens, places
    return x


def attention(
    t: Trace, s: Shape, rotation: Rotation | None, mask: Tensor | None, x: Tensor
) -> Tensor:
    """Attention of every token to all, whose queries are scaled before they are turned."""
    q, k, v = bert.projections(t, s, x)
    q = ops.scale(t, q)
    if rotation is not None:
        q, k = modernbert_decoder.turn(t, q, k, rotation)
    return bert.attend(t, s, q, k, v, mask)


def told(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """The logits of every token, by the embeddings turned round; a bias is added behind."""
    names = s.family.unmasking
    x = t.linear(x, names.dense, s.hidden, bias=True, role="transform")
    x = gelu(t, x)
    x = blocks.layer_norm(t, x, names.norm)
    offset = t.weight(names.bias, (s.vocabulary,), "bias")
    if s.tied:
        table = bert.head_table(t, s)
        return ops.add(t, ops.linear(t, x, table), offset)
    return ops.add(t, t.linear(x, names.decoder, s.vocabulary, role="head"), offset)
