"""The operations that forward passes are written in.

Each makes its result, records what autograd keeps for it, and says what its backward pass makes.
Names and derivatives are PyTorch's (torch v2.13: tools/autograd/derivatives.yaml and
torch/csrc/autograd/FunctionsManual.cpp); a C++ expression keeps its temporaries to its end, and so
do the rules here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.layout import Strides, elementwise, moved, row_major, tidy, viewed
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Shape, Tensor
from llmsize.formats import BOOL, FP16, FP32, INT8, INT32, INT64, Format

GradList = list[Tensor | None]


def first(grads: GradList) -> Tensor:
    """The gradient of an operation's only output."""
    grad = grads[0]
    assert grad is not None
    return grad


def attach(tensor: Tensor, node: Node | None, *like: Tensor) -> Tensor:
    """Make `tensor` the output of `node`; an elementwise result is laid out `like` its operands."""
    tensor.node = node
    for operand in like:
        if operand.strides is not None:
            operands = [(x.shape, x.strides) for x in like]
            tensor.strides = elementwise(tensor.shape, *operands)
            break
    return tensor


def laid_out(tensor: Tensor, *like: Tensor) -> Tensor:
    """`tensor`, laid out as an elementwise operation on `like` lays out its result."""
    return attach(tensor, None, *like)


def keep_output(t: Tape, node: Node | None, output: Tensor) -> None:
    """Keep an output for the node's own backward pass (without a cycle back to the node)."""
    if node is not None:
        t.keep(node, Tensor(output.shape, output.format, output.storage, strides=output.strides))


def promoted(a: Format, b: Format) -> Format:
    """The format of an operation on both: the wider one."""
    return a if a.block_bytes >= b.block_bytes else b


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape of an elementwise operation on both."""
    if a == b:
        return a
    if len(a) < len(b):
        a, b = b, a
    offset = len(a) - len(b)
    return a[:offset] + tuple(
        [y if x == 1 and y != 1 else x for x, y in zip(a[offset:], b, strict=True)]
    )


# --- elementwise -------------------------------------------------------------------------------


def add(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """`a + b`; keeps nothing, passes its gradient on without a copy."""
    node = t.record(_add_backward, (a, b))
    return attach(
        t.new("add", broadcast(a.shape, b.shape), promoted(a.format, b.format)), node, a, b
    )


def _add_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    same = Tensor(grad.shape, grad.format, grad.storage, strides=grad.strides)
    same.own = grad.own
    return grad, same


def add_in_place(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """`a += b`; makes nothing."""
    node = t.record(_add_backward, (a, b))
    return Tensor(a.shape, a.format, a.storage, node, 0, a.strides)


def sub(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """`a - b`; keeps nothing, negates the gradient for `b`."""
    node = t.record(_sub_backward, (a, b))
    shape = broadcast(a.shape, b.shape)
    return attach(t.new("sub", shape, promoted(a.format, b.format)), node, a, b)


def _sub_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    negated = laid_out(t.new("neg", grad.shape, grad.format), grad) if node.needs(1) else None
    return grad, negated


def mul(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """`a * b`; keeps the factor that the other one's gradient needs."""
    node = t.record(
        _mul_backward,
        (a, b),
        (b if a.node is not None else None, a if b.node is not None else None),
    )
    return attach(
        t.new("mul", broadcast(a.shape, b.shape), promoted(a.format, b.format)), node, a, b
    )


def _mul_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    return [
        None
        if other is None
        else laid_out(
            t.new(
                "mul_backward",
                broadcast(grad.shape, other.shape),
                promoted(grad.format, other.format),
            ),
            grad,
            other,
        )
        for other in node.saved
    ]


def mul_complex(t: Tape, x: Tensor, table: Tensor) -> Tensor:
    """`x` times a constant `table`, both as complex numbers of two neighbouring channels.

    Keeps the table, and conjugates it in its backward pass.
    """
    node = t.record(_mul_complex_backward, (x,), (table,))
    return attach(t.new("mul", x.shape, x.format), node, x)


def _mul_complex_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = contiguous(t, first(grads))
    grads.clear()
    (table,) = node.saved
    assert table is not None
    conjugate = t.new("conj", table.shape, table.format)
    out = t.new("mul_backward", grad.shape, grad.format)
    del conjugate
    return (out,)


def unary(
    t: Tape, operation: str, x: Tensor, *, keeps: str = "", format: Format | None = None
) -> Tensor:
    """An elementwise function of one tensor that keeps its `input`, its `output` or nothing.

    Its backward pass makes one tensor of the input's size.
    """
    node = t.record(_unary_backward, (x,), (x,) if keeps == "input" else (), operation)
    out = attach(t.new(operation, x.shape, format or x.format), node, x)
    if keeps == "output":
        keep_output(t, node, out)
    return out


def _unary_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    return (laid_out(t.new(f"{node.context}_backward", grad.shape, grad.format), grad),)


def scale(t: Tape, x: Tensor) -> Tensor:
    """`x` times a plain number; keeps nothing."""
    return unary(t, "mul", x)


def scale_in_place(t: Tape, x: Tensor) -> Tensor:
    """`x *= number`; makes nothing but its gradient."""
    node = t.record(_unary_backward, (x,), (), "mul")
    return Tensor(x.shape, x.format, x.storage, node, 0, x.strides)


