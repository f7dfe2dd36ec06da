"""GPT-2, and Cerebras-GPT and others that share its block.

transformers v5.23, models/gpt2/modeling_gpt2.py.
"""

from __future__ import annotations

from llmsize.anatomy import attention, blocks, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32
from llmsize.quick_dataclasses import dataclass

HEAD = Head("transformer.wte", casts=False)


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of GPT-2."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    tied: bool
    activation: blocks.Activation
    residual_dropout: float
    embedding_dropout: float
    attention_dropout: float
    upcast: bool
    """Whether attention that is written out computes its scores in fp32."""


def read(c: Config) -> Shape:
    """The shape from a `config.json`."""
    hidden = c.size("n_embd", "hidden_size")
    return Shape(
        layers=c.few("n_layer", "num_hidden_layers"),
        hidden=Dim(hidden, "hidden"),
        heads=Dim(c.heads(hidden, "n_head", "num_attention_heads"), "heads"),
        intermediate=Dim(
            c.size("n_inner", "intermediate_size", default=4 * hidden), "intermediate"
        ),
        vocabulary=Dim(c.size("vocab_size"), "vocabulary"),
        positions=Dim(c.size("n_positions", "max_position_embeddings", default=1024), "positions"),
        tied=c.flag("tie_word_embeddings", default=True),
        activation=blocks.activation(c, "activation_function", default="gelu_new"),
        residual_dropout=c.number("resid_pdrop", default=0.1),
        embedding_dropout=c.number("embd_pdrop", default=0.1),
        attention_dropout=c.number("attn_pdrop", default=0.1),
        upcast=c.flag("reorder_and_upcast_attn"),
    )


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = read(c)
    x = model(t, s)
    return lm_head.causal_lm(t, x, s.vocabulary, HEAD, tied=s.tied)


def model(t: Trace, s: Shape) -> Tensor:
    """Token and position embeddings, blocks, final norm."""
    tokens = blocks.embed(t, "transformer.wte", s.vocabulary, s.hidden)
    position_ids = blocks.positions(t)
    table = t.weight("transformer.wpe.weight", (s.positions, s.hidden), "position")
    places = ops.embedding(t, table, 1, t.sequence, indices=position_ids)
    mask = blocks.mask(t)

    def block(x: Tensor, kind: str) -> Tensor:
        residual = x
        x = blocks.layer_norm(t, x, "ln_1")
        attended = attend(t, s, x, mask)
        x = ops.add(t, attended, residual)
        residual = x
        x = blocks.layer_norm(t, x, "ln_2")
        change = mlp(t, s, x)
        return ops.add(t, residual, change)

    x = t.layers(
        "transformer.h",
        block,
        ops.dropout(t, ops.add(t, tokens, places), s.embedding_dropout),
        ["full"] * s.layers,
        position_ids,
    )
    return blocks.layer_norm(t, x, "transformer.ln_f")


def attend(t: Trace, s: Shape, x: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over one fused projection, which q, k and v are views of."""
    fused = t.linear(x, "attn.c_attn", 3 * s.hidden, bias=True, role="qkv", transposed=True)
    q, k, v = (ops.split_heads(t, part, s.heads) for part in ops.split(t, fused, *[s.hidden] * 3))
    del fused
    k, v = blocks.remember(t, k, v)
    dropout = s.attention_dropout
    if t.setting.attention == "eager" and s.upcast:
        out = upcast(t, q, k, v, mask, dropout)
    elif t.setting.attention == "eager":
        out = attention.eager(t, q, k, v, mask, dropout=dropout, softmax_format=None)
    else:
        out = attention.attend(t, q, k, v, mask, dropout=dropout)
    out = t.linear(
        ops.merge_heads(t, out), "attn.c_proj", s.hidden, bias=True, role="o", transposed=True
    )
    return ops.dropout(t, out, s.residual_dropout)


def upcast(
    t: Trace, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """Attention with scores in fp32, multiplied into a tensor made before."""
    batch, heads, tokens, channels = q.shape
    rows, total = batch * heads, k.shape[2]
    scores = t.new("empty", (rows, tokens, total), FP32)
    autocast, t.autocast = t.autocast, None
    queries = ops.reshape(t, q, rows, tokens, channels)
    keys = ops.reshape(t, ops.transpose(t, k, -1, -2), rows, channels, total)
    scores = ops.add_product(t, scores, ops.to(t, queries, FP32), ops.to(t, keys, FP32))
    scores = ops.reshape(t, scores, batch, heads, tokens, total)
    t.autocast = autocast
    scores = scores if mask is None else ops.add(t, scores, mask)
    scores = ops.softmax(t, scores, None)
    scores = ops.to(t, scores, v.format)
    t.attention_weights = scores = ops.dropout(t, scores, dropout)
    return ops.matmul(t, scores, v)


def mlp(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """Two linear layers around the activation."""
    x = t.linear(x, "mlp.c_fc", s.intermediate, bias=True, role="up", transposed=True)
    x = s.activation(t, x)
    x = t.linear(x, "mlp.c_proj", s.hidden, bias=True, role="down", transposed=True)
    return ops.dropout(t, x, s.residual_dropout)
