"""Granite with windows: attention sinks as a scale of the output, angles of their own by base.

transformers v5.23, models/granite_swa/modeling_granite_swa.py and
models/granitemoe_swa/modeling_granitemoe_swa.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, ByWindow, Frame, Heads, Part, Sizes
from llmsize.anatomy.families import granite_hybrid
from llmsize.anatomy.families.granite import scaled_residuals
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32

PERIOD = 4
"""Every so many layers, the first one too, one attends to all tokens."""

SPARSE = "granitemoe_swa"
"""The type that has experts."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, tied=c.text("model_type") != SPARSE)
    feed, bias = feed_forward(t, s, c), c.flag("attention_bias")
    bases = rotation_bases(c, s.layers)
    used = sorted(set(bases) - {0.0})
    tables: ByWindow[rotary.Rotation] = ByWindow(t, {})  # each base's, by its place among them

    def begin(t: Trace, x: Tensor) -> Tensor:
        x = ops.scale(t, x)
        tables.update({used.index(base): rotary.table(t, x, s.rotary) for base in used})
        t.buffers += 2 * FP32.block_bytes * (s.rotary // 2)  # for a base that no layer uses
        return x

    def block(x: Tensor, kind: tuple[int, float], around: Around) -> Tensor:
        window, base = kind

        def attend(x: Tensor) -> Tensor:
            rotation = tables[used.index(base)] if base else None
            return attention(t, s, x, around, window, rotation, bias)

        return scaled_residuals(t, x, attend, feed)

    def end(t: Trace, x: Tensor, name: str) -> Tensor:
        x = blocks.rms_norm(t, x, name)
        tables.clear()
        return x

    reach = windows(c, s.layers)
    frame = Frame(
        windows=reach,
        begin=begin,
        norm=end,
        masking="eager",
        masks=(0, s.window),
        head=Head(end=(ops.scale,)),
    )
    return decoder.run(t, s._replace(rotary=0), block, list(zip(reach, bases, strict=True)), frame)


def feed_forward(t: Trace, s: Sizes, c: Config) -> Part:
    """A gated MLP, or experts beside one."""
    if c.text("model_type") != SPARSE:
        return partial(decoder.gated, t, s, bias=c.flag("mlp_bias"))
    m = mixture.read(c, scores="chosen", width="intermediate_size", balanced=True)
    shared = Dim(c.count("shared_intermediate_size"), "shared_width")
    return lambda x: granite_hybrid.feed(t, s, m, x, shared)


def windows(c: Config, layers: int) -> list[int]:
    """The window of all layers but the first one and every fourth one after it."""
    c = c.changed(sliding_window=c.count("sliding_window", default=128))
    return decoder.windows(c, layers, lambda i: i % PERIOD > 0)


def rotation_bases(c: Config, layers: int) -> list[float]:
    """The base of each layer's angles; 0 where a layer does not rotate."""
    listed = c.each_layer(layers, "layer_rope_theta")
    if listed is None:
        return [1.0] * layers
    return [Config({"base": base}, c.model).number("base") for base in listed]


def attention(
    t: Trace,
    s: Sizes,
    x: Tensor,
    around: Around,
    window: int,
    rotation: rotary.Rotation | None,
    bias: bool,
) -> Tensor:
    """Grouped-query attention, written out because of the sinks."""
    q, k, v = decoder.projections(t, s, Heads(bias=bias), x)
    if rotation is not None:
        q, k = rotary.turn(t, q, k, rotation)
    k, v = blocks.remember(t, k, v, window)
    mask = around.masks[window]
    assert mask is not None
    out = attend(t, s, q, k, v, mask)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def attend(t: Trace, s: Sizes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention whose output a sigmoid scales: of all scores' log-sum-exp less the head's sink."""
    groups = q.shape[1] // k.shape[1]
    k, v = ops.repeat(t, k, groups), ops.repeat(t, v, groups)
    weights = ops.scale(t, ops.matmul(t, q, ops.transpose(t, k, -1, -2)))
    weights = ops.add(t, weights, mask)
    whole = ops.log_sum_exp(t, weights).view(*weights.shape[:-1])
    sinks = t.weight("self_attn.sinks", (s.heads,), "sinks").view(1, s.heads, 1)
    scale = ops.sigmoid(t, ops.to(t, ops.sub(t, whole, sinks), FP32))
    weights = ops.to(t, ops.softmax(t, weights, FP32), q.format)
    weights = ops.dropout(t, weights, s.attention_dropout)
    out = ops.matmul(t, weights, v)
    scale = ops.reshape(t, ops.to(t, scale, out.format), *scale.shape, 1)
    return ops.merge_heads(t, ops.mul(t, out, scale))
