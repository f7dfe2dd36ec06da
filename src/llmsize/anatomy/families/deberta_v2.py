"""DeBERTa V2 and V3: BERT whose scores also compare tokens with distances, and distances with them.

transformers v5.23, models/deberta_v2/modeling_deberta_v2.py. Attention is written out whatever
kernel is asked for.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.families import bert, t5
from llmsize.anatomy.families.bert import BERT, Layer, Shape, Type, by_pooler
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32, INT64
from llmsize.quick_dataclasses import dataclass

DEBERTA = Type(
    prefix="deberta", counted=False, narrow=True, unmasking=BERT, gelu=False,
    layer=Layer(
        "attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"
    ),
    classifying=by_pooler("pooler.dense", ops.gelu),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Distances:
    """How attention sees how far tokens are apart."""

    span: int
    """Distances to each side that have an embedding of their own."""
    bucketed: bool
    """Whether far ones share theirs."""
    normed: bool
    from_content: bool
    """Whether queries are compared with distances (c2p)."""
    to_content: bool
    """Whether distances are compared with keys (p2c)."""
    shared: bool
    """Whether distances pass the projections that tokens do."""


def read_distances(c: Config) -> Distances | None:
    """It from a `config.json`; `None` if scores are those of tokens alone."""
    if not c.flag("relative_attention"):
        return None
    told = c.value("pos_att_type")
    kinds = told.lower().split("|") if isinstance(told, str) else c.sequence("pos_att_type") or ()
    positions = c.size("max_position_embeddings", default=512)
    buckets = positive(c, "position_buckets")
    return Distances(
        span=buckets or positive(c, "max_relative_positions") or positions,
        bucketed=buckets > 0,
        normed="layer_norm" in c.text("norm_rel_ebd", default="none").lower(),
        from_content="c2p" in kinds,
        to_content="p2c" in kinds,
        shared=c.flag("share_att_key"),
    )


def positive(c: Config, field: str) -> int:
    """A number of distances; 0 if it is below one, which stands for none."""
    value = c.value(field)
    return 0 if isinstance(value, int) and value < 1 else c.count(field)


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    bert.check(t, c)
    if (
        c.count("conv_kernel_size")
        or c.number("pooler_dropout")
        or not c.flag("legacy", default=True)
    ):
        raise c.error(
            "has a convolution, dropout before its pooler, or a head of its own",
            "`conv_kernel_size`, `pooler_dropout` and `legacy` are as in DeBERTa V3 here",
        )
    c = c.changed(embedding_size=c.size("embedding_size", default=c.size("hidden_size")))
    s = bert.read(c, DEBERTA)
    placed = c.flag("position_biased_input", default=True)
    return bert.headed(t, s, encoder(t, s, read_distances(c), placed=placed))


def encoder(t: Trace, s: Shape, d: Distances | None, *, placed: bool) -> Tensor:
    """Embeddings and layers; what each gives is held until the last has run."""
    shown = Tensor((t.batch, t.sequence), INT64, None)
    if not t.setting.padded:
        shown = t.new("ones", shown.shape, FP32)
    kinds = t.new("zeros", shown.shape, INT64)
    held: list[Tensor | None] = [embed(t, s, shown, kinds, placed=placed)]
    mask = t.new("mul", (t.batch, 1, t.sequence, t.sequence), shown.format)
    distance = distances(t, d) if d is not None else None
    table = table_of_distances(t, s, d) if d is not None else None

    def block(x: Tensor, last: bool) -> Tensor:
        x = bert.layer(t, s, x, partial(attend, t, s, d, mask, distance, table))
        if not t.replaying:
            held.append(x)
        return x

    # the gradient of distances begins in the last layer; the others add to it
    ends = [layer == s.layers - 1 for layer in range(s.layers)]
    first = held[0]
    assert first is not None
    x = t.layers(
        "deberta.encoder.layer", block, first, ends, mask, distance, table,
        told=lambda last: None,
    )  # fmt: skip
    del first
    t.let_go(held)
    del kinds
    return x


def embed(t: Trace, s: Shape, shown: Tensor, kinds: Tensor, *, placed: bool) -> Tensor:
    """Tokens, with their positions and kinds if those are told so, normalised; padding is zero."""
    name = "deberta.embeddings"
    t.buffers += INT64.block_bytes * s.positions
    x = tokens = blocks.embed(t, s.table, s.vocabulary, s.embedding)
    if placed:
        places = bert.looked_up(t, f"{name}.position_embeddings", s.positions, s, 1, None)
        x = ops.add(t, x, places)
    else:
        places = t.new("zeros_like", tokens.shape, tokens.format)
    if s.kinds:
        of_kind = bert.looked_up(t, f"{name}.token_type_embeddings", s.kinds, s, t.batch, kinds)
        x = ops.add(t, x, of_kind)
    if s.embedding != s.hidden:
        x = t.linear(x, f"{name}.embed_proj", s.hidden, role="projection")
    x = blocks.layer_norm(t, x, f"{name}.LayerNorm")
    factor = ops.to(t, shown, x.format).view(t.batch, t.sequence, 1)
    x = ops.dropout(t, ops.mul(t, x, factor), s.dropout)
    del places
    return x


def distances(t: Trace, d: Distances) -> Tensor:
    """The row of each distance of two tokens: far ones by their logarithm."""
    shape = (t.sequence, t.sequence)
    ends = [t.new("arange", (t.sequence,), INT64) for _ in range(2)]
    apart = t.new("sub", shape, INT64)
    del ends
    if not d.bucketed:
        return apart
    sign = t.new("sign", shape, INT64)
    within = [t.new(operation, shape, BOOL) for operation in ("lt", "gt")]
    near = t.new("bitwise_and", shape, BOOL)
    within.clear()
    size = t.new("abs", shape, INT64)
    limited = t.new("where", shape, INT64)
    del near, size
    logarithm = t5.successively(t, shape, (FP32,) * 6)
    small, exact = t.new("le", shape, BOOL), t.new("to", shape, FP32)
    signed = t.new("mul", shape, FP32)
    bucket = t.new("where", shape, FP32)
    del sign, limited, logarithm, small, exact, signed, apart
    return ops.to(t, bucket, INT64)


def table_of_distances(t: Trace, s: Shape, d: Distances) -> Tensor:
    """The embedding of each distance, from the farthest before to the farthest behind."""
    name = "deberta.encoder"
    rows = Dim(2 * d.span, "distances")
    table = t.weight(f"{name}.rel_embeddings.weight", (rows, s.hidden), "position")
    return blocks.layer_norm(t, table, f"{name}.LayerNorm") if d.normed else table


def attend(
    t: Trace, s: Shape, d: Distances | None, mask: Tensor, distance: Tensor | None,
    table: Tensor | None, x: Tensor,
) -> Tensor:  # fmt: skip
    """Attention of every token to all, whose scores are those of tokens and of distances."""
    q, k, v = (by_matrix(t, part) for part in bert.projections(t, s, x))
    scores = ops.bmm(t, q, scaled(t, ops.transpose(t, k, -1, -2)))
    bias = None
    if d is not None and distance is not None and table is not None:
        table = ops.dropout(t, table, s.dropout)
        bias = scores_of_distances(t, s, d, q, k, distance, table)
        if bias is not None:
            scores = ops.add(t, scores, bias)
    by_pair = t.sequence, t.sequence
    scores = ops.reshape(t, scores, t.batch, s.heads, *by_pair)
    seen = t.new("to", mask.shape, BOOL)
    scores = ops.masked_fill(t, scores, t.new("bitwise_not", mask.shape, BOOL))
    weights = ops.dropout(t, ops.softmax(t, scores), s.attention_dropout)
    out = ops.bmm(t, ops.reshape(t, weights, t.batch * s.heads, *by_pair), v)
    out = ops.reshape(t, out, t.batch, s.heads, t.sequence, s.hidden // s.heads)
    out = ops.merge_heads(t, out)
    del seen, bias
    return out


def scaled(t: Trace, x: Tensor) -> Tensor:
    """`x` over the square root of a number of channels, which is a tensor."""
    root = t.new("sqrt", (), FP32)
    return ops.divide(t, x, ops.to(t, root, x.format))


def by_matrix(t: Trace, x: Tensor) -> Tensor:
    """Heads laid out one after the other, and those of all sequences in one dimension."""
    return ops.reshape(t, ops.contiguous(t, x), x.shape[0] * x.shape[1], *x.shape[2:])


def scores_of_distances(
    t: Trace, s: Shape, d: Distances, q: Tensor, k: Tensor, distance: Tensor, table: Tensor
) -> Tensor | None:
    """What queries make of the distance to each token, and what keys make of that from it."""
    rows = ops.narrow(t, table, 0, table.shape[0])
    rows = ops.reshape(t, rows, 1, *rows.shape)
    heads = s.family.layer if d.shared else OWN
    wanted = [(heads.k, "k", d.from_content), (heads.q, "q", d.to_content)]
    made = {
        role: of_rows(t, s, rows, name, role)
        for name, role, used in (reversed(wanted) if d.shared else wanted)
        if used or d.shared
    }
    indices = [distance]
    score = None
    if d.from_content:
        compared = ops.bmm(t, q, ops.transpose(t, made["k"], -1, -2))
        indices.append(t5.successively(t, distance.shape, (INT64, INT64)))
        compared = picked(t, compared, indices[-1])
        score = ops.shift(t, scaled(t, compared))
    if d.to_content:
        indices.append(t5.successively(t, distance.shape, (INT64, INT64, INT64)))
        other = ops.bmm(t, k, ops.transpose(t, made["q"], -1, -2))
        other = ops.transpose(t, picked(t, other, indices[-1]), -1, -2)
        over = scaled(t, other)
        score = ops.shift(t, over) if score is None else ops.add_in_place(t, score, over)
        del over
    return score


OWN = Layer("attention.self.pos_query_proj", "attention.self.pos_key_proj")
"""Projections that distances alone pass."""


def of_rows(t: Trace, s: Shape, rows: Tensor, name: str, role: str) -> Tensor:
    """A projection of all distances by heads, once for each sequence."""
    projected = ops.split_heads(t, t.linear(rows, name, s.hidden, bias=True, role=role), s.heads)
    by_head = by_matrix(t, projected)
    repeated = ops.repeat_first(t, by_head, t.batch)
    return ops.reshape(t, repeated, t.batch * s.heads, *by_head.shape[1:])


def picked(t: Trace, compared: Tensor, places: Tensor) -> Tensor:
    """The entry of each pair of tokens from those of all distances."""
    places = ops.expand(t, places.view(1, *places.shape), compared.shape[0], *places.shape)
    return ops.gather(t, compared, places)
