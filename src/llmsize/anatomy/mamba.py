"""Mamba as transformers computes it, with the kernels of mamba-ssm or without.

transformers v5.23, models/mamba/modeling_mamba.py: it goes through the tokens one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llmsize.anatomy import operations as ops
from llmsize.anatomy import recurrent, scan_kernels
from llmsize.anatomy.decoder import Norm
from llmsize.anatomy.loops import turns
from llmsize.anatomy.scan_operations import exp, softplus, stack_turns, unsqueeze
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32
from llmsize.quick_dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mamba:
    """The dimensions of a Mamba mixer."""

    hidden: int
    inner: int
    state: int
    rank: int
    """Channels that the time steps are made of."""
    kernel: int
    bias: bool
    conv_bias: bool
    norm: Norm | None = None
    """Of time steps and of what enters and leaves the state (Jamba, Falcon-Mamba)."""
    fused_in_training: bool = True
    """Whether one kernel for the whole mixer is asked for first."""


def mixer(t: Trace, m: Mamba, hidden: Tensor, name: str) -> Tensor:
    """Selective state space: every channel with states of its own."""
    format = hidden.format
    hidden = recurrent.without_padding(t, hidden)
    both = t.linear(hidden, f"{name}.in_proj", 2 * m.inner, bias=m.bias, role="ssm")
    both = ops.transpose(t, both, 1, 2)
    decay = recurrent.decay(t, f"{name}.A_log", m.inner, m.state)
    if t.setting.training and m.fused_in_training:
        if t.setting.fused_recurrence:
            return fused_mixer(t, m, both, decay, name)
        handed = [t.new("to", (m.inner,), FP32) for _ in range(2 * (format is not FP32))]
        del handed  # to a kernel that is not there
    x, gate = ops.split(t, both, m.inner, m.inner, dim=1)
    x = recurrent.convolve(t, x, f"{name}.conv1d", m.kernel, bias=m.conv_bias)
    x = recurrent.without_padding(t, ops.transpose(t, x, 1, 2))
    steps, into, out_of = selection(t, m, x, name)
    steps = expanded(t, m, steps, f"{name}.dt_proj")
    offset = ops.to(t, t.weight(f"{name}.dt_proj.bias", (m.inner,), "bias"), FP32)
    skip = t.weight(f"{name}.D", (m.inner,), "ssm")
    selected = Selected(steps, decay, into, out_of, gate, offset)
    if recurrent.continues(t):
        out = unsqueeze(t, selective_update(t, ops.select(t, x, 1), selected, skip), 2)
    elif t.setting.fused_recurrence:
        out = fused_scan(t, ops.transpose(t, x, 1, 2), selected, ops.to(t, skip, FP32))
    else:
        out, state = selective_scan(t, ops.transpose(t, x, 1, 2), selected, ops.to(t, skip, FP32))
        recurrent.store_state(t, state)
    recurrent.remember(t, m.inner * m.state, m.inner, m.kernel)
    by_token = ops.transpose(t, out, 1, 2)
    return t.linear(
        ops.to(t, by_token, format), f"{name}.out_proj", m.hidden, bias=m.bias, role="ssm"
    )


def fused_mixer(t: Trace, m: Mamba, both: Tensor, decay: Tensor, name: str) -> Tensor:
    """The whole mixer behind its input projection in one kernel; its norms have no weights."""
    recurrent.remember(t, m.inner * m.state, m.inner, m.kernel)
    weights = [
        t.weight(f"{name}.conv1d.weight", (m.inner, 1, m.kernel), "conv"),
        t.bare_weight(f"{name}.x_proj", m.rank + 2 * m.state, m.inner, "ssm"),
        t.bare_weight(f"{name}.dt_proj", m.inner, m.rank, "ssm"),
        t.bare_weight(f"{name}.out_proj", m.hidden, m.inner, "ssm"),
    ]
    vectors: list[Tensor] = [t.weight(f"{name}.dt_proj.bias", (m.inner,), "bias")]
    vectors.append(t.weight(f"{name}.D", (m.inner,), "ssm"))
    if m.bias:
        vectors.append(t.weight(f"{name}.out_proj.bias", (m.hidden,), "bias"))
    vectors = [ops.to(t, vector, FP32) for vector in vectors]
    if m.conv_bias:
        vectors.append(t.weight(f"{name}.conv1d.bias", (m.inner,), "bias"))
    return scan_kernels.mamba_inner(t, both, weights, decay, vectors, m.rank)


def fused_scan(t: Trace, x: Tensor, s: Selected, skip: Tensor) -> Tensor:
    """The scan in one kernel; with a cache, a copy of its last state."""
    out = scan_kernels.selective_scan(
        t, x, s.steps, s.decay, (s.into, s.out_of), s.gate, (s.offset, skip)
    )
    if t.setting.cache:
        recurrent.store_state(t, Tensor((t.batch, *s.decay.shape), FP32, None))
    return out


class Selected(NamedTuple):
    """What a selective state space makes of its input, and its weights."""

    steps: Tensor
    """Batch, channels, tokens."""
    decay: Tensor
    into: Tensor
    """Batch, tokens, state."""
    out_of: Tensor
    gate: Tensor
    offset: Tensor


def selection(t: Trace, m: Mamba, x: Tensor, name: str) -> Sequence[Tensor]:
    """Time steps, what enters the state and what leaves it, of every token."""
    both = t.linear(x, f"{name}.x_proj", m.rank + 2 * m.state, role="ssm")
    parts = ops.split(t, both, m.rank, m.state, m.state)
    if m.norm is None:
        return parts
    names = ("dt_layernorm", "b_layernorm", "c_layernorm")
    return [m.norm(t, part, f"{name}.{n}") for part, n in zip(parts, names, strict=True)]


def expanded(t: Trace, m: Mamba, steps: Tensor, name: str) -> Tensor:
    """Time steps of every channel, without their bias: batch, channels, tokens."""
    if t.setting.quantized is not None and m.norm is not None:
        # Falcon-Mamba and Jamba call a quantized layer, and take its bias off again
        both = t.linear(steps, name, m.inner, bias=True, role="ssm")
        offset = t.weight(f"{name}.bias", (m.inner,), "bias")
        return ops.transpose(t, ops.add(t, both, offset), 1, 2)
    weight = t.bare_weight(name, m.inner, m.rank, "ssm")
    return ops.contiguous(t, ops.transpose(t, ops.linear(t, steps, weight), 1, 2))


def selective_scan(t: Trace, x: Tensor, s: Selected, skip: Tensor) -> tuple[Tensor, Tensor | None]:
    """`mamba_selective_scan` of x as batch, channels, tokens; with the last state for the cache."""
    batch, inner, tokens = x.shape
    width = s.decay.shape[1]
    steps = ops.add(t, s.steps, unsqueeze(t, ops.to(t, s.offset, s.steps.format), 1))
    steps = softplus(t, steps)
    by_channel = ops.reshape(t, s.decay, 1, inner, 1, width)
    discrete = exp(t, ops.mul(t, by_channel, unsqueeze(t, steps, 3)))
    entering = ops.mul(t, unsqueeze(t, steps, 3), ops.to(t, unsqueeze(t, s.into, 1), FP32))
    driven = ops.mul(t, entering, ops.to(t, unsqueeze(t, x, 3), FP32))
    state = t.new("zeros", (batch, inner, width), x.format)
    outputs = []
    for _ in turns(t, tokens):
        decayed = ops.mul(t, ops.select(t, discrete, 2), state)
        state = ops.add(t, decayed, ops.select(t, driven, 2))
        del decayed
        seen = ops.to(t, state, x.format)
        out = ops.matmul(t, seen, unsqueeze(t, ops.select(t, s.out_of, 1), 2))
        del seen
        outputs.append(ops.select(t, out, 2))
    out = stack_turns(t, outputs, tokens)
    out = ops.add(t, out, ops.mul(t, x, ops.reshape(t, skip, 1, inner, 1)))
    out = ops.mul(t, out, ops.silu(t, s.gate))
    return out, state if t.setting.cache else None


def selective_update(t: Trace, x: Tensor, s: Selected, skip: Tensor) -> Tensor:
    """`mamba_selective_state_update`: one token, x as batch, channels."""
    batch, inner = x.shape
    width = s.decay.shape[1]
    steps = ops.add(t, ops.select(t, s.steps, 2), ops.to(t, s.offset, s.steps.format))
    steps = softplus(t, steps)
    decayed = exp(t, ops.mul(t, unsqueeze(t, ops.to(t, steps, FP32), 2), s.decay))
    into = unsqueeze(t, ops.to(t, ops.select(t, s.into, 1), FP32), 1)
    entering = ops.mul(t, unsqueeze(t, ops.to(t, steps, FP32), 2), into)
    del into
    driven = ops.mul(t, entering, unsqueeze(t, ops.to(t, x, FP32), 2))
    kept = Tensor((batch, inner, width), FP32, None)
    state = ops.add(t, ops.mul(t, kept, decayed), driven)
    seen = ops.to(t, state, s.out_of.format)
    out = ops.select(t, ops.matmul(t, seen, unsqueeze(t, ops.select(t, s.out_of, 1), 2)), 2)
    del seen
    out = ops.add(t, out, ops.mul(t, x, skip))
    out = ops.mul(t, out, ops.silu(t, ops.select(t, s.gate, 2)))
    return ops.to(t, out, x.format)
