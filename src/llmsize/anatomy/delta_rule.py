"""Gated delta rules as transformers computes them, with flash-linear-attention or without.

transformers v5.23, models/qwen3_next/modeling_qwen3_next.py, `torch_chunk_gated_delta_rule` and
`torch_recurrent_gated_delta_rule`: chunks of 64 tokens one after another, or one token.
"""

from __future__ import annotations

from typing import NamedTuple

from llmsize.anatomy import operations as ops
from llmsize.anatomy import recurrent, scan_kernels
from llmsize.anatomy.loops import turns
from llmsize.anatomy.scan_operations import (
    cumsum,
    exp,
    pad,
    repeat_interleave,
    softplus,
    solve_triangular,
    sum_over,
    to_rows,
    triangle,
    unsqueeze,
    written,
)
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32
from llmsize.quick_dataclasses import dataclass

CHUNK = 64
"""Tokens that are computed at once."""


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """The dimensions of a gated delta rule."""

    hidden: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def keys(self) -> int:
        """Channels of all keys; the queries have as many."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Channels of all values."""
        return self.value_heads * self.value_dim


class Inputs(NamedTuple):
    """What a delta rule is given: batch, tokens, heads and, but for decay and beta, channels."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor


def delta_rule(
    t: Trace, d: DeltaNet, name: str, mixed: Tensor, gate: Tensor, beta: Tensor, decay: Tensor
) -> Tensor:
    """Gated DeltaNet behind its projections: convolution, recurrence, gated norm, output.

    `gate` is batch, tokens, heads, channels.
    """
    mixed = ops.transpose(t, mixed, 1, 2)
    mixed = recurrent.convolve(t, mixed, f"{name}.conv1d", d.kernel)
    mixed = ops.transpose(t, mixed, 1, 2)
    q, k, v = ops.split(t, mixed, d.keys, d.keys, d.values)
    tokens = (t.batch, t.sequence)
    q = ops.reshape(t, q, *tokens, d.key_heads, d.key_dim)
    k = ops.reshape(t, k, *tokens, d.key_heads, d.key_dim)
    v = ops.reshape(t, v, *tokens, d.value_heads, d.value_dim)
    strength = ops.sigmoid(t, beta)
    offsets = t.weight(f"{name}.dt_bias", (d.value_heads,), "ssm")
    steps = ops.mul(
        t,
        recurrent.decay(t, f"{name}.A_log", d.value_heads),
        softplus(t, ops.add(t, ops.to(t, decay, FP32), offsets)),
    )
    recurrent.remember(t, d.value_heads * d.key_dim * d.value_dim, 2 * d.keys + d.values, d.kernel)
    out = scanned(t, d, Inputs(q, k, v, steps, strength))
    by_head = (t.batch * t.sequence * d.value_heads, d.value_dim)
    out = ops.reshape(t, out, *by_head)
    out = gated_norm(t, out, ops.reshape(t, gate, *by_head), f"{name}.norm")
    out = ops.reshape(t, out, *tokens, d.values)
    return t.linear(out, f"{name}.out_proj", d.hidden, role="ssm")


def scanned(t: Trace, d: DeltaNet, inputs: Inputs) -> Tensor:
    """The rule for all tokens or the next one, its last state kept for the cache."""
    at_once = in_kernel if t.setting.fused_recurrence else chunks
    scan = one_token if recurrent.continues(t) else at_once
    begin = len(t.recent)
    out, state = scan(t, d, inputs)
    t.forget_unused(begin)  # of a single chunk, all that only its last state is made of
    recurrent.store_state(t, state)
    return out


def in_kernel(t: Trace, d: DeltaNet, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The rule in one kernel. With the last state, for the cache."""
    out = scan_kernels.gated_delta_rule(t, *inputs)
    shape = (t.batch, d.value_heads, d.key_dim, d.value_dim)
    return out, t.new("gated_delta_rule", shape, FP32) if t.setting.cache else None


