"""Doge: a mask that values make, weighed residuals, experts of one row each by products of keys.

transformers v5.23, models/doge/modeling_doge.py.
"""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes
from llmsize.anatomy.scan_operations import exp, softplus
from llmsize.anatomy.tape import Parameter
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, INT64
from llmsize.quick_dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts that are a row of two tables each."""

    count: int
    keys: int
    """Of each of two halves of a name: an expert has one of each."""
    chosen: int
    normed: bool
    """Whether the weights of those chosen are made to sum to one."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    experts = read_experts(c) if c.flag("is_moe") else None
    bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")
    kept, dropout = c.size("keep_window_size", default=2048), c.number("hidden_dropout")

    def block(x: Tensor, window: int, around: Around) -> Tensor:
        residual = x
        x = blocks.rms_norm(t, x, "input_layernorm")
        x = attention(t, s, x, around, window, kept, bias)
        x = ops.dropout(t, x, dropout)
        x = ops.add(t, ops.mul(t, weighed(t, s, "input_residual"), residual), x)
        residual = x
        x = blocks.rms_norm(t, x, "post_attention_layernorm")
        x = feed(t, s, experts, x, mlp_bias)
        x = ops.dropout(t, x, dropout)
        return ops.add(t, ops.mul(t, weighed(t, s, "post_attention_residual"), residual), x)

    windows = decoder.windows(c, s.layers, lambda layer: True)
    return decoder.run(t, s, block, windows, Frame(masking="always"))


def read_experts(c: Config) -> Experts:
    """The experts from a `config.json`."""
    count = c.size("num_experts", default=16384)
    chosen = c.size("num_experts_per_tok", default=64)
    keys = isqrt(count)
    if chosen > keys * keys:
        raise c.error(f"sends a token to {chosen} of {keys * keys} experts", "correct one of them")
    return Experts(Dim(count, "experts"), keys, chosen, c.flag("norm_topk_prob"))


def weighed(t: Trace, s: Sizes, name: str) -> Parameter:
    """What a residual is multiplied by, channel by channel."""
    return t.weight(name, (s.hidden,), "norm")


def attention(
    t: Trace, s: Sizes, x: Tensor, around: Around, window: int, kept: int, bias: bool
) -> Tensor:
    """Grouped-query attention whose mask is learned from the values."""
    q, k, v = decoder.projections(
        t, s, Heads(bias=bias, norm=blocks.rms_norm, normed_at_once=True), x
    )
    rotation = around.tables[window]
    assert rotation is not None
    q, k = rotary.turn(t, q, k, rotation)
    k, v = blocks.remember(t, k, v, window)
    sizes = t.weight("self_attn.A", (s.kv_heads,), "sinks")
    steps = t.linear(
        ops.merge_heads(t, v), "self_attn.dt_proj", s.kv_heads, bias=bias, role="gate_attention"
    )
    steps = ops.transpose(t, exp(t, ops.mul(t, sizes, softplus(t, steps))), -1, -2)
    mask = dynamic_mask(t, steps, around.masks[window], kept, x)
    mask = ops.repeat(t, mask, s.heads // s.kv_heads)
    out = blocks.attend(t, q, k, v, mask, dropout=s.attention_dropout)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def dynamic_mask(t: Trace, steps: Tensor, mask: Tensor | None, kept: int, x: Tensor) -> Tensor:
    """What is added to the scores of each KV head: the same for all queries, but for the masked.

    Of more than the `kept` tokens the others are masked, too.
    """
    batch, heads, tokens = steps.shape
    shape = (batch, heads, x.shape[1], tokens)
    added = ops.expand(t, ops.reshape(t, steps, batch, heads, 1, tokens), *shape)
    if mask is not None:
        of_all = (batch, *mask.shape[1:])
        mask = t.new("where", of_all, x.format) if mask.format is BOOL else mask
        added = ops.masked_fill(t, added, t.new("ne", of_all, BOOL))
    if tokens > kept:
        active = t.new("zeros_like", shape, x.format)
        values = t.new("topk", (*shape[:-1], kept), added.format)
        indices = t.new("topk", (*shape[:-1], kept), INT64)
        del values
        active = t.new("scatter", active.shape, active.format)
        added = ops.masked_fill(t, added, t.new("eq", shape, BOOL))
        del indices
    return added


def feed(t: Trace, s: Sizes, e: Experts | None, x: Tensor, bias: bool) -> Tensor:
    """The gated MLP, and what the experts of each token add to it."""
    if e is None:
        return decoder.gated(t, s, x, bias=bias)
    by_token = x.view(t.batch * t.sequence, s.hidden, 1)
    routing = route(t, e, x)
    lower = rows(t, s, e, "mlp.down_embed", routing.indices, "expert_down")
    upper = rows(t, s, e, "mlp.up_embed", routing.indices, "expert_up")
    tokens = by_token.shape[0]
    scores = ops.matmul(t, lower, by_token).view(tokens, e.chosen)
    scores = ops.mul(t, s.activation(t, scores), routing.weights)
    mixed = ops.matmul(t, ops.reshape(t, scores, tokens, 1, e.chosen), upper).view(*x.shape)
    x = decoder.gated(t, s, x, bias=bias)
    x = ops.add(t, x, mixed)
    del routing, lower, upper, scores, mixed
    return x


class Routing(NamedTuple):
    """Which experts each token has; all of it lives as long as they work."""

    weights: Tensor
    indices: Tensor
    steps: tuple[Tensor, ...]
    """What led to them."""


def route(t: Trace, e: Experts, x: Tensor) -> Routing:
    """The experts of each token: the best pairs of the best keys of two kinds."""
    logits = t.linear(x, "mlp.router_gate", 2 * e.keys, role="router")
    tokens = t.batch * t.sequence
    scores, indices = ops.topk(t, logits.view(2, tokens, e.keys), e.keys)
    first, second = ops.split(t, scores, 1, 1, dim=0)
    sums = ops.add(t, first.view(tokens, e.keys, 1), second.view(tokens, 1, e.keys))
    multiples = t.new("mul", (tokens, e.keys, 1), INT64)
    pairs = t.new("add", sums.shape, INT64)
    del multiples
    best, places = ops.topk(t, sums.view(tokens, e.keys * e.keys), e.chosen)
    chosen = t.new("gather", places.shape, INT64)
    weights = ops.softmax(t, best)
    if e.normed:
        weights = ops.divide_in_place(t, weights, ops.total(t, weights))
    return Routing(weights, chosen, (logits, first, second, indices, sums, pairs, best, places))


def rows(t: Trace, s: Sizes, e: Experts, name: str, indices: Tensor, role: str) -> Tensor:
    """The rows of a table that the experts of each token have."""
    table = t.weight(f"{name}.weight", (e.count, s.hidden), role, experts=e.count, chosen=e.chosen)
    return ops.embedding(t, table, *indices.shape, indices=indices)