def shift(t: Tape, x: Tensor) -> Tensor:
    """`x` plus a plain number; keeps nothing and passes its gradient on."""
    node = t.record(_same_backward, (x,))
    return attach(t.new("add", x.shape, x.format), node, x)


def _same_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (first(grads),)


def neg(t: Tape, x: Tensor) -> Tensor:
    """`-x`."""
    return unary(t, "neg", x)


def silu(t: Tape, x: Tensor) -> Tensor:
    """`x * sigmoid(x)` in one kernel; keeps its input."""
    return unary(t, "silu", x, keeps="input")


def gelu(t: Tape, x: Tensor) -> Tensor:
    """GELU in one kernel, exact or tanh; keeps its input."""
    return unary(t, "gelu", x, keeps="input")


def relu(t: Tape, x: Tensor) -> Tensor:
    """`max(x, 0)`; keeps its output."""
    return unary(t, "relu", x, keeps="output")


def clamp(t: Tape, x: Tensor, bounds: int = 1) -> Tensor:
    """`x` within one or two `bounds`; keeps its input, and marks what was within in its backward
    pass."""
    node = t.record(_clamp_backward, (x,), (x,), bounds)
    return attach(t.new("clamp", x.shape, x.format), node, x)


def _clamp_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    zero = t.new("scalar_tensor", (), grad.format)
    within = [t.new("le", grad.shape, BOOL) for _ in range(node.context)]
    out = laid_out(t.new("where", grad.shape, grad.format), grad)
    del zero, within
    return (out,)


def masked_fill(t: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """`x` with a number where the mask says so; keeps the mask."""
    node = t.record(_unary_backward, (x,), (mask,), "masked_fill")
    return attach(t.new("masked_fill", x.shape, x.format), node, x)


def where(t: Tape, condition: Tensor, *branches: Tensor) -> Tensor:
    """One of two tensors, or a tensor or a number, by a condition, which it keeps."""
    node = t.record(_where_backward, branches, (condition,))
    format = max((x.format for x in branches), key=lambda format: format.block_bytes)
    return attach(t.new("where", branches[0].shape, format), node, *branches)


def _where_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    made: list[Tensor | None] = []
    for index in range(len(node.edges)):
        zero = t.new("zeros", (), grad.format)
        wanted = node.needs(index)
        made.append(laid_out(t.new("where", grad.shape, grad.format), grad) if wanted else None)
        del zero
    return made


def limited(t: Tape, x: Tensor, number: Tensor, operation: str) -> Tensor:
    """The `maximum` or `minimum` of `x` and a number that is a tensor; keeps both."""
    node = t.record(_limited_backward, (x,), (x, number))
    return attach(t.new(operation, x.shape, x.format), node, x)


def _limited_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    halved, same = t.new("div", grad.shape, grad.format), t.new("eq", grad.shape, BOOL)
    out = t.new("where", grad.shape, grad.format)
    beyond = t.new("lt", grad.shape, BOOL)
    del halved, same, beyond
    return (out,)


def expm1(t: Tape, x: Tensor) -> Tensor:
    """`exp(x) - 1`; keeps its output. Under autocast it runs in fp32."""
    x = to(t, x, FP32) if t.autocast else x
    node = t.record(_expm1_backward, (x,))
    out = attach(t.new("expm1", x.shape, x.format), node, x)
    keep_output(t, node, out)
    return out


def _expm1_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    raised = t.new("add", grad.shape, grad.format)
    out = laid_out(t.new("mul", grad.shape, grad.format), grad)
    del raised
    return (out,)


def tanh(t: Tape, x: Tensor) -> Tensor:
    """Keeps its output."""
    return unary(t, "tanh", x, keeps="output")


def sigmoid(t: Tape, x: Tensor) -> Tensor:
    """Keeps its output."""
    return unary(t, "sigmoid", x, keeps="output")


def gelu_new(t: Tape, x: Tensor) -> Tensor:
    """GELU's tanh form written out in Python: five tensors instead of two."""
    return mul(
        t,
        scale(t, x),
        shift(t, tanh(t, scale(t, add(t, x, scale(t, power(t, x)))))),
    )


def power(t: Tape, x: Tensor) -> Tensor:
    """`x ** n`; keeps its input. Under autocast it runs in fp32."""
    x = to(t, x, FP32) if t.autocast else x
    node = t.record(_power_backward, (x,), (x,))
    return attach(t.new("pow", x.shape, x.format), node, x)


def _power_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    raised = t.new("pow", grad.shape, grad.format)
    scaled = t.new("mul", grad.shape, grad.format)
    out = laid_out(t.new("pow_backward", grad.shape, grad.format), grad)
    del raised, scaled
    return (out,)


def rsqrt(t: Tape, x: Tensor) -> Tensor:
    """`1 / sqrt(x)`; keeps its output."""
    node = t.record(_power_backward, (x,))
    out = attach(t.new("rsqrt", x.shape, x.format), node, x)
    keep_output(t, node, out)
    return out


def mean(t: Tape, x: Tensor) -> Tensor:
    """The mean over the last dimension, which stays as 1."""
    node = t.record(_mean_backward, (x,), (), x.shape)
    return attach(t.new("mean", (*x.shape[:-1], 1), x.format), node, x)


def _mean_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("mean_backward", node.context, first(grads).format),)


