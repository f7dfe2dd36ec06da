"""InternLM2: Llama's block with q, k and v in one projection, grouped by KV head.

internlm/internlm2-7b, modeling_internlm2.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Names, Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

FRAME = Frame(names=Names(embedding="model.tok_embeddings"), head=Head(name="output"))


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    bias = c.flag("bias")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, bias),
            lambda x: decoder.gated(t, s, x, name="feed_forward", names=("w1", "w3", "w2")),
            names=("attention_norm", "ffn_norm"),
        )

    return decoder.run(t, s, block, ["full"] * s.layers, FRAME)


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, bias: bool) -> Tensor:
    """Grouped-query attention; each KV head's queries, key and value stand together."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    fused = t.linear(x, "attention.wqkv", queries + 2 * keys, bias=bias, role="qkv")
    q, k, v = (ops.slice_last(t, fused, size) for size in (queries, keys, keys))
    q = ops.split_heads(t, q, s.heads)
    k = ops.split_heads(t, k, s.kv_heads)
    v = ops.split_heads(t, v, s.kv_heads)
    q, k = decoder.turn(t, q, k, around)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, around.mask)
    return t.linear(out, "attention.wo", s.hidden, bias=bias, role="o")
