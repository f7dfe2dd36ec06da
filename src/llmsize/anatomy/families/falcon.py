"""Falcon: the old block (7B, RW) and the new one (40B, 180B, 11B).

transformers v5.23, models/falcon/modeling_falcon.py.
"""

from __future__ import annotations

from llmsize.anatomy import attention as kernels
from llmsize.anatomy import blocks, decoder, lm_head, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, INT64
from llmsize.quick_dataclasses import dataclass

EMBEDDING = "transformer.word_embeddings"

Out = tuple[Tensor, Tensor | None]
"""What a layer or its attention gives, and the attention's weights beside."""


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
    x = model(t, s, b)
    return lm_head.causal_lm(t, x, s.vocabulary, Head(EMBEDDING, casts=False), tied=s.tied)


def model(t: Trace, s: Sizes, b: Block) -> Tensor:
    """Embeddings, blocks, final norm."""
    embeddings = blocks.embed(t, EMBEDDING, s.vocabulary, s.hidden)
    total = t.sequence + t.setting.past
    counted = b.alibi and not t.setting.padded
    seen = t.new("ones", (t.batch, total), INT64) if counted else None
    biases = t.new("alibi", (t.batch, s.heads, total), t.setting.format) if b.alibi else None
    position_ids = blocks.positions(t)
    mask = blocks.mask(t, 0, masking(t, b), s.heads)
    around = Around({0: rotary.table(t, embeddings, s.rotary)}, {0: mask}, [])
    returned: list[Tensor] = []

    def block(x: Tensor, kind: str) -> Tensor:
        form = side_by_side if b.parallel else one_after_the_other
        out, weights = form(t, s, b, x, around)
        if weights is not None:
            blocks.hand_back(t, returned, weights)
        return out

    x = t.layers("transformer.h", block, embeddings, ["full"] * s.layers, position_ids, biases)
    x = blocks.layer_norm(t, x, "transformer.ln_f")
    returned.clear()
    del seen
    return x


def masking(t: Trace, b: Block) -> blocks.Masking:
    """How tokens are masked: LitGPT, which repeats the only key, has a block like Llama's."""
    if b.alibi:
        return "alibi"
    return "as needed" if t.setting.repeats_keys else "always"


def sizes(c: Config, new: bool) -> Sizes:
    """The dimensions; the old block has one KV head or as many as query heads."""
    heads = c.size("num_attention_heads", "n_head")
    if new:
        kv_heads = c.size("num_kv_heads", "n_head_kv", default=heads)
    else:
        kv_heads = 1 if c.flag("multi_query", default=True) else heads
    inner = c.size("ffn_hidden_size", default=4 * c.size("hidden_size"))
    changed = c.changed(num_key_value_heads=kv_heads, intermediate_size=inner)
    return decoder.read(changed, tied=True, activation="gelu")


def side_by_side(t: Trace, s: Sizes, b: Block, x: Tensor, around: Around) -> Out:
    """Attention and MLP read the same residual stream."""
    residual = x
    if b.norms == 2:
        for_attention = blocks.layer_norm(t, x, "ln_attn")
        for_mlp = blocks.layer_norm(t, x, "ln_mlp")
    else:
        for_attention = for_mlp = blocks.layer_norm(t, x, "input_layernorm")
    attended, weights = attention(t, s, b, for_attention, around)
    fed = mlp(t, s, b, for_mlp)
    fed = ops.add_in_place(t, fed, attended)
    return ops.add(t, residual, ops.dropout(t, fed, b.dropout)), weights


def one_after_the_other(t: Trace, s: Sizes, b: Block, x: Tensor, around: Around) -> Out:
    """First attention, then the MLP, each with its norm (Falcon RW)."""
    normed = blocks.layer_norm(t, x, "input_layernorm")
    attended, weights = attention(t, s, b, normed, around)
    residual = ops.add(t, x, ops.dropout(t, attended, s.attention_dropout))
    for_mlp = blocks.layer_norm(t, residual, "post_attention_layernorm")
    fed = mlp(t, s, b, for_mlp)
    return ops.add(t, residual, ops.dropout(t, fed, b.dropout)), weights


def linear(t: Trace, b: Block, x: Tensor, name: str, out: int, role: str) -> Tensor:
    """A product with the transposed weight, and a bias that is added apart."""
    t.weight(f"{name}.weight", (out, x.shape[-1]), role).viewed = True
    x = t.linear(x, name, out, role=role)
    return ops.add(t, x, t.weight(f"{name}.bias", (out,), "bias")) if b.bias else x


