"""Flint: normalised heads that rotate within windows, sinks beside fp32 scores, sigmoid routing.

transformers v5.23, models/flint/modeling_flint.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes, fp32_norm
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32

DENSE = (0, 1)
"""Layers without experts where the configuration does not say."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    m = mixture.read(c, scores="sigmoid", precise=True, wide=True, balanced=True)
    bias = c.flag("attention_bias")

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, sparse = kind
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, window, bias),
            lambda x: feed(t, s, m, x) if sparse else decoder.gated(t, s, x),
            norm=fp32_norm,
        )

    last = s.layers - 1
    windows = decoder.windows(c, s.layers, lambda i: not (i < 2 or i % 4 == 1 or i == last))
    dense = c.sequence("mlp_only_layers")
    sparse = mixture.sparse_layers(
        c.changed(mlp_only_layers=DENSE if dense is None else dense), s.layers
    )
    kinds = list(zip(windows, sparse, strict=True))
    frame = Frame(
        norm=fp32_norm,
        windows=(0, *windows),
        masking="eager",
        masks=() if any(windows) else (t.sequence + t.setting.past,),
    )
    return decoder.run(t, s, block, kinds, frame)


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, window: int, bias: bool) -> Tensor:
    """Grouped-query attention, written out because of the sinks."""
    q, k, v = decoder.projections(t, s, Heads(bias=bias, norm=fp32_norm, normed_at_once=True), x)
    rotation = around.tables[window]
    if window and rotation is not None:
        q, k = rotary.turn(t, q, k, rotation)
    k, v = blocks.remember(t, k, v, window)
    out = attend(t, s, q, k, v, around.masks[window])
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def attend(t: Trace, s: Sizes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scores and their softmax in fp32, also under autocast, with one more score for each head."""
    assert mask is not None
    batch, heads, sequence, _ = q.shape
    keys, values = (ops.repeat(t, part, heads // k.shape[1]) for part in (k, v))
    autocast, t.autocast = t.autocast, None
    queries = ops.to(t, q, FP32)
    scores = ops.matmul(t, queries, ops.transpose(t, ops.to(t, keys, FP32), -1, -2))
    del queries
    scores = ops.scale(t, scores)
    t.autocast = autocast
    scores = ops.add(t, scores, mask)
    sinks = t.weight("self_attn.sinks", (heads,), "sinks")
    column = ops.expand(t, sinks.view(1, heads, 1, 1), batch, heads, sequence, 1)
    weights = ops.softmax(t, ops.cat(t, (scores, column)))
    weights = ops.to(t, ops.slice_last(t, weights, scores.shape[-1]), v.format)
    del scores
    t.attention_weights = weights = ops.dropout(t, weights, s.attention_dropout)
    by_token = ops.contiguous(t, ops.transpose(t, ops.matmul(t, weights, values), 1, 2))
    return ops.reshape(t, by_token, batch, sequence, heads * by_token.shape[-1])


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts, and one for every token."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    autocast, t.autocast = t.autocast, None
    logits = mixture.router_logits(t, m, tokens, "mlp.gate", bias=False)
    t.autocast = autocast
    weights, indices = ops.topk(t, ops.sigmoid(t, logits), m.chosen)
    if m.normed:
        weights = ops.divide(t, weights, ops.total(t, weights))
    routing = mixture.Routing(weights, indices, logits)
    del weights, indices, logits
    routed = mixture.run_experts(t, s, m, tokens, routing)
    shared = decoder.gated(t, s, tokens, name="mlp.shared_expert", width=m.shared, role="shared_")
    return ops.add(t, routed, shared).view(*x.shape)
