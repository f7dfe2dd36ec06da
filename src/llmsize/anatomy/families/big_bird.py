"""BigBird where it sees all tokens: BERT with its dropout before the norm of the embeddings.

transformers v5.23, models/big_bird/modeling_big_bird.py. Attention is written out whatever kernel
is asked for. Sequences that are longer than all blocks of one query are seen by blocks, which is
not modelled.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.families import bert, rembert
from llmsize.anatomy.families.bert import BERT, Classifying, Shape, Type
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32, INT64


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    bert.check(t, c)
    check_length(t, c)
    if not c.flag("use_bias", default=True):
        raise c.error("has `use_bias` = false", "layers without biases are not modelled")
    c = c.changed(hidden_act=c.text("hidden_act", default="gelu_new"))
    classifying = Classifying(activation=blocks.activation(c, "hidden_act", default="gelu_new"))
    family = Type(prefix="bert", counted=False, unmasking=BERT, gelu=False, classifying=classifying)
    s = bert.read(c, family)
    return beside_pooled(t, s, encoder(t, s, scaled=c.flag("rescale_embeddings")))


def beside_pooled(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """Loss or logits; the model pools the first token, too, of which nobody learns anything."""
    begin, known = len(t.recent), {*t.casts}
    first = t.linear(ops.select(t, x, 1), "bert.pooler", s.hidden, bias=True, role="pooler")
    first = ops.tanh(t, first)
    casts = [copy for weight, copy in t.casts.items() if weight not in known]
    out = bert.headed(t, s, x)
    del first
    while casts:  # autocast holds them, not the graph that they were made for
        casts.pop().node = None
    t.forget_unused(begin)
    return out


def check_length(t: Trace, c: Config) -> None:
    """Raise `LLMSizeError` where a sequence is seen by blocks."""
    random, size = c.count("num_random_blocks", default=3), c.size("block_size", default=64)
    longest = (5 + 2 * random) * size
    whole = c.text("attention_type", default="block_sparse") == "original_full"
    if not whole and t.setting.sequence > longest:
        raise c.error(
            f"sees more than {longest:,} tokens by blocks, which is not modelled",
            f"give it {longest:,} tokens at most, of which it sees all",
        )


def encoder(t: Trace, s: Shape, *, scaled: bool) -> Tensor:
    """Embeddings and layers."""
    shown = None if t.setting.padded else t.new("ones", (t.batch, t.sequence), FP32)
    x = embed(t, s, scaled=scaled)
    if shown is not None:
        t.new("to", shown.shape, BOOL)
    del shown
    mask = blocks.mask(t, 0, "eager", format=x.format) if t.setting.padded else None

    def block(x: Tensor, kind: int) -> Tensor:
        return bert.layer(t, s, x, partial(rembert.attend, t, s, mask, None, ""))

    return t.layers("bert.encoder.layer", block, x, [0] * s.layers, mask)


def embed(t: Trace, s: Shape, *, scaled: bool) -> Tensor:
    """Tokens, their kinds and their positions; constants tell the last two."""
    name = "bert.embeddings"
    t.buffers += 2 * INT64.block_bytes * s.positions
    tokens = blocks.embed(t, s.table, s.vocabulary, s.embedding)
    tokens = ops.scale(t, tokens) if scaled else tokens
    of_kind = bert.looked_up(t, f"{name}.token_type_embeddings", s.kinds, s, t.batch, None)
    x = ops.add(t, tokens, of_kind)
    places = bert.looked_up(t, f"{name}.position_embeddings", s.positions, s, 1, None)
    x = ops.dropout(t, ops.add_in_place(t, x, places), s.dropout)
    return blocks.layer_norm(t, x, f"{name}.LayerNorm")
