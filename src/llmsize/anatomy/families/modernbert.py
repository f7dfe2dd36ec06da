"""ModernBERT: an encoder of gated GELU layers, of which two of three see a window.

transformers v5.23, models/modernbert/modeling_modernbert.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder, lm_head, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.blocks import Step
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, ByWindow, Sizes
from llmsize.anatomy.families import bert, modernbert_decoder, t5gemma
from llmsize.anatomy.families.modernbert_decoder import NAMES, Type
from llmsize.anatomy.rotary import Rope
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, INT64


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    bert.check(t, c)
    if c.flag("sparse_prediction"):
        raise c.error("tells masked tokens alone", "how many there are is not known; leave it out")
    c = c.changed(sliding_window=c.size("local_attention", default=128) // 2)
    s = decoder.read(c, tied=True, activation="gelu")
    d = modernbert_decoder.read(c)
    x = encoder(t, c, s, d)
    head = modernbert_decoder.head(c, s, d.norm, "head")
    labels = bert.labels(c)
    if labels or t.setting.objective == "score":
        return classified(t, c, x, head.transform, labels or 1)
    return lm_head.causal_lm(t, x, s.vocabulary, head, tied=s.tied, loss=t5gemma.loss)


def encoder(t: Trace, c: Config, s: Sizes, d: Type) -> Tensor:
    """Embeddings, layers, final norm."""
    every = c.size("global_attn_every_n_layers", default=3)
    windows = decoder.windows(c, s.layers, lambda layer: layer % every > 0)
    position_ids = t.new("arange", (1, t.sequence), INT64)
    tokens = blocks.embed(t, NAMES.embedding, s.vocabulary, s.hidden)
    tokens = d.norm(t, tokens, "model.embeddings.norm")
    embeddings = ops.dropout(t, tokens, c.number("embedding_dropout"))
    del tokens
    masks = {window: mask(t, window) for window in (0, s.window)}
    tables = rotary.tables(t, Rope(apart=True), embeddings, s.rotary, s.rotary, {*windows})
    around = Around(ByWindow(t, tables), ByWindow(t, masks), [])
    block = partial(layer, t, s, d, c.flag("attention_bias"), around)
    kinds = [(window, index == 0) for index, window in enumerate(windows)]
    x = t.layers(NAMES.layers, block, embeddings, kinds)
    x = d.norm(t, x, NAMES.norm)
    around.leave_to_checkpoints()
    del position_ids, masks, tables, embeddings
    return x


def mask(t: Trace, window: int) -> Tensor | None:
    """The mask of layers with that window, where tokens are padded or outgrow it."""
    if not t.setting.padded and not 0 < window <= t.sequence:
        return None
    return blocks.mask(t, window)


def layer(
    t: Trace, s: Sizes, d: Type, bias: bool, around: Around, x: Tensor, kind: tuple[int, bool]
) -> Tensor:
    """Attention and feed-forward, each with a norm before it but the first."""
    window, first = kind
    normed = [x if first else d.norm(t, x, "attn_norm")]
    attended = attention(t, s, bias, around, window, normed)
    x = ops.add(t, x, attended)
    return ops.add(t, x, modernbert_decoder.feed(t, s, d, d.norm(t, x, "mlp_norm")))


def attention(
    t: Trace, s: Sizes, bias: bool, around: Around, window: int, source: list[Tensor]
) -> Tensor:
    """Attention of every token to all in the window; queries, keys and values in one projection."""
    x, width = source.pop(), s.heads * s.head_dim
    qkv = t.linear(x, "attn.Wqkv", 3 * width, bias=bias, role="qkv")
    q, k, v = (ops.split_heads(t, part, s.heads) for part in ops.split(t, qkv, *[width] * 3))
    rotation = around.tables[window]
    assert rotation is not None
    q, k = modernbert_decoder.turn(t, q, k, rotation)
    out = blocks.attend(t, q, k, v, around.masks[window], dropout=s.attention_dropout)
    out = t.linear(out, "attn.Wo", s.hidden, bias=bias, role="o")
    return ops.dropout(t, out, s.attention_dropout)


def classified(t: Trace, c: Config, x: Tensor, transform: Step, labels: int) -> Tensor:
    """A class for each sequence, from its first token or from the mean of all."""
    t.classifies = True
    pooled = mean(t, x) if c.text("classifier_pooling") == "mean" else ops.select(t, x, 1)
    del x
    pooled = ops.dropout(t, transform(t, pooled), c.number("classifier_dropout"))
    logits = t.linear(pooled, "classifier", labels, bias=True, role="score")
    return bert.loss(t, logits) if t.setting.training else logits


def mean(t: Trace, x: Tensor) -> Tensor:
    """The mean of the tokens that are no padding."""
    shape = (t.batch, t.sequence, 1)
    seen = Tensor(shape, BOOL, None) if t.setting.padded else t.new("ones", shape, BOOL)
    whole = ops.sum_over(t, ops.in_fp32(t, ops.mul(t, x, seen)), 1)
    return ops.divide(t, whole, t.new("sum", (t.batch, 1), INT64))
