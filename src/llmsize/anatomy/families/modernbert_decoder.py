"""ModernBERT's decoder (Ettin): gated GELU, two layers of three in a window, a head of two layers.

transformers v5.23, models/modernbert_decoder/modeling_modernbert_decoder.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Names, Norm, Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.rotary import Rotation
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32
from llmsize.quick_dataclasses import dataclass

NAMES = Names("model.embeddings.tok_embeddings", norm="model.final_norm")


@dataclass(frozen=True, slots=True)
class Type:
    """What is told of the parts beside attention."""

    norm: Norm
    mlp_bias: bool
    dropout: float
    """Of the gated product in the MLP."""


def read(c: Config) -> Type:
    """It from a `config.json`."""
    norm = blocks.layer_norm if c.flag("norm_bias") else decoder.layer_norm_without_bias
    return Type(norm, c.flag("mlp_bias"), c.number("mlp_dropout"))


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    window = c.size("local_attention", default=128) // 2
    c = c.changed(sliding_window=c.size("sliding_window", default=window))
    s = decoder.read(c, tied=True, activation="gelu")
    d = read(c)
    norm = d.norm
    bias, embedding_dropout = c.flag("attention_bias"), c.number("embedding_dropout")
    h = Heads(bias=bias, turn=turn, name="attn", output="Wo")

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        reach, first = kind
        residual = x
        x = x if first else norm(t, x, "attn_norm")
        attended = decoder.attention(t, s, h, x, around, reach)
        attended = ops.dropout(t, attended, s.attention_dropout)
        x = ops.add(t, residual, attended)
        residual = x
        x = norm(t, x, "mlp_norm")
        return ops.add(t, residual, feed(t, s, d, x))

    def begin(t: Trace, x: Tensor) -> Tensor:
        return ops.dropout(t, norm(t, x, "model.embeddings.norm"), embedding_dropout)

    every = c.size("global_attn_every_n_layers", default=3)
    windows = decoder.windows(c, s.layers, lambda layer: layer % every > 0)
    kinds = [(window, layer == 0) for layer, window in enumerate(windows)]
    frame = Frame(
        norm=norm,
        names=NAMES,
        windows=windows,
        begin=begin,
        rope=rotary.Rope(rotary.table_by_sequence, apart=True),
        head=head(c, s, norm, "lm_head"),
    )
    return decoder.run(t, s, block, kinds, frame)


def head(c: Config, s: Sizes, norm: Norm, name: str) -> Head:
    """The head behind a layer of that `name`, an activation and a norm."""
    bias = c.flag("classifier_bias")
    activation = blocks.activation(c, "classifier_activation", default="gelu")

    def transform(t: Trace, x: Tensor) -> Tensor:
        x = t.linear(x, f"{name}.dense", s.hidden, bias=bias, role="transform")
        return norm(t, activation(t, x), f"{name}.norm")

    head_bias = c.flag("decoder_bias", default=True)
    return Head(NAMES.embedding, "decoder", bias=head_bias, transform=transform)


def feed(t: Trace, s: Sizes, d: Type, x: Tensor) -> Tensor:
    """The gated MLP with both halves in one projection, of which the first is activated."""
    both = t.linear(x, "mlp.Wi", 2 * s.intermediate, bias=d.mlp_bias, role="gate_up")
    first, gate = ops.split(t, both, s.intermediate, s.intermediate)
    product = ops.dropout(t, ops.mul(t, s.activation(t, first), gate), d.dropout)
    return t.linear(product, "mlp.Wo", s.hidden, bias=d.mlp_bias, role="down")


def turn(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`rotary.turn` in fp32, of a copy for each factor, cast back."""
    turned = [
        ops.add(
            t,
            ops.mul(t, ops.to(t, x, FP32), rotation.cosines),
            ops.mul(t, rotary.rotate_half(t, ops.to(t, x, FP32)), rotation.sines),
        )
        for x in (q, k)
    ]
    return ops.to(t, turned[0], q.format), ops.to(t, turned[1], q.format)
