"""Operations that make one number of many."""

from __future__ import annotations

from llmsize.anatomy.autograd import Grads, Node, Rule
from llmsize.anatomy.layout import row_major
from llmsize.anatomy.operations.elementwise import in_fp32
from llmsize.anatomy.operations.rules import (
    GradList,
    first,
    keep_output,
    whole_backward,
)
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Tensor, laid_out
from llmsize.formats import FP32, Format


def mean(t: Tape, x: Tensor) -> Tensor:
    """The mean over the last dimension, which stays as 1."""
    node = t.record(whole_backward, (x,), (), ("mean_backward", x.shape))
    return laid_out(t.new("mean", (*x.shape[:-1], 1), x.format, node), x)


def spread(t: Tape, x: Tensor) -> Tensor:
    """The standard deviation over the last dimension, which stays as 1; keeps both."""
    return _measure(t, "std", x, _spread_backward)


def _measure(t: Tape, operation: str, x: Tensor, backward: Rule) -> Tensor:
    node = t.record(backward, (x,), (x,))
    out = t.new(operation, (*x.shape[:-1], 1), x.format, node)
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
    return _measure(t, "linalg_vector_norm", x, _length_backward)


def _length_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad, x = first(grads), node.saved[0]
    assert x is not None
    ratio = t.new("div", grad.shape, grad.format)
    filled = t.new("masked_fill", grad.shape, grad.format)
    out = t.new("norm_backward", x.shape, grad.format)
    del ratio, filled
    return (out,)


def total(t: Tape, x: Tensor) -> Tensor:
    """The sum over the last dimension, which stays as 1; its gradient is expanded as a view."""
    node = t.record(_total_backward, (x,), (), x.shape)
    return t.new("sum", (*x.shape[:-1], 1), x.format, node)


def _total_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    return (Tensor(node.context, grad.format, grad.storage),)


def sum_over(t: Tape, x: Tensor, dim: int, *, keep: bool = False) -> Tensor:
    """The sum over one dimension, which stays as 1 if asked to; its gradient is a view."""
    node = t.record(_total_backward, (x,), (), x.shape)
    left = (1,) if keep else ()
    return t.new("sum", (*x.shape[:dim], *left, *x.shape[dim + 1 :]), x.format, node)


def log_sum_exp(t: Tape, x: Tensor) -> Tensor:
    """The logarithm of the summed exponentials of the last dimension, which stays as 1; keeps its
    input and its output. Under autocast it runs in fp32."""
    x = in_fp32(t, x)
    node = t.record(_log_sum_exp_backward, (x,), (x,), x.shape)
    out = t.new("logsumexp", (*x.shape[:-1], 1), x.format, node)
    keep_output(t, node, out)
    return out


def _log_sum_exp_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    format = first(grads).format
    difference, raised = t.new("sub", node.context, format), t.new("exp", node.context, format)
    result = t.new("mul", node.context, format)
    del difference, raised
    return (result,)


def sum_first(t: Tape, x: Tensor, format: Format | None = None) -> Tensor:
    """The sum over the first dimension, in a `format` or, under autocast, in fp32; its gradient is
    a view."""
    node = t.record(_sum_first_backward, (x,), (), x.shape)
    return t.new("sum", x.shape[1:], format or (FP32 if t.autocast else x.format), node)


def _sum_first_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    strides = (0, *(grad.strides or row_major(grad.shape)))
    return (Tensor(node.context, grad.format, grad.storage, strides=strides),)


def sum_chosen(t: Tape, x: Tensor, chosen: int) -> Tensor:
    """Every `chosen` rows summed; the gradient is copied for each of them."""
    node = t.record(whole_backward, (x,), (), ("copy", x.shape))
    return t.new("sum", (x.shape[0] // chosen, *x.shape[1:]), x.format, node)
