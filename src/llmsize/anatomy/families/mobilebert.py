"""MobileBERT: BERT whose layers work within a bottleneck, and whose embeddings see neighbours.

transformers v5.23, models/mobilebert/modeling_mobilebert.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.families import bert
from llmsize.anatomy.families.bert import Shape, Type, by_pooler
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import INT64
from llmsize.quick_dataclasses import dataclass, replace

MOBILE = Type(
    prefix="mobilebert", counted=False, narrow=True,
    classifying=by_pooler("mobilebert.pooler.dense"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Narrow:
    """What MobileBERT has beside the dimensions of BERT."""

    inner: int
    """Width within the bottleneck."""
    feeds: int
    """Feed-forward networks of a layer."""
    trigrams: bool
    """Whether tokens are seen with their neighbours."""
    scaled: bool
    """Whether norms do no more than scale and shift."""


USUAL = {
    "use_bottleneck": True, "key_query_shared_bottleneck": True, "use_bottleneck_attention": False,
    "classifier_activation": True,
}  # fmt: skip
"""What is modelled, as google/mobilebert-uncased has it."""


def read(c: Config) -> Narrow:
    """MobileBERT's own dimensions from a `config.json`."""
    kind = c.text("normalization_type", default="no_norm")
    if kind not in ("no_norm", "layer_norm"):
        raise c.error("has an unknown `normalization_type`", "known ones: no_norm, layer_norm")
    for field, usual in USUAL.items():
        if c.flag(field, default=usual) != usual:
            raise c.error(
                f"has an unusual `{field}`", "`google/mobilebert-uncased` has it the other way"
            )
    return Narrow(
        inner=Dim(c.size("intra_bottleneck_size", default=128), "inner"),
        feeds=c.few("num_feedforward_networks", default=4),
        trigrams=c.flag("trigram_input", default=True),
        scaled=kind == "no_norm",
    )


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    bert.check(t, c)
    n = read(c)
    s = bert.read(c, MOBILE)
    return bert.headed(t, s, encoder(t, s, n), told)


def encoder(t: Trace, s: Shape, n: Narrow) -> Tensor:
    """Embeddings and layers."""
    embeddings = embed(t, s, n)
    mask = blocks.mask(t, format=embeddings.format) if t.setting.padded else None

    def block(x: Tensor, kind: int) -> Tensor:
        return layer(t, s, n, mask, x)

    return t.layers("mobilebert.encoder.layer", block, embeddings, [0] * s.layers, mask)


def norm(t: Trace, n: Narrow, x: Tensor, name: str) -> Tensor:
    """A norm, or what has taken its place."""
    if not n.scaled:
        return blocks.layer_norm(t, x, name)
    width = (x.shape[-1],)
    product = ops.mul(t, x, t.weight(f"{name}.weight", width, "norm"))
    return ops.add(t, product, t.weight(f"{name}.bias", width, "norm"))


def embed(t: Trace, s: Shape, n: Narrow) -> Tensor:
    """Tokens, perhaps beside those before and behind them, their positions and their kinds."""
    name = "mobilebert.embeddings"
    t.buffers += INT64.block_bytes * s.positions
    kinds = t.new("zeros", (t.batch, t.sequence), INT64)
    x = blocks.embed(t, s.table, s.vocabulary, s.embedding)
    x = with_neighbours(t, x) if n.trigrams else x
    if n.trigrams or s.embedding != s.hidden:
        transform = f"{name}.embedding_transformation"
        x = t.linear(x, transform, s.hidden, bias=True, role="projection")
    places = bert.looked_up(t, f"{name}.position_embeddings", s.positions, wide(s), 1, None)
    of_kind = bert.looked_up(t, f"{name}.token_type_embeddings", s.kinds, wide(s), t.batch, kinds)
    whole = ops.add(t, ops.add(t, x, places), of_kind)
    whole = ops.dropout(t, norm(t, n, whole, f"{name}.LayerNorm"), s.dropout)
    del x, places, of_kind, kinds
    return whole


