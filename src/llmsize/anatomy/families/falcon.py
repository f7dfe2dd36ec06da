"""Falcon: the old block (7B, RW) and the new one (40B, 180B, 11B).

transformers v5.23, models/falcon/modeling_falcon.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsize.anatomy import attention as kernels
from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Names, Sizes
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32

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
    alibi: bool
    """Whether positions are told by ALiBi; the angles for rotation are made all the same."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    new = c.flag("new_decoder_architecture")
    b = Block(
        new=new,
        parallel=c.flag("parallel_attn", default=True),
        norms=c.size("num_ln_in_parallel_attn", default=2 if new else 1),
        bias=c.flag("bias"),
        dropout=c.number("hidden_dropout"),
        alibi=c.flag("alibi"),
    )
    s = sizes(c, new)

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        if b.parallel:
            return side_by_side(t, s, b, x, around)
        return one_after_the_other(t, s, b, x, around)

    return decoder.run(
        t,
        s,
        block,
        ["full"] * s.layers,
        norm=blocks.layer_norm,
        names=NAMES,
        masking="alibi" if b.alibi else "always",
    )


def sizes(c: Config, new: bool) -> Sizes:
    """The dimensions; the old block has one KV head or as many as query heads."""
    heads = c.size("num_attention_heads", "n_head")
    if new:
        kv_heads = c.size("num_kv_heads", "n_head_kv", default=heads)
    else:
        kv_heads = 1 if c.flag("multi_query", default=True) else heads
    inner = c.size("ffn_hidden_size", default=4 * c.size("hidden_size"))
    fields = {**c.fields, "num_key_value_heads": kv_heads, "intermediate_size": inner}
    return decoder.read(Config(fields, c.model), tied=True, activation="gelu")


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
    fed = ops.add_in_place(t, fed, attended)
    return ops.add(t, residual, ops.dropout(t, fed, b.dropout))


def one_after_the_other(t: Trace, s: Sizes, b: Block, x: Tensor, around: Around) -> Tensor:
    """First attention, then the MLP, each with its norm (Falcon RW)."""
    normed = blocks.layer_norm(t, x, "input_layernorm")
    attended = attention(t, s, b, normed, around)
    residual = ops.add(t, x, ops.dropout(t, attended, s.attention_dropout))
    fed = mlp(t, s, b, blocks.layer_norm(t, residual, "post_attention_layernorm"))
    return ops.add(t, residual, ops.dropout(t, fed, b.dropout))


def linear(t: Trace, b: Block, x: Tensor, name: str, out: int, role: str) -> Tensor:
    """A linear layer that adds its bias apart."""
    x = t.linear(x, name, out, role=role)
    return ops.add(t, x, t.weight(f"{name}.bias", (out,), "bias")) if b.bias else x


def mlp(t: Trace, s: Sizes, b: Block, x: Tensor) -> Tensor:
    """Two linear layers around the activation."""
    x = s.activation(t, linear(t, b, x, "mlp.dense_h_to_4h", s.intermediate, "up"))
    return linear(t, b, x, "mlp.dense_4h_to_h", s.hidden, "down")


def attention(t: Trace, s: Sizes, b: Block, x: Tensor, around: Around) -> Tensor:
    """Attention over one fused projection."""
    width = (s.heads + 2 * s.kv_heads) * s.head_dim
    fused = linear(t, b, x, "self_attention.query_key_value", width, "qkv")
    parts = grouped_heads(t, s, fused) if b.new else heads_one_by_one(t, s, fused)
    q, k, v = (ops.transpose(t, part, 1, 2) for part in parts)
    del parts
    if not b.alibi:
        q, k = decoder.turn(t, q, k, around)
    t.remember(LayerCache("full", s.kv_heads, s.head_dim, s.head_dim))
    k, v = blocks.store(t, k, v)
    out = attend(t, s, b, q, k, v, around)
    return linear(t, b, out, "self_attention.dense", s.hidden, "o")


def heads_one_by_one(t: Trace, s: Sizes, fused: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of every head side by side, or all heads' q before the only k and v."""
    batch, sequence, _ = fused.shape
    if s.kv_heads > 1:
        fused = ops.reshape(t, fused, batch, sequence, s.heads, 3, s.head_dim)
        return tuple(ops.select(t, fused, 3) for _ in range(3))
    fused = ops.reshape(t, fused, batch, sequence, s.heads + 2, s.head_dim)
    return ops.narrow(t, fused, 2, s.heads), *(ops.pick(t, fused, 2) for _ in range(2))


def grouped_heads(t: Trace, s: Sizes, fused: Tensor) -> tuple[Tensor, ...]:
    """The heads of a group before their k and v, which are copied for every head."""
    batch, sequence, _ = fused.shape
    group = s.heads // s.kv_heads
    fused = ops.reshape(t, fused, batch, sequence, s.kv_heads, group + 2, s.head_dim)
    q = ops.narrow(t, fused, 3, group)
    k, v = (ops.pick(t, fused, 3) for _ in range(2))
    k, v = ops.expand(t, k, *q.shape), ops.expand(t, v, *q.shape)
    by_head = (batch, sequence, s.heads, s.head_dim)
    return tuple([ops.reshape(t, part, *by_head) for part in (q, k, v)])


def attend(t: Trace, s: Sizes, b: Block, q: Tensor, k: Tensor, v: Tensor, around: Around) -> Tensor:
    """A fused kernel, or scores written out: in place, in the weights' format, without ALiBi."""
    if t.setting.attention != "eager":
        return ops.merge_heads(t, kernels.attend(t, q, k, v, around.mask, repeated=False))
    assert around.mask is not None
    if not b.alibi:
        scores = ops.scale_in_place(t, ops.matmul(t, q, ops.transpose(t, k, -1, -2)))
        weights = ops.softmax(t, ops.add(t, scores, around.mask), t.setting.format)
        return ops.merge_heads(t, ops.matmul(t, weights, v))
    product = ops.matmul(t, q, ops.transpose(t, k, -1, -2))
    scores = ops.to(t, product, FP32)
    scores = ops.scale_in_place(t, ops.shift(t, scores))
    weights = ops.softmax(t, ops.add(t, scores, around.mask), t.setting.format)
    weights = ops.dropout(t, weights, s.attention_dropout)
    return ops.merge_heads(t, ops.matmul(t, weights, v))
