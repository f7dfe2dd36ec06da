"""Phi-1, 1.5 and 2: attention and MLP side by side, biases everywhere.

transformers v5.23, models/phi/modeling_phi.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Names
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

NAMES = Names(norm="model.final_layernorm")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, activation="gelu_new", rotary=0.5)
    norm = blocks.layer_norm if c.flag("qk_layernorm") else None
    dropout, first_dropout = c.number("resid_pdrop"), c.number("embd_pdrop")
    h = Heads(bias=True, norm=norm, output="dense")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        residual = x
        x = blocks.layer_norm(t, x, "input_layernorm")
        parts: list[Tensor] = []
        turn = partial(rotary.turn_in_place, parts)
        attended = decoder.attention(t, s, h._replace(turn=turn), x, around)
        parts.clear()
        attended = ops.dropout(t, attended, dropout)
        fed = decoder.plain(t, s, x, up="mlp.fc1", down="mlp.fc2", bias=True)
        fed = ops.dropout(t, fed, dropout)
        return ops.add(t, ops.add(t, attended, fed), residual)

    frame = Frame(
        norm=blocks.layer_norm,
        names=NAMES,
        begin=lambda t, x: ops.dropout(t, x, first_dropout),
        head=Head(bias=True),
    )
    return decoder.run(t, s, block, ["full"] * s.layers, frame)
