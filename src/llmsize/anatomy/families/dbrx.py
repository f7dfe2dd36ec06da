"""DBRX: LayerNorm without biases, q, k and v in one projection, experts in every layer.

transformers v5.23, models/dbrx/modeling_dbrx.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Names, Sizes, layer_norm_without_bias
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32

NAMES = Names("transformer.wte", "transformer.blocks", "transformer.norm_f")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    attention_fields, ffn_fields = nested(c, "attn_config"), nested(c, "ffn_config")
    told = {"kv_n_heads": "num_key_value_heads", "attn_pdrop": "attention_dropout"}
    renamed = {usual: attention_fields.get(own) for own, usual in told.items()}
    c = c.changed(**ffn_fields, **renamed)
    s = decoder.read(c)
    m = mixture.read(c, width="ffn_hidden_size", balanced=True)
    clipped = attention_fields.get("clip_qkv") is not None

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, clipped),
            lambda x: feed(t, s, m, x),
            norm=layer_norm_without_bias,
            names=("norm_attn_norm.norm_1", "norm_attn_norm.norm_2"),
        )

    frame = Frame(norm=layer_norm_without_bias, names=NAMES)
    return decoder.run(t, s, block, ["full"] * s.layers, frame)


def nested(c: Config, name: str) -> Mapping[str, Any]:
    """A part of the configuration. Raises `LLMSizeError` if it is not a mapping."""
    part = c.value(name)
    if not isinstance(part, Mapping):
        raise c.error(f"has no mapping `{name}`", "add it, as in the published config")
    return part


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, clipped: bool) -> Tensor:
    """Grouped-query attention over one fused projection, which q, k and v are views of."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    fused = t.linear(x, "norm_attn_norm.attn.Wqkv", queries + 2 * keys, role="qkv")
    if clipped:
        fused = ops.unary(t, "clamp", fused, keeps="input")
    q, k, v = ops.split(t, fused, queries, keys, keys)
    del fused
    q = ops.split_heads(t, q, s.heads)
    k, v = ops.split_heads(t, k, s.kv_heads), ops.split_heads(t, v, s.kv_heads)
    q, k = decoder.turn(t, q, k, around)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, around.mask, dropout=s.attention_dropout)
    return t.linear(out, "norm_attn_norm.attn.out_proj", s.hidden, role="o")


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts, whose weights are kept as three long matrices."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    routing = mixture.route(t, m, tokens, "ffn.router.layer", linear=True)
    mixture.hand_out(t, m, routing)
    weights = routing.weights
    del routing
    rows = tokens.shape[0] * m.chosen
    chosen = mixture.take(t, tokens, (rows, s.hidden), "index")
    gate, up, down = (
        t.weight(
            f"ffn.experts.mlp.{name}", (m.count * m.width, s.hidden), role,
            experts=m.count, chosen=m.chosen,
        )
        for name, role in (("w1", "expert_gate"), ("v1", "expert_up"), ("w2", "expert_down"))
    )  # fmt: skip
    inside = ops.mul(
        t,
        s.activation(t, ops.linear(t, chosen, gate, None, m.width)),
        ops.linear(t, chosen, up, None, m.width),
    )
    out = ops.linear(t, inside, down, None, s.hidden)
    weighted = ops.mul(t, out, ops.to(t, weights, FP32).view(rows, 1))
    return mixture.take(t, weighted, tokens.shape, "sum").view(*x.shape)
