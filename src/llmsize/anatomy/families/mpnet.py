"""MPNet: BERT with a learned bias for each distance of two tokens, the same in all layers.

transformers v5.23, models/mpnet/modeling_mpnet.py. Attention is written out whatever kernel is
asked for.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.families import bert, t5
from llmsize.anatomy.families.bert import Layer, Shape, Type
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import INT64

MPNET = Type(
    prefix="mpnet", has_kinds=False,
    layer=Layer(
        "attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o",
        "attention.LayerNorm",
    ),
)  # fmt: skip


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = bert.read(c, MPNET)
    bert.check(t, c, recomputed=False)
    buckets = Dim(c.size("relative_attention_num_buckets", default=32), "buckets")
    return bert.headed(t, s, encoder(t, s, buckets))


def encoder(t: Trace, s: Shape, buckets: int) -> Tensor:
    """Embeddings and layers, whose scores have the same bias."""
    embeddings = bert.embed(t, s)
    mask = blocks.mask(t, 0, "eager", format=embeddings.format) if t.setting.padded else None
    bias = position_bias(t, s, buckets)

    def block(x: Tensor, last: bool) -> Tensor:
        return bert.layer(t, s, x, partial(attend, t, s, bias, mask))

    # the gradient of the bias begins in the last layer; the others add to it
    kinds = [layer == s.layers - 1 for layer in range(s.layers)]
    return t.layers(
        "mpnet.encoder.layer", block, embeddings, kinds, mask, bias, told=lambda last: None
    )


def position_bias(t: Trace, s: Shape, buckets: int) -> Tensor:
    """A learned number for each head and bucket of distances, laid out for every sequence."""
    tokens = t.sequence
    ends = [t.new("arange", (tokens,), INT64) for _ in range(2)]
    distance = t.new("sub", (tokens, tokens), INT64)
    negated = t.new("neg", distance.shape, INT64)
    chosen = t5.buckets(t, distance.shape, bidirectional=True)
    del negated
    table = t.weight("mpnet.encoder.relative_attention_bias.weight", (buckets, s.heads), "position")
    values = ops.embedding(t, table, tokens, tokens, indices=chosen)
    by_head = ops.permute(t, values, 2, 0, 1)
    by_head = ops.reshape(t, by_head, 1, *by_head.shape)
    whole = ops.copy(t, ops.expand(t, by_head, t.batch, *by_head.shape[1:]))
    del ends, distance
    return whole


def attend(t: Trace, s: Shape, bias: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
    """Attention of every token to all, with a bias on the scores."""
    q, k, v = bert.projections(t, s, x)
    scores = ops.scale(t, ops.matmul(t, q, ops.transpose(t, k, -1, -2)))
    scores = ops.add_in_place(t, scores, bias)
    if mask is not None:
        scores = ops.add(t, scores, mask)
    weights = ops.softmax(t, scores)
    weights = ops.dropout(t, weights, s.attention_dropout)
    return ops.merge_heads(t, ops.matmul(t, weights, v))
