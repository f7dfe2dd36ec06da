"""BioGPT: BART's decoder alone, norms first.

transformers v5.23, models/biogpt/modeling_biogpt.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around
from llmsize.anatomy.families import bart
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import INT64

BEFORE = bart.Type(before=True, embedding_norm=False, positions="learned", offset=2)
NAMES = decoder.Names(
    "biogpt.embed_tokens", "biogpt.layers", "biogpt.layer_norm", "output_projection"
)


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

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return bart.layer(t, BEFORE, stack, around.mask, None, x, kind)

    return decoder.run(
        t, s, block, ["full"] * s.layers, names=NAMES, norm=blocks.layer_norm,
        begin=partial(begin, t, stack), holds_tokens=True,
    )  # fmt: skip


def begin(t: Trace, s: bart.Stack, x: Tensor) -> Tensor:
    """Scaled embeddings and those of the positions."""
    x = ops.scale(t, x)
    rows = Dim(s.positions + BEFORE.offset, "positions")
    table = t.weight("biogpt.embed_positions.weight", (rows, s.hidden), "position")
    indices = t.new("add", (1, t.sequence), INT64)
    places = ops.embedding(t, table, 1, t.sequence, indices=indices)
    return ops.dropout(t, ops.add(t, x, places), s.dropout)
