"""Nomic BERT, GTE and Jina embeddings v3: BERT that rotates instead of telling positions.

transformers v5.23, the modeling file of each type under models/. The first two have a gated MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.families import bert, eurobert
from llmsize.anatomy.families.bert import BERT, Shape, Type, Unmasking, by_pooler
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import INT64
from llmsize.quick_dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rotated:
    """What one `model_type` does differently from the others."""

    type: Type
    feed: Callable[[Trace, Shape, Sizes, Tensor], Tensor]
    bias: bool = True
    """Of the linear layers of attention."""
    buffers: int = 2
    """Constants that tell positions and kinds, unread."""
    attention_dropout: float = 0.1
    hands_positions: bool = False
    """Whether layers are handed positions, which they do not read."""


def gated(t: Trace, s: Shape, sizes: Sizes, x: Tensor) -> Tensor:
    """Nomic's MLP, without biases and dropout."""
    return decoder.gated(t, sizes, x)


def gated_and_dropped(t: Trace, s: Shape, sizes: Sizes, x: Tensor) -> Tensor:
    """GTE's, some of whose product is left out before the last layer, which has a bias."""
    gate = s.activation(t, t.linear(x, "mlp.gate_proj", s.intermediate, role="gate"))
    product = ops.mul(t, gate, t.linear(x, "mlp.up_proj", s.intermediate, role="up"))
    del gate
    product = ops.dropout(t, product, s.dropout)
    return t.linear(product, "mlp.down_proj", s.hidden, bias=True, role="down")


def plain(t: Trace, s: Shape, sizes: Sizes, x: Tensor) -> Tensor:
    """Jina's, without a gate."""
    return decoder.plain(t, sizes, x, up="mlp.fc1", down="mlp.fc2", bias=True)


TYPES = {
    "nomic_bert": Rotated(
        Type(
            prefix="nomic_bert", counted=False, gelu=False,
            unmasking=BERT._replace(norm="cls.predictions.transform.layer_norm"),
            classifying=by_pooler("nomic_bert.pooler.dense"),
        ),
        gated, bias=False, hands_positions=True,
    ),
    "gte": Rotated(
        Type(
            prefix="gte", counted=False, unmasking=Unmasking(bias="lm_head.decoder.bias"),
            classifying=by_pooler("gte.pooler.dense"),
        ),
        gated_and_dropped, buffers=0, attention_dropout=0.0,
    ),
    "jina_embeddings_v3": Rotated(Type(counted=False), plain),
}  # fmt: skip


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    bert.check(t, c)
    family = TYPES[c.text("model_type")]
    dropout = c.number("attention_probs_dropout_prob", default=family.attention_dropout)
    c = c.changed(attention_dropout=dropout)
    s = bert.read(c, family.type)
    sizes = decoder.read(c, tied=True, activation="gelu")
    return bert.headed(t, s, encoder(t, s, sizes, family))


def encoder(t: Trace, s: Shape, sizes: Sizes, family: Rotated) -> Tensor:
    """Embeddings and layers."""
    position_ids = t.new("arange", (1, t.sequence), INT64)
    embeddings = embed(t, s, family.buffers)
    mask = blocks.mask(t, format=embeddings.format) if t.setting.padded else None
    rotation = rotary.table(t, embeddings, sizes.rotary)
    attend = partial(
        eurobert.attention, t, sizes, rotation, mask, bias=family.bias, softmax_format=None
    )

    def block(x: Tensor, kind: int) -> Tensor:
        attended = attend(x)
        x = ops.add(t, x, ops.dropout(t, attended, s.dropout))
        x = residual = blocks.layer_norm(t, x, "post_attention_layernorm")
        x = family.feed(t, s, sizes, x)
        x = ops.add(t, residual, ops.dropout(t, x, s.dropout))
        x = blocks.layer_norm(t, x, "post_mlp_layernorm")
        del attended
        return x

    kinds = [0] * s.layers
    name = f"{s.family.prefix}.layers"
    handed = position_ids if family.hands_positions else None
    x = t.layers(name, block, embeddings, kinds, handed, mask, *rotation)
    del position_ids, handed, mask
    return x


def embed(t: Trace, s: Shape, buffers: int) -> Tensor:
    """Tokens and their kinds, if there are kinds, normalised."""
    name = f"{s.family.prefix}.embeddings"
    t.buffers += buffers * INT64.block_bytes * s.positions
    x = tokens = blocks.embed(t, s.table, s.vocabulary, s.embedding)
    if s.kinds:
        kinds = t.new("zeros", (t.batch, t.sequence), INT64)
        of_kind = bert.looked_up(t, f"{name}.token_type_embeddings", s.kinds, s, t.batch, kinds)
        x = ops.add(t, x, of_kind)
    del tokens
    x = blocks.layer_norm(t, x, f"{name}.LayerNorm")
    return ops.dropout(t, x, s.dropout)
