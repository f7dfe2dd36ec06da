"""BART and kin (mBART, PLBART, Pegasus, Marian, M2M-100, NLLB, BlenderBot): encoder and decoder.

transformers v5.23, the modeling file of each type under models/. Both stacks are given the same
number of tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

from llmsize.anatomy import blocks, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Part
from llmsize.anatomy.families import t5
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, INT64
from llmsize.quick_dataclasses import dataclass

HAS_ENCODER = True
"""What is written attends to what an encoder makes of other tokens."""


@dataclass(frozen=True, slots=True)
class Type:
    """What one `model_type` does differently from the others."""

    before: bool
    """Whether norms come before attention and feed-forward, and one more behind each stack."""
    embedding_norm: bool
    positions: Literal["learned", "fixed", "buffer"]
    """Position embeddings: trained, weights of sines and cosines, or no weights."""
    offset: int = 0
    """Rows before that of the first position."""
    shifted_logits: bool = True
    """Whether a constant for each token is added to the logits."""
    scaled_within: bool = True
    """Whether the embedding module itself scales what it looks up."""
    holds: tuple[Literal["places", "ones"], ...] = ("ones",)
    """What the decoder holds to the end of its positions and of the mask that it makes itself."""
    shifts: bool = False
    """Whether the model itself shifts the encoder's tokens for the decoder if it is given none."""
    normed_first: bool = False
    """Whether the decoder normalises its embeddings as they are: not scaled, without positions."""
    successive: bool = False
    """Whether what the MLP reads is gone when its activation begins (BioGPT)."""


