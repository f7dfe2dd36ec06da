"""BERT and its kin (RoBERTa, ELECTRA, ERNIE, DistilBERT, …): encoders, whose tokens see all others.

transformers v5.23, the modeling file of each type under models/. They write no text: the head is
that of masked tokens, or a classifier's where `architectures` names one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

from llmsize.anatomy import attention as kernels
from llmsize.anatomy import blocks, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import ACTIVATION_FIELDS, Part
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import INT32, INT64
from llmsize.quick_dataclasses import dataclass


class Layer(NamedTuple):
    """What a checkpoint calls the parts of a layer."""

    q: str = "attention.self.query"
    k: str = "attention.self.key"
    v: str = "attention.self.value"
    o: str = "attention.output.dense"
    attention_norm: str = "attention.output.LayerNorm"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    norm: str = "output.LayerNorm"
    successive: bool = False
    """Whether what the last linear layer reads is gone when that has run."""
    holds_normed: Literal["", "activation", "all"] = ""
    """Whether what feed-forward reads is held until its activation has run, or all of it."""


class Unmasking(NamedTuple):
    """What a checkpoint calls the parts of the head of masked tokens."""

    dense: str = "lm_head.dense"
    norm: str = "lm_head.layer_norm"
    decoder: str = "lm_head.decoder"
    bias: str = "lm_head.bias"
    """Of the decoder where that is the embeddings turned round."""


class Classifying(NamedTuple):
    """The layer that reads the first token, with its role, and the one that tells its class."""

    pool: str = "classifier.dense"
    role: str = "score"
    classify: str = "classifier.out_proj"
    drops_first: bool = True
    """Whether some of the first token is left out before it is read."""
    activation: blocks.Activation = ops.tanh


def by_pooler(name: str, activation: blocks.Activation = ops.tanh) -> Classifying:
    """BERT's: what the pooler of that name makes of the first token tells its class."""
    return Classifying(name, "pooler", "classifier", drops_first=False, activation=activation)


@dataclass(frozen=True, slots=True)
class Type:
    """What one `model_type` does differently from the others."""

    prefix: str = "roberta"
    layers: str = "encoder.layer"
    layer: Layer = Layer()
    before: bool = False
    """Whether norms come before attention and feed-forward."""
    final_norm: str = ""
    """The norm behind all layers."""
    dropped: Literal["both", "first", "second"] = "both"
    """What is left out in part: what `both` halves of a layer give, or the `first` or `second`."""
    counted: bool = True
    """Whether positions are counted from the first token that is no padding."""
    has_kinds: bool = True
    """Whether tokens of the first and of the second sentence are told apart."""
    activation: blocks.Activation | None = None
    """Of layers whatever the configuration says."""
    narrow: bool = False
    """Whether embeddings have a width of their own."""
    embedding_norm: bool = True
    unmasking: Unmasking = Unmasking()
    gelu: bool = True
    """Whether the head of masked tokens has a GELU whatever the layers have."""
    classifying: Classifying = Classifying()
    head_dropout: float | None = None
    """What a classifier leaves out if nothing is said; `None` for as much as layers do."""


BERT = Unmasking(
    "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder", "cls.predictions.bias",
)  # fmt: skip
ROBERTA = Type()


def like_bert(prefix: str) -> Type:
    """A type whose modules are BERT's."""
    return Type(
        prefix=prefix, counted=False, unmasking=BERT, gelu=False,
        classifying=by_pooler(f"{prefix}.pooler.dense"),
    )  # fmt: skip


