"""RemBERT, Megatron BERT and RoFormer: BERTs whose attention is written out whatever is asked for.

transformers v5.23, the modeling file of each type under models/. RoFormer turns queries and keys
instead of telling positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from llmsize.anatomy import blocks
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.families import bert, gptj
from llmsize.anatomy.families.bert import BERT, Classifying, Layer, Shape, Type, by_pooler
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32, INT64
from llmsize.quick_dataclasses import replace

REMBERT = Type(
    prefix="rembert", counted=False, narrow=True,
    classifying=by_pooler("rembert.pooler.dense"),
)  # fmt: skip
MEGATRON = Type(
    prefix="bert", counted=False, before=True, final_norm="bert.encoder.ln", gelu=False,
    embedding_norm=False, unmasking=BERT,
    layer=Layer(attention_norm="attention.ln", norm="ln", holds_normed="all"),
    classifying=by_pooler("bert.pooler.dense"),
)  # fmt: skip
ROFORMER = Type(prefix="roformer", counted=False, narrow=True, unmasking=BERT, gelu=False)


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    bert.check(t, c)
    return FORWARDS[c.text("model_type")](t, c)


def rembert(t: Trace, c: Config) -> Tensor:
    """RemBERT, whose embeddings and head have widths of their own."""
    c = c.changed(embedding_size=c.size("input_embedding_size", default=256))
    s = bert.read(c, REMBERT)
    width = Dim(c.size("output_embedding_size", default=1664), "head_width")
    return bert.headed(t, s, encoder(t, s), partial(told, width))


def megatron(t: Trace, c: Config) -> Tensor:
    """Megatron BERT, whose norms come first."""
    s = bert.read(c, MEGATRON)
    return bert.headed(t, s, encoder(t, s))


def roformer(t: Trace, c: Config) -> Tensor:
    """RoFormer, whose classifier has the activation and the dropout of its layers."""
    c = c.changed(
        embedding_size=c.size("embedding_size", default=c.size("hidden_size")),
        classifier_dropout=c.number("hidden_dropout_prob", default=0.1),
    )
    activation = blocks.activation(c, "hidden_act", default="gelu")
    family = replace(ROFORMER, classifying=Classifying(activation=activation))
    s = bert.read(c, family)
    return bert.headed(t, s, encoder(t, s, turned="qkv" if c.flag("rotary_value") else "qk"))


FORWARDS = {"rembert": rembert, "megatron-bert": megatron, "roformer": roformer}


def encoder(t: Trace, s: Shape, turned: str = "") -> Tensor:
    """Embeddings and layers, which return the weights of attention, too."""
    prefix = s.family.prefix
    shown = None if t.setting.padded else t.new("ones", (t.batch, t.sequence), FP32)
    kinds = t.new("zeros", (t.batch, t.sequence), INT64)
    x = embed(t, s, kinds, placed=not turned)
    if shown is not None:
        t.new("to", shown.shape, BOOL)
    del shown
    inside = s.family is REMBERT  # whose encoder widens the embeddings, which the model holds
    if not inside and s.embedding != s.hidden:
        x = t.linear(x, f"{prefix}.embeddings_project", s.hidden, bias=True, role="projection")
    mask = blocks.mask(t, 0, "eager", format=x.format) if t.setting.padded else None
    inputs = [x]
    if inside:
        name = f"{prefix}.encoder.embedding_hidden_mapping_in"
        inputs = [t.linear(x, name, s.hidden, bias=True, role="projection")]
    waves = sinusoids(t, s) if turned else None
    returned: list[Tensor] = []

    def block(x: Tensor, kind: int) -> Tensor:
        x = bert.layer(t, s, x, partial(attend, t, s, mask, waves, turned))
        blocks.hand_back(t, returned, t.attention_weights)
        return x

    out = t.layers(f"{prefix}.encoder.layer", block, inputs.pop(), [0] * s.layers, mask, waves)
    out = blocks.layer_norm(t, out, s.family.final_norm) if s.family.final_norm else out
    returned.clear()
    del kinds, x
    return out


def embed(t: Trace, s: Shape, kinds: Tensor, *, placed: bool) -> Tensor:
    """Tokens, their kinds and, where these are told so, their positions."""
    name = f"{s.family.prefix}.embeddings"
    x = tokens = blocks.embed(t, s.table, s.vocabulary, s.embedding)
    of_kind = bert.looked_up(t, f"{name}.token_type_embeddings", s.kinds, s, t.batch, kinds)
    x = ops.add(t, tokens, of_kind)
    if placed:
        t.buffers += INT64.block_bytes * s.positions
        places = bert.looked_up(t, f"{name}.position_embeddings", s.positions, s, 1, None)
        x = ops.add_in_place(t, x, places)
    x = blocks.layer_norm(t, x, f"{name}.LayerNorm") if s.family.embedding_norm else x
    return ops.dropout(t, x, s.dropout)


def sinusoids(t: Trace, s: Shape) -> Tensor:
    """Sines and cosines side by side for every position."""
    table = t.weight(
        "roformer.encoder.embed_positions.weight", (s.positions, s.hidden // s.heads), "position",
        fixed=True,
    )  # fmt: skip
    places = t.new("arange", (t.sequence,), INT64)
    return ops.embedding(t, table, 1, t.sequence, indices=places)


def attend(
    t: Trace, s: Shape, mask: Tensor | None, waves: Tensor | None, turned: str, x: Tensor
) -> Tensor:
    """Attention of every token to all."""
    q, k, v = bert.projections(t, s, x)
    if waves is not None:
        q, k, v = turn(t, waves, (q, k, v), turned)
    scores = ops.matmul(t, q, ops.transpose(t, k, -1, -2))
    scores = ops.scale(t, scores)
    if mask is not None:
        scores = ops.add(t, scores, mask)
    weights = ops.softmax(t, scores)
    t.attention_weights = weights = ops.dropout(t, weights, s.attention_dropout)
    return ops.merge_heads(t, ops.matmul(t, weights, v))


def turn(t: Trace, waves: Tensor, heads: Sequence[Tensor], turned: str) -> Sequence[Tensor]:
    """Those that are to be `turned`, by neighbouring channels."""
    sines, cosines = (t.new("stack", waves.shape, waves.format) for _ in range(2))
    made, halves = [*heads], []
    for place in range(len(turned)):
        halves.append(gptj.rotate_every_two(t, heads[place]))
        product = ops.mul(t, heads[place], cosines)
        made[place] = ops.add(t, product, ops.mul(t, halves[-1], sines))
        del product
    return made


def told(width: int, t: Trace, s: Shape, x: Tensor) -> Tensor:
    """The logits of every token, by a head that is as wide as it likes (RemBERT)."""
    name = "cls.predictions"
    x = t.linear(x, f"{name}.dense", width, bias=True, role="transform")
    x = blocks.layer_norm(t, s.activation(t, x), f"{name}.LayerNorm")
    return t.linear(x, f"{name}.decoder", s.vocabulary, bias=True, role="head")
