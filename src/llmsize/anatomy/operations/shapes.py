"""Operations that show the same numbers otherwise: views, and copies where a view cannot."""

from __future__ import annotations

from collections.abc import Sequence

from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.layout import Strides, moved, row_major, tidy, viewed
from llmsize.anatomy.operations.rules import (
    GradList,
    first,
    same_backward,
    whole_backward,
)
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Shape, Tensor


def slice_last(t: Tape, x: Tensor, size: int, step: int = 1) -> Tensor:
    """`x[..., a:b:step]`, a view; its backward pass fills a tensor of the input's size."""
    node = t.record(whole_backward, (x,), (), ("slice_backward", x.shape))
    return Tensor((*x.shape[:-1], size), x.format, x.storage, node, 0, _part_of_last(x, size, step))


def _part_of_last(x: Tensor, size: int, step: int = 1) -> Strides:
    *outer, last = x.strides or row_major(x.shape)
    return tidy((*x.shape[:-1], size), (*outer, last * step))


def narrow(t: Tape, x: Tensor, dim: int, size: int) -> Tensor:
    """Some neighbouring entries of one dimension, a view; its backward pass fills a tensor."""
    node = t.record(whole_backward, (x,), (), ("slice_backward", x.shape))
    shape = (*x.shape[:dim], size, *x.shape[dim + 1 :])
    return Tensor(shape, x.format, x.storage, node, 0, tidy(shape, x.strides or row_major(x.shape)))


def select(t: Tape, x: Tensor, dim: int) -> Tensor:
    """One entry of a dimension, which goes, as a view; its backward pass fills a tensor."""
    node = t.record(whole_backward, (x,), (), ("slice_backward", x.shape))
    strides = x.strides or row_major(x.shape)
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    left = tidy(shape, (*strides[:dim], *strides[dim + 1 :]))
    return Tensor(shape, x.format, x.storage, node, 0, left)


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


def _split_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    format = next(g.format for g in grads if g is not None)
    return (t.new("split_backward", node.context, format),)


def expand(t: Tape, x: Tensor, *shape: int) -> Tensor:
    """The same numbers again along dimensions of one entry, a view; gradients are summed."""
    if shape == x.shape:
        return x
    node = t.record(whole_backward, (x,), (), ("sum", x.shape))
    more = (0,) * (len(shape) - len(x.shape))
    own = zip(x.shape, shape[len(more) :], x.strides or row_major(x.shape), strict=True)
    strides = (*more, *[0 if a != b else step for a, b, step in own])
    return Tensor(shape, x.format, x.storage, node, 0, strides)


def repeat(t: Tape, x: Tensor, times: int) -> Tensor:
    """KV heads repeated for the query heads that share them: batch, heads, sequence, channels.

    A copy, unless there is only one head to repeat.
    """
    if times == 1:
        return x
    batch, heads, sequence, channels = x.shape
    if heads == 1:
        return expand(t, x, batch, times, sequence, channels)
    node = t.record(whole_backward, (x,), (), ("sum", x.shape))
    return t.new("repeat", (batch, heads * times, sequence, channels), x.format, node)


def repeat_first(t: Tape, x: Tensor, times: int) -> Tensor:
    """`x` that many times along a new first dimension, as a copy."""
    node = t.record(whole_backward, (x,), (), ("sum", x.shape))
    return t.new("repeat", (times, *x.shape), x.format, node)


def tile(t: Tape, x: Tensor, times: int) -> Tensor:
    """`x`, whose first dimension is 1, copied so many times."""
    node = t.record(whole_backward, (x,), (), ("sum", x.shape))
    return t.new("repeat", (times, *x.shape[1:]), x.format, node)


def cat(t: Tape, parts: Sequence[Tensor], dim: int = -1) -> Tensor:
    """The parts one after another; the gradient is handed back in views."""
    node = t.record(_cat_backward, parts, (), [p.shape for p in parts])
    shape = list(parts[0].shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    return t.new("cat", tuple(shape), parts[0].format, node)


def _cat_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    steps = grad.strides or row_major(grad.shape)
    return [
        Tensor(shape, grad.format, grad.storage, strides=tidy(shape, steps))
        for shape in node.context
    ]


def pad_last(t: Tape, x: Tensor, more: int) -> Tensor:
    """`x` with that many zeros more along the last dimension, as a copy."""
    return pad(t, x, more, len(x.shape) - 1)


def pad(t: Tape, x: Tensor, more: int, dim: int) -> Tensor:
    """`x` with that many zeros more along a dimension, as a copy."""
    node = t.record(whole_backward, (x,), (), ("pad_backward", x.shape))
    shape = (*x.shape[:dim], x.shape[dim] + more, *x.shape[dim + 1 :])
    return t.new("pad", shape, x.format, node)


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
    whole = t.like("copy_slices", grad)
    part = t.new("copy", node.context, grad.format)
    if not node.needs(0):
        return None, part
    zeros = t.new("zeros", node.context, grad.format)
    del zeros
    return whole, part


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
    whole = t.like("copy_slices", grad)
    return whole, t.new("copy", node.context, grad.format)


def transpose(t: Tape, x: Tensor, a: int, b: int) -> Tensor:
    """A view with two dimensions exchanged."""
    places = list(range(len(x.shape)))
    places[a], places[b] = places[b], places[a]
    order = tuple(places)
    return rearranged(x, order, t.record(_transpose_backward, (x,), (), order))


def permute(t: Tape, x: Tensor, *order: int) -> Tensor:
    """A view with the dimensions in that order."""
    back = tuple(sorted(range(len(order)), key=order.__getitem__))
    return rearranged(x, order, t.record(_transpose_backward, (x,), (), back))


def _transpose_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (rearranged(first(grads), node.context),)


def rearranged(x: Tensor, order: tuple[int, ...], node: Node | None = None) -> Tensor:
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
        return t.new("copy", shape, x.format, node)
    return Tensor(shape, x.format, x.storage, node, 0, strides)


def contiguous(t: Tape, x: Tensor) -> Tensor:
    """`x` row-major: itself, or a copy."""
    return x if x.strides is None else copy(t, x)


def copy(t: Tape, x: Tensor) -> Tensor:
    """`x` laid out anew, row-major."""
    return t.new("copy", x.shape, x.format, t.record(same_backward, (x,)))


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