def mlp(t: Trace, s: Sizes, b: Block, x: Tensor) -> Tensor:
    """Two linear layers around the activation."""
    x = s.activation(t, linear(t, b, x, "mlp.dense_h_to_4h", s.intermediate, "up"))
    return linear(t, b, x, "mlp.dense_4h_to_h", s.hidden, "down")


def attention(t: Trace, s: Sizes, b: Block, x: Tensor, around: Around) -> Out:
    """Attention over one fused projection, and its weights where they are written out."""
    fused = projection(t, s, b, x)
    grouped = b.new or t.setting.repeats_keys
    parts = grouped_heads(t, s, fused) if grouped else heads_one_by_one(t, s, fused)
    q, k, v = (ops.transpose(t, part, 1, 2) for part in parts)
    del parts
    if not b.alibi:
        q, k = decoder.turn(t, q, k, around)
    repeated = 2 * s.heads * s.head_dim if b.new else 0
    t.remember(LayerCache("full", s.kv_heads, s.head_dim, s.head_dim, expanded=repeated))
    k, v = blocks.store(t, k, v)
    if t.setting.attention != "eager":
        dropout = s.attention_dropout if b.alibi else 0.0  # where positions are rotated, none
        out = kernels.attend(t, q, k, v, around.mask, repeated=False, dropout=dropout)
        out = blocks.beside_each_other(t, q, out)
        return linear(t, b, out, "self_attention.dense", s.hidden, "o"), None
    assert around.mask is not None
    weigh = weights_with_alibi if b.alibi else weights_in_place
    weights, *alive = weigh(t, s, q, k, around.mask)
    out = ops.merge_heads(t, ops.matmul(t, weights, v))
    out = linear(t, b, out, "self_attention.dense", s.hidden, "o")
    del alive
    return out, weights


def projection(t: Trace, s: Sizes, b: Block, x: Tensor) -> Tensor:
    """Queries, keys and values of all heads; LitGPT's layer is an ordinary one."""
    name = "self_attention.query_key_value"
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    if t.setting.fused_qkv:
        return blocks.queries_keys_values(t, x, name, queries, keys, bias=b.bias)
    return linear(t, b, x, name, queries + 2 * keys, "qkv")


def heads_one_by_one(t: Trace, s: Sizes, fused: Tensor) -> tuple[Tensor, ...]:
    """q, k and v of every head side by side, or all heads' q before the only k and v."""
    batch, sequence, _ = fused.shape
    if s.kv_heads > 1:
        fused = ops.reshape(t, fused, batch, sequence, s.heads, 3, s.head_dim)
        return tuple(ops.select(t, fused, 3) for _ in range(3))
    fused = ops.reshape(t, fused, batch, sequence, s.heads + 2, s.head_dim)
    return ops.narrow(t, fused, 2, s.heads), *(ops.pick(t, fused, 2) for _ in range(2))


def grouped_heads(t: Trace, s: Sizes, fused: Tensor) -> tuple[Tensor, ...]:
    """The heads of a group before their k and v, which are copied for every head.

    LitGPT has views of them, and of an only one so many of these (litgpt/model.py).
    """
    batch, sequence, _ = fused.shape
    group = s.heads // s.kv_heads
    fused = ops.reshape(t, fused, batch, sequence, s.kv_heads, group + 2, s.head_dim)
    if t.setting.repeats_keys:
        q, k, v = ops.split(t, fused, group, 1, 1, dim=3)
    else:
        q = ops.narrow(t, fused, 3, group)
        k, v = (ops.pick(t, fused, 3) for _ in range(2))
    k, v = ops.expand(t, k, *q.shape), ops.expand(t, v, *q.shape)
    by_head = (batch, sequence, s.heads, s.head_dim)
    return tuple([ops.reshape(t, part, *by_head) for part in (q, k, v)])


def weights_in_place(t: Trace, s: Sizes, q: Tensor, k: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Scores scaled in place, and their softmax in the weights' format."""
    scores = ops.scale_in_place(t, ops.matmul(t, q, ops.transpose(t, k, -1, -2)))
    return (ops.softmax(t, ops.add(t, scores, mask), t.setting.format),)


def weights_with_alibi(
    t: Trace, s: Sizes, q: Tensor, k: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    """Scores in fp32 with their biases, and what is alive beside their softmax."""
    product = ops.matmul(t, q, ops.transpose(t, k, -1, -2))
    scores = ops.to(t, product, FP32)
    logits = ops.scale_in_place(t, ops.shift(t, scores))
    weights = ops.softmax(t, ops.add(t, logits, mask), t.setting.format)
    return ops.dropout(t, weights, s.attention_dropout), product, scores, logits
