"""GPT: GPT-2's forerunner, norms behind each half, no cache of earlier tokens.

transformers v5.23, models/openai/modeling_openai.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.families import gpt2
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import INT64

ACTIVATIONS = {"gelu": "gelu_new", "swish": "silu"}
"""Activations by names that stand for others elsewhere."""

HEAD = Head("transformer.tokens_embed", casts=False)


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    name = c.text("afn", default="gelu")
    s = gpt2.read(c.changed(activation_function=ACTIVATIONS.get(name, name), n_inner=None))
    x = model(t, s)
    return lm_head.causal_lm(t, x, s.vocabulary, HEAD, tied=s.tied)


def model(t: Trace, s: gpt2.Shape) -> Tensor:
    """Token and position embeddings and blocks; no norm is last."""
    t.buffers += s.positions * INT64.block_bytes
    padding = padded(t)
    tokens = blocks.embed(t, "transformer.tokens_embed", s.vocabulary, s.hidden)
    table = t.weight("transformer.positions_embed.weight", (s.positions, s.hidden), "position")
    places = ops.embedding(t, table, 1, t.sequence, indices=Tensor((1, t.sequence), INT64, None))

    def block(x: Tensor, kind: str) -> Tensor:
        attended = attend(t, s, x, padding)
        normed = blocks.layer_norm(t, ops.add(t, x, attended), "ln_1")
        change = gpt2.mlp(t, s, normed)
        return blocks.layer_norm(t, ops.add(t, normed, change), "ln_2")

    return t.layers(
        "transformer.h",
        block,
        ops.dropout(t, ops.shift(t, ops.add(t, tokens, places)), s.embedding_dropout),
        ["full"] * s.layers,
        padding,
    )


def padded(t: Trace) -> Tensor | None:
    """A number for every token to add to its scores, if a batch is padded."""
    if not t.setting.padded:
        return None
    return ops.scale(t, ops.shift(t, t.new("to", (t.batch, 1, 1, t.sequence), t.setting.format)))


def attend(t: Trace, s: gpt2.Shape, x: Tensor, padding: Tensor | None) -> Tensor:
    """Attention over one fused projection, masked by products with a buffer of ones and zeros."""
    fused = t.linear(x, "attn.c_attn", 3 * s.hidden, bias=True, role="qkv", transposed=True)
    q, k, v = (ops.split_heads(t, part, s.heads) for part in ops.split(t, fused, *[s.hidden] * 3))
    t.add_buffer(s.positions * s.positions * t.setting.format.block_bytes)
    scores = ops.scale(t, ops.matmul(t, q, ops.transpose(t, k, -1, -2)))
    seen = Tensor((1, 1, t.sequence, t.sequence), t.setting.format, None)
    scores = ops.add(t, ops.mul(t, scores, seen), ops.scale(t, ops.shift(t, seen)))
    scores = scores if padding is None else ops.add(t, scores, padding)
    weights = ops.dropout(t, ops.softmax(t, scores), s.attention_dropout)
    del scores
    out = ops.merge_heads(t, ops.matmul(t, weights, v))
    out = t.linear(out, "attn.c_proj", s.hidden, bias=True, role="o", transposed=True)
    return ops.dropout(t, out, s.residual_dropout)
