"""gpt-oss: a sink in every head's softmax, every other layer local, experts with biases.

transformers v5.23, models/gpt_oss/modeling_gpt_oss.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes, fp32_norm
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    m = mixture.read(c, width="intermediate_size", balanced=True)
    bias = c.flag("attention_bias", default=True)

    def block(x: Tensor, window: int, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, window, bias),
            lambda x: feed(t, s, m, x),
            norm=fp32_norm,
        )

    kinds = decoder.windows(c, s.layers, lambda layer: layer % 2 == 0)
    frame = Frame(
        norm=fp32_norm,
        masking="eager",
        masks=(0, s.window),
        alike=True,
        rope=rotary.Rope(rotary.half_table),
    )
    return decoder.run(t, s, block, kinds, frame)


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, window: int, bias: bool) -> Tensor:
    """Grouped-query attention, written out because of the sinks."""
    q, k, v = decoder.projections(t, s, Heads(bias=bias), x)
    rotation = around.rotation
    assert rotation is not None
    q, k = rotary.turn_halves(t, q, k, rotation)
    k, v = blocks.remember(t, k, v, window)
    out = attend_with_sinks(t, q, k, v, around.masks[window], dropout=s.attention_dropout)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def attend_with_sinks(
    t: Trace,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    sunk: bool = True,
    holds: bool = True,
) -> Tensor:
    """Scores less their highest, their softmax; a learned score more for each head if `sunk`.

    The reference `holds` the scores without the learned ones until the softmax is done, and those
    that it is made of to the end.
    """
    assert mask is not None
    batch, heads, sequence, _ = q.shape
    keys, values = (ops.repeat(t, part, heads // k.shape[1]) for part in (k, v))
    scores = ops.scale(t, ops.matmul(t, q, ops.transpose(t, keys, -1, -2)))
    scores = ops.add(t, scores, mask)
    tokens = scores.shape[-1]
    held = [scores] if holds else []
    if sunk:
        sinks = t.weight("self_attn.sinks", (heads,), "sinks")
        column = ops.expand(t, sinks.view(1, heads, 1, 1), batch, heads, sequence, 1)
        scores = ops.cat(t, (scores, column))
    scores = ops.sub(t, scores, ops.highest(t, scores))
    weights = ops.softmax(t, scores, scores.format)
    held = [scores] if holds else []
    del scores
    if sunk:
        weights = ops.slice_last(t, weights, tokens)
    weights = ops.dropout(t, weights, dropout)
    t.attention_weights = weights
    out = ops.merge_heads(t, ops.matmul(t, weights, values))
    held.clear()
    return out


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts with biases; the softmax is over the chosen ones alone."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    logits = mixture.router_logits(t, m, tokens, "mlp.router", bias=True)
    chosen, indices = ops.topk(t, logits, m.chosen)
    routing = mixture.Routing(ops.softmax(t, chosen), indices, logits)
    del chosen, indices, logits
    out = mixture.run_experts(
        t, s, m, tokens, routing, bias=True, transposed=True, gate=clamped_gate
    )
    return out.view(*x.shape)


def clamped_gate(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """Even channels gate odd ones."""
    half = x.shape[-1] // 2
    return limited(t, ops.slice_last(t, x, half, 2), ops.slice_last(t, x, half, 2))


def limited(t: Trace, gate: Tensor, up: Tensor) -> Tensor:
    """A gated product: both within bounds, a scaled sigmoid, one added."""
    gate = ops.clamp(t, gate)
    up = ops.clamp(t, up, bounds=2)
    inside = ops.mul(t, gate, ops.sigmoid(t, ops.scale(t, gate)))
    return ops.mul(t, ops.shift(t, up), inside)