def to(t: Tape, x: Tensor, format: Format) -> Tensor:
    """`x` in another format; itself if it has that one already."""
    if x.format is format:
        return x
    node = t.record(_to_backward, (x,), (), x.format)
    return attach(t.new("to", x.shape, format), node, x)


def _to_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (laid_out(t.new("to", first(grads).shape, node.context), first(grads)),)


def dropout(t: Tape, x: Tensor, p: float) -> Tensor:
    """Keeps a mask of one byte an element; nothing at all for `p` = 0."""
    if not p or not t.grad:
        return x
    node = t.record(_unary_backward, (x,), (), "dropout")
    out = attach(t.new("dropout", x.shape, x.format), node, x)
    mask = t.new("dropout", x.shape, BOOL)
    keep_output(t, node, mask)
    return out


# --- shapes ------------------------------------------------------------------------------------


def slice_last(t: Tape, x: Tensor, size: int, step: int = 1) -> Tensor:
    """`x[..., a:b:step]`, a view; its backward pass fills a tensor of the input's size."""
    node = t.record(_slice_backward, (x,), (), x.shape)
    return Tensor((*x.shape[:-1], size), x.format, x.storage, node, 0, _part_of_last(x, size, step))


def _part_of_last(x: Tensor, size: int, step: int = 1) -> Strides:
    *outer, last = x.strides or row_major(x.shape)
    return tidy((*x.shape[:-1], size), (*outer, last * step))


def _slice_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("slice_backward", node.context, first(grads).format),)


def split(t: Tape, x: Tensor, *sizes: int, dim: int = -1) -> tuple[Tensor, ...]:
    """Views of `x` along a dimension; their gradients are concatenated."""
    node = t.record(_split_backward, (x,), (), x.shape)
    strides = x.strides or row_major(x.shape)
    before, after = x.shape[:dim], x.shape[dim:][1:]
    shapes = [(*before, size, *after) for size in sizes]
    return tuple(
        Tensor(shape, x.format, x.storage, node, slot, tidy(shape, strides))
        for slot, shape in enumerate(shapes)
    )


def split_tokens(t: Tape, x: Tensor, *sizes: int) -> list[Tensor]:
    """Views of batch, sequence, width along the sequence; their gradients are concatenated."""
    node = t.record(_split_backward, (x,), (), x.shape)
    batch, _, width = x.shape
    shapes = [(batch, size, width) for size in sizes]
    strides = x.strides or row_major(x.shape)
    return [
        Tensor(shape, x.format, x.storage, node, slot, tidy(shape, strides))
        for slot, shape in enumerate(shapes)
    ]


def _split_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    format = next(g.format for g in grads if g is not None)
    return (t.new("split_backward", node.context, format),)


def narrow(t: Tape, x: Tensor, dim: int, size: int) -> Tensor:
    """Some neighbouring entries of one dimension, a view; its backward pass fills a tensor."""
    node = t.record(_slice_backward, (x,), (), x.shape)
    shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
    return Tensor(shape, x.format, x.storage, node, 0, tidy(shape, x.strides or row_major(x.shape)))


def select(t: Tape, x: Tensor, dim: int) -> Tensor:
    """One entry of a dimension, which goes, as a view; its backward pass fills a tensor."""
    node = t.record(_slice_backward, (x,), (), x.shape)
    strides = x.strides or row_major(x.shape)
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    left = tidy(shape, (*strides[:dim], *strides[dim + 1 :]))
    return Tensor(shape, x.format, x.storage, node, 0, left)


def pick(t: Tape, x: Tensor, dim: int) -> Tensor:
    """One entry of a dimension, which stays as 1, as a copy (indexing with a list)."""
    node = t.record(_scatter_backward, (x,), (t.new("to", (1,), INT64),), x.shape)
    return attach(t.new("index", (*x.shape[:dim], 1, *x.shape[dim + 1 :]), x.format), node)


def add_to_last(t: Tape, x: Tensor, other: Tensor, size: int) -> Tensor:
    """`x[-size:] += other` of the first dimension, which Python ends by copying the sum to itself.

    Both steps copy the whole gradient and the part of it that is theirs (`CopySlices`).
    """
    shape = (size, *x.shape[1:])
    node = t.record(_add_to_last_backward, (x, other), (), shape)
    x = Tensor(x.shape, x.format, x.storage, node, 0, x.strides)
    node = t.record(_assemble_backward, (x, narrow(t, x, 0, size)), (), shape)
    return Tensor(x.shape, x.format, x.storage, node, 0, x.strides)


def _add_to_last_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    whole = laid_out(t.new("copy_slices", grad.shape, grad.format), grad)
    return whole, t.new("copy", node.context, grad.format)


def spread(t: Tape, x: Tensor) -> Tensor:
    """The standard deviation over the last dimension, which stays as 1; keeps both."""
    node = t.record(_spread_backward, (x,), (x,))
    out = attach(t.new("std", (*x.shape[:-1], 1), x.format), node)
    keep_output(t, node, out)
    return out


