"""Llama and the many that share its block: Mistral, Qwen2, Yi, SmolLM, …

transformers v5.23, models/llama/modeling_llama.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsize.anatomy import blocks
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of a Llama block."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: blocks.Activation


def read(c: Config) -> Shape:
    """The shape from a `config.json`."""
    hidden = c.size("hidden_size")
    heads = c.size("num_attention_heads")
    if "head_dim" not in c.fields and hidden % heads:
        raise c.error(f"has {heads} heads that do not divide {hidden}", "give `head_dim`")
    bias = c.flag("attention_bias", default=c.text("model_type") == "qwen2")
    return Shape(
        layers=c.size("num_hidden_layers"),
        hidden=Dim(hidden, "hidden"),
        heads=Dim(heads, "heads"),
        kv_heads=Dim(c.size("num_key_value_heads", default=heads), "kv_heads"),
        head_dim=Dim(c.size("head_dim", default=hidden // heads), "head_dim"),
        intermediate=Dim(c.size("intermediate_size"), "intermediate"),
        vocabulary=Dim(c.size("vocab_size"), "vocabulary"),
        tied=c.flag("tie_word_embeddings"),
        qkv_bias=bias,
        output_bias=bias and c.text("model_type") != "qwen2",
        mlp_bias=c.flag("mlp_bias"),
        activation=blocks.activation(c, "hidden_act", default="silu"),
    )


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = read(c)
    x = model(t, s)
    return blocks.causal_lm(t, x, s.vocabulary, tied="model.embed_tokens" if s.tied else "")


def model(t: Trace, s: Shape) -> Tensor:
    """Embedding, blocks, final norm."""
    embeddings = blocks.embed(t, "model.embed_tokens", s.vocabulary, s.hidden)
    position_ids = blocks.positions(t)
    mask = blocks.mask(t)
    cosines, sines = blocks.rotary(t, embeddings, s.head_dim)

    def block(x: Tensor, kind: str) -> Tensor:
        residual = x
        x = blocks.rms_norm(t, x, "input_layernorm")
        x = attention(t, s, x, cosines, sines, mask)
        x = ops.add(t, residual, x)
        residual = x
        x = blocks.rms_norm(t, x, "post_attention_layernorm")
        x = mlp(t, s, x)
        return ops.add(t, residual, x)

    x = t.layers("model.layers", block, embeddings, ["full"] * s.layers)
    x = blocks.rms_norm(t, x, "model.norm")
    del position_ids
    return x


def attention(
    t: Trace, s: Shape, x: Tensor, cosines: Tensor, sines: Tensor, mask: Tensor | None
) -> Tensor:
    """Grouped-query attention with rotary positions."""
    q = t.linear(x, "self_attn.q_proj", s.heads * s.head_dim, bias=s.qkv_bias, role="q")
    q = ops.split_heads(t, q, s.heads, rotated=True)
    k = t.linear(x, "self_attn.k_proj", s.kv_heads * s.head_dim, bias=s.qkv_bias, role="k")
    k = ops.split_heads(t, k, s.kv_heads, rotated=True)
    v = t.linear(x, "self_attn.v_proj", s.kv_heads * s.head_dim, bias=s.qkv_bias, role="v")
    v = ops.split_heads(t, v, s.kv_heads)
    q = blocks.rotate(t, q, cosines, sines)
    k = blocks.rotate(t, k, cosines, sines)
    out = blocks.attend(t, q, k, v, mask)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=s.output_bias, role="o")


def mlp(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """The gated MLP."""
    product = ops.mul(
        t,
        s.activation(t, t.linear(x, "mlp.gate_proj", s.intermediate, bias=s.mlp_bias, role="gate")),
        t.linear(x, "mlp.up_proj", s.intermediate, bias=s.mlp_bias, role="up"),
    )
    return t.linear(product, "mlp.down_proj", s.hidden, bias=s.mlp_bias, role="down")
