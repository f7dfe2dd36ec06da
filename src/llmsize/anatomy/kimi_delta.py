"""Kimi Delta Attention as transformers computes it, with flash-linear-attention or without.

transformers v5.23, models/kimi_linear/modeling_kimi_linear.py, `chunk_kimi_delta_attention` and
`recurrent_kimi_delta_attention`: a delta rule whose decay every channel has for itself, so that
every pair of tokens in a chunk has one for every channel.
"""

from __future__ import annotations

from llmsize.anatomy import operations as ops
from llmsize.anatomy import recurrent, scan_kernels
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.delta_rule import CHUNK, Inputs, in_chunks
from llmsize.anatomy.loops import turns
from llmsize.anatomy.operations import GradList, first
from llmsize.anatomy.scan_operations import (
    cumsum,
    either,
    exp,
    pad,
    softplus,
    sum_over,
    triangle,
    unsqueeze,
    written,
)
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32
from llmsize.quick_dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KimiDelta:
    """The dimensions of Kimi Delta Attention."""

    hidden: int
    heads: int
    head_dim: int
    kernel: int
    whole_gates: bool = False
    """Whether each gate is one layer (Ling), not two of low rank."""
    bounded: bool = False
    """Whether it forgets no more than so much, where gates are whole."""

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim


def attention(t: Trace, d: KimiDelta, hidden: Tensor, name: str) -> Tensor:
    """Projections, convolution, recurrence, gated norm, output."""
    hidden = recurrent.without_padding(t, hidden)
    by_head = (t.batch, t.sequence, d.heads, d.head_dim)
    mixed = ops.cat(t, [t.linear(hidden, f"{name}.{p}_proj", d.width, role=p) for p in "qkv"])
    mixed = ops.transpose(t, mixed, 1, 2)
    mixed = recurrent.convolve(t, mixed, f"{name}.conv1d", d.kernel)
    if not recurrent.continues(t) and (t.setting.cache or not d.whole_gates):
        mixed = ops.narrow(t, mixed, 2, t.sequence)
    q, k, v = ops.split(t, ops.transpose(t, mixed, 1, 2), *[d.width] * 3)
    q, k, v = [ops.reshape(t, x, *by_head) for x in (q, k, v)]
    forget = forgetting_at_once if d.whole_gates else forgetting
    decay = forget(t, d, hidden, f"{name}.forget_gate")
    beta = ops.sigmoid(t, t.linear(hidden, f"{name}.b_proj", d.heads, role="ssm"))
    recurrent.remember(t, d.heads * d.head_dim**2, 3 * d.width, d.kernel)
    at_once = in_kernel if t.setting.fused_recurrence else chunks
    scan = one_token if recurrent.continues(t) else at_once
    begin = len(t.recent)
    out, state = scan(t, Inputs(q, k, v, decay, beta))
    t.forget_unused(begin)  # of a single chunk, all that only its last state is made of
    recurrent.store_state(t, state)
    gate = output_gate(t, d, hidden, name)
    normed = gated_norm(t, out, ops.reshape(t, gate, *by_head), f"{name}.o_norm")
    normed = ops.reshape(t, normed, t.batch, t.sequence, d.width)
    return t.linear(normed, f"{name}.o_proj", d.hidden, role="o")


def output_gate(t: Trace, d: KimiDelta, x: Tensor, name: str) -> Tensor:
    """What a sigmoid makes a gate of, for every channel."""
    if d.whole_gates:
        return t.linear(x, f"{name}.g_proj", d.width, role="gate_attention")
    low = t.linear(x, f"{name}.g_a_proj", d.head_dim, role="gate_attention")
    return t.linear(low, f"{name}.g_b_proj", d.width, role="gate_attention")


def forgetting_at_once(t: Trace, d: KimiDelta, x: Tensor, name: str) -> Tensor:
    """How much each channel forgets at each token, a logarithm that may be bounded.

    transformers v5.23, models/bailing_hybrid, `BailingHybridForgetGate`.
    """
    by_head = (t.batch, t.sequence, d.heads, d.head_dim)
    steps = ops.to(t, t.linear(x, f"{name}.f_proj", d.width, role="ssm"), FP32)
    offset = t.weight(f"{name}.dt_bias", (d.width,), "ssm")
    steps = ops.add(t, steps.view(*by_head), offset.view(1, 1, d.heads, d.head_dim))
    rates = exp(t, t.weight(f"{name}.A_log", (d.heads,), "ssm")).view(1, 1, d.heads, 1)
    if d.bounded:
        decay = ops.scale(t, ops.sigmoid(t, ops.mul(t, rates, steps)))
    else:
        decay = ops.mul(t, ops.neg(t, rates), softplus(t, steps))
    return ops.to(t, decay, x.format)