def _spread_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad, x = first(grads), node.saved[0]
    assert x is not None
    centred = t.new("sub", x.shape, grad.format)
    out = t.new("std_backward", x.shape, grad.format)
    del centred
    return (out,)


def length(t: Tape, x: Tensor) -> Tensor:
    """The Euclidean length of the last dimension, which stays as 1; keeps both."""
    node = t.record(_length_backward, (x,), (x,))
    out = attach(t.new("linalg_vector_norm", (*x.shape[:-1], 1), x.format), node)
    keep_output(t, node, out)
    return out


def _length_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad, x = first(grads), node.saved[0]
    assert x is not None
    ratio = t.new("div", grad.shape, grad.format)
    filled = t.new("masked_fill", grad.shape, grad.format)
    out = t.new("norm_backward", x.shape, grad.format)
    del ratio, filled
    return (out,)


def convolution(t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """A convolution along the last dimension; keeps its input and weight."""
    offsets = [cast(t, bias)] if bias is not None else []
    weight = cast(t, weight)
    inputs = [cast(t, x), weight, *offsets]
    node = t.record(_convolution_backward, inputs, inputs[:2], [i.shape for i in inputs])
    return attach(t.new("convolution", shape, inputs[0].format), node)


def _convolution_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    return [
        t.new("convolution_backward", shape, grad.format) if node.needs(index) else None
        for index, shape in enumerate(node.context)
    ]


def expand(t: Tape, x: Tensor, *shape: int) -> Tensor:
    """The same numbers again along dimensions of one entry, a view; gradients are summed."""
    if shape == x.shape:
        return x
    node = t.record(_repeat_backward, (x,), (), x.shape)
    more = (0,) * (len(shape) - len(x.shape))
    own = zip(x.shape, shape[len(more) :], x.strides or row_major(x.shape), strict=True)
    strides = (*more, *[0 if a != b else step for a, b, step in own])
    return Tensor(shape, x.format, x.storage, node, 0, strides)


def cat(t: Tape, parts: Sequence[Tensor], dim: int = -1) -> Tensor:
    """The parts one after another; the gradient is handed back in views."""
    node = t.record(_cat_backward, parts, (), [p.shape for p in parts])
    shape = list(parts[0].shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    return attach(t.new("cat", tuple(shape), parts[0].format), node)


def _cat_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    steps = grad.strides or row_major(grad.shape)
    return [
        Tensor(shape, grad.format, grad.storage, strides=tidy(shape, steps))
        for shape in node.context
    ]


def pad_last(t: Tape, x: Tensor, more: int) -> Tensor:
    """`x` with that many zeros more along the last dimension, as a copy."""
    node = t.record(_pad_backward, (x,), (), x.shape)
    return attach(t.new("pad", (*x.shape[:-1], x.shape[-1] + more), x.format), node)


def _pad_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("pad_backward", node.context, first(grads).format),)


def assemble(t: Tape, shape: Shape, parts: Sequence[Tensor]) -> Tensor:
    """A new tensor that the parts are copied into, one after another along the last dimension.

    Each copy's backward pass copies the whole gradient, and clears what the part had overwritten
    if anything that wants a gradient was there (torch/csrc/autograd/functions/tensor.cpp,
    `CopySlices`).
    """
    whole = t.new("new_empty", shape, parts[0].format)
    for part in parts:
        node = t.record(_assemble_backward, (whole, part), (), part.shape)
        whole = Tensor(shape, whole.format, whole.storage, node)
    return whole


def _assemble_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    whole = laid_out(t.new("copy_slices", grad.shape, grad.format), grad)
    part = t.new("copy", node.context, grad.format)
    if not node.needs(0):
        return None, part
    zeros = t.new("zeros", node.context, grad.format)
    del zeros
    return whole, part


def transpose(t: Tape, x: Tensor, a: int, b: int) -> Tensor:
    """A view with two dimensions exchanged."""
    order = list(range(len(x.shape)))
    order[a], order[b] = order[b], order[a]
    return rearranged(x, order, t.record(_transpose_backward, (x,), (), order))


def permute(t: Tape, x: Tensor, *order: int) -> Tensor:
    """A view with the dimensions in that order."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return rearranged(x, order, t.record(_transpose_backward, (x,), (), back))


def _transpose_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (rearranged(first(grads), node.context),)


def rearranged(x: Tensor, order: Sequence[int], node: Node | None = None) -> Tensor:
    """A view with the dimensions in another order, as the output of `node`."""
    shape = tuple([x.shape[i] for i in order])
    return Tensor(shape, x.format, x.storage, node, 0, moved(x.shape, x.strides, order))


def reshape(t: Tape, x: Tensor, *shape: int) -> Tensor:
    """The same numbers in another shape: a view if their layout allows, or else a copy."""
    return _reshaped(t, x, shape, t.record(_reshape_backward, (x,), (), x.shape))


def _reshape_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (_reshaped(t, first(grads), node.context),)


def _reshaped(t: Tape, x: Tensor, shape: Shape, node: Node | None = None) -> Tensor:
    possible, strides = viewed(x.shape, x.strides, shape)
    if not possible:
        return attach(t.new("copy", shape, x.format), node)
    return Tensor(shape, x.format, x.storage, node, 0, strides)


def contiguous(t: Tape, x: Tensor) -> Tensor:
    """`x` row-major: itself, or a copy."""
    return x if x.strides is None else copy(t, x)


def copy(t: Tape, x: Tensor) -> Tensor:
    """`x` laid out anew, row-major."""
    return attach(t.new("copy", x.shape, x.format), t.record(_same_backward, (x,)))


def split_heads(t: Tape, x: Tensor, heads: int) -> Tensor:
    """A projection (batch, sequence, width) seen as batch, heads, sequence, channels."""
    batch, sequence, width = x.shape
    node = t.record(_split_heads_backward, (x,), (), x.shape)
    by_token = _reshaped(t, x, (batch, sequence, heads, width // heads))
    return rearranged(by_token, (0, 2, 1, 3), node)


def _split_heads_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (_reshaped(t, rearranged(first(grads), (0, 2, 1, 3)), node.context),)


def merge_heads(t: Tape, x: Tensor) -> Tensor:
    """The heads' channels side by side: a copy, unless they are laid out so already."""
    batch, heads, sequence, channels = x.shape
    node = t.record(_merge_heads_backward, (x,), (), (batch, sequence, heads, channels))
    return _reshaped(t, rearranged(x, (0, 2, 1, 3)), (batch, sequence, heads * channels), node)


def _merge_heads_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (rearranged(_reshaped(t, first(grads), node.context), (0, 2, 1, 3)),)


def repeat(t: Tape, x: Tensor, times: int) -> Tensor:
    """KV heads repeated for the query heads that share them: batch, heads, sequence, channels.

    A copy, unless there is only one head to repeat.
    """
    if times == 1:
        return x
    batch, heads, sequence, channels = x.shape
    if heads == 1:
        return expand(t, x, batch, times, sequence, channels)
    node = t.record(_repeat_backward, (x,), (), x.shape)
    return attach(t.new("repeat", (batch, heads * times, sequence, channels), x.format), node)


def repeat_first(t: Tape, x: Tensor, times: int) -> Tensor:
    """`x` that many times along a new first dimension, as a copy."""
    node = t.record(_repeat_backward, (x,), (), x.shape)
    return attach(t.new("repeat", (times, *x.shape), x.format), node)


def _repeat_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("sum", node.context, first(grads).format),)


