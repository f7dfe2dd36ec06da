"""Operations that recurrent layers are written in, beside those of `operations`.

Names, derivatives and layouts are PyTorch's, as there; `einsum` is aten/src/ATen/native/Linear.cpp,
`sumproduct_pair`, torch v2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.layout import channels_last, looks_channels_last, row_major
from llmsize.anatomy.operations import GradList, first, keep_output
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Tensor, laid_out
from llmsize.formats import BOOL, Format

# --- elementwise ----------------------------------------------------------------------------------


def exp(t: Tape, x: Tensor) -> Tensor:
    """Keeps its output. Under autocast it runs in fp32."""
    return ops.unary(t, "exp", ops.in_fp32(t, x), keeps="output")


def softplus(t: Tape, x: Tensor) -> Tensor:
    """`log(1 + exp(x))` in one kernel; keeps its input. Under autocast it runs in fp32."""
    return ops.unary(t, "softplus", ops.in_fp32(t, x), keeps="input")


def either(t: Tape, mask: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """`x` where `mask` says so, else `other`; keeps the mask."""
    node = t.record(_either_backward, (x, other), (mask,))
    return t.like("where", x, node)


def _either_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    return [t.like("where", grad) for _ in node.edges]


def triangle(t: Tape, size: int) -> Tensor:
    """A mask of one half of a square, made of a square of ones."""
    ones = t.new("ones", (size, size), BOOL)
    half = t.new("tril", (size, size), BOOL)
    del ones
    return half


def inverted(t: Tape, mask: Tensor) -> Tensor:
    """`~mask`."""
    return t.new("bitwise_not", mask.shape, BOOL)


def cumsum(t: Tape, x: Tensor) -> Tensor:
    """Running sums along a dimension; keeps nothing."""
    node = t.record(_cumsum_backward, (x,))
    return t.new("cumsum", x.shape, x.format, node)


def _cumsum_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    flipped = t.new("flip", grad.shape, grad.format)
    summed = t.new("cumsum", grad.shape, grad.format)
    out = t.new("flip", grad.shape, grad.format)
    del flipped, summed
    return (out,)


# --- shapes ---------------------------------------------------------------------------------------


def unsqueeze(t: Tape, x: Tensor, dim: int) -> Tensor:
    """A view with a dimension of one entry more, at `dim`."""
    return ops.reshape(t, x, *x.shape[:dim], 1, *x.shape[dim:])


def pad(t: Tape, x: Tensor, dim: int, size: int) -> Tensor:
    """A copy of `x` with `size` entries in that dimension, of which the new ones are zero.

    It is row-major, unless there are none or `x` has its second dimension closest.
    """
    node = t.record(_pad_backward, (x,), (), x.shape)
    out = t.new("pad", (*x.shape[:dim], size, *x.shape[dim + 1 :]), x.format, node)
    if size == x.shape[dim]:
        return laid_out(out, x)
    if len(x.shape) == 4 and x.strides and x.strides == channels_last(x.shape):
        out.strides = channels_last(out.shape)
    return out


def _pad_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    out = t.new("pad", node.context, grad.format)
    return (laid_out(out, grad) if grad.shape == node.context else out,)


def repeat_interleave(t: Tape, x: Tensor, times: int, dim: int) -> Tensor:
    """Every entry of a dimension `times` in a row, a copy."""
    before, size, after = x.shape[:dim], x.shape[dim], x.shape[dim + 1 :]
    apart = ops.expand(t, unsqueeze(t, x, dim + 1), *before, size, times, *after)
    return ops.reshape(t, ops.copy(t, apart), *before, size * times, *after)


def to_rows(t: Tape, x: Tensor, format: Format) -> Tensor:
    """`x` in another format and row-major; itself if it has that format already.

    Unless it looks like an image: then it is copied (`Tensor.to` with a `memory_format` looks no
    closer than `suggest_memory_format`).
    """
    if x.format is format:
        return ops.copy(t, x) if looks_channels_last(x.shape, x.strides) else x
    rows = ops.to(t, x, format)
    rows.strides = None
    return rows


def sum_over(t: Tape, x: Tensor, dim: int) -> Tensor:
    """The sum over a dimension, which goes; its gradient is expanded as a view."""
    node = t.record(_sum_over_backward, (x,), (), (x.shape, dim))
    return t.new("sum", (*x.shape[:dim], *x.shape[dim + 1 :]), x.format, node)


def _sum_over_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    shape, dim = node.context
    steps = grad.strides or row_major(grad.shape)
    return (Tensor(shape, grad.format, grad.storage, strides=(*steps[:dim], 0, *steps[dim:])),)


def stack_turns(t: Tape, parts: Sequence[Tensor], turns: int) -> Tensor:
    """What each of `turns` turns of a loop gave, side by side in a new last dimension."""
    shape = (*parts[0].shape, turns)
    node = t.record(_stack_backward, parts, (), parts[0].shape)
    return t.new("stack", shape, parts[0].format, node)


def _stack_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    return [Tensor(node.context, grad.format, grad.storage) for _ in node.edges]


def written(t: Tape, base: Tensor, value: Tensor) -> Tensor:
    """`base` after a part of it is overwritten; the gradient of the whole is copied for that.

    torch/csrc/autograd/functions/tensor.cpp, `CopySlices`.
    """
    node = t.record(_written_backward, (base, value), (), value.shape)
    return Tensor(base.shape, base.format, base.storage, node, 0, base.strides)


def _written_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    whole = t.like("new_empty_strided", grad)
    del grad
    part = t.new("clone", node.context, whole.format)
    if node.needs(0):
        zeros = t.new("zeros_like", node.context, whole.format)
        del zeros
    return whole if node.needs(0) else None, part


# --- products -------------------------------------------------------------------------------------


def einsum(t: Tape, equation: str, a: Tensor, b: Tensor) -> Tensor:
    """The product of two tensors, summed over the letters that the result does not have."""
    a, b = ops.cast(t, a), ops.cast(t, b)
    inputs, result = equation.split("->")
    left, right = inputs.split(",")
    sizes = dict(zip(left, a.shape, strict=True)) | dict(zip(right, b.shape, strict=True))
    summed = [letter for letter in sorted(sizes) if letter not in result]
    wide = {letter for letter in result if sizes[letter] != 1}
    alone = [x for x in result if x in wide and (x in left) != (x in right)]
    if alone and alone[0] in right:  # the result then needs no rearranging
        left, right, a, b = right, left, b, a
    both = [x for x in result if x in wide and x in left and x in right]
    only_left = [x for x in result if x in wide and x in left and x not in right]
    rest = [x for x in result if x not in both and x not in only_left]
    one = _factor(t, a, left, [both, only_left, summed])
    other = _factor(t, b, right, [both, summed, [x for x in rest if x in right]])
    product = ops.bmm(t, one, other)
    order = [*both, *only_left, *rest]
    product = ops.reshape(t, product, *[sizes[x] for x in order])
    return ops.permute(t, product, *[order.index(x) for x in result])


def _factor(t: Tape, x: Tensor, letters: str, groups: Sequence[Sequence[str]]) -> Tensor:
    """`x` as a stack of matrices: one dimension for each group of letters."""
    left_over = [letter for letter in letters if not any(letter in group for group in groups)]
    order = [letter for group in groups for letter in group if letter in letters]
    x = ops.permute(t, x, *[letters.index(letter) for letter in (*left_over, *order)])
    sizes = dict(zip((*left_over, *order), x.shape, strict=True))
    return ops.reshape(t, x, *[prod(sizes.get(x, 1) for x in group) for group in groups])


def solve_triangular(t: Tape, matrix: Tensor, right: Tensor) -> Tensor:
    """`matrix⁻¹ @ right` for a triangular matrix; keeps the matrix and its output.

    torch/csrc/autograd/FunctionsManual.cpp, `linalg_solve_triangular_backward`.
    """
    node = t.record(_solve_backward, (matrix, right), (matrix,))
    out = by_column(t.new("solve_triangular", right.shape, right.format, node))
    keep_output(t, node, out)
    return out


def by_column(x: Tensor) -> Tensor:
    """Laid out with the last two dimensions exchanged, as LAPACK's results are."""
    order = (*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2)
    shape = tuple([x.shape[i] for i in order])
    x.strides = ops.rearranged(Tensor(shape, x.format, x.storage), order).strides
    return x


def _solve_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    matrix = node.saved[0]
    assert matrix is not None
    to_right = by_column(t.new("solve_triangular", grad.shape, grad.format))
    product = t.new("bmm", matrix.shape, grad.format)
    negated = t.new("neg", matrix.shape, grad.format)
    del product
    to_matrix = t.new("tril", matrix.shape, grad.format)
    del negated
    return to_matrix, to_right
