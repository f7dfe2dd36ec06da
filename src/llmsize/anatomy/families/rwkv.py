"""RWKV-4: no attention, a decaying average of values by their keys, tokens mixed with those before.

Peng et al. 2023, arXiv:2305.13048; transformers v5.23, models/rwkv/modeling_rwkv.py, which goes
through the tokens one by one where its kernel is not there.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from llmsize.anatomy import blocks, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.families.recurrent_gemma import written
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.loops import turns
from llmsize.anatomy.operations import GradList
from llmsize.anatomy.scan_operations import exp
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32

STATES = 5
"""What a layer keeps of the tokens before: two as they came, a numerator, a denominator and the
highest exponent."""


class Shape(NamedTuple):
    """The dimensions of RWKV."""

    layers: int
    hidden: int
    width: int
    """Channels of keys and values."""
    intermediate: int
    vocabulary: int
    tied: bool


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    hidden = c.size("hidden_size")
    s = Shape(
        layers=c.few("num_hidden_layers"),
        hidden=Dim(hidden, "hidden"),
        width=Dim(c.size("attention_hidden_size", default=hidden), "width"),
        intermediate=Dim(c.size("intermediate_size", default=4 * hidden), "intermediate"),
        vocabulary=Dim(c.size("vocab_size"), "vocabulary"),
        tied=c.flag("tie_word_embeddings"),
    )
    tokens = blocks.embed(t, "rwkv.embeddings", s.vocabulary, s.hidden)
    if t.setting.cache and not t.setting.past:
        for index in range(STATES):
            format = tokens.format if index < 2 else FP32
            t.stored.append(t.new("zeros", (t.batch, s.hidden, s.layers), format, role="cache"))
    inputs = [tokens]
    kinds = [layer == 0 for layer in range(s.layers)]
    x = t.layers("rwkv.blocks", partial(block, t, s), inputs.pop(), kinds)
    x = blocks.layer_norm(t, x, "rwkv.ln_out")
    del tokens
    return lm_head.causal_lm(t, x, s.vocabulary, Head("rwkv.embeddings", "head"), tied=s.tied)


def block(t: Trace, s: Shape, x: Tensor, first: bool) -> Tensor:
    """What is mixed over tokens, and over channels, each of a normalised copy; the first layer
    normalises what comes in."""
    x = blocks.layer_norm(t, x, "pre_ln") if first else x
    attended = mix_tokens(t, s, blocks.layer_norm(t, x, "ln1"))
    x = ops.add(t, x, attended)
    fed = mix_channels(t, s, blocks.layer_norm(t, x, "ln2"))
    return ops.add(t, x, fed)


def shifted(t: Trace, x: Tensor) -> Tensor:
    """Every token in the place of the next one, zeros in that of the first."""
    node = t.record(ops.whole_backward, (x,), (), ("pad", x.shape))
    return t.new("pad", x.shape, x.format, node)


def mixed(t: Trace, x: Tensor, before: Tensor, name: str) -> Tensor:
    """Each token and the one before it, by a share for each channel."""
    share = t.weight(name, (1, 1, x.shape[-1]), "norm")
    kept = ops.mul(t, x, share)
    return ops.add(t, kept, ops.mul(t, before, ops.shift(t, ops.neg(t, share))))


def mix_tokens(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """The average of values by keys, which decays, behind a gate."""
    t.remember(LayerCache("recurrent", state=STATES * s.hidden))
    gate, k, v = gate_key_value(t, s, x)
    rates = t.weight("attention.time_decay", (s.width,), "ssm")
    bonus = t.weight("attention.time_first", (s.width,), "ssm")
    one_by_one = t.sequence == 1 or not t.setting.fused_recurrence
    average = (averages if one_by_one else in_kernel)(t, rates, bonus, k, v)
    return t.linear(ops.mul(t, gate, average), "attention.output", s.hidden, role="o")


def gate_key_value(t: Trace, s: Shape, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A gate, keys and values, each of a mixture of its own."""
    before = shifted(t, x)
    k, v, gate = (
        mixed(t, x, before, f"attention.time_mix_{name}") for name in ("key", "value", "receptance")
    )
    k = t.linear(k, "attention.key", s.width, role="k")
    v = t.linear(v, "attention.value", s.width, role="v")
    gate = ops.sigmoid(t, t.linear(gate, "attention.receptance", s.width, role="gate_attention"))
    return gate, k, v


