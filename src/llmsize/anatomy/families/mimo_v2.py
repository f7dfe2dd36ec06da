"""MiMo-V2-Flash: local layers with sinks and twice the KV heads, keys wider than values.

transformers v5.23, models/mimo_v2_flash/modeling_mimo_v2_flash.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Sizes
from llmsize.anatomy.families.gpt_oss import attend_with_sinks
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits; a `sliding_window_size` leaves out the token that looks back."""
    if c.value("sliding_window_size") is not None:
        c = c.changed(sliding_window=c.size("sliding_window_size") + 1)
    s = decoder.read(c, rotary=0.334)
    m = mixture.read_corrected(c)
    value_dim = Dim(c.size("v_head_dim", default=s.head_dim), "value_dim")
    local_kv_heads = c.size("swa_num_key_value_heads", default=2 * s.kv_heads)
    bias = c.flag("attention_bias")

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, sparse = kind
        kv_heads = Dim(local_kv_heads, "local_kv_heads") if window else s.kv_heads
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, window, kv_heads, value_dim, bias),
            lambda x: mixture.feed(t, s, m, x) if sparse else decoder.gated(t, s, x),
        )

    local = c.each_layer(s.layers, "hybrid_layer_pattern")
    if local is None:  # the first layer and every sixth one see everything
        local = [int(i > 0 and (i + 1) % 6 > 0) for i in range(s.layers)]
    reach = decoder.windows(c, s.layers, lambda layer: local[layer] == 1)
    kinds = list(zip(reach, mixture.sparse_layers(c, s.layers, 1), strict=True))
    frame = Frame(windows=reach, masking="eager", rope=rotary.Rope(apart=True))
    return decoder.run(t, s, block, kinds, frame)


def attention(
    t: Trace,
    s: Sizes,
    x: Tensor,
    around: Around,
    window: int,
    kv_heads: int,
    value_dim: int,
    bias: bool,
) -> Tensor:
    """Grouped-query attention; a sink in every head's softmax where it is local."""
    q = t.linear(x, "self_attn.q_proj", s.heads * s.head_dim, bias=bias, role="q")
    k = t.linear(x, "self_attn.k_proj", kv_heads * s.head_dim, bias=bias, role="k")
    v = t.linear(x, "self_attn.v_proj", kv_heads * value_dim, bias=bias, role="v")
    q = ops.split_heads(t, q, s.heads)
    k = ops.split_heads(t, k, kv_heads)
    v = ops.scale(t, ops.split_heads(t, v, kv_heads))
    q, k = decoder.turn(t, q, k, around, window)
    sunk = window > 0
    k, v = blocks.remember(t, k, v, window)
    out = attend_with_sinks(
        t, q, k, v, around.masks[window], dropout=s.attention_dropout, sunk=sunk, holds=False
    )
    return t.linear(out, "self_attn.o_proj", s.hidden, role="o")
