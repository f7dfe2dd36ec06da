"""Nomic BERT: BERT that rotates instead of telling positions, with a gated MLP.

transformers v5.23, models/nomic_bert/modeling_nomic_bert.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.families import bert, eurobert
from llmsize.anatomy.families.bert import BERT, Classifying, Shape, Type
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import INT64

NOMIC = Type(
    prefix="nomic_bert", counted=False, gelu=False,
    unmasking=BERT._replace(norm="cls.predictions.transform.layer_norm"),
    classifying=Classifying("nomic_bert.pooler.dense", "pooler", "classifier", False),
)  # fmt: skip


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    bert.check(t, c)
    c = c.changed(attention_dropout=c.number("attention_probs_dropout_prob"))
    s = bert.read(c, NOMIC)
    return bert.headed(t, s, encoder(t, s, decoder.read(c, tied=True)))


def encoder(t: Trace, s: Shape, sizes: Sizes) -> Tensor:
    """Embeddings and layers."""
    position_ids = t.new("arange", (1, t.sequence), INT64)
    embeddings = embed(t, s)
    mask = blocks.mask(t, format=embeddings.format) if t.setting.padded else None
    rotation = rotary.table(t, embeddings, sizes.rotary)
    attend = partial(eurobert.attention, t, sizes, rotation, mask, softmax_format=None)

    def block(x: Tensor, kind: int) -> Tensor:
        attended = attend(x)
        x = ops.add(t, x, ops.dropout(t, attended, s.dropout))
        x = residual = blocks.layer_norm(t, x, "post_attention_layernorm")
        x = decoder.gated(t, sizes, x)
        x = ops.add(t, residual, ops.dropout(t, x, s.dropout))
        x = blocks.layer_norm(t, x, "post_mlp_layernorm")
        del attended
        return x

    kinds = [0] * s.layers
    x = t.layers("nomic_bert.layers", block, embeddings, kinds, position_ids, mask, *rotation)
    del position_ids, mask
    return x


def embed(t: Trace, s: Shape) -> Tensor:
    """Tokens and their kinds, normalised; constants that tell positions are there, unread."""
    name = "nomic_bert.embeddings"
    t.buffers += 2 * INT64.block_bytes * s.positions
    x = tokens = blocks.embed(t, s.table, s.vocabulary, s.embedding)
    kinds = t.new("zeros", (t.batch, t.sequence), INT64)
    of_kind = bert.looked_up(t, f"{name}.token_type_embeddings", s.kinds, s, t.batch, kinds)
    x = ops.add(t, x, of_kind)
    del tokens
    x = blocks.layer_norm(t, x, f"{name}.LayerNorm")
    return ops.dropout(t, x, s.dropout)
