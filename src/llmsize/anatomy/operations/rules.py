"""What the rules of all operations share: results, what they keep, and common backward passes."""

from __future__ import annotations

from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.layout import elementwise
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Shape, Tensor
from llmsize.formats import Format

GradList = list[Tensor | None]
"""The gradients of an operation's outputs, as its backward pass gets them."""


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


def unary_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """One tensor like the gradient; the node knows the operation's name."""
    grad = first(grads)
    return (laid_out(t.new(f"{node.context}_backward", grad.shape, grad.format), grad),)


def same_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """The gradient as it came."""
    return (first(grads),)


def whole_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """One tensor made for the whole input; the node knows the operation and the input's shape."""
    operation, shape = node.context
    return (t.new(operation, shape, first(grads).format),)
