"""Mamba-2 as transformers computes it, with the kernels of mamba-ssm or without.

transformers v5.23, models/mamba2/modeling_mamba2.py: it goes through chunks of tokens at once.
"""

from __future__ import annotations

from typing import NamedTuple

from llmsize.anatomy import operations as ops
from llmsize.anatomy import recurrent, scan_kernels
from llmsize.anatomy.scan_operations import (
    cumsum,
    einsum,
    exp,
    inverted,
    pad,
    repeat_interleave,
    softplus,
    triangle,
    unsqueeze,
)
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32
from llmsize.quick_dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mamba2:
    """The dimensions of a Mamba-2 mixer."""

    hidden: int
    heads: int
    head_dim: int
    groups: int
    """Groups of heads that share what enters and leaves the state."""
    state: int
    kernel: int
    bias: bool
    conv_bias: bool
    chunk: int = 256
    """Tokens that are computed at once."""
    output_bias: bool | None = None
    """Of the projection of its output, where it is not `bias`."""
    normed: bool = True
    """Whether the gated output is normalised."""
    scaled: bool = False
    """Whether the input and all channels of its projection are multiplied by constants."""

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim

    @property
    def biased_output(self) -> bool:
        """Whether the projection of its output has a bias."""
        return self.bias if self.output_bias is None else self.output_bias


def mixer(t: Trace, m: Mamba2, hidden: Tensor, name: str) -> Tensor:
    """State space with one decay for each head."""
    format = hidden.format
    hidden = recurrent.without_padding(t, hidden)
    if m.scaled:
        hidden = ops.scale(t, hidden)
    shared = m.groups * m.state
    sizes = (m.inner, m.inner + 2 * shared, m.heads)
    both = t.linear(hidden, f"{name}.in_proj", sum(sizes), bias=m.bias, role="ssm")
    if m.scaled:
        scales = Tensor((1, 1, both.shape[-1]), t.setting.format, None)
        t.add_buffer(scales.bytes)
        both = ops.mul(t, both, scales)
    decay = recurrent.decay(t, f"{name}.A_log", m.heads)
    if t.setting.training and t.setting.fused_recurrence:
        return fused_mixer(t, m, both, decay, name)
    gate, x, steps = ops.split(t, both, *sizes)
    x = ops.transpose(t, x, 1, 2)
    x = recurrent.convolve(t, x, f"{name}.conv1d", m.kernel, bias=m.conv_bias)
    x = recurrent.without_padding(t, ops.transpose(t, x, 1, 2))
    del hidden
    parts = by_heads(t, m, x, steps, decay, name)
    recurrent.remember(t, m.inner * m.state, m.inner + 2 * shared, m.kernel)
    scanned = None
    if recurrent.continues(t):
        out = chunk_update(t, m, parts)
    else:
        scan = fused_chunk_scan if t.setting.fused_recurrence else chunk_scan
        scanned, state = scan(t, m, parts)
        recurrent.store_state(t, state)
        out = scanned
    del parts
    out = ops.reshape(t, out, t.batch, t.sequence, m.inner)
    out = gated_norm(t, m, out, gate, f"{name}.norm")
    out = ops.to(t, out, format)
    out = t.linear(out, f"{name}.out_proj", m.hidden, bias=m.biased_output, role="ssm")
    del scanned  # which has a name in the reference as long as the mixer works
    return out


def fused_mixer(t: Trace, m: Mamba2, both: Tensor, decay: Tensor, name: str) -> Tensor:
    """The whole mixer behind its input projection in one kernel."""
    channels = m.inner + 2 * m.groups * m.state
    recurrent.remember(t, m.inner * m.state, channels, m.kernel)
    weights: list[Tensor] = [t.weight(f"{name}.conv1d.weight", (channels, 1, m.kernel), "conv")]
    if m.conv_bias:
        weights.append(t.weight(f"{name}.conv1d.bias", (channels,), "bias"))
    weights += [t.weight(f"{name}.{part}", (m.heads,), "ssm") for part in ("dt_bias", "D")]
    if m.normed:
        weights.append(t.weight(f"{name}.norm.weight", (m.inner,), "norm"))
    if m.biased_output:
        weights.append(t.weight(f"{name}.out_proj.bias", (m.hidden,), "bias"))
    weights.append(t.bare_weight(f"{name}.out_proj", m.hidden, m.inner, "ssm"))
    shape = (t.batch, t.sequence, m.heads, m.head_dim)
    return scan_kernels.mamba2_combined(
        t, both, weights, decay, shape, m.groups, m.state, m.chunk, normed=m.normed
    )


