"""Falcon-H1: attention and Mamba-2 side by side in every layer.

transformers v5.23, models/falcon_h1/modeling_falcon_h1.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder, mamba2
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Names, Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.mamba2 import Mamba2
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace

NAMES = Names(norm="model.final_layernorm")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    mixer = read_mamba2(c, s.hidden)
    bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        residual = x
        x = blocks.rms_norm(t, x, "input_layernorm")
        mixed = mamba2.mixer(t, mixer, x, "mamba")
        mixed = ops.scale(t, mixed)
        attended = attention(t, s, ops.scale(t, x), around, bias)
        attended = ops.scale(t, attended)
        x = ops.add(t, mixed, attended)
        x = ops.add(t, residual, x)
        residual = x
        x = blocks.rms_norm(t, x, "pre_ff_layernorm")
        x = feed(t, s, x, mlp_bias)
        return ops.add(t, residual, x)

    frame = Frame(names=NAMES, begin=ops.scale, head=Head(end=(ops.scale,)))
    return decoder.run(t, s, block, ["full"] * s.layers, frame)


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, bias: bool) -> Tensor:
    """Grouped-query attention with scaled keys."""
    q = t.linear(x, "self_attn.q_proj", s.heads * s.head_dim, bias=bias, role="q")
    q = ops.split_heads(t, q, s.heads)
    k = t.linear(x, "self_attn.k_proj", s.kv_heads * s.head_dim, bias=bias, role="k")
    k = ops.split_heads(t, k, s.kv_heads)
    k = ops.scale(t, k)
    v = t.linear(x, "self_attn.v_proj", s.kv_heads * s.head_dim, bias=bias, role="v")
    v = ops.split_heads(t, v, s.kv_heads)
    q, k = decoder.turn(t, q, k, around)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, around.mask, dropout=s.attention_dropout)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def feed(t: Trace, s: Sizes, x: Tensor, bias: bool) -> Tensor:
    """The gated MLP with its gate and its output scaled."""
    project = partial(t.linear, x, out=s.intermediate, bias=bias)
    product = ops.mul(
        t,
        project(name="feed_forward.up_proj", role="up"),
        s.activation(t, ops.scale(t, project(name="feed_forward.gate_proj", role="gate"))),
    )
    product = t.linear(product, "feed_forward.down_proj", s.hidden, bias=bias, role="down")
    return ops.scale(t, product)


def read_mamba2(c: Config, hidden: int) -> Mamba2:
    """The mixer from a `config.json`."""
    inner = c.size("mamba_d_ssm", default=c.size("mamba_expand", default=2) * hidden)
    heads = c.heads(inner, "mamba_n_heads", default=128)
    return Mamba2(
        hidden=hidden,
        heads=Dim(heads, "heads"),
        head_dim=Dim(inner // heads, "head_dim"),
        groups=c.size("mamba_n_groups", default=1),
        state=Dim(c.size("mamba_d_state", default=256), "state"),
        kernel=c.size("mamba_d_conv", default=4),
        bias=c.flag("mamba_proj_bias"),
        conv_bias=c.flag("mamba_conv_bias", default=True),
        chunk=c.size("mamba_chunk_size", default=256),
        output_bias=c.flag("projectors_bias"),
        normed=c.flag("mamba_rms_norm"),
        scaled=True,
    )
