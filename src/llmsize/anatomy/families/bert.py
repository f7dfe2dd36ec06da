"""BERT and RoBERTa: encoders, whose tokens see all others and which write no text.

transformers v5.23, models/bert/modeling_bert.py and models/roberta/modeling_roberta.py. The head is
that of masked tokens, or a classifier's where `architectures` names one.
"""

from __future__ import annotations

from llmsize.anatomy import attention as kernels
from llmsize.anatomy import blocks, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import ACTIVATION_FIELDS
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import INT32, INT64
from llmsize.quick_dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of BERT."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    kinds: int
    """Kinds of tokens: of the first and of the second sentence."""
    labels: int
    """Classes of a classifier; 0 for the head of masked tokens."""
    activation: blocks.Activation
    dropout: float
    attention_dropout: float
    head_dropout: float
    tied: bool
    """Whether the embeddings turned round tell masked tokens."""


def read(c: Config) -> Shape:
    """The shape from a `config.json`."""
    if c.flag("is_decoder"):
        raise c.error("is an encoder made a decoder, which is not modelled", "leave out is_decoder")
    hidden = c.size("hidden_size")
    dropout = c.number("hidden_dropout_prob", default=0.1)
    return Shape(
        layers=c.few("num_hidden_layers"),
        hidden=Dim(hidden, "hidden"),
        heads=Dim(c.heads(hidden, "num_attention_heads"), "heads"),
        intermediate=Dim(c.size("intermediate_size"), "intermediate"),
        vocabulary=Dim(c.size("vocab_size"), "vocabulary"),
        positions=Dim(c.size("max_position_embeddings", default=512), "positions"),
        kinds=Dim(c.size("type_vocab_size", default=2), "kinds"),
        labels=labels(c),
        activation=blocks.activation(c, *ACTIVATION_FIELDS, default="gelu"),
        dropout=dropout,
        attention_dropout=c.number("attention_probs_dropout_prob", default=0.1),
        head_dropout=c.number("classifier_dropout", default=dropout),
        tied=c.flag("tie_word_embeddings", default=True),
    )


def labels(c: Config) -> int:
    """How many classes there are; 0 where no classifier is asked for."""
    heads = c.sequence("architectures") or [""]
    if not str(heads[0]).endswith("ForSequenceClassification"):
        return 0
    named = c.value("id2label")
    return len(named) if isinstance(named, dict) and named else c.few("num_labels", default=2)


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    if t.setting.cache or t.setting.objective not in ("tokens", "score"):
        raise c.error(
            "is that of an encoder, which writes no text",
            "`inspect` it, or `train` its head of masked tokens or its classifier",
        )
    s, family = read(c), c.text("model_type")
    prefix = "bert" if family == "bert" else "roberta"
    x = encoder(t, s, prefix)
    if s.labels or t.setting.objective == "score":
        return classified(t, s, x, prefix)
    return unmasked(t, s, x, prefix)


def encoder(t: Trace, s: Shape, prefix: str) -> Tensor:
    """Embeddings and layers."""
    embeddings = embed(t, s, prefix)
    mask = blocks.mask(t) if t.setting.padded else None

    def block(x: Tensor, kind: int) -> Tensor:
        return layer(t, s, x, mask)

    return t.layers(f"{prefix}.encoder.layer", block, embeddings, [0] * s.layers, mask)


def embed(t: Trace, s: Shape, prefix: str) -> Tensor:
    """Tokens, their kinds and their positions, normalised; the constants are buffers."""
    name = f"{prefix}.embeddings"
    t.buffers += 2 * INT64.block_bytes * s.positions
    places = counted(t) if prefix == "roberta" else None
    kinds = t.new("gather", (t.batch if places else 1, t.sequence), INT64)
    tokens = blocks.embed(t, f"{name}.word_embeddings", s.vocabulary, s.hidden)
    table = t.weight(f"{name}.token_type_embeddings.weight", (s.kinds, s.hidden), "position")
    of_kind = ops.embedding(t, table, t.batch, t.sequence, indices=kinds)
    x = ops.add(t, tokens, of_kind)
    table = t.weight(f"{name}.position_embeddings.weight", (s.positions, s.hidden), "position")
    sequences = t.batch if places else 1
    placed = ops.embedding(t, table, sequences, t.sequence, indices=places)
    x = ops.add(t, x, placed)
    x = blocks.layer_norm(t, x, f"{name}.LayerNorm")
    return ops.dropout(t, x, s.dropout)


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


