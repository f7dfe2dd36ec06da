"""EuroBERT: Llama's layers as an encoder, whose tokens see all others.

transformers v5.23, models/eurobert/modeling_eurobert.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder, lm_head, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Heads, Norm, Sizes
from llmsize.anatomy.families import bert, t5gemma
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.rotary import Rotation
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32, INT64, Format


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    bert.check(t, c)
    s = decoder.read(c)
    bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")
    x = encoder(t, s, bias=bias, mlp_bias=mlp_bias)
    labels = bert.labels(c)
    pooling = c.text("classifier_pooling", default="late")
    if pooling not in ("late", "mean", "bos"):
        raise c.error("has an unknown `classifier_pooling`", "known ones: late, mean, bos")
    if labels or t.setting.objective == "score":
        return classified(t, s, x, labels or 1, pooling)
    head = Head(bias=mlp_bias)
    return lm_head.causal_lm(t, x, s.vocabulary, head, tied=s.tied, loss=t5gemma.loss)


def encoder(t: Trace, s: Sizes, *, bias: bool, mlp_bias: bool) -> Tensor:
    """Embeddings, layers, final norm."""
    embeddings = blocks.embed(t, "model.embed_tokens", s.vocabulary, s.hidden)
    position_ids = t.new("arange", (1, t.sequence), INT64)
    mask = blocks.mask(t) if t.setting.padded else None
    rotation = rotary.table(t, embeddings, s.rotary)
    attend = partial(attention, t, s, rotation, mask, bias=bias)

    def block(x: Tensor, kind: int) -> Tensor:
        return decoder.pre_norm(
            t, x, lambda x: attend(x), lambda x: decoder.gated(t, s, x, bias=mlp_bias)
        )

    kinds = [0] * s.layers
    x = t.layers("model.layers", block, embeddings, kinds, position_ids, mask, *rotation)
    x = blocks.rms_norm(t, x, "model.norm")
    del position_ids, mask
    return x


def attention(
    t: Trace,
    s: Sizes,
    rotation: Rotation,
    mask: Tensor | None,
    x: Tensor,
    *,
    bias: bool = False,
    softmax_format: Format | None = FP32,
    norm: Norm | None = None,
) -> Tensor:
    """Grouped-query attention of every token to all; nothing is cached.

    All heads of q, and those of k, may pass a `norm` together.
    """
    q, k, v = decoder.projections(t, s, Heads(bias=bias, wide_norm=norm), x)
    q, k = rotary.turn(t, q, k, rotation)
    dropout = s.attention_dropout
    out = blocks.attend(t, q, k, v, mask, dropout=dropout, softmax_format=softmax_format)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def classified(t: Trace, s: Sizes, x: Tensor, labels: int, pooling: str) -> Tensor:
    """A class for each sequence, of its first token, of the mean of all, or as all have it."""
    t.classifies = True
    if pooling != "late":
        x = ops.select(t, x, 1) if pooling == "bos" else mean(t, x)
    x = ops.gelu(t, t.linear(x, "dense", s.hidden, bias=True, role="pooler"))
    logits = t.linear(x, "classifier", labels, bias=True, role="score")
    del x
    logits = mean(t, logits) if pooling == "late" else logits
    return bert.loss(t, logits) if t.setting.training else logits


def mean(t: Trace, x: Tensor) -> Tensor:
    """The mean of the tokens that are no padding."""
    if not t.setting.padded:
        return ops.sum_over(t, x, 1)
    seen = Tensor((t.batch, t.sequence, 1), BOOL, None)
    whole = ops.sum_over(t, ops.in_fp32(t, ops.mul(t, x, seen)), 1)
    return ops.mul_in_place(t, whole, t.new("sum", (t.batch, 1), INT64))
