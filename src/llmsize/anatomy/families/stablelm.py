"""StableLM 3B and 2: a quarter of each head rotated, LayerNorm, both halves side by side or not.

transformers v5.23, models/stablelm/modeling_stablelm.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Sizes
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, rotary=0.25)
    parallel = c.flag("use_parallel_residual")
    dropout = c.number("hidden_dropout")
    bias, normed_heads = c.flag("use_qkv_bias"), c.flag("qk_layernorm")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        residual = x
        x = blocks.layer_norm(t, x, "input_layernorm")
        attended = attention(t, s, x, around, bias, normed_heads)
        if parallel:
            fed = ops.dropout(t, decoder.gated(t, s, x), dropout)
            return ops.add(t, ops.add(t, residual, attended), fed)
        residual = ops.add(t, residual, attended)
        fed = mlp(t, s, residual)
        fed = ops.dropout(t, fed, dropout)
        return ops.add(t, residual, fed)

    return decoder.run(t, s, block, ["full"] * s.layers, Frame(norm=blocks.layer_norm))


def mlp(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """The gated MLP of a normalised copy that has no name outside of it."""
    return decoder.gated(t, s, blocks.layer_norm(t, x, "post_attention_layernorm"))


def attention(
    t: Trace, s: Sizes, x: Tensor, around: Around, bias: bool, normed_heads: bool
) -> Tensor:
    """Grouped-query attention; where heads are normalised, each by a LayerNorm of its own."""
    q = t.linear(x, "self_attn.q_proj", s.heads * s.head_dim, bias=bias, role="q")
    k = t.linear(x, "self_attn.k_proj", s.kv_heads * s.head_dim, bias=bias, role="k")
    v = t.linear(x, "self_attn.v_proj", s.kv_heads * s.head_dim, bias=bias, role="v")
    v = ops.split_heads(t, v, s.kv_heads)
    if normed_heads:
        q = norm_heads(t, q, "self_attn.q_layernorm", s.heads)
        k = norm_heads(t, k, "self_attn.k_layernorm", s.kv_heads)
    else:
        q = ops.split_heads(t, q, s.heads)
        k = ops.split_heads(t, k, s.kv_heads)
    parts: list[Tensor] = []
    assert around.rotation is not None
    q, k = rotary.turn_in_place(parts, t, q, k, around.rotation)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, around.mask, dropout=s.attention_dropout)
    out = t.linear(out, "self_attn.o_proj", s.hidden, role="o")
    del parts
    return out


def norm_heads(t: Trace, x: Tensor, name: str, heads: int) -> Tensor:
    """Every head through its own LayerNorm, then all joined by heads."""
    channels = x.shape[-1] // heads
    normed = [
        blocks.layer_norm(t, head, f"{name}.norms.{index}", bias=False)
        for index, head in enumerate(ops.split(t, x, *[channels] * heads))
    ]
    by_heads = [head.view(t.batch, 1, t.sequence, channels) for head in normed]
    return ops.cat(t, by_heads, dim=1)
