"""RecurrentGemma (Griffin): gated linear recurrences, local attention in every third layer.

De et al. 2024, arXiv:2402.19427; transformers v5.23, models/recurrent_gemma. It goes through the
tokens one by one, and a layer computes the angles that it rotates by itself.
"""

from __future__ import annotations

from typing import NamedTuple

from llmsize.anatomy import blocks, decoder, recurrent, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Names, Sizes, gemma_norm
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.loops import turns
from llmsize.anatomy.operations import GradList
from llmsize.anatomy.scan_operations import exp, softplus
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BF16, BOOL, FP32

NAMES = Names(norm="model.final_norm")
HALVES = 2
"""Of `intermediate_size`, one is the width of the gate, the other of what it gates."""


class Recurrence(NamedTuple):
    """The dimensions of a recurrent block, and where its layers' last states are stored."""

    places: dict[int, int]
    """By the layer's number."""
    width: int
    blocks: int
    """Square blocks on the diagonal of the gates' matrices."""
    kernel: int


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    window = c.size("attention_window_size", "sliding_window", default=2048)
    s = decoder.read(
        c.changed(sliding_window=window), tied=True, activation="gelu_pytorch_tanh", rotary=0.5
    )
    width = c.size("lru_width", default=s.hidden)
    r = Recurrence({}, Dim(width, "lru_width"), s.heads, c.size("conv1d_width", default=4))
    bias = c.flag("attention_bias")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        normed = gemma_norm(t, x, "temporal_pre_norm")
        if kind == "recurrent":
            mixed = recurrence(t, s, r, normed)
        else:
            mixed = attention(t, s, normed, around, window, bias)
        weights, t.attention_weights = t.attention_weights, None
        del weights
        residual = ops.add(t, mixed, x)
        mixed = gemma_norm(t, residual, "channel_pre_norm")
        mixed = feed(t, s, mixed)
        return ops.add(t, mixed, residual)

    cycle = c.sequence("block_types", "_block_types") or ("recurrent", "recurrent", "attention")
    kinds = [str(cycle[i % len(cycle)]) for i in range(s.layers)]
    frame = Frame(
        windows=(window,),
        norm=gemma_norm,
        names=NAMES,
        begin=scaled,
        holds_tokens=True,
        head=Head(end=(capped,)),
    )
    return decoder.run(t, s._replace(rotary=Dim(0, "rotary")), block, kinds, frame)


def scaled(t: Trace, x: Tensor) -> Tensor:
    """Embeddings times a number, which is a buffer in 16 bit."""
    t.buffers += BF16.block_bytes
    return ops.mul(t, x, ops.to(t, Tensor((), BF16, None), x.format))


def capped(t: Tape, logits: Tensor) -> Tensor:
    """Logits within bounds, in one expression."""
    return ops.scale(t, ops.tanh(t, ops.scale(t, logits)))


