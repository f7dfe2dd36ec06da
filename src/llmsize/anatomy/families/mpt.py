"""MPT: ALiBi for positions, no biases, GELU.

transformers v5.23, models/mpt/modeling_mpt.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsize.anatomy import blocks, decoder, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.decoder import layer_norm_without_bias as layer_norm
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32

EMBEDDING = "transformer.wte"


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    inner = 4 * c.size("d_model")  # whatever `expansion_ratio` says
    nested = c.value("attn_config")
    attention_fields: Mapping[str, Any] = nested if isinstance(nested, dict) else {}
    inside = Config(attention_fields, c.model)
    s = decoder.read(
        c.changed(intermediate_size=inner), tied=True, activation="gelu", rotary=0.0,
        attention_dropout=inside.number("attn_pdrop"),
    )  # fmt: skip
    clipped = inside.number("clip_qkv") > 0
    x = model(t, s, c.size("max_seq_len", default=2048), clipped)
    return lm_head.causal_lm(t, x, s.vocabulary, Head(EMBEDDING, casts=False), tied=s.tied)


def model(t: Trace, s: Sizes, longest: int, clipped: bool) -> Tensor:
    """Embeddings, blocks, final norm."""
    embeddings = blocks.embed(t, EMBEDDING, s.vocabulary, s.hidden)
    biases = t.new("alibi", (s.heads, 1, longest), FP32)
    mask = hidden(t)
    returned: list[Tensor] = []

    def block(x: Tensor, kind: str) -> Tensor:
        normed = layer_norm(t, x, "norm_1")
        residual = x
        attended, weights = attention(t, s, normed, biases, mask, clipped)
        x = ops.add(t, ops.dropout(t, attended, s.attention_dropout), residual)
        normed = layer_norm(t, x, "norm_2")
        residual = x
        out = mlp(t, s, normed, residual)
        blocks.hand_back(t, returned, weights)
        return out

    x = t.layers("transformer.blocks", block, embeddings, ["full"] * s.layers, biases, mask)
    x = layer_norm(t, x, "transformer.norm_f")
    returned.clear()
    return x


def hidden(t: Trace) -> Tensor:
    """What each token does not see, as yes and no."""
    mask = blocks.mask(t, masking="eager")
    assert mask is not None
    return t.new("to", mask.shape, BOOL)


def mlp(t: Trace, s: Sizes, x: Tensor, residual: Tensor) -> Tensor:
    """Two linear layers around the activation, added to the residual."""
    x = s.activation(t, t.linear(x, "ffn.up_proj", s.intermediate, role="up"))
    out = t.linear(x, "ffn.down_proj", s.hidden, role="down")
    return ops.add(t, ops.dropout(t, out, s.attention_dropout), residual)


def attention(
    t: Trace, s: Sizes, x: Tensor, biases: Tensor, mask: Tensor, clipped: bool
) -> tuple[Tensor, Tensor]:
    """Attention over one fused projection, in fp32 as its biases are, and its weights beside."""
    fused = t.linear(x, "attn.Wqkv", 3 * s.hidden, role="qkv")
    if clipped:
        fused = ops.clamp(t, fused)
    q, k, v = (ops.split_heads(t, p, s.heads) for p in ops.split(t, fused, *[s.hidden] * 3))
    k, v = blocks.remember(t, k, v)
    scores = ops.scale(t, ops.matmul(t, q, ops.transpose(t, k, -1, -2)))
    scores = ops.add(t, scores, biases.view(s.heads, 1, k.shape[2]))
    scores = ops.masked_fill(t, scores, mask)
    weights = ops.to(t, ops.softmax(t, scores, FP32), v.format)
    weights = ops.dropout(t, weights, s.attention_dropout)
    context = ops.merge_heads(t, ops.matmul(t, weights, v))
    return t.linear(context, "attn.out_proj", s.hidden, role="o"), weights