def chunks(t: Trace, d: DeltaNet, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The rule within chunks as a triangular system, then from chunk to chunk.

    With the last state, for the cache.
    """
    format, begin = inputs.q.format, len(t.recent)
    q, k, v, decay, beta = by_heads(t, d, inputs)
    tokens = q.shape[2]
    padded = -(-tokens // CHUNK) * CHUNK
    q, k, v = [pad(t, x, 2, padded) for x in (q, k, v)]
    beta, decay = [pad(t, x, 2, padded) for x in (beta, decay)]
    v_beta = ops.mul(t, v, unsqueeze(t, beta, 3))
    k_beta = ops.mul(t, k, unsqueeze(t, beta, 3))
    q, k, k_beta, v_beta = [in_chunks(t, x) for x in (q, k, k_beta, v_beta)]
    decay = in_chunks(t, decay)
    own = within_chunks(t, q, k, k_beta, v_beta, decay)
    state = t.new("zeros", (*q.shape[:2], d.key_dim, d.value_dim), FP32)
    out = t.like("zeros_like", own.values)
    q = ops.mul(t, q, unsqueeze(t, exp(t, own.decays), 4))
    k = scaled_to_end(t, k, own.decays)
    passed = exp(t, ops.select(t, own.decays, 3))
    passed = ops.reshape(t, passed, *passed.shape, 1, 1)
    for _ in turns(t, padded // CHUNK):
        solved = ops.select(t, own.values, 2)
        new = ops.sub(t, solved, ops.matmul(t, ops.select(t, own.keys, 2), state))
        across = ops.matmul(t, ops.select(t, q, 2), state)
        added = ops.add(t, across, ops.matmul(t, ops.select(t, own.scores, 2), new))
        out = written(t, out, added)
        del added
        state = advanced(t, state, k, passed, new)
    last = state if t.setting.cache else None
    del state
    t.forget_unused(begin)
    out = ops.reshape(t, out, *out.shape[:2], padded, d.value_dim)
    out = ops.narrow(t, out, 2, tokens)
    return to_rows(t, ops.transpose(t, out, 1, 2), format), last


class Within(NamedTuple):
    """What every chunk makes of its own tokens; all of it lives until the rule is done."""

    decays: Tensor
    """From the start of the chunk to each token, logarithms."""
    scores: Tensor
    """Of queries and keys."""
    values: Tensor
    keys: Tensor
    """Behind the triangular system, as the values are (the WY representation)."""
    pairs: Tensor
    """How much decays between two tokens."""
    system: Tensor
    k_beta_decayed: Tensor
    mask: Tensor


def within_chunks(
    t: Trace, q: Tensor, k: Tensor, k_beta: Tensor, v_beta: Tensor, decay: Tensor
) -> Within:
    """Each chunk by itself: what its tokens change is solved for at once."""
    mask = triangle(t, CHUNK)
    decays = cumsum(t, decay)
    pairs = ops.sub(t, unsqueeze(t, decays, 4), unsqueeze(t, decays, 3))
    pairs = ops.masked_fill(t, pairs, mask)
    pairs = exp(t, pairs)
    system = ops.mul(t, ops.matmul(t, k_beta, ops.transpose(t, k, -1, -2)), pairs)
    scores = ops.mul(t, ops.matmul(t, q, ops.transpose(t, k, -1, -2)), pairs)
    k_beta_decayed = ops.mul(t, k_beta, unsqueeze(t, exp(t, decays), 4))
    values = solve_triangular(t, system, v_beta)
    keys = solve_triangular(t, system, k_beta_decayed)
    return Within(decays, scores, values, keys, pairs, system, k_beta_decayed, mask)


def scaled_to_end(t: Trace, k: Tensor, decays: Tensor) -> Tensor:
    """Keys as they count at the end of their chunk."""
    to_end = exp(t, ops.sub(t, ops.narrow(t, decays, 3, 1), decays))
    return ops.mul(t, k, unsqueeze(t, to_end, 4))


def advanced(t: Trace, state: Tensor, k: Tensor, passed: Tensor, new: Tensor) -> Tensor:
    """The state after a chunk: what is left of it, and what the chunk's keys and values add."""
    left = ops.mul(t, state, ops.select(t, passed, 2))
    by_channel = ops.transpose(t, ops.select(t, k, 2), -1, -2)
    return ops.add(t, left, ops.matmul(t, by_channel, new))


def by_heads(t: Trace, d: DeltaNet, inputs: Inputs) -> Inputs:
    """Everything in fp32 by heads, the keys as many as values, normalised; queries scaled."""
    q, k, v, decay, beta = inputs
    del inputs
    shared = d.value_heads // d.key_heads
    if shared > 1:
        q, k = [repeat_interleave(t, x, shared, 2) for x in (q, k)]
    q, k, v, beta, decay = [
        to_rows(t, ops.transpose(t, x, 1, 2), FP32) for x in (q, k, v, beta, decay)
    ]
    q = normalised(t, q)
    k = normalised(t, k)
    return Inputs(ops.scale(t, q), k, v, decay, beta)


def normalised(t: Trace, x: Tensor) -> Tensor:
    """`l2norm`: divided by its length."""
    inverse = ops.rsqrt(t, ops.shift(t, ops.total(t, ops.mul(t, x, x))))
    return ops.mul(t, x, inverse)


def in_chunks(t: Trace, x: Tensor) -> Tensor:
    """Tokens, the third dimension, as chunks of tokens."""
    return ops.reshape(t, x, *x.shape[:2], x.shape[2] // CHUNK, CHUNK, *x.shape[3:])


def one_token(t: Trace, d: DeltaNet, inputs: Inputs) -> tuple[Tensor, None]:
    """`torch_recurrent_gated_delta_rule` of one token; its state is written over the cache's."""
    format = inputs.q.format
    q, k, v, decay, beta = by_heads(t, d, inputs)
    out = t.new("zeros_like", v.shape, v.format)
    q, k, v, decay, beta = [ops.select(t, x, 2) for x in (q, k, v, decay, beta)]
    decayed = exp(t, decay)
    kept = Tensor((*k.shape, d.value_dim), FP32, None)
    state = ops.mul(t, kept, ops.reshape(t, decayed, *decayed.shape, 1, 1))
    seen = sum_over(t, ops.mul(t, state, unsqueeze(t, k, 3)), 2)
    change = ops.mul(t, ops.sub(t, v, seen), unsqueeze(t, beta, 2))
    state = ops.add(t, state, ops.mul(t, unsqueeze(t, k, 3), unsqueeze(t, change, 2)))
    out = written(t, out, sum_over(t, ops.mul(t, state, unsqueeze(t, q, 3)), 2))
    return ops.to(t, ops.transpose(t, out, 1, 2), format), None


def gated_norm(t: Trace, x: Tensor, gate: Tensor, name: str) -> Tensor:
    """`Qwen3NextRMSNormGated`: normalised in fp32, then gated in fp32."""
    weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
    format = x.format
    x = ops.to(t, x, FP32)
    variance: list[Tensor] = []
    x = ops.normalized(t, x, variance)
    x = ops.mul(t, weight, ops.to(t, x, format))
    x = ops.mul(t, x, ops.silu(t, ops.to(t, gate, FP32)))
    return ops.to(t, x, format)