def feed(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """The gated MLP, which holds its gate to the end."""
    width = Dim(s.intermediate // HALVES, "intermediate")
    gate = s.activation(t, t.linear(x, "mlp_block.gate_proj", width, bias=True, role="gate"))
    up = t.linear(x, "mlp_block.up_proj", width, bias=True, role="up")
    x = ops.mul(t, gate, up)
    del up
    return t.linear(x, "mlp_block.down_proj", s.hidden, bias=True, role="down")


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, window: int, bias: bool) -> Tensor:
    """Grouped-query attention within a window, by angles of its own."""
    q, k, v = decoder.projections(t, s, Heads(bias=bias, name="temporal_block"), x)
    t.add_buffer(2 * FP32.block_bytes * (s.rotary // 2))
    rotation = rotary.tabulated(t, s.rotary, v.format)
    q, k = rotary.turn(t, q, k, rotation)
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window], dropout=s.attention_dropout)
    return t.linear(out, "temporal_block.o_proj", s.hidden, bias=True, role="o")


def recurrence(t: Trace, s: Sizes, r: Recurrence, x: Tensor) -> Tensor:
    """A convolution and a gated linear recurrence, times a gate beside them."""
    name = "temporal_block"
    gate = t.linear(x, f"{name}.linear_y", r.width, bias=True, role="gate_attention")
    gate = s.activation(t, gate)
    x = ops.transpose(t, t.linear(x, f"{name}.linear_x", r.width, bias=True, role="ssm"), 1, 2)
    recurrent.remember(t, r.width, r.width, r.kernel)
    x = convolve(t, r, x, f"{name}.conv_1d")
    x = gated_recurrence(t, r, ops.transpose(t, x, 1, 2), f"{name}.rg_lru")
    return t.linear(ops.mul(t, x, gate), f"{name}.linear_out", s.hidden, bias=True, role="ssm")


def convolve(t: Trace, r: Recurrence, x: Tensor, name: str) -> Tensor:
    """A short causal convolution of batch, channels, tokens."""
    weight = t.weight(f"{name}.weight", (r.width, 1, r.kernel), "conv")
    offset = t.weight(f"{name}.bias", (r.width,), "bias")
    if recurrent.continues(t):
        whole = ops.cat(t, (recurrent.with_tokens(x, r.kernel - 1), x), 2)
        products = ops.mul(t, whole, weight.view(r.width, r.kernel))
        return ops.add(t, ops.total(t, products), offset.view(r.width, 1))
    if t.setting.cache:
        t.stored.append(t.new("pad", (*x.shape[:2], r.kernel - 1), x.format, role="cache"))
    out = ops.convolution(t, x, weight, offset, (*x.shape[:2], x.shape[2] + r.kernel - 1))
    return ops.slice_last(t, out, x.shape[2])


def gated_recurrence(t: Trace, r: Recurrence, x: Tensor, name: str) -> Tensor:
    """The real-gated linear recurrent unit of batch, tokens, channels."""
    rates = t.weight(f"{name}.recurrent_param", (r.width,), "ssm")
    reset = t.new("eq", (1, t.sequence, 1), BOOL)
    size = r.width // r.blocks
    by_block = ops.reshape(t, x, t.batch * t.sequence, r.blocks, size)
    by_block = ops.permute(t, by_block, 1, 0, 2)
    result = block_diagonal(t, by_block, f"{name}.input_gate")
    entering = ops.sigmoid(t, ops.reshape(t, ops.transpose(t, result, 0, 1), *x.shape))
    result = block_diagonal(t, by_block, f"{name}.recurrent_gate")
    forgets = ops.sigmoid(t, ops.reshape(t, ops.transpose(t, result, 0, 1), *x.shape))
    logarithm = ops.mul(t, ops.scale(t, forgets), softplus(t, rates))
    forgets = exp(t, logarithm)
    squared = exp(t, ops.scale(t, logarithm))
    gated = ops.mul(t, x, entering)
    multiplier = bounded_root(t, ops.scale(t, squared))
    multiplier = ops.shift(t, ops.mul(t, t.new("bitwise_not", reset.shape, BOOL), multiplier))
    driven = ops.mul(t, gated, ops.to(t, multiplier, x.format))
    out, state = scan(t, driven, forgets)
    hold(t, r, state)
    del by_block, result, logarithm, squared, gated, multiplier, driven, reset
    return out


def block_diagonal(t: Trace, x: Tensor, name: str) -> Tensor:
    """Every block of channels times a matrix of its own, with an offset."""
    blocks, _, size = x.shape
    offset = t.weight(f"{name}_bias", (blocks, size), "bias")
    matrix = t.weight(f"{name}_weight", (blocks, size, size), "ssm")
    product = ops.bmm(t, x, matrix)
    return ops.add_in_place(t, product, offset.view(blocks, 1, size))


def bounded_root(t: Tape, x: Tensor) -> Tensor:
    """A square root whose derivative is bounded; keeps its input."""
    node = t.record(_root_backward, (x,), (x,))
    return t.like("sqrt", x, node)


def _root_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = ops.first(grads)
    scaled = t.new("mul", grad.shape, grad.format)
    clipped = t.new("clip", grad.shape, grad.format)
    del scaled
    root = t.new("sqrt", grad.shape, grad.format)
    result = t.new("div", grad.shape, grad.format)
    del clipped, root
    return (result,)


def hold(t: Trace, r: Recurrence, state: Tensor) -> None:
    """Keep a layer's last state until the next pass, as its module does.

    With it stays what it was computed from, if that has been computed again.
    """
    if t.layer not in r.places:
        r.places[t.layer] = len(t.stored)
        t.stored.append(state)
    else:
        t.stored[r.places[t.layer]] = state
        t.stored += [x for x in kept_for(state) if x is not None]


def kept_for(x: Tensor) -> list[Tensor | None]:
    """What the nodes that lead to `x` keep."""
    found, open_nodes, kept = set[int](), [x.node], list[Tensor | None]()
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and id(node) not in found:
            found.add(id(node))
            kept += node.saved
            open_nodes += [edge[0] for edge in node.edges if edge is not None]
    return kept


def scan(t: Trace, x: Tensor, forgets: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence in fp32, token by token, written into one tensor for all; its last state."""
    forgets = ops.mul(t, forgets, t.new("bitwise_not", (1, t.sequence, 1), BOOL))
    batch, tokens, width = x.shape
    state = Tensor((batch, width), FP32, None)
    if tokens == 1:
        if not t.setting.cache:
            return x, ops.to(t, x, FP32)
        seen = ops.mul(t, ops.to(t, forgets, FP32), state.view(batch, 1, width))
        seen = ops.add_in_place(t, seen, ops.to(t, x, FP32))
        return ops.to(t, seen, x.format), seen
    if not t.setting.cache:
        state = t.new("zeros", (batch, width), FP32)
    out = t.new("zeros_like", x.shape, x.format)
    for _ in turns(t, tokens):
        state = ops.mul(t, wide(t, forgets), state)
        state = ops.add(t, state, wide(t, x))
        out = written(t, out, ops.to(t, state, x.format))
    return out, state


def wide(t: Tape, x: Tensor) -> Tensor:
    """One token of `x` in fp32."""
    return ops.to(t, ops.select(t, x, 1), FP32)


def written(t: Tape, whole: Tensor, part: Tensor) -> Tensor:
    """`whole[:, i] = part`, in place."""
    node = t.record(_written_backward, (whole, part), (), part.shape)
    return Tensor(whole.shape, whole.format, whole.storage, node, 0, whole.strides)


def _written_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """`CopySlices`: a copy of the whole gradient with zeros where the part was, and the part."""
    grad = ops.first(grads)
    whole = t.new("copy", grad.shape, grad.format)
    part = t.new("clone", node.context, grad.format)
    zeros = t.new("zeros_like", node.context, grad.format)
    del zeros
    return whole, part
