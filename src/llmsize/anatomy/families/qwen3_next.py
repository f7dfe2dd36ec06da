"""Qwen3-Next and Qwen3.5: three gated DeltaNet layers to one of gated attention.

transformers v5.23, models/qwen3_next, models/qwen3_5, models/qwen3_5_moe (the text models).
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder, mixture, recurrent, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Sizes, gemma_norm
from llmsize.anatomy.delta_rule import DeltaNet, delta_rule
from llmsize.anatomy.families.mixtral import feed_beside_gated_expert
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, rotary=0.25)
    d = read_delta_net(c, s.hidden)
    m = mixture.read(c, balanced=True) if c.value("num_experts") is not None else None
    joined = c.text("model_type") == "qwen3_next"
    t.once_linear = joined
    bias = c.flag("attention_bias")

    def block(x: Tensor, kind: tuple[bool, bool], around: Around) -> Tensor:
        attends, sparse = kind
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, bias) if attends else delta_net(t, d, x, joined),
            lambda x: (
                feed_beside_gated_expert(t, s, m, x) if m and sparse else decoder.gated(t, s, x)
            ),
            norm=gemma_norm,
        )

    sparse = mixture.sparse_layers(c, s.layers) if m else [False] * s.layers
    kinds = list(zip(attention_layers(c, s.layers), sparse, strict=True))
    rope = rotary.Rope(rotary.table if joined else rotary.table_in_sections)
    return decoder.run(t, s, block, kinds, Frame(norm=gemma_norm, rope=rope))


def read_delta_net(c: Config, hidden: int) -> DeltaNet:
    """The linear attention from a `config.json`."""
    return DeltaNet(
        hidden=hidden,
        key_heads=Dim(c.size("linear_num_key_heads", default=16), "key_heads"),
        value_heads=Dim(c.size("linear_num_value_heads", default=32), "value_heads"),
        key_dim=Dim(c.size("linear_key_head_dim", default=128), "key_dim"),
        value_dim=Dim(c.size("linear_value_head_dim", default=128), "value_dim"),
        kernel=c.size("linear_conv_kernel_dim", default=4),
    )


def attention_layers(c: Config, layers: int) -> list[bool]:
    """Which layers attend to all tokens: as listed, or every fourth."""
    kinds = c.each_layer(layers, "layer_types")
    if kinds is None:
        interval = c.size("full_attention_interval", default=4)
        return [(layer + 1) % interval == 0 for layer in range(layers)]
    return [kind == "full_attention" for kind in kinds]


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, bias: bool) -> Tensor:
    """Grouped-query attention whose output passes a gate made beside the queries."""
    tokens, width = (t.batch, t.sequence), s.heads * s.head_dim
    both = t.linear(x, "self_attn.q_proj", 2 * width, bias=bias, role="q")
    q, gate = ops.split(
        t, ops.reshape(t, both, *tokens, s.heads, 2 * s.head_dim), s.head_dim, s.head_dim
    )
    del both
    gate = ops.reshape(t, gate, *tokens, width)
    q = ops.transpose(t, gemma_norm(t, q, "self_attn.q_norm"), 1, 2)
    k = t.linear(x, "self_attn.k_proj", s.kv_heads * s.head_dim, bias=bias, role="k")
    k = ops.reshape(t, k, *tokens, s.kv_heads, s.head_dim)
    k = ops.transpose(t, gemma_norm(t, k, "self_attn.k_norm"), 1, 2)
    v = t.linear(x, "self_attn.v_proj", s.kv_heads * s.head_dim, bias=bias, role="v")
    v = ops.split_heads(t, v, s.kv_heads)
    q, k = decoder.turn(t, q, k, around)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, around.mask, dropout=s.attention_dropout)
    out = ops.mul(t, out, ops.sigmoid(t, gate))
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def delta_net(t: Trace, d: DeltaNet, x: Tensor, joined: bool) -> Tensor:
    """Gated DeltaNet; Qwen3-Next has two projections where Qwen3.5 has four."""
    x = recurrent.without_padding(t, x)
    if joined:
        return joined_delta_net(t, d, x)
    heads = (t.batch, t.sequence, d.value_heads, d.value_dim)
    project = partial(t.linear, x, role="ssm")
    return delta_rule(
        t,
        d,
        "linear_attn",
        project("linear_attn.in_proj_qkv", 2 * d.keys + d.values),
        project("linear_attn.in_proj_z", d.values).view(*heads),
        project("linear_attn.in_proj_b", d.value_heads),
        project("linear_attn.in_proj_a", d.value_heads),
    )


def joined_delta_net(t: Trace, d: DeltaNet, x: Tensor) -> Tensor:
    """The parts lie side by side in each head of the keys, and are copied apart."""
    shared = d.value_heads // d.key_heads
    sizes = (d.key_dim, d.key_dim, shared * d.value_dim, shared * d.value_dim)
    tokens = (t.batch, t.sequence)
    wide = t.linear(x, "linear_attn.in_proj_qkvz", d.key_heads * sum(sizes), role="ssm")
    narrow = t.linear(x, "linear_attn.in_proj_ba", 2 * d.value_heads, role="ssm")
    q, k, v, gate = ops.split(t, ops.reshape(t, wide, *tokens, d.key_heads, sum(sizes)), *sizes)
    by_key = ops.reshape(t, narrow, *tokens, d.key_heads, 2 * shared)
    beta, decay = ops.split(t, by_key, shared, shared)
    v, gate = [ops.reshape(t, y, *tokens, d.value_heads, d.value_dim) for y in (v, gate)]
    beta, decay = [ops.reshape(t, y, *tokens, d.value_heads) for y in (beta, decay)]
    q, k, v = [ops.reshape(t, y, *tokens, y.shape[2] * y.shape[3]) for y in (q, k, v)]
    mixed = [ops.cat(t, (q, k, v))]
    del q, k, v
    return delta_rule(t, d, "linear_attn", mixed.pop(), gate, beta, decay)