def tile(t: Tape, x: Tensor, times: int) -> Tensor:
    """`x`, whose first dimension is 1, copied so many times."""
    node = t.record(_repeat_backward, (x,), (), x.shape)
    return attach(t.new("repeat", (times, *x.shape[1:]), x.format), node)


# --- picking -----------------------------------------------------------------------------------


def topk(t: Tape, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of the last dimension and where they are, which it keeps."""
    shape = (*x.shape[:-1], k)
    values, indices = t.new("topk", shape, x.format), t.new("topk", shape, INT64)
    return attach(values, t.record(_scatter_backward, (x,), (indices,), x.shape)), indices


def highest(t: Tape, x: Tensor) -> Tensor:
    """The highest of the last dimension, which stays as 1; keeps where it was."""
    shape = (*x.shape[:-1], 1)
    values, indices = t.new("max", shape, x.format), t.new("max", shape, INT64)
    return attach(values, t.record(_scatter_backward, (x,), (indices,), x.shape))


def scatter_in_place(t: Tape, x: Tensor, source: Tensor, indices: Tensor) -> Tensor:
    """`source` written into a constant `x` at `indices` of the last dimension, which it keeps."""
    node = t.record(_gather_backward, (source,), (indices,), source.shape)
    return Tensor(x.shape, x.format, x.storage, node, 0, x.strides)


def _gather_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("gather", node.context, first(grads).format),)


def gather(t: Tape, x: Tensor, indices: Tensor) -> Tensor:
    """The entries of the last dimension at `indices`, which it keeps."""
    node = t.record(_scatter_backward, (x,), (indices,), x.shape)
    return attach(t.new("gather", indices.shape, x.format), node)


def index(t: Tape, x: Tensor, indices: Tensor) -> Tensor:
    """The rows of `x` at `indices`, which it keeps."""
    node = t.record(_scatter_backward, (x,), (indices,), x.shape)
    return attach(t.new("index", (*indices.shape, *x.shape[1:]), x.format), node)


def scattered(t: Tape, x: Tensor, indices: Tensor) -> Tensor:
    """A copy of `x` with a number at `indices` of the last dimension, which it keeps."""
    node = t.record(_unary_backward, (x,), (indices,), "scatter")
    return attach(t.new("scatter", x.shape, x.format), node)


def _scatter_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    zeros = t.new("zeros", node.context, first(grads).format)
    filled = t.new("scatter", node.context, first(grads).format)
    del zeros
    return (filled,)


def index_copy(t: Tape, source: Tensor, size: int) -> Tensor:
    """Zeros with the columns of `source` in some places of their `size` columns; keeps it."""
    node = t.record(_index_copy_backward, (source,), (source,), source.shape)
    return attach(t.new("index_copy", (*source.shape[:-1], size), source.format), node)


def _index_copy_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("index_select", node.context, first(grads).format),)


def total(t: Tape, x: Tensor) -> Tensor:
    """The sum over the last dimension, which stays as 1; its gradient is expanded as a view."""
    node = t.record(_total_backward, (x,), (), x.shape)
    return attach(t.new("sum", (*x.shape[:-1], 1), x.format), node)


def _total_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    return (Tensor(node.context, grad.format, grad.storage),)


def sum_first(t: Tape, x: Tensor) -> Tensor:
    """The sum over the first dimension, in fp32 under autocast; its gradient is a view."""
    node = t.record(_sum_first_backward, (x,), (), x.shape)
    return attach(t.new("sum", x.shape[1:], FP32 if t.autocast else x.format), node)


def _sum_first_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    strides = (0, *(grad.strides or row_major(grad.shape)))
    return (Tensor(node.context, grad.format, grad.storage, strides=strides),)


def sum_over(t: Tape, x: Tensor, dim: int, *, keep: bool = False) -> Tensor:
    """The sum over one dimension, which stays as 1 if asked to; its gradient is a view."""
    node = t.record(_total_backward, (x,), (), x.shape)
    left = (1,) if keep else ()
    return attach(t.new("sum", (*x.shape[:dim], *left, *x.shape[dim + 1 :]), x.format), node)


def sum_chosen(t: Tape, x: Tensor, chosen: int) -> Tensor:
    """Every `chosen` rows summed; the gradient is copied for each of them."""
    node = t.record(_sum_chosen_backward, (x,), (), x.shape)
    return attach(t.new("sum", (x.shape[0] // chosen, *x.shape[1:]), x.format), node)


def _sum_chosen_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("copy", node.context, first(grads).format),)


def divide_in_place(t: Tape, x: Tensor, divisor: Tensor) -> Tensor:
    """`x /= divisor`; keeps the divisor and a copy of what `x` was."""
    node = t.record(_divide_backward, (x, divisor), (divisor,))
    if node is not None:
        t.keep(node, t.new("copy", x.shape, x.format))
    return Tensor(x.shape, x.format, x.storage, node)


def divide(t: Tape, x: Tensor, divisor: Tensor) -> Tensor:
    """`x / divisor`; keeps the divisor, and `x` too if the divisor wants a gradient."""
    wanted = x if divisor.node is not None else None
    node = t.record(_divide_backward, (x, divisor), (divisor, wanted))
    return attach(t.new("div", x.shape, x.format), node, x)


def _divide_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    if not node.needs(1):
        return t.new("div", grad.shape, grad.format), None
    made = [t.new(name, grad.shape, grad.format) for name in ("div", "div", "neg")]
    to_divisor = t.new("mul", grad.shape, grad.format)
    to_x = t.new("div", grad.shape, grad.format)
    made.clear()
    return to_x, to_divisor


# --- matrix products ---------------------------------------------------------------------------


def cast(t: Tape, x: Tensor) -> Tensor:
    """`x` as autocast hands it to a matrix product; a trained weight's copy is made once.

    A view of a weight is copied for every use.
    """
    if t.autocast is None or x.format is t.autocast or x.format is not FP32:
        return x
    from llmsize.anatomy.tape import Parameter

    if not isinstance(x, Parameter) or x.node is None:
        return to(t, x, t.autocast)
    copy = t.casts.get(id(x))
    if copy is None:
        copy = to(t, x, t.autocast)
        assert copy.storage is not None
        copy.storage.becomes("cast")
        if not x.viewed:
            t.casts[id(x)] = copy
    return copy


def matmul(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """Batched `a @ b` over the last two dimensions; keeps the factor the other one needs."""
    b = cast(t, b)
    a = cast(t, a)
    casts = a, b  # which live as long as the product takes
    outer = broadcast(a.shape[:-2], b.shape[:-2])
    a = batched(t, expand(t, a, *outer, *a.shape[-2:]))
    b = batched(t, expand(t, b, *outer, *b.shape[-2:]))
    out = bmm(t, a, b)
    del casts
    return out


def bmm(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of stacks of matrices as they are; keeps the factor the other one needs."""
    b = cast(t, b)
    a = cast(t, a)
    node = t.record(
        _matmul_backward,
        (a, b),
        (b if a.node is not None else None, a if b.node is not None else None),
        (a.shape, b.shape),
    )
    return attach(t.new("bmm", (*a.shape[:-1], b.shape[-1]), a.format), node)


def batched(t: Tape, x: Tensor) -> Tensor:
    """`x` with all dimensions but the last two seen as one, which may take a copy."""
    possible, _ = viewed(x.shape, x.strides, (prod(x.shape[:-2]), *x.shape[-2:]))
    return x if possible else copy(t, x)


def flat(t: Tape, x: Tensor) -> Tensor:
    """`x` with all dimensions but the last one seen as one, which may take a copy."""
    possible, _ = viewed(x.shape, x.strides, (prod(x.shape[:-1]), x.shape[-1]))
    return x if possible else copy(t, x)


def _matmul_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = batched(t, first(grads))
    grads.clear()  # a view of the product made the copy, and has let go of what came
    a_shape, b_shape = node.context
    to_b = _product(t, "bmm_backward", b_shape, grad) if node.needs(1) else None
    return _product(t, "bmm_backward", a_shape, grad) if node.needs(0) else None, to_b


def _product(t: Tape, operation: str, shape: Shape, grad: Tensor) -> Tensor:
    """A gradient that a matrix product gives, seen in the shape of what it is for."""
    return t.new(operation, shape, grad.format).view(*shape)


def linear(
    t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: int | None = None
) -> Tensor:
    """`x @ weight.T + bias`; keeps its input if the weight is trained, the weight if the input is.

    `out` is the number of output features where the weight is stored the other way round.
    """
    bias = cast(t, bias) if bias is not None else None
    weight = cast(t, weight)
    x = flat(t, cast(t, x))
    inputs = (x, weight) if bias is None else (x, weight, bias)
    saved = (x if weight.node is not None else None, weight if x.node is not None else None)
    node = t.record(_linear_backward, inputs, saved, (x.shape, weight.shape))
    return attach(t.new("mm", (*x.shape[:-1], out or weight.shape[0]), x.format), node)


def _linear_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = flat(t, first(grads))
    grads.clear()  # a view of the product made the copy, and has let go of what came
    x_shape, weight_shape = node.context
    if len(node.edges) == 3:  # addmm: the bias's gradient is summed from what came
        to_x = _product(t, "mm", x_shape, grad) if node.needs(0) else None
        return to_x, _product(t, "mm", weight_shape, grad) if node.needs(1) else None, grad
    to_weight = _product(t, "mm", weight_shape, grad) if node.needs(1) else None
    return _product(t, "mm", x_shape, grad) if node.needs(0) else None, to_weight


def dequantized_linear(
    t: Tape, x: Tensor, weight: Tensor, out: int, *, keeps_input: bool = False
) -> Tensor:
    """`x @ weight.T` for a frozen weight that is stored quantized.

    It is brought back to 16 bit for the product and let go of; so again in the backward pass
    (bitsandbytes v0.50, bitsandbytes/autograd/_functions.py, MatMul4Bit).
    """
    saved = (x,) if keeps_input else ()
    node = t.record(_dequantized_backward, (x,), saved, (x.shape, weight))
    whole = t.new("dequantize", weight.shape, x.format)
    result = attach(t.new("mm", (*x.shape[:-1], out), x.format), node)
    del whole
    return result


def int8_linear(t: Tape, x: Tensor, weight: Tensor, out: int) -> Tensor:
    """`x @ weight.T` in int8 for a frozen weight in int8: `x` is quantized for it, and kept.

    The weight is brought back to 16 bit in the backward pass only (bitsandbytes v0.50,
    bitsandbytes/autograd/_functions.py, MatMul8bitLt); outliers are not counted.
    """
    node = t.record(_dequantized_backward, (x,), (x,), (x.shape, weight))
    half = to(t, Tensor(x.shape, x.format, x.storage), FP16)
    quantized = t.new("int8_vectorwise_quant", x.shape, INT8)
    del half
    product = t.new("int8_linear_matmul", (*x.shape[:-1], out), INT32)
    result = attach(t.new("int8_mm_dequant", product.shape, x.format), node)
    del quantized, product
    return result


def _dequantized_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    shape, weight = node.context
    whole = t.new("dequantize", weight.shape, grad.format)
    to_x = t.new("mm", shape, grad.format)
    del whole
    return (to_x,)


def grouped_linear(t: Tape, x: Tensor, weight: Tensor, ends: Tensor, out: int) -> Tensor:
    """A linear layer of each expert for the rows of its tokens, which end at `ends`.

    One product for all (`torch.nn.functional.grouped_mm`); autocast leaves it alone.
    """
    x = to(t, x, weight.format)
    saved = (x if weight.node is not None else None, weight if x.node is not None else None)
    node = t.record(_linear_backward, (x, weight), (*saved, ends), (x.shape, weight.shape))
    return attach(t.new("grouped_mm", (x.shape[0], out), x.format), node)


def merged_adapter(t: Tape, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`weight + up @ down` as a tensor of its own, from their product in the factors' format."""
    change = to(t, scale(t, linear(t, up, down, out=weight.shape[1])), weight.format)
    return add(t, weight, change)


def add_product(t: Tape, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`base + scale * a @ b` in one kernel (`baddbmm`), broadcast; keeps the factors."""
    base, a, b = (cast(t, x) for x in (base, a, b))
    node = t.record(_add_product_backward, (a, b), (a, b))
    shape = broadcast(base.shape, (*a.shape[:-1], b.shape[-1]))
    return attach(t.new("baddbmm", shape, a.format), node)


def _add_product_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    made: list[Tensor | None] = []
    for index, factor in enumerate(node.saved):
        assert factor is not None
        if not node.needs(index):
            made.append(None)
            continue
        product = t.new("bmm_backward", factor.shape, first(grads).format)
        made.append(t.new("mul", factor.shape, first(grads).format))
        del product
    return made


def embedding(t: Tape, table: Tensor, *shape: int, indices: Tensor | None = None) -> Tensor:
    """Rows of `table` for `indices` of `shape`, which it keeps; its backward pass fills a table.

    The model's input needs no `indices`: it lives through the step.
    """
    node = t.record(_embedding_backward, (table,), (indices,), table.shape)
    return attach(t.new("embedding", (*shape, table.shape[-1]), table.format), node)


def _embedding_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("embedding_dense_backward", node.context, first(grads).format),)


# --- norms and softmax -------------------------------------------------------------------------


def layer_norm(t: Tape, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """LayerNorm in one kernel: keeps its input, the mean and the reciprocal deviation in fp32."""
    weights = [w for w in (weight, bias) if w is not None]
    if t.autocast:
        x, *weights = (to(t, part, FP32) for part in (x, *weights))
    node = t.record(_layer_norm_backward, (x, *weights), (x, *weights), [w.shape for w in weights])
    out = attach(t.new("layer_norm", x.shape, x.format), node)
    for _ in ("mean", "rstd"):
        keep_output(t, node, t.new("layer_norm", (*x.shape[:-1], 1), FP32))
    return out


def _layer_norm_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    to_x = t.new("layer_norm_backward", grad.shape, grad.format) if node.needs(0) else None
    return (to_x, *[t.new("layer_norm_backward", s, grad.format) if node.needs(i + 1) else None
                    for i, s in enumerate(node.context)])  # fmt: skip


def softmax(t: Tape, x: Tensor, format: Format | None = None) -> Tensor:
    """Softmax over the last dimension, computed in `format`; keeps its output."""
    if t.autocast and format is None:
        format = FP32
    converted = to(t, x, format) if format else x
    return unary(t, "softmax", converted, keeps="output")


def fused_norm(t: Tape, x: Tensor, *weights: Tensor) -> Tensor:
    """A norm in one kernel: keeps its input and one fp32 number a token; makes only its result.

    Liger-Kernel v0.6, ops/rms_norm.py; torch's `_fused_rms_norm`.
    """
    node = t.record(_layer_norm_backward, (x, *weights), (x,), [w.shape for w in weights])
    out = attach(t.new("fused_norm", x.shape, x.format), node, x)
    keep_output(t, node, t.new("fused_norm", (*x.shape[:-1], 1), FP32))
    return out


def rotate_in_place(t: Tape, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding written over its input, forward and backward; keeps the tables only."""
    node = t.record(_same_backward, (x,), (cosines, sines))
    return Tensor(x.shape, x.format, x.storage, node, 0, x.strides)


def gated_product(t: Tape, gate: Tensor, up: Tensor) -> Tensor:
    """`activation(gate) * up` in one kernel: keeps both, and writes their gradients over them."""
    node = t.record(_gated_backward, (gate, up), (gate, up))
    return attach(t.new("gated_product", gate.shape, gate.format), node)


def _gated_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return [
        None if x is None else Tensor(x.shape, x.format, x.storage, strides=x.strides)
        for x in node.saved
    ]


def fused_linear_cross_entropy(
    t: Tape, x: Tensor, weight: Tensor, targets: Tensor, vocabulary: int
) -> Tensor:
    """Head and loss together, some tokens at a time, with their gradients made in the forward.

    Liger-Kernel v0.6, ops/fused_linear_cross_entropy.py: as many chunks as the vocabulary is wide
    in units of the hidden size, of a power of two tokens.
    """
    tokens, hidden = prod(x.shape[:-1]), x.shape[-1]
    chunk = 1 << (-(-tokens // -(-vocabulary // hidden)) - 1).bit_length()
    node = t.record(_precomputed_backward, (x, weight))
    to_x = t.new("fused_linear_cross_entropy", x.shape, x.format)
    wants = weight.node is not None
    to_weight = t.new("fused_linear_cross_entropy", weight.shape, weight.format) if wants else None
    losses = t.new("fused_linear_cross_entropy", (tokens,), FP32)
    logits = t.new("mm", (min(chunk, tokens), vocabulary), x.format)
    product = t.new("mm", weight.shape, weight.format) if wants else None
    del logits, product
    if node is not None:
        t.keep(node, to_x)
        t.keep(node, to_weight)
    del losses
    return attach(t.new("sum", (), FP32), node)


def _precomputed_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return list(node.saved)


def compiled_cross_entropy(t: Tape, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss as one compiled kernel: keeps the 16-bit logits and one number a token."""
    node = t.record(_logits_backward, (logits,), (logits, targets), (logits.shape, logits.format))
    loss = attach(t.new("cross_entropy", (), FP32), node)
    keep_output(t, node, t.new("cross_entropy", (*logits.shape[:-1], 1), FP32))
    return loss


def _logits_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("cross_entropy_backward", *node.context),)


def cross_entropy(t: Tape, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of `logits`: keeps the log-probabilities.

    Those have the format of the logits also under autocast, which takes them to fp32 for the mean.
    """
    node = t.record(_unary_backward, (logits,), (), "log_softmax")
    log_probabilities = attach(t.new("log_softmax", logits.shape, logits.format), node)
    keep_output(t, node, log_probabilities)
    if t.autocast:
        log_probabilities = to(t, log_probabilities, FP32)
    return nll_loss(t, log_probabilities, targets)


def nll_loss(t: Tape, log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """The mean of the targets' negative log-probabilities; keeps both and the total weight."""
    shape, format = log_probabilities.shape, log_probabilities.format
    saved = (log_probabilities, targets)
    node = t.record(_nll_backward, (log_probabilities,), saved, (shape, format))
    loss = attach(t.new("nll_loss", (), format), node)
    keep_output(t, node, t.new("nll_loss", (), format))
    return loss


def _nll_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("nll_loss_backward", *node.context),)
