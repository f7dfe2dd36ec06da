"""OPT and XGLM: ReLU or GELU, biases, positions learned (OPT) or sinusoidal (XGLM).

transformers v5.23, models/opt/modeling_opt.py, models/xglm/modeling_xglm.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Names, Sizes
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace

NAMES = Names(
    "model.decoder.embed_tokens", "model.decoder.layers", "model.decoder.final_layer_norm"
)
XGLM_NAMES = Names(norm="model.layer_norm")

EXTRA_POSITIONS = 2
"""Rows of OPT's position table before the first position."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    opt = c.text("model_type") == "opt"
    s = decoder.read(c, tied=True, activation="relu" if opt else "gelu", rotary=0.0)
    before = c.flag("do_layer_norm_before", default=True)
    bias = c.flag("enable_bias", default=True)
    dropout = c.number("dropout", default=0.1)
    embedding = Dim(c.size("word_embed_proj_dim", default=s.hidden), "embedding")
    projected = embedding != s.hidden

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        residual = x
        if before:
            x = blocks.layer_norm(t, x, "self_attn_layer_norm")
        x = attention(t, s, x, around, bias)
        x = ops.dropout(t, x, dropout)
        x = ops.add(t, residual, x)
        if not before:
            x = blocks.layer_norm(t, x, "self_attn_layer_norm")
        residual = x
        if before:
            x = blocks.layer_norm(t, x, "final_layer_norm")
        x = decoder.plain(t, s, x, up="fc1", down="fc2", bias=bias)
        x = ops.dropout(t, x, dropout)
        x = ops.add(t, residual, x)
        return x if before else blocks.layer_norm(t, x, "final_layer_norm")

    def begin(x: Tensor) -> Tensor:
        if projected:
            x = t.linear(x, "model.decoder.project_in", s.hidden, role="projection")
        if not opt:
            return ops.dropout(t, ops.add(t, ops.scale(t, x), sinusoids(t, s)), dropout)
        rows = c.size("max_position_embeddings", default=2048) + EXTRA_POSITIONS
        return decoder.add_positions(t, x, "model.decoder.embed_positions", rows, t.batch)

    def end(t: Trace, x: Tensor, name: str) -> Tensor:
        if before:
            x = blocks.layer_norm(t, x, name)
        if projected:
            x = t.linear(x, "model.decoder.project_out", embedding, role="projection")
        return x

    return decoder.run(
        t, s, block, ["full"] * s.layers, norm=end, names=NAMES if opt else XGLM_NAMES,
        begin=begin, embedding=embedding, padded_positions=opt,
    )  # fmt: skip


def sinusoids(t: Trace, s: Sizes) -> Tensor:
    """Position embeddings that are computed, not learned."""
    return t.new("index_select", (1, t.sequence, s.hidden), t.setting.format)


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, bias: bool) -> Tensor:
    """Attention with scaled queries."""
    q = ops.scale(t, t.linear(x, "self_attn.q_proj", s.hidden, bias=bias, role="q"))
    q = ops.split_heads(t, q, s.heads)
    k = t.linear(x, "self_attn.k_proj", s.hidden, bias=bias, role="k")
    v = t.linear(x, "self_attn.v_proj", s.hidden, bias=bias, role="v")
    k, v = ops.split_heads(t, k, s.heads), ops.split_heads(t, v, s.heads)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, around.mask)
    return t.linear(out, "self_attn.out_proj", s.hidden, bias=bias, role="o")