TYPES = {
    "bart": Type(
        before=False, embedding_norm=True, positions="learned", offset=2, holds=("places",),
        shifts=True,
    ),
    "plbart": Type(
        before=False, embedding_norm=True, positions="learned", offset=2, holds=("places",),
        shifts=True,
    ),
    "mbart": Type(before=True, embedding_norm=True, positions="learned", offset=2, shifts=True),
    "pegasus": Type(
        before=True, embedding_norm=False, positions="fixed", scaled_within=False,
        holds=("places", "ones"),
    ),
    "marian": Type(before=False, embedding_norm=False, positions="fixed", scaled_within=False),
    "m2m_100": Type(
        before=True, embedding_norm=False, positions="buffer", offset=2, shifted_logits=False,
        holds=(),
    ),
    "blenderbot": Type(before=True, embedding_norm=False, positions="learned"),
    "blenderbot-small": Type(
        before=False, embedding_norm=True, positions="learned", scaled_within=False,
        normed_first=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stack:
    """The dimensions of the encoder or the decoder."""

    name: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int
    activation: blocks.Activation
    dropout: float
    attention_dropout: float
    activation_dropout: float

    @property
    def decodes(self) -> bool:
        """Whether it is the decoder."""
        return self.name == "decoder"


SHARED = "model.shared"


class Tables(NamedTuple):
    """Which embeddings are one: with the head's, and the encoder's with the decoder's."""

    tied: bool
    shared: bool

    def of(self, stack: str) -> str:
        """The name of the embedding that a stack reads."""
        return SHARED if self.tied and self.shared else f"model.{stack}.embed_tokens"


def read(c: Config, name: str) -> Stack:
    """One stack from a `config.json`."""
    hidden = c.size("d_model")
    return Stack(
        name=name,
        layers=c.few(f"{name}_layers"),
        hidden=Dim(hidden, "hidden"),
        heads=Dim(c.heads(hidden, f"{name}_attention_heads"), f"{name}_heads"),
        intermediate=Dim(c.size(f"{name}_ffn_dim"), f"{name}_intermediate"),
        vocabulary=Dim(c.size("vocab_size"), "vocabulary"),
        positions=c.size("max_position_embeddings", default=1024),
        activation=blocks.activation(c, "activation_function", default="gelu"),
        dropout=c.number("dropout", default=0.1),
        attention_dropout=c.number("attention_dropout"),
        activation_dropout=c.number("activation_dropout"),
    )


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens of both stacks to loss or logits."""
    family = TYPES[c.text("model_type")]
    encoder, decoder = read(c, "encoder"), read(c, "decoder")
    tables = Tables(
        tied=c.flag("tie_word_embeddings", default=True),
        shared=c.flag("share_encoder_decoder_embeddings", default=True),
    )
    if tables.shared and not tables.tied:  # the shared one is there, and nobody reads it
        t.weight(f"{SHARED}.weight", (encoder.vocabulary, encoder.hidden), "embedding")
    encoded = run(t, family, encoder, tables, None, None)
    shifted = t.new("new_zeros", (t.batch, t.sequence), INT64)
    decoded = run(t, family, decoder, tables, shifted, encoded)
    if family.shifts and t.setting.cache:
        del shifted  # made within, since there are no labels
    if family.shifted_logits:
        t.buffers += decoder.vocabulary * t.setting.format.block_bytes
    head = Head(tables.of("decoder"), end=(shifted_logits,) if family.shifted_logits else ())
    result = lm_head.causal_lm(t, decoded, decoder.vocabulary, head, tied=tables.tied, loss=t5.loss)
    if t.outputs is not None:
        t.outputs = (*t.outputs, encoded)
    return result


def shifted_logits(t: Trace, logits: Tensor) -> Tensor:
    """A buffer's number added to each token's."""
    return ops.add(t, logits, Tensor((1, logits.shape[-1]), t.setting.format, None))


def run(
    t: Trace,
    family: Type,
    s: Stack,
    tables: Tables,
    tokens: Tensor | None,
    encoded: Tensor | None,
) -> Tensor:
    """Embeddings, blocks, and the final norm of those whose norms come first."""
    table = t.weight(f"{tables.of(s.name)}.weight", (s.vocabulary, s.hidden), "embedding")
    embeddings = ops.embedding(t, table, t.batch, t.sequence, indices=tokens)
    if t.setting.input_gradients:
        embeddings = t.with_gradient(embeddings)
    normed_first = family.normed_first and s.decodes
    scaled = blocks.scaled_embeddings if family.scaled_within else ops.scale
    embeddings = embeddings if normed_first else scaled(t, embeddings)
    held = beside(t, family) if s.decodes else []
    mask = blocks.mask(t) if s.decodes or t.setting.padded else None
    across = blocks.mask(t) if s.decodes and t.setting.padded else None
    places = placed(t, family, s)
    prefix = f"model.{s.name}"
    norm = partial(blocks.layer_norm, t, name=f"{prefix}.layernorm_embedding")
    embeddings = norm(embeddings) if normed_first else embeddings
    x = ops.add(t, embeddings, places)
    x = norm(x) if family.embedding_norm and not normed_first else x
    embedded = [ops.dropout(t, x, s.dropout)]
    del x  # the first layer alone has it
    block = partial(layer, t, family, s, mask, encoded, across)
    # the gradient of what is encoded begins in the last layer; the others add to it
    kinds = ["full"] * (s.layers - 1) + ["last"]
    told = None if encoded is None else str  # what is encoded goes with the first layer
    x = t.layers(f"{prefix}.layers", block, embedded.pop(), kinds, mask, encoded, across, told=told)
    x = blocks.layer_norm(t, x, f"{prefix}.layer_norm") if family.before else x
    held.clear()
    return x


def beside(t: Trace, family: Type) -> list[Tensor]:
    """What the decoder holds to the end beside what its layers see."""
    total = t.setting.past + t.sequence
    made = {"places": ((t.sequence,), INT64), "ones": ((t.batch, total), FP32)}
    return [t.new(name, *made[name]) for name in family.holds]


def placed(t: Trace, family: Type, s: Stack) -> Tensor:
    """The position embeddings: of each sequence in the encoder, once for all in the decoder.

    The encoder's positions are a view for all sequences, until an offset is added to them.
    """
    rows = s.positions + family.offset
    batch = t.batch if not s.decodes and family.positions == "learned" and family.offset else 1
    if family.positions == "buffer":
        t.buffers += rows * s.hidden * t.setting.format.block_bytes
        return t.new("index_select", (t.batch, t.sequence, s.hidden), t.setting.format)
    table = t.weight(
        f"model.{s.name}.embed_positions.weight", (rows, s.hidden), "position",
        fixed=family.positions == "fixed",
    )  # fmt: skip
    indices = t.new("add", (batch, t.sequence), INT64)
    return ops.embedding(t, table, batch, t.sequence, indices=indices)


def layer(
    t: Trace, family: Type, s: Stack, mask: Tensor | None, encoded: Tensor | None,
    across: Tensor | None, x: Tensor, kind: str,
) -> Tensor:  # fmt: skip
    """Self-attention, attention to what is `encoded`, feed-forward; each has a norm."""
    x = half(t, family, s, x, "self_attn", lambda x: attention(t, s, x, x, "self_attn", mask))
    if encoded is not None:
        weights = t.attention_weights  # which have a name until there are others
        x = half(
            t, family, s, x, "encoder_attn",
            lambda x: attention(t, s, x, encoded, "encoder_attn", across),
        )  # fmt: skip
        del weights
    return feed(t, family, s, x)


def half(t: Trace, family: Type, s: Stack, x: Tensor, name: str, part: Part) -> Tensor:
    """What attention adds to the residual stream, with the norm before or behind."""
    residual = x
    if family.before:
        x = blocks.layer_norm(t, x, f"{name}_layer_norm")
    x = part(x)
    x = ops.dropout(t, x, s.dropout)
    x = ops.add(t, residual, x)
    return x if family.before else blocks.layer_norm(t, x, f"{name}_layer_norm")


def attention(
    t: Trace, s: Stack, x: Tensor, source: Tensor, name: str, mask: Tensor | None
) -> Tensor:
    """Attention from `x` to `source`; what the decoder attends to is cached."""
    q = t.linear(x, f"{name}.q_proj", s.hidden, bias=True, role="q")
    q = ops.split_heads(t, q, s.heads)
    made = partial(keys_and_values, t, s, source, name)
    if source is not x:
        k, v = blocks.remember_encoded(t, q, s.heads, made)
    else:
        k, v = made()
        k, v = blocks.remember(t, k, v) if s.decodes else (k, v)
    out = blocks.attend(t, q, k, v, mask, dropout=s.attention_dropout, softmax_format=None)
    return t.linear(out, f"{name}.out_proj", s.hidden, bias=True, role="o")


def keys_and_values(t: Trace, s: Stack, source: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Keys and values by heads of the tokens that are attended to."""
    k = t.linear(source, f"{name}.k_proj", s.hidden, bias=True, role="k")
    v = t.linear(source, f"{name}.v_proj", s.hidden, bias=True, role="v")
    return ops.split_heads(t, k, s.heads), ops.split_heads(t, v, s.heads)


def feed(t: Trace, family: Type, s: Stack, x: Tensor) -> Tensor:
    """Two linear layers around the activation, added to the residual stream."""
    residual = x
    if family.before:
        x = blocks.layer_norm(t, x, "final_layer_norm")
    up = t.linear(x, "fc1", s.intermediate, bias=True, role="up")
    x = up if family.successive else x
    x = s.activation(t, up)
    del up
    x = ops.dropout(t, x, s.activation_dropout)
    x = t.linear(x, "fc2", s.hidden, bias=True, role="down")
    x = ops.dropout(t, x, s.dropout)
    x = ops.add(t, residual, x)
    return x if family.before else blocks.layer_norm(t, x, "final_layer_norm")