def forgetting(t: Trace, d: KimiDelta, x: Tensor, name: str) -> Tensor:
    """How much each channel forgets at each token, a logarithm in fp32."""
    low = t.linear(x, f"{name}.f_a_proj", d.head_dim, role="ssm")
    gate = t.linear(low, f"{name}.f_b_proj", d.width, role="ssm")
    del low
    offset = t.weight(f"{name}.dt_bias", (d.width,), "ssm")
    steps = ops.add(t, ops.to(t, gate, FP32), ops.to(t, offset, FP32))
    steps = ops.reshape(t, steps, t.batch, t.sequence, d.heads, d.head_dim)
    rates = ops.to(t, t.weight(f"{name}.A_log", (1, 1, d.heads, 1), "ssm"), FP32)
    rates = exp(t, rates)
    soft = either(
        t,
        t.new("gt", steps.shape, BOOL),
        steps,
        ops.unary(t, "log", ops.shift(t, exp(t, steps)), keeps="input"),
    )
    return ops.mul(t, ops.neg(t, rates), soft)


def in_kernel(t: Trace, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The rule in one kernel. With the last state, for the cache."""
    out = scan_kernels.kimi_delta(t, *inputs)
    batch, _, heads, channels = inputs.v.shape
    state = (batch, heads, inputs.k.shape[3], channels)
    return out, t.new("kimi_delta", state, FP32) if t.setting.cache else None


def chunks(t: Trace, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    """The rule within chunks by forward substitution, then from chunk to chunk.

    With the last state, for the cache.
    """
    format, begin = inputs.q.format, len(t.recent)
    q, k, v, decay, beta = by_heads(t, inputs)
    batch, heads, tokens, channels = k.shape
    padded = -(-tokens // CHUNK) * CHUNK
    q = ops.scale(t, pad(t, q, 2, padded))
    k = pad(t, k, 2, padded)
    v = pad(t, v, 2, padded)
    decay = pad(t, decay, 2, padded)
    beta = pad(t, beta, 2, padded)
    v_beta = ops.mul(t, v, unsqueeze(t, beta, 3))
    k_beta = ops.mul(t, k, unsqueeze(t, beta, 3))
    q, k, v, decay, k_beta, v_beta = [in_chunks(t, x) for x in (q, k, v, decay, k_beta, v_beta)]
    decay = cumsum(t, decay)
    mask, strict = triangle(t, CHUNK), triangle(t, CHUNK)
    pairs = ops.masked_fill(t, ops.sub(t, unsqueeze(t, decay, 4), unsqueeze(t, decay, 3)), strict)
    pairs = exp(t, pairs)
    inverse, last_row = inverted_system(t, k, k_beta, pairs, mask)
    v = ops.matmul(t, inverse, v_beta)
    keys = ops.matmul(t, inverse, ops.mul(t, k_beta, exp(t, decay)))
    state = t.new("zeros", (batch, heads, channels, v.shape[-1]), FP32)
    out = t.new("zeros_like", v.shape, v.format)
    mask = triangle(t, CHUNK)
    for _ in turns(t, padded // CHUNK):
        q_i, k_i, v_i, decay_i = [ops.select(t, x, 2) for x in (q, k, v, decay)]
        across = ops.matmul(t, ops.mul(t, q_i, exp(t, decay_i)), state)
        within = ops.masked_fill(t, scored(t, q_i, k_i, pairs), mask)
        known = ops.matmul(t, ops.select(t, keys, 2), state)
        new = ops.sub(t, v_i, known)
        out = written(t, out, ops.add(t, across, ops.matmul(t, within, new)))
        state = advanced(t, state, k_i, decay_i, new)
    last = state if t.setting.cache else None
    del state
    t.forget_unused(begin)
    out = ops.reshape(t, out, batch, heads, padded, channels)
    out = ops.narrow(t, out, 2, tokens)
    out = ops.to(t, ops.contiguous(t, ops.transpose(t, out, 1, 2)), format)
    del last_row
    return out, last


def inverted_system(
    t: Trace, k: Tensor, k_beta: Tensor, pairs: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The inverse of every chunk's triangular system, and a row that lives on in the loop for it.

    The system has a product for each pair of tokens and each channel, with its decay.
    """
    scores = ops.mul(t, unsqueeze(t, k_beta, 4), unsqueeze(t, k, 3))
    scores = ops.mul(t, scores, pairs)
    scores = sum_over(t, scores, 5)
    scores = ops.masked_fill(t, scores, mask)
    inverse, last_row = substituted(t, ops.neg(t, scores))
    del scores
    return ops.add(t, inverse, t.new("eye", (CHUNK, CHUNK), FP32)), last_row


def scored(t: Trace, q: Tensor, k: Tensor, pairs: Tensor) -> Tensor:
    """How well each query of a chunk suits each key, channel by channel, after its decay."""
    products = ops.mul(t, unsqueeze(t, q, 3), unsqueeze(t, k, 2))
    products = ops.mul(t, products, ops.select(t, pairs, 2))
    return sum_over(t, products, 4)


def advanced(t: Trace, state: Tensor, k: Tensor, decay: Tensor, new: Tensor) -> Tensor:
    """The state after a chunk: what is left of it, and what the chunk's keys and values add."""
    return ops.add(
        t,
        ops.mul(t, state, unsqueeze(t, exp(t, ops.select(t, decay, 2)), 3)),
        ops.matmul(t, ops.transpose(t, scaled_to_end(t, k, decay), -1, -2), new),
    )


def scaled_to_end(t: Trace, k: Tensor, decay: Tensor) -> Tensor:
    """Keys as they count at the end of their chunk."""
    return ops.mul(t, k, exp(t, ops.sub(t, ops.narrow(t, decay, 2, 1), decay)))


def by_heads(t: Trace, inputs: Inputs) -> Inputs:
    """Everything in fp32 by heads, queries and keys normalised."""
    q, k, v, decay, beta = inputs
    del inputs
    q, k, v, beta, decay = [
        ops.to(t, ops.contiguous(t, ops.transpose(t, x, 1, 2)), FP32)
        for x in (q, k, v, beta, decay)
    ]
    q = normalised(t, q)
    k = normalised(t, k)
    return Inputs(q, k, v, decay, beta)


def normalised(t: Trace, x: Tensor) -> Tensor:
    """`l2norm`: divided by its length."""
    length = ops.unary(t, "sqrt", ops.shift(t, ops.total(t, ops.mul(t, x, x))), keeps="output")
    return ops.divide(t, x, length)


def substituted(t: Trace, system: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row, each with the rows above it: what it makes of a triangle, and the last row.

    Row `i` is copied, and the `i` rows of as many entries above it; both are kept.
    """
    *outer, size, _ = system.shape
    node = t.record(_substituted_backward, (system,), (), system.shape)
    last = t.new("clone", (*outer, (size - 1) * size), system.format)
    if node is not None:
        before = sum(i * (i + 1) for i in range(1, size - 1))
        keeps = t.checkpoint is None or t.replaying
        t.keep(node, (t.new("clone", (*outer, before), system.format) if keeps else last, last))
    product = t.new("mul", (*outer, size - 1, size - 1), system.format)
    summed = [t.new(name, (*outer, size - 1), system.format) for name in ("sum", "add")]
    del product, summed
    return Tensor(system.shape, system.format, system.storage, node), last


def _substituted_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """The first of its turns, with the last row, is the widest."""
    shape, format = node.context, first(grads).format
    *outer, size, _ = shape
    whole = t.new("new_empty_strided", shape, format)
    grads.clear()
    product = t.new("mul", (*outer, size - 1, size - 1), format)
    rows = t.new("slice_backward", (*outer, size - 1, size), format)
    above = t.new("slice_backward", shape, format)
    del product, rows, above
    return (whole,)


def one_token(t: Trace, inputs: Inputs) -> tuple[Tensor, None]:
    """`recurrent_kimi_delta_attention` of one token; its state is written over the cache's."""
    format = inputs.q.format
    q, k, v, decay, beta = [ops.to(t, x, FP32) for x in inputs]
    q = normalised(t, q)
    k = normalised(t, k)
    q = ops.scale(t, q)
    out = t.new("zeros", v.shape, v.format)
    q, k, v, decay, beta = [ops.select(t, x, 1) for x in (q, k, v, decay, beta)]
    decayed = exp(t, unsqueeze(t, decay, 3))
    kept = Tensor((*k.shape, v.shape[-1]), FP32, None)
    state = ops.mul(t, kept, decayed)
    seen = sum_over(t, ops.mul(t, state, unsqueeze(t, k, 3)), 2)
    change = ops.mul(t, ops.sub(t, v, seen), unsqueeze(t, beta, 2))
    state = ops.add(t, state, ops.mul(t, unsqueeze(t, k, 3), unsqueeze(t, change, 2)))
    out = written(t, out, sum_over(t, ops.mul(t, state, unsqueeze(t, q, 3)), 2))
    return ops.to(t, out, format), None


def gated_norm(t: Trace, x: Tensor, gate: Tensor, name: str) -> Tensor:
    """`KimiLinearRMSNormGated`: normalised and gated by a sigmoid in fp32."""
    weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
    format = x.format
    x = ops.to(t, x, FP32)
    variance: list[Tensor] = []
    x = ops.normalized(t, x, variance)
    x = ops.mul(t, ops.to(t, weight, FP32), x)
    x = ops.mul(t, x, ops.sigmoid(t, ops.to(t, gate, FP32)))
    return ops.to(t, x, format)
