"""CTRL: norms first, positions of sines and cosines, a head with a bias.

transformers v5.23, models/ctrl/modeling_ctrl.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.families import gpt2
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import INT64

HEAD = Head("transformer.w", bias=True, casts=False)


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = gpt2.read(
        c.changed(
            n_inner=c.size("dff", default=8192),
            activation_function="relu",
            n_positions=c.size("n_positions", default=256),
        )
    )
    x = model(t, s)
    return lm_head.causal_lm(t, x, s.vocabulary, HEAD, tied=s.tied)


def model(t: Trace, s: gpt2.Shape) -> Tensor:
    """Scaled embeddings and those of positions, blocks, final norm."""
    tokens = blocks.embed(t, "transformer.w", s.vocabulary, s.hidden)
    position_ids = t.new("arange", (1, t.sequence), INT64)
    mask = blocks.mask(t)
    tokens = ops.scale_in_place(t, tokens)
    t.buffers += s.positions * s.hidden * t.setting.format.block_bytes
    places = t.new("index", (1, t.sequence, s.hidden), t.setting.format)
    x = t.layers(
        "transformer.h",
        partial(layer, t, s, mask),
        ops.dropout(t, ops.shift(t, ops.add(t, tokens, places)), s.embedding_dropout),
        ["full"] * s.layers,
        mask,
    )
    del position_ids
    return blocks.layer_norm(t, x, "transformer.layernorm")


def layer(t: Trace, s: gpt2.Shape, mask: Tensor | None, x: Tensor, kind: str) -> Tensor:
    """Attention and MLP, each of which reads a normalised copy and adds to the residual stream."""
    normed = blocks.layer_norm(t, x, "layernorm1")
    attended = ops.dropout(t, attention(t, s, normed, mask), s.residual_dropout)
    weights, t.attention_weights = t.attention_weights, None
    first = ops.add(t, x, attended)
    second = blocks.layer_norm(t, first, "layernorm2")
    fed = t.linear(second, "ffn.0", s.intermediate, bias=True, role="up")
    fed = s.activation(t, fed)
    fed = t.linear(fed, "ffn.2", s.hidden, bias=True, role="down")
    fed = ops.dropout(t, fed, s.residual_dropout)
    del weights
    return ops.add(t, first, fed)


def attention(t: Trace, s: gpt2.Shape, x: Tensor, mask: Tensor | None) -> Tensor:
    """Attention with a projection for each of q, k and v."""
    name = "multi_head_attention"
    project = partial(t.linear, x, out=s.hidden, bias=True)
    q, k, v = (
        ops.split_heads(t, project(name=f"{name}.W{part}", role=part), s.heads) for part in "qkv"
    )
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, mask, softmax_format=None)
    return t.linear(out, f"{name}.dense", s.hidden, bias=True, role="o")
