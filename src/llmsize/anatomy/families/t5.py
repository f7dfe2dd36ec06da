"""T5, Flan-T5 and the first of their kind: an encoder and a decoder that reads it.

transformers v5.23, models/t5/modeling_t5.py. Both stacks are given the same number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmsize.anatomy import blocks, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions of T5."""

    encoder_layers: int
    decoder_layers: int
    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    buckets: int
    """Distances that have a bias of their own."""
    tied: bool
    gated: bool
    activation: blocks.Activation
    dropout: float


def read(c: Config) -> Shape:
    """The shape from a `config.json`."""
    kind = c.text("feed_forward_proj", default="relu")
    gated = kind.startswith("gated-")
    name = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    layers = c.few("num_layers")
    return Shape(
        encoder_layers=layers,
        decoder_layers=c.few("num_decoder_layers", default=layers),
        hidden=Dim(c.size("d_model"), "hidden"),
        heads=Dim(c.size("num_heads"), "heads"),
        head_dim=Dim(c.size("d_kv"), "head_dim"),
        intermediate=Dim(c.size("d_ff"), "intermediate"),
        vocabulary=Dim(c.size("vocab_size"), "vocabulary"),
        buckets=Dim(c.size("relative_attention_num_buckets", default=32), "buckets"),
        tied=c.flag("tie_word_embeddings", default=True),
        gated=gated,
        activation=blocks.activation(Config({"name": name}, c.model), "name", default="relu"),
        dropout=c.number("dropout_rate", default=0.1),
    )


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens of both stacks to loss or logits."""
    s = read(c)
    encoded = stack(t, s, "encoder", s.encoder_layers, None)
    x = stack(t, s, "decoder", s.decoder_layers, encoded)
    if s.tied:
        x = ops.scale(t, x)
    return blocks.causal_lm(t, x, s.vocabulary, tied="shared" if s.tied else "")


def stack(t: Trace, s: Shape, name: str, layers: int, encoded: Tensor | None) -> Tensor:
    """One stack; the decoder attends to what is `encoded` as well."""
    x = ops.dropout(t, blocks.embed(t, "shared", s.vocabulary, s.hidden), s.dropout)
    bias: list[Tensor] = []

    def block(x: Tensor, first: bool) -> Tensor:
        normed = norm(t, x, "layer.0.layer_norm")
        attended = attention(t, s, normed, normed, "layer.0.SelfAttention", bias, first)
        if encoded is not None:
            remember(t, s, "full")
        x = ops.add(t, x, ops.dropout(t, attended, s.dropout))
        last = 1
        if encoded is not None:
            normed = norm(t, x, "layer.1.layer_norm")
            attended = attention(t, s, normed, encoded, "layer.1.EncDecAttention", [], False)
            remember(t, s, "cross")
            x = ops.add(t, x, ops.dropout(t, attended, s.dropout))
            last = 2
        fed = feed(t, s, norm(t, x, f"layer.{last}.layer_norm"), f"layer.{last}.DenseReluDense")
        return ops.add(t, x, ops.dropout(t, fed, s.dropout))

    x = t.layers(f"{name}.block", block, x, [layer == 0 for layer in range(layers)])
    x = norm(t, x, f"{name}.final_layer_norm")
    return ops.dropout(t, x, s.dropout)


def remember(t: Trace, s: Shape, kind: Literal["full", "cross"]) -> None:
    """Keys and values stay for the next token."""
    t.remember(LayerCache(kind, s.heads, s.head_dim, s.head_dim))


def norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """RMSNorm whose variance alone is taken in fp32."""
    weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
    variance = ops.mean(t, ops.power(t, ops.to(t, x, FP32)))
    x = ops.mul(t, x, ops.rsqrt(t, ops.shift(t, variance)))
    return ops.mul(t, weight, ops.to(t, x, weight.format))


def attention(
    t: Trace, s: Shape, x: Tensor, source: Tensor, name: str, bias: list[Tensor], first: bool
) -> Tensor:
    """Attention from `x` to `source`, unscaled; the first layer makes the bias for all."""
    width = s.heads * s.head_dim
    q = ops.split_heads(t, t.linear(x, f"{name}.q", width, role="q"), s.heads)
    k = ops.split_heads(t, t.linear(source, f"{name}.k", width, role="k"), s.heads)
    v = ops.split_heads(t, t.linear(source, f"{name}.v", width, role="v"), s.heads)
    scores = ops.matmul(t, q, ops.transpose(t, k, -1, -2))
    if first:
        table = t.weight(f"{name}.relative_attention_bias.weight", (s.buckets, s.heads), "position")
        bias.append(mixture.take(t, table, (1, *scores.shape[1:]), "embedding"))
    if bias:
        scores = ops.add(t, scores, bias[0])
    weights = ops.to(t, ops.softmax(t, ops.to(t, scores, FP32)), scores.format)
    weights = ops.dropout(t, weights, s.dropout)
    out = ops.merge_heads(t, ops.matmul(t, weights, v))
    return t.linear(out, f"{name}.o", s.hidden, role="o")


def feed(t: Trace, s: Shape, x: Tensor, name: str) -> Tensor:
    """Two linear layers around the activation; in later versions three, with a gate."""
    if s.gated:
        gate = s.activation(t, t.linear(x, f"{name}.wi_0", s.intermediate, role="gate"))
        x = ops.mul(t, gate, t.linear(x, f"{name}.wi_1", s.intermediate, role="up"))
    else:
        x = s.activation(t, t.linear(x, f"{name}.wi", s.intermediate, role="up"))
    x = ops.dropout(t, x, s.dropout)
    return t.linear(x, f"{name}.wo", s.hidden, role="down")
