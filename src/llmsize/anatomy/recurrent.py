"""Layers whose memory of the past is a state of fixed size: Mamba, Mamba-2, delta rules.

The recurrences run in one fused kernel, as the libraries that transformers v5.23 calls do
(mamba-ssm, flash-linear-attention): it keeps its inputs and makes its output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmsize.anatomy import blocks
from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.decoder import Norm
from llmsize.anatomy.operations import GradList, attach, first
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Shape, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def convolve(
    t: Trace, x: Tensor, name: str, kernel: int, *, bias: bool = False, activated: bool = True
) -> Tensor:
    """A short causal convolution of every channel, and SiLU if it is `activated`."""
    channels = x.shape[-1]
    weight = t.weight(f"{name}.weight", (channels, 1, kernel), "conv")
    offsets = [t.weight(f"{name}.bias", (channels,), "bias")] if bias else []
    x = fused(t, "causal_conv1d", (x, weight, *offsets), x.shape)
    return ops.silu(t, x) if activated else x


def fused(t: Trace, operation: str, inputs: Sequence[Tensor], shape: Shape) -> Tensor:
    """One kernel that keeps its inputs and makes one output in the format of the first."""
    node = t.record(_fused_backward, inputs, inputs, (operation, [x.shape for x in inputs]))
    return attach(t.new(operation, shape, inputs[0].format), node)


def _fused_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    operation, shapes = node.context
    format = first(grads).format
    return [
        t.new(f"{operation}_backward", shape, format) if node.needs(index) else None
        for index, shape in enumerate(shapes)
    ]


def remember(t: Trace, state: int, convolved: int, kernel: int) -> None:
    """A layer keeps its state and the last inputs of its convolution for the next token."""
    t.remember(LayerCache("recurrent", state=state + convolved * (kernel - 1)))


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
    """Of time steps and of what enters and leaves the state (Jamba)."""


def mamba(t: Trace, m: Mamba, x: Tensor, name: str) -> Tensor:
    """Selective state space: every channel with states of its own."""
    both = t.linear(x, f"{name}.in_proj", 2 * m.inner, bias=m.bias, role="ssm")
    x, gate = ops.split(t, both, m.inner, m.inner)
    x = convolve(t, x, f"{name}.conv1d", m.kernel, bias=m.conv_bias)
    selected = t.linear(x, f"{name}.x_proj", m.rank + 2 * m.state, role="ssm")
    steps, into, out_of = ops.split(t, selected, m.rank, m.state, m.state)
    if m.norm is not None:
        steps = m.norm(t, steps, f"{name}.dt_layernorm")
        into = m.norm(t, into, f"{name}.b_layernorm")
        out_of = m.norm(t, out_of, f"{name}.c_layernorm")
    steps = t.linear(steps, f"{name}.dt_proj", m.inner, bias=True, role="ssm")
    decay = t.weight(f"{name}.A_log", (m.inner, m.state), "ssm")
    skip = t.weight(f"{name}.D", (m.inner,), "ssm")
    scanned = fused(t, "selective_scan", (x, steps, decay, into, out_of, skip, gate), x.shape)
    remember(t, m.inner * m.state, m.inner, m.kernel)
    return t.linear(scanned, f"{name}.out_proj", m.hidden, bias=m.bias, role="ssm")


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
    normed: bool = True
    """Whether the gated output is normalised."""


def mamba2(t: Trace, m: Mamba2, x: Tensor, name: str) -> Tensor:
    """State space with one decay for each head."""
    inner = m.heads * m.head_dim
    convolved = inner + 2 * m.groups * m.state
    projected = t.linear(x, f"{name}.in_proj", inner + convolved + m.heads, bias=m.bias, role="ssm")
    gate, x, steps = ops.split(t, projected, inner, convolved, m.heads)
    x = convolve(t, x, f"{name}.conv1d", m.kernel, bias=m.conv_bias)
    offsets, decay, skip = (
        t.weight(f"{name}.{last}", (m.heads,), "ssm") for last in ("dt_bias", "A_log", "D")
    )
    shape = (*gate.shape[:-1], inner)
    scanned = fused(t, "chunk_scan", (x, steps, offsets, decay, skip), shape)
    remember(t, inner * m.state, convolved, m.kernel)
    scanned = ops.mul(t, scanned, ops.silu(t, gate))
    if m.normed:
        scanned = blocks.rms_norm(t, scanned, f"{name}.norm")
    return t.linear(scanned, f"{name}.out_proj", m.hidden, bias=m.bias, role="ssm")


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


def delta_rule(
    t: Trace, d: DeltaNet, mixed: Tensor, beta: Tensor, decay: Tensor, gate: Tensor, name: str
) -> Tensor:
    """Gated DeltaNet behind its projections: convolution, recurrence, gated norm, output."""
    mixed = convolve(t, mixed, f"{name}.conv1d", d.kernel)
    q, k, v = ops.split(t, mixed, d.keys, d.keys, d.values)
    offsets = t.weight(f"{name}.dt_bias", (d.value_heads,), "ssm")
    rates = t.weight(f"{name}.A_log", (d.value_heads,), "ssm")
    beta = ops.sigmoid(t, beta)
    steps = ops.add(t, ops.to(t, decay, FP32), offsets)
    decay = ops.mul(t, ops.unary(t, "softplus", steps, keeps="input"), rates)
    out = fused(t, "gated_delta_rule", (v, q, k, decay, beta), v.shape)
    remember(t, d.value_heads * d.key_dim * d.value_dim, 2 * d.keys + d.values, d.kernel)
    heads = (t.batch, t.sequence, d.value_heads, d.value_dim)
    normed = blocks.rms_norm(t, out.view(*heads), f"{name}.norm")
    out = ops.mul(t, normed, ops.silu(t, gate).view(*heads)).view(*out.shape)
    return t.linear(out, f"{name}.out_proj", d.hidden, role="ssm")