def wide(s: Shape) -> Shape:
    """The shape for tables that are as wide as the layers."""
    return replace(s, embedding=s.hidden)


def with_neighbours(t: Trace, x: Tensor) -> Tensor:
    """Each token between the next one and the one before."""
    before = ops.pad(t, ops.narrow(t, x, 1, t.sequence - 1), 1, 1)
    behind = ops.pad(t, ops.narrow(t, x, 1, t.sequence - 1), 1, 1)
    return ops.cat(t, (before, x, behind), 2)


def layer(t: Trace, s: Shape, n: Narrow, mask: Tensor | None, x: Tensor) -> Tensor:
    """Attention and feed-forward networks within a bottleneck."""
    narrow = bottleneck(t, n, x, "bottleneck.input")
    asks = bottleneck(t, n, x, "bottleneck.attention")
    attended = attention(t, s, n, asks, x, mask)
    attended = first = joined(t, n, attended, narrow, "attention.output", n.inner, "o")
    for index in range(n.feeds - 1):
        attended = feed(t, s, n, attended, f"ffn.{index}.")
    between = activated(t, s, attended, "intermediate")
    out = joined(t, n, between, attended, "output", n.inner, "down")
    wide = t.linear(out, "output.bottleneck.dense", s.hidden, bias=True, role="projection")
    wide = ops.dropout(t, wide, s.dropout)
    wide = norm(t, n, ops.add(t, wide, x), "output.bottleneck.LayerNorm")
    del narrow, asks, first, between, out
    return wide


def bottleneck(t: Trace, n: Narrow, x: Tensor, name: str) -> Tensor:
    """`x` made narrow."""
    x = t.linear(x, f"{name}.dense", n.inner, bias=True, role="projection")
    return norm(t, n, x, f"{name}.LayerNorm")


def attention(
    t: Trace, s: Shape, n: Narrow, asks: Tensor, asked: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention of every token to all: queries and keys are of narrow states, values of wide."""
    project = partial(t.linear, out=n.inner, bias=True)
    q, k, v = (
        ops.split_heads(t, project(source, f"attention.self.{name}", role=name[0]), s.heads)
        for name, source in (("query", asks), ("key", asks), ("value", asked))
    )
    return bert.attend(t, s, q, k, v, mask)


def joined(
    t: Trace, n: Narrow, x: Tensor, residual: Tensor, name: str, out: int, role: str
) -> Tensor:
    """What a linear layer makes of `x`, added to the residual, with a norm behind."""
    made = t.linear(x, f"{name}.dense", out, bias=True, role=role)
    return norm(t, n, ops.add(t, made, residual), f"{name}.LayerNorm")


def feed(t: Trace, s: Shape, n: Narrow, x: Tensor, name: str) -> Tensor:
    """One more feed-forward network."""
    between = activated(t, s, x, f"{name}intermediate")
    return joined(t, n, between, x, f"{name}output", n.inner, "down")


def activated(t: Trace, s: Shape, x: Tensor, name: str) -> Tensor:
    """The first half of a feed-forward network."""
    return s.activation(t, t.linear(x, f"{name}.dense", s.intermediate, bias=True, role="up"))


def told(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """The logits of every token, by the embeddings turned round and what they lack in width."""
    name = "cls.predictions"
    x = t.linear(x, f"{name}.transform.dense", s.hidden, bias=True, role="transform")
    x = blocks.layer_norm(t, s.activation(t, x), f"{name}.transform.LayerNorm")
    rest = t.bare_weight(f"{name}.dense", s.hidden - s.embedding, s.vocabulary, "transform")
    rest.beside = s.embedding * s.vocabulary  # whose gradient comes in one tensor with its own
    offset = t.weight(f"{name}.bias", (s.vocabulary,), "bias")
    table = lm_head.shared_table(t, f"{name}.decoder.weight", f"{s.table}.weight")
    whole = ops.cat(t, (ops.transpose(t, table, 0, 1), rest), 0)
    logits = ops.linear(t, x, whole, out=s.vocabulary)
    del whole
    return ops.add_in_place(t, logits, offset)
