"""What the rules of all operations share: results, what they keep, and common backward passes."""

from __future__ import annotations

from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Shape, Tensor, laid_out
from llmsize.formats import BOOL, INT8, INT32, INT64, Format

GradList = list[Tensor | None]
"""The gradients of an operation's outputs, as its backward pass gets them."""


def first(grads: GradList) -> Tensor:
    """The gradient of an operation's only output."""
    grad = grads[0]
    assert grad is not None
    return grad


def of_result(grads: GradList, shape: Shape) -> Tensor:
    """The gradient of an operation's only output, which has that shape; it comes in that of a view
    where a view of the output went on."""
    grad = first(grads)
    return grad if grad.shape == shape else grad.view(*shape)


def keep_output(t: Tape, node: Node | None, output: Tensor) -> None:
    """Keep an output for the node's own backward pass (without a cycle back to the node)."""
    if node is not None:
        kept = Tensor(output.shape, output.format, output.storage, strides=output.strides)
        t.keep(node, (kept,))


def softmax_input(t: Tape, x: Tensor) -> tuple[Tensor, ...]:
    """What softmax and its logarithm keep of their input: PyTorch before 1.11 all of it, though no
    gradient needs it (pytorch/pytorch issue 64000, mended by pull request 66018)."""
    return (x,) if t.softmax_keeps_input else ()


WHOLE = frozenset(format.name for format in (BOOL, INT8, INT32, INT64))
"""Formats of whole numbers, which fractions win over."""


def promoted(a: Format, b: Format) -> Format:
    """The format of an operation on both: the wider one."""
    whole = a.name in WHOLE
    if whole is not (b.name in WHOLE):
        return b if whole else a
    return a if a.block_bytes >= b.block_bytes else b


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape of an elementwise operation on both."""
    if a == b:
        return a
    if len(a) < len(b):
        a, b = b, a
    offset = len(a) - len(b)
    if a[offset:] == b:
        return a
    return a[:offset] + tuple(
        [y if x == 1 and y != 1 else x for x, y in zip(a[offset:], b, strict=True)]
    )


def joined(
    t: Tape,
    operation: str,
    a: Tensor,
    b: Tensor,
    node: Node | None = None,
    shape: Shape | None = None,
) -> Tensor:
    """What an elementwise operation on two tensors makes, of the `shape` of both broadcast."""
    shape = shape or broadcast(a.shape, b.shape)
    format = a.format if a.format is b.format else promoted(a.format, b.format)
    made = t.new(operation, shape, format, node)
    return made if a.strides is None is b.strides else laid_out(made, a, b)


def unary_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """One tensor like the gradient; the node knows the operation's name."""
    grad = first(grads)
    return (t.like(f"{node.context}_backward", grad),)


def same_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """The gradient as it came."""
    return (first(grads),)


def whole_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """One tensor made for the whole input; the node knows the operation and the input's shape."""
    operation, shape = node.context
    return (t.new(operation, shape, first(grads).format),)