def fused_chunk_scan(t: Trace, m: Mamba2, c: Parts) -> tuple[Tensor, Tensor | None]:
    """The scan in one kernel. With the last state, for the cache."""
    out = scan_kernels.chunk_scan(t, c, c.x.shape, m.groups, m.state, m.chunk)
    shape = (t.batch, m.heads, m.head_dim, m.state)
    return out, t.new("chunk_scan", shape, FP32) if t.setting.cache else None


class Parts(NamedTuple):
    """What goes into the state of Mamba-2 and comes out: by heads, and by groups of heads."""

    x: Tensor
    steps: Tensor
    decay: Tensor
    into: Tensor
    out_of: Tensor
    offset: Tensor
    skip: Tensor


class Discrete(NamedTuple):
    """What every token drives the state with, by chunks; it lives until the scan is done."""

    x: Tensor
    decay: Tensor
    into: Tensor
    out_of: Tensor
    skipped: Tensor
    """What passes beside the state, not by chunks."""
    steps: Tensor


def discretised(t: Trace, m: Mamba2, c: Parts, padded: int) -> Discrete:
    """Input and decay times the steps, what enters and leaves for every head; all in fp32."""
    steps = softplus(t, ops.add(t, c.steps, c.offset))
    steps = ops.clamp(t, steps, 2)
    x = ops.to(t, c.x, FP32)
    into = repeat_interleave(t, ops.to(t, c.into, FP32), m.heads // m.groups, 2)
    out_of = repeat_interleave(t, ops.to(t, c.out_of, FP32), m.heads // m.groups, 2)
    skipped = ops.mul(t, unsqueeze(t, c.skip, 1), pad(t, x, 1, padded))
    x = ops.mul(t, x, ops.to(t, unsqueeze(t, steps, 3), FP32))
    decay = ops.mul(t, c.decay, ops.to(t, steps, FP32))
    x, decay, into, out_of = [
        in_chunks(t, part, padded, m.chunk) for part in (x, decay, into, out_of)
    ]
    return Discrete(x, decay, into, out_of, skipped, steps)


def chunk_scan(t: Trace, m: Mamba2, c: Parts) -> tuple[Tensor, Tensor | None]:
    """`mamba2_chunk_scan`: within chunks, from chunk to chunk, and from their states to outputs.

    The letters of the products: batch, chunk, l and s positions in it, head, p channel, n state.
    """
    batch, tokens = c.x.shape[:2]
    padded = -(-tokens // m.chunk) * m.chunk
    d = discretised(t, m, c, padded)
    decay = ops.permute(t, d.decay, 0, 3, 1, 2)
    decays = cumsum(t, decay)
    lower = exp(t, segment_sum(t, decay))
    scores = einsum(t, "bclhn,bcshn->bclsh", d.out_of, d.into)
    scores_decayed = ops.mul(t, scores, ops.permute(t, lower, 0, 2, 3, 4, 1))
    within = einsum(t, "bclsh,bcshp->bclhp", scores_decayed, d.x)
    to_end = exp(t, ops.sub(t, ops.narrow(t, decays, 3, 1), decays))
    entering = ops.mul(t, d.into, unsqueeze(t, ops.permute(t, to_end, 0, 2, 3, 1), 4))
    states = einsum(t, "bclhn,bclhp->bchpn", entering, d.x)
    before = t.new("zeros_like", (batch, 1, *states.shape[2:]), states.format)
    states = ops.cat(t, (before, states), 1)
    chunks = padded // m.chunk
    between = segment_sum(t, pad(t, ops.select(t, decays, 3), 2, chunks + 1))
    between = ops.transpose(t, exp(t, between), 1, 3)
    all_states = einsum(t, "bzch,bzhpn->bchpn", between, states)
    states = ops.narrow(t, all_states, 1, chunks)
    last = ops.select(t, all_states, 1)
    from_start = exp(t, decays)
    across = einsum(t, "bclhn,bchpn->bclhp", d.out_of, states)
    passed = ops.mul(t, across, unsqueeze(t, ops.permute(t, from_start, 0, 2, 3, 1), 4))
    out = ops.contiguous(t, ops.add(t, within, passed))
    out = ops.add(t, ops.reshape(t, out, batch, padded, m.heads, m.head_dim), d.skipped)
    if padded > tokens:
        out = ops.narrow(t, out, 1, tokens)
    return out, last if t.setting.cache else None


def by_heads(t: Trace, m: Mamba2, x: Tensor, steps: Tensor, decay: Tensor, name: str) -> Parts:
    """What the convolution gives, by heads and by groups of heads, with the weights of the scan."""
    x, into, out_of = ops.split(t, x, m.inner, m.groups * m.state, m.groups * m.state)
    offset = t.weight(f"{name}.dt_bias", (m.heads,), "ssm")
    skip = t.weight(f"{name}.D", (m.heads,), "ssm")
    by_head = (t.batch, t.sequence, m.heads, m.head_dim)
    by_group = (t.batch, t.sequence, m.groups, m.state)
    return Parts(
        ops.reshape(t, x, *by_head), steps, decay,
        ops.reshape(t, into, *by_group), ops.reshape(t, out_of, *by_group), offset, skip,
    )  # fmt: skip


def chunk_update(t: Trace, m: Mamba2, c: Parts) -> Tensor:
    """`mamba2_selective_state_update`: one token."""
    by_channel = (t.batch, m.heads, m.head_dim)
    states = (*by_channel, m.state)
    x = c.x.view(*by_channel)
    steps = ops.expand(t, ops.transpose(t, c.steps, 1, 2), *by_channel)
    steps = softplus(t, ops.add(t, steps, c.offset.view(m.heads, 1)))
    decay = ops.expand(t, c.decay.view(1, m.heads, 1, 1), *states)
    decayed = exp(t, ops.mul(t, unsqueeze(t, ops.to(t, steps, FP32), 3), decay))
    into = for_heads(t, m, c.into).view(t.batch, m.heads, 1, m.state)
    entering = ops.mul(t, unsqueeze(t, steps, 3), into)
    driven = ops.mul(t, entering, unsqueeze(t, x, 3))
    state = ops.add(t, ops.mul(t, Tensor(states, FP32, None), decayed), driven)
    out_of = for_heads(t, m, c.out_of)
    state = ops.to(t, state, out_of.format)
    out = ops.bmm(
        t,
        state.view(t.batch * m.heads, m.head_dim, m.state),
        out_of.view(t.batch * m.heads, m.state, 1),
    )
    out = out.view(*by_channel)
    return ops.add(t, out, ops.mul(t, x, c.skip.view(m.heads, 1)))


def for_heads(t: Trace, m: Mamba2, x: Tensor) -> Tensor:
    """What a group of heads shares, a copy for each of them."""
    x = x.view(t.batch, m.groups, 1, m.state)
    x = ops.expand(t, x, t.batch, m.groups, m.heads // m.groups, m.state)
    return ops.contiguous(t, x)


def in_chunks(t: Trace, x: Tensor, padded: int, chunk: int) -> Tensor:
    """Padded to whole chunks, which become a dimension."""
    whole = pad(t, x, 1, padded)
    return ops.reshape(t, whole, x.shape[0], padded // chunk, chunk, *x.shape[2:])


def segment_sum(t: Trace, x: Tensor) -> Tensor:
    """Sums over all stretches of the last dimension, as differences are unstable."""
    size = x.shape[-1]
    x = ops.expand(t, unsqueeze(t, x, len(x.shape)), *x.shape, size)
    mask = triangle(t, size)
    x = ops.masked_fill(t, x, inverted(t, mask))
    sums = cumsum(t, x)
    mask = triangle(t, size)
    return ops.masked_fill(t, sums, inverted(t, mask))


def gated_norm(t: Trace, m: Mamba2, x: Tensor, gate: Tensor, name: str) -> Tensor:
    """`MambaRMSNormGated`: gated, then normalised by groups, in fp32."""
    format = x.format
    if not m.normed:
        return ops.mul(t, x, ops.silu(t, gate))
    weight = t.weight(f"{name}.weight", (m.inner,), "norm")
    x = ops.to(t, x, FP32)
    x = ops.mul(t, x, ops.silu(t, ops.to(t, gate, FP32)))
    groups = ops.reshape(t, x, *x.shape[:-1], m.groups, m.inner // m.groups)
    variance: list[Tensor] = []
    groups = ops.normalized(t, groups, variance)
    x = ops.reshape(t, groups, *x.shape)
    return ops.mul(t, weight, ops.to(t, x, format))
