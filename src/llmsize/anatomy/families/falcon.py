"""Falcon: the old block (7B, RW) and the new one (40B, 180B, 11B).

transformers v5.23, models/falcon/modeling_falcon.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Names, Sizes
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

NAMES = Names("transformer.word_embeddings", "transformer.h", "transformer.ln_f")


@dataclass(frozen=True, slots=True)
class Block:
    """Which of Falcon's blocks it is."""

    new: bool
    """40B and later: keys and values are repeated for their queries at once."""
    parallel: bool
    """Whether attention and MLP stand side by side."""
    norms: int
    """Norms before them: one each or one for both."""
    bias: bool
    dropout: float


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    new = c.flag("new_decoder_architecture")
    b = Block(
        new=new,
        parallel=c.flag("parallel_attn", default=True),
        norms=c.size("num_ln_in_parallel_attn", default=2 if new else 1),
        bias=c.flag("bias"),
        dropout=c.number("hidden_dropout"),
    )
    s = sizes(c, new)

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        if b.parallel:
            return side_by_side(t, s, b, x, around)
        return one_after_the_other(t, s, b, x, around)

    return decoder.run(t, s, block, ["full"] * s.layers, norm=blocks.layer_norm, names=NAMES)


def sizes(c: Config, new: bool) -> Sizes:
    """The dimensions; the old block has one KV head or as many as query heads."""
    heads = c.size("num_attention_heads", "n_head")
    if new:
        kv_heads = c.size("num_kv_heads", "n_head_kv", default=heads)
    else:
        kv_heads = 1 if c.flag("multi_query", default=True) else heads
    inner = c.size("ffn_hidden_size", default=4 * c.size("hidden_size"))
    fields = {**c.fields, "num_key_value_heads": kv_heads, "intermediate_size": inner}
    rotary = 0.0 if c.flag("alibi") else 1.0
    return decoder.read(Config(fields, c.model), tied=True, activation="gelu", rotary=rotary)


def side_by_side(t: Trace, s: Sizes, b: Block, x: Tensor, around: Around) -> Tensor:
    """Attention and MLP read the same residual stream."""
    residual = x
    if b.norms == 2:
        for_attention = blocks.layer_norm(t, x, "ln_attn")
        for_mlp = blocks.layer_norm(t, x, "ln_mlp")
    else:
        for_attention = for_mlp = blocks.layer_norm(t, x, "input_layernorm")
    attended = attention(t, s, b, for_attention, around)
    fed = mlp(t, s, b, for_mlp)
    fed = ops.add(t, fed, attended)
    return ops.add(t, residual, ops.dropout(t, fed, b.dropout))


def one_after_the_other(t: Trace, s: Sizes, b: Block, x: Tensor, around: Around) -> Tensor:
    """First attention, then the MLP, each with its norm (Falcon RW)."""
    attended = attention(t, s, b, blocks.layer_norm(t, x, "input_layernorm"), around)
    residual = ops.add(t, x, attended)
    fed = mlp(t, s, b, blocks.layer_norm(t, residual, "post_attention_layernorm"))
    return ops.add(t, residual, ops.dropout(t, fed, b.dropout))


def mlp(t: Trace, s: Sizes, b: Block, x: Tensor) -> Tensor:
    """Two linear layers around the activation."""
    return decoder.plain(t, s, x, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", bias=b.bias)


def attention(t: Trace, s: Sizes, b: Block, x: Tensor, around: Around) -> Tensor:
    """Attention over one fused projection, laid out anew by heads."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    fused = t.linear(x, "self_attention.query_key_value", queries + 2 * keys, bias=b.bias,
                     role="qkv")  # fmt: skip
    q = ops.split_heads(t, ops.slice_last(t, fused, queries), s.heads)
    k, v = (ops.split_heads(t, ops.slice_last(t, fused, keys), s.kv_heads) for _ in range(2))
    k, v = blocks.remember(t, k, v)
    if b.new:
        k, v = (ops.repeat(t, part, s.heads // s.kv_heads) for part in (k, v))
    q, k, v = (ops.copy(t, part) for part in (q, k, v))
    if around.rotation is not None:
        q, k = decoder.turn(t, q, k, around)
    out = blocks.attend(t, q, k, v, around.mask)
    return t.linear(out, "self_attention.dense", s.hidden, bias=b.bias, role="o")