TYPES = {
    "bert": like_bert("bert"),
    "ernie": like_bert("ernie"),
    "roberta": ROBERTA,
    "xlm-roberta": ROBERTA,
    "camembert": ROBERTA,
    "data2vec-text": Type(prefix="data2vec_text"),
    "roberta-prelayernorm": Type(
        prefix="roberta_prelayernorm", before=True, final_norm="roberta_prelayernorm.LayerNorm",
        layer=Layer(attention_norm="attention.LayerNorm", norm="intermediate.LayerNorm"),
    ),
    "xlm-roberta-xl": Type(
        before=True, embedding_norm=False, final_norm="roberta.encoder.LayerNorm", dropped="first",
        layer=Layer(
            attention_norm="attention.self_attn_layer_norm", norm="LayerNorm",
            holds_normed="activation",
        ),
    ),
    "electra": Type(
        prefix="electra", counted=False, narrow=True, classifying=Classifying(activation=ops.gelu),
        unmasking=Unmasking(
            "generator_predictions.dense", "generator_predictions.LayerNorm",
            "generator_lm_head", "generator_lm_head.bias",
        ),
    ),
    "distilbert": Type(
        prefix="distilbert", layers="transformer.layer", dropped="second", counted=False,
        has_kinds=False, gelu=False,
        layer=Layer(
            "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
            "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm", successive=True,
        ),
        unmasking=Unmasking(
            "vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias"
        ),
        classifying=by_pooler("pre_classifier", ops.relu),
        head_dropout=0.2,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of BERT."""

    family: Type
    layers: int
    hidden: int
    embedding: int
    """Width of the embeddings, which may be narrower than the layers."""
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    kinds: int
    """Kinds of tokens: of the first and of the second sentence."""
    tasks: int
    """Kinds of tasks, of which the first is at hand (ERNIE); 0 if they are not told apart."""
    labels: int
    """Classes of a classifier; 0 for the head of masked tokens."""
    activation: blocks.Activation
    dropout: float
    attention_dropout: float
    head_dropout: float
    tied: bool
    """Whether the embeddings turned round tell masked tokens."""

    @property
    def table(self) -> str:
        """The name of the tokens' embeddings."""
        return f"{self.family.prefix}.embeddings.word_embeddings"


def read(c: Config, family: Type) -> Shape:
    """The shape from a `config.json`."""
    if c.flag("is_decoder"):
        raise c.error("is an encoder made a decoder, which is not modelled", "leave out is_decoder")
    hidden = c.size("hidden_size", "dim")
    dropout = c.number("hidden_dropout_prob", "dropout", default=0.1)
    embedding = c.size("embedding_size", default=128) if family.narrow else hidden
    return Shape(
        family=family,
        layers=c.few("num_hidden_layers", "n_layers"),
        hidden=Dim(hidden, "hidden"),
        embedding=Dim(embedding, "embedding"),
        heads=Dim(c.heads(hidden, "num_attention_heads", "n_heads"), "heads"),
        intermediate=Dim(c.size("intermediate_size", "hidden_dim"), "intermediate"),
        vocabulary=Dim(c.size("vocab_size"), "vocabulary"),
        positions=Dim(c.size("max_position_embeddings", default=512), "positions"),
        kinds=Dim(c.count("type_vocab_size", default=2), "kinds") if family.has_kinds else 0,
        tasks=c.size("task_type_vocab_size", default=3) if c.flag("use_task_id") else 0,
        labels=labels(c),
        activation=family.activation or blocks.activation(c, *ACTIVATION_FIELDS, default="gelu"),
        dropout=dropout,
        attention_dropout=c.number(
            "attention_probs_dropout_prob", "attention_dropout", default=0.1
        ),
        head_dropout=c.number(
            "classifier_dropout", "classifier_dropout_prob", "seq_classif_dropout", "cls_dropout",
            default=dropout if family.head_dropout is None else family.head_dropout,
        ),
        tied=c.flag("tie_word_embeddings", default=True),
    )  # fmt: skip


def labels(c: Config) -> int:
    """How many classes there are; 0 where no classifier is asked for."""
    heads = c.sequence("architectures") or [""]
    if not str(heads[0]).endswith("ForSequenceClassification"):
        return 0
    named = c.value("id2label")
    return len(named) if isinstance(named, dict) and named else c.few("num_labels", default=2)


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = read(c, TYPES[c.text("model_type")])
    check(t, c)
    return headed(t, s, encoder(t, s))


def check(t: Trace, c: Config, *, recomputed: bool = True) -> None:
    """Raises `LLMSizeError` where an encoder is asked to write, or to run layers again that cannot.

    Some classes say that their layers cannot be `recomputed`.
    """
    if t.setting.cache or t.setting.objective not in ("tokens", "score"):
        raise c.error(
            "is that of an encoder, which writes no text",
            "`inspect` it, or `train` its head of masked tokens or its classifier",
        )
    if t.setting.checkpoint_every and not recomputed:
        raise c.error(
            "is of a class without gradient checkpointing in transformers", "train without it"
        )


def encoder(t: Trace, s: Shape) -> Tensor:
    """Embeddings and layers."""
    family = s.family
    embeddings = embed(t, s)
    if s.embedding != s.hidden:
        name = f"{family.prefix}.embeddings_project"
        embeddings = t.linear(embeddings, name, s.hidden, bias=True, role="projection")
    mask = blocks.mask(t, format=embeddings.format) if t.setting.padded else None

    def block(x: Tensor, kind: int) -> Tensor:
        return layer(t, s, x, partial(self_attention, t, s, mask))

    name = f"{family.prefix}.{family.layers}"
    x = t.layers(name, block, embeddings, [0] * s.layers, mask)
    return blocks.layer_norm(t, x, family.final_norm) if family.final_norm else x


def embed(t: Trace, s: Shape) -> Tensor:
    """Tokens, their kinds and their positions, normalised; the constants are buffers."""
    name, counts = f"{s.family.prefix}.embeddings", s.family.counted
    t.buffers += (2 if s.kinds else 1) * INT64.block_bytes * s.positions
    places = counted(t) if counts else None
    sequences = t.batch if counts else 1
    kinds = t.new("gather", (sequences, t.sequence), INT64) if s.kinds else None
    x = tokens = blocks.embed(t, s.table, s.vocabulary, s.embedding)
    if s.kinds:
        of_kind = looked_up(t, f"{name}.token_type_embeddings", s.kinds, s, t.batch, kinds)
        x = ops.add(t, tokens, of_kind)
    placed = looked_up(t, f"{name}.position_embeddings", s.positions, s, sequences, places)
    x = ops.add(t, x, placed)
    if s.tasks:
        tasks = t.new("zeros", (t.batch, t.sequence), INT64)
        of_task = looked_up(t, f"{name}.task_type_embeddings", s.tasks, s, t.batch, tasks)
        x = ops.add_in_place(t, x, of_task)
    x = blocks.layer_norm(t, x, f"{name}.LayerNorm") if s.family.embedding_norm else x
    return ops.dropout(t, x, s.dropout)


def looked_up(
    t: Trace, name: str, rows: int, s: Shape, sequences: int, indices: Tensor | None
) -> Tensor:
    """Rows of a table of positions or kinds for the tokens of so many sequences."""
    table = t.weight(f"{name}.weight", (rows, s.embedding), "position")
    return ops.embedding(t, table, sequences, t.sequence, indices=indices)


def counted(t: Trace) -> Tensor:
    """RoBERTa's positions, counted from the first token that is no padding."""
    shape = (t.batch, t.sequence)
    mask = t.new("to", shape, INT32)
    sums = t.new("cumsum", shape, INT64)
    narrow = t.new("to", shape, INT32)
    product = t.new("mul", shape, INT32)
    del sums, narrow
    wide = t.new("to", shape, INT64)
    places = t.new("add", shape, INT64)
    del mask, product, wide
    return places


def layer(t: Trace, s: Shape, x: Tensor, attend: Part) -> Tensor:
    """Attention and feed-forward, each added to what it read, with a norm before or behind it."""
    names, before, dropped = s.family.layer, s.family.before, s.family.dropped
    source = blocks.layer_norm(t, x, names.attention_norm) if before else x
    attended = attend(source)
    attended = t.linear(attended, names.o, s.hidden, bias=True, role="o")
    attended = ops.dropout(t, attended, s.dropout) if dropped != "second" else attended
    attended = added(t, attended, x, "" if before else names.attention_norm)
    del source
    source = blocks.layer_norm(t, attended, names.norm) if before else attended
    fed = t.linear(source, names.up, s.intermediate, bias=True, role="up")
    source = source if names.holds_normed else fed
    fed = s.activation(t, fed)
    if names.holds_normed != "all":
        del source
    out = t.linear(fed, names.down, s.hidden, bias=True, role="down")
    if names.successive:
        del fed
    out = ops.dropout(t, out, s.dropout) if dropped != "first" else out
    return added(t, out, attended, "" if before else names.norm)


def added(t: Trace, x: Tensor, residual: Tensor, norm: str) -> Tensor:
    """What half a layer gives with what it read, which a `norm` may be behind."""
    total = [ops.add(t, x, residual)]
    return blocks.layer_norm(t, total.pop(), norm) if norm else total.pop()


def self_attention(t: Trace, s: Shape, mask: Tensor | None, x: Tensor) -> Tensor:
    """Attention of every token to all."""
    q, k, v = projections(t, s, x)
    return attend(t, s, q, k, v, mask)


def attend(t: Trace, s: Shape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q, k, v by heads; the result is batch, sequence, all channels of all heads."""
    if t.setting.attention != "eager":
        return ops.merge_heads(t, kernels.attend(t, q, k, v, mask, dropout=s.attention_dropout))
    weights = ops.scale(t, ops.matmul(t, q, ops.transpose(t, k, -1, -2)))
    if mask is not None:
        weights = ops.add(t, weights, mask)
    weights = ops.softmax(t, weights)
    t.attention_weights = weights = ops.dropout(t, weights, s.attention_dropout)
    return ops.merge_heads(t, ops.matmul(t, weights, v))


def projections(t: Trace, s: Shape, x: Tensor) -> Iterator[Tensor]:
    """Queries, keys and values by heads."""
    names = s.family.layer
    for name, role in zip((names.q, names.k, names.v), "qkv", strict=True):
        yield ops.split_heads(t, t.linear(x, name, s.hidden, bias=True, role=role), s.heads)


Tell = Callable[[Trace, Shape, Tensor], Tensor]
"""A head of masked tokens: from the last hidden states to the logits of every token."""


def headed(t: Trace, s: Shape, x: Tensor, tell: Tell | None = None) -> Tensor:
    """What the head that is asked for makes of the last hidden states."""
    if s.labels or t.setting.objective == "score":
        return classified(t, s, x)
    return unmasked(t, s, x, tell or told)


def unmasked(t: Trace, s: Shape, x: Tensor, tell: Tell) -> Tensor:
    """Loss or logits of masked tokens; the loss is in the format of the logits."""
    logits = tell(t, s, x)
    if t.setting.keep_outputs or not t.setting.training:
        t.outputs = (logits,)
    return loss(t, logits) if t.setting.training else logits


def told(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """The logits of every token, by the embeddings turned round."""
    names = s.family.unmasking
    x = t.linear(x, names.dense, s.embedding, bias=True, role="transform")
    x = ops.gelu(t, x) if s.family.gelu else s.activation(t, x)
    x = blocks.layer_norm(t, x, names.norm)
    offset = t.weight(names.bias, (s.vocabulary,), "bias")  # idle beside a head's own
    if not s.tied:
        return t.linear(x, names.decoder, s.vocabulary, bias=True, role="head")
    return ops.linear(t, x, head_table(t, s), offset)


def head_table(t: Trace, s: Shape) -> Tensor:
    """The embeddings that tell masked tokens."""
    return lm_head.shared_table(t, f"{s.family.unmasking.decoder}.weight", f"{s.table}.weight")


def loss(t: Trace, logits: Tensor) -> Tensor:
    """Cross entropy with labels that are not shifted."""
    return ops.cross_entropy(t, logits, Tensor(logits.shape[:-1], INT64, None))


def classified(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """A class for each sequence from its first token, which one more layer reads."""
    t.classifies = True
    names = s.family.classifying
    first = ops.select(t, x, 1)
    del x
    first = ops.dropout(t, first, s.head_dropout) if names.drops_first else first
    pooled = names.activation(t, t.linear(first, names.pool, s.hidden, bias=True, role=names.role))
    pooled = ops.dropout(t, pooled, s.head_dropout)
    logits = t.linear(pooled, names.classify, s.labels or 1, bias=True, role="score")
    return loss(t, logits) if t.setting.training else logits
