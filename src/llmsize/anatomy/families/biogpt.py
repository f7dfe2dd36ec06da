"""BioGPT: BART's decoder alone, norms first.

transformers v5.23, models/biogpt/modeling_biogpt.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.families import bart
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, INT64

BLOCK = bart.Type(before=True, embedding_norm=False, positions="learned", offset=2, successive=True)

HEAD = Head("biogpt.embed_tokens", "output_projection", casts=False)


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, tied=True, activation="gelu", rotary=0.0)
    stack = bart.Stack(
        "decoder", s.layers, s.hidden, s.heads, s.intermediate, s.vocabulary,
        c.size("max_position_embeddings", default=1024), s.activation,
        dropout=c.number("hidden_dropout_prob", default=0.1),
        attention_dropout=c.number("attention_probs_dropout_prob", default=0.1),
        activation_dropout=c.number("activation_dropout"),
    )  # fmt: skip
    x = model(t, stack)
    return lm_head.causal_lm(t, x, s.vocabulary, HEAD, tied=s.tied)


def model(t: Trace, s: bart.Stack) -> Tensor:
    """Embeddings with their positions, blocks, final norm."""
    embeddings = blocks.embed(t, "biogpt.embed_tokens", s.vocabulary, s.hidden)
    embeddings = blocks.scaled_embeddings(t, embeddings)
    total = t.setting.past + t.sequence
    seen = None if t.setting.padded else t.new("ones", (t.batch, total), FP32)
    mask = blocks.mask(t)
    position_ids = blocks.positions(t)
    positions = embedded(t, s)
    block = partial(bart.layer, t, BLOCK, s, mask, None, None)
    x = t.layers(
        "biogpt.layers", block, ops.dropout(t, ops.add(t, embeddings, positions), s.dropout),
        ["full"] * s.layers, position_ids, mask,
    )  # fmt: skip
    del seen
    return blocks.layer_norm(t, x, "biogpt.layer_norm")


def embedded(t: Trace, s: bart.Stack) -> Tensor:
    """The positions' rows of the table."""
    rows = Dim(s.positions + BLOCK.offset, "positions")
    table = t.weight("biogpt.embed_positions.weight", (rows, s.hidden), "position")
    indices = t.new("add", (1, t.sequence), INT64)
    return ops.embedding(t, table, 1, t.sequence, indices=indices)
