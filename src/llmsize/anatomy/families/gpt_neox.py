"""GPT-NeoX: Pythia, Polyglot-ko, Dolly.

transformers v5.23, models/gpt_neox/modeling_gpt_neox.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, lm_head, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.quick_dataclasses import dataclass

HEAD = Head("gpt_neox.embed_in", casts=False)


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of GPT-NeoX."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    rotary: int
    """Channels of each head that are rotated."""
    tied: bool
    bias: bool
    parallel: bool
    """Whether attention and MLP read the same input."""
    activation: blocks.Activation
    dropout: float
    attention_dropout: float


def read(c: Config) -> Shape:
    """The shape from a `config.json`."""
    hidden = c.size("hidden_size")
    heads = c.heads(hidden, "num_attention_heads")
    return Shape(
        layers=c.few("num_hidden_layers"),
        hidden=Dim(hidden, "hidden"),
        heads=Dim(heads, "heads"),
        intermediate=Dim(c.size("intermediate_size", default=4 * hidden), "intermediate"),
        vocabulary=Dim(c.size("vocab_size"), "vocabulary"),
        rotary=Dim(rotary.rotated(c, hidden // heads, 0.25, "full_attention"), "rotary"),
        tied=c.flag("tie_word_embeddings"),
        bias=c.flag("attention_bias", default=True),
        parallel=c.flag("use_parallel_residual", default=True),
        activation=blocks.activation(c, "hidden_act", default="gelu"),
        dropout=c.number("hidden_dropout"),
        attention_dropout=c.number("attention_dropout"),
    )


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = read(c)
    x = model(t, s)
    return lm_head.causal_lm(t, x, s.vocabulary, HEAD, tied=s.tied)


def model(t: Trace, s: Shape) -> Tensor:
    """Embedding, blocks, final norm."""
    embeddings = blocks.embed(t, "gpt_neox.embed_in", s.vocabulary, s.hidden)
    position_ids = blocks.positions(t)
    mask = blocks.mask(t)
    x = ops.dropout(t, embeddings, s.dropout)
    cosines, sines = rotary.table(t, x, s.rotary)

    def block(x: Tensor, kind: str) -> Tensor:
        normed = blocks.layer_norm(t, x, "input_layernorm")
        attended = attention(t, s, normed, cosines, sines, mask)
        del normed
        attended = ops.dropout(t, attended, s.dropout)
        if s.parallel:
            normed = blocks.layer_norm(t, x, "post_attention_layernorm")
            change = mlp(t, s, normed)
            del normed
            change = ops.dropout(t, change, s.dropout)
            return ops.add(t, ops.add(t, change, attended), x)
        attended = ops.add(t, attended, x)
        normed = blocks.layer_norm(t, attended, "post_attention_layernorm")
        change = mlp(t, s, normed)
        del normed
        change = ops.dropout(t, change, s.dropout)
        return ops.add(t, change, attended)

    x = t.layers("gpt_neox.layers", block, x, ["full"] * s.layers, position_ids)
    return blocks.layer_norm(t, x, "gpt_neox.final_layer_norm")


def attention(
    t: Trace, s: Shape, x: Tensor, cosines: Tensor, sines: Tensor, mask: Tensor | None
) -> Tensor:
    """Attention over one fused projection; only the first channels of a head are rotated."""
    name = "attention.query_key_value"
    fused = blocks.queries_keys_values(t, x, name, s.hidden, s.hidden, bias=s.bias)
    fused = ops.split_heads(t, fused, s.heads)
    q, k, v = ops.split(t, fused, *[s.hidden // s.heads] * 3)
    q, k = rotary.rotate_part(t, q, k, cosines, sines)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, mask, dropout=s.attention_dropout)
    return t.linear(out, "attention.dense", s.hidden, bias=s.bias, role="o")


def mlp(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """Two linear layers around the activation."""
    x = t.linear(x, "mlp.dense_h_to_4h", s.intermediate, bias=True, role="up")
    x = s.activation(t, x)
    return t.linear(x, "mlp.dense_4h_to_h", s.hidden, bias=True, role="down")
