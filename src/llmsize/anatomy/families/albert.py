"""ALBERT: BERT whose layers call one module, or a few, again and again.

transformers v5.23, models/albert/modeling_albert.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks
from llmsize.anatomy.config import Config
from llmsize.anatomy.families import bert
from llmsize.anatomy.families.bert import Layer, Shape, Type, Unmasking, by_pooler
from llmsize.anatomy.families.zamba2 import Kind
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Module, Trace

ALBERT = Type(
    prefix="albert", counted=False, narrow=True, dropped="first", gelu=False, head_dropout=0.1,
    layer=Layer(
        "attention.query", "attention.key", "attention.value", "attention.dense",
        "attention.LayerNorm", "ffn", "ffn_output", "full_layer_layer_norm",
        successive=True,
    ),
    unmasking=Unmasking(
        "predictions.dense", "predictions.LayerNorm", "predictions.decoder", "predictions.bias"
    ),
    classifying=by_pooler("albert.pooler"),
)  # fmt: skip


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = bert.read(c, ALBERT)
    bert.check(t, c, recomputed=False)
    groups, inner = (c.few(f, default=1) for f in ("num_hidden_groups", "inner_group_num"))
    return bert.headed(t, s, encoder(t, s, groups, inner))


def encoder(t: Trace, s: Shape, groups: int, inner: int) -> Tensor:
    """Embeddings and layers, of so many `groups` of `inner` modules."""
    embeddings = bert.embed(t, s)
    mask = blocks.mask(t, format=embeddings.format) if t.setting.padded else None
    name = "albert.encoder.embedding_hidden_mapping_in"
    inputs = [t.linear(embeddings, name, s.hidden, bias=True, role="projection")]

    def block(x: Tensor, kind: Kind) -> Tensor:
        t.common = kind.module
        x = bert.layer(t, s, x, partial(bert.self_attention, t, s, mask))
        t.common = None
        return x

    kinds = calls(s.layers, groups, inner)
    name = "albert.encoder.albert_layer_groups"
    x = t.layers(name, block, inputs.pop(), kinds, mask, told=lambda kind: kind)
    del embeddings
    return x


def calls(layers: int, groups: int, inner: int) -> list[Kind]:
    """The module of each layer; those of a group follow each other."""
    called = [(layer * groups // layers, i) for layer in range(layers) for i in range(inner)]
    last = {which: index for index, which in enumerate(called)}
    first = {which: len(called) - 1 - index for index, which in enumerate(reversed(called))}
    modules = {
        which: Module(
            f"albert.encoder.albert_layer_groups.{which[0]}.albert_layers.{which[1]}.",
            called.count(which),
        )
        for which in last
    }
    return [
        Kind(modules[which], first[which] == index, last[which] == index)
        for index, which in enumerate(called)
    ]