def mix_channels(t: Trace, s: Shape, x: Tensor) -> Tensor:
    """An MLP of squared ReLU behind a gate."""
    before = shifted(t, x)
    k = mixed(t, x, before, "feed_forward.time_mix_key")
    gate = mixed(t, x, before, "feed_forward.time_mix_receptance")
    k = ops.power(t, ops.relu(t, t.linear(k, "feed_forward.key", s.intermediate, role="up")))
    out = t.linear(k, "feed_forward.value", s.hidden, role="down")
    gate = ops.sigmoid(t, t.linear(gate, "feed_forward.receptance", s.hidden, role="gate"))
    return ops.mul(t, gate, out)


# --- the average ----------------------------------------------------------------------------------


def averages(t: Trace, rates: Tensor, bonus: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`rwkv_linear_attention_cpu`: token by token, exponents kept below the highest so far."""
    begin = len(t.recent)
    out = t.new("zeros_like", k.shape, k.format)
    shape = (k.shape[0], k.shape[2])
    top, bottom = t.new("zeros_like", shape, FP32), t.new("zeros_like", shape, FP32)
    zeros = t.new("zeros_like", shape, FP32)
    highest = t.new("sub", shape, FP32)
    del zeros
    decay = ops.neg(t, exp(t, rates))
    for _ in turns(t, t.sequence):
        key = ops.to(t, ops.select(t, k, 1), FP32)
        value = ops.select(t, v, 1)
        limit = maximum(t, highest, ops.add(t, key, bonus))
        old = exp(t, ops.sub(t, highest, limit))
        new = exp(t, ops.sub(t, ops.add(t, key, bonus), limit))
        above = ops.add(t, ops.mul(t, old, top), ops.mul(t, new, value))
        below = ops.add(t, ops.mul(t, old, bottom), new)
        out = written(t, out, ops.to(t, ops.divide(t, above, below), out.format))
        limit_of_state = maximum(t, ops.add(t, highest, decay), key)
        old = exp(t, ops.sub(t, ops.add(t, highest, decay), limit_of_state))
        new = exp(t, ops.sub(t, key, limit_of_state))
        top = ops.add(t, ops.mul(t, old, top), ops.mul(t, new, value))
        bottom = ops.add(t, ops.mul(t, old, bottom), new)
        highest = limit_of_state
    del top, bottom, highest, limit_of_state, old, new, key, value, limit, above, below
    t.forget_unused(begin)  # what is made of the last token for the next one
    return out


def maximum(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """The larger of two tensors, element by element; keeps both."""
    node = t.record(_maximum_backward, (a, b), (a, b))
    return t.new("maximum", a.shape, a.format, node)


def _maximum_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = ops.first(grads)
    made: list[Tensor | None] = []
    for index in range(2):
        if not node.needs(index):
            made.append(None)
            continue
        same, halved = t.new("eq", grad.shape, BOOL), t.new("div", grad.shape, grad.format)
        part = t.new("where", grad.shape, grad.format)
        del same, halved
        t.new("lt", grad.shape, BOOL)
        made.append(part)
    return made


def in_kernel(t: Trace, rates: Tensor, bonus: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`RwkvLinearAttention`: keeps what goes in and what comes out."""
    grad, t.grad = t.grad, False
    raised = exp(t, ops.to(t, rates, FP32))
    decay = ops.neg(t, raised)
    t.grad = grad
    del raised
    node = t.record(_kernel_backward, (rates, bonus, k, v), (decay, bonus, k, v))
    out = t.new("rwkv", k.shape, k.format, node)
    ops.keep_output(t, node, out)
    return out


def _kernel_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = ops.contiguous(t, ops.first(grads))
    _, bonus, k, v, _ = node.saved
    assert bonus is not None and k is not None and v is not None
    made = [t.new("rwkv_backward", x.shape, grad.format) for x in (bonus, bonus, k, v)]
    del grad
    return made