def layer(t: Trace, s: Shape, x: Tensor, mask: Tensor | None) -> Tensor:
    """Attention and feed-forward, each added to what it read and normalised."""
    attended = self_attention(t, s, x, mask)
    attended = t.linear(attended, "attention.output.dense", s.hidden, bias=True, role="o")
    attended = ops.dropout(t, attended, s.dropout)
    attended = blocks.layer_norm(t, ops.add(t, attended, x), "attention.output.LayerNorm")
    fed = t.linear(attended, "intermediate.dense", s.intermediate, bias=True, role="up")
    fed = s.activation(t, fed)
    out = t.linear(fed, "output.dense", s.hidden, bias=True, role="down")
    out = ops.dropout(t, out, s.dropout)
    return blocks.layer_norm(t, ops.add(t, out, attended), "output.LayerNorm")


def self_attention(t: Trace, s: Shape, x: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of every token to all."""
    q, k, v = (
        ops.split_heads(
            t, t.linear(x, f"attention.self.{name}", s.hidden, bias=True, role=name[0]), s.heads
        )
        for name in ("query", "key", "value")
    )
    if t.setting.attention != "eager":
        return ops.merge_heads(t, kernels.attend(t, q, k, v, mask, dropout=s.attention_dropout))
    weights = ops.scale(t, ops.matmul(t, q, ops.transpose(t, k, -1, -2)))
    if mask is not None:
        weights = ops.add(t, weights, mask)
    weights = ops.softmax(t, weights)
    t.attention_weights = weights = ops.dropout(t, weights, s.attention_dropout)
    return ops.merge_heads(t, ops.matmul(t, weights, v))


def unmasked(t: Trace, s: Shape, x: Tensor, prefix: str) -> Tensor:
    """Loss or logits of masked tokens; the loss is in the format of the logits."""
    logits = told(t, s, x, prefix)
    if t.setting.keep_outputs or not t.setting.training:
        t.outputs = (logits,)
    return loss(t, logits) if t.setting.training else logits


def told(t: Trace, s: Shape, x: Tensor, prefix: str) -> Tensor:
    """The logits of every token, by the embeddings turned round."""
    dense, norm, decoder = HEADS[prefix]
    x = t.linear(x, dense, s.hidden, bias=True, role="transform")
    x = s.activation(t, x)
    x = blocks.layer_norm(t, x, norm)
    offset = t.weight(f"{decoder}.bias", (s.vocabulary,), "bias")  # idle beside a head's own
    if not s.tied:
        return t.linear(x, f"{decoder}.decoder", s.vocabulary, bias=True, role="head")
    embeddings = f"{prefix}.embeddings.word_embeddings.weight"
    table = lm_head.shared_table(t, f"{decoder}.decoder.weight", embeddings)
    return ops.linear(t, x, table, offset)


HEADS = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
             "cls.predictions"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head"),
}  # fmt: skip
"""Names of the layer, the norm and the bias before masked tokens are told."""


def loss(t: Trace, logits: Tensor) -> Tensor:
    """Cross entropy with labels that are not shifted."""
    return ops.cross_entropy(t, logits, Tensor(logits.shape[:-1], INT64, None))


def classified(t: Trace, s: Shape, x: Tensor, prefix: str) -> Tensor:
    """A class for each sequence from its first token, which one more layer reads."""
    t.classifies = True
    first = ops.select(t, x, 1)
    del x
    if prefix == "roberta":
        first = ops.dropout(t, first, s.head_dropout)
    pool, role, classify = CLASSIFIERS[prefix]
    pooled = ops.tanh(t, t.linear(first, pool, s.hidden, bias=True, role=role))
    pooled = ops.dropout(t, pooled, s.head_dropout)
    logits = t.linear(pooled, classify, s.labels or 1, bias=True, role="score")
    return loss(t, logits) if t.setting.training else logits


CLASSIFIERS = {
    "bert": ("bert.pooler.dense", "pooler", "classifier"),
    "roberta": ("classifier.dense", "score", "classifier.out_proj"),
}
"""The layer that reads the first token, with its role, and the one that tells its class."""
