"""Operations on each element: sums, products, activations, conversions."""

from __future__ import annotations

from collections.abc import Sequence

from llmsize.anatomy.autograd import Grads, Node, Rule
from llmsize.anatomy.operations.rules import (
    GradList,
    broadcast,
    first,
    joined,
    keep_output,
    of_result,
    promoted,
    same_backward,
    unary_backward,
)
from llmsize.anatomy.operations.shapes import contiguous
from llmsize.anatomy.tape import Parameter, Tape
from llmsize.anatomy.tensor import Tensor, laid_out
from llmsize.formats import BOOL, FP32, Format


def add(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """`a + b`; keeps nothing, passes its gradient on without a copy."""
    return joined(t, "add", a, b, t.record(_add_backward, (a, b)))


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
    return joined(t, "sub", a, b, t.record(_sub_backward, (a, b)))


def _sub_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    negated = t.like("neg", grad) if node.needs(1) else None
    return grad, negated


def mul(t: Tape, a: Tensor, b: Tensor) -> Tensor:
    """`a * b`; keeps the factor that the other one's gradient needs."""
    shape = broadcast(a.shape, b.shape)
    saved = (b if a.node is not None else None, a if b.node is not None else None)
    node = t.record(_mul_backward, (a, b), saved, shape)
    return joined(t, "mul", a, b, node, shape)


def mul_in_place(t: Tape, x: Tensor, factor: Tensor) -> Tensor:
    """`x *= factor`, a constant that is kept; makes nothing but its gradient."""
    node = t.record(_mul_backward, (x, factor), (factor, None), x.shape)
    return Tensor(x.shape, x.format, x.storage, node, 0, x.strides)


def _mul_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = of_result(grads, node.context)
    return [
        None if other is None else joined(t, "mul_backward", grad, other) for other in node.saved
    ]


def mul_complex(t: Tape, x: Tensor, table: Tensor) -> Tensor:
    """`x` times a constant `table`, both as complex numbers of two neighbouring channels.

    Keeps the table, and conjugates it in its backward pass.
    """
    node = t.record(_mul_complex_backward, (x,), (table,))
    return t.like("mul", x, node)


def _mul_complex_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = contiguous(t, first(grads))
    grads.clear()
    (table,) = node.saved
    assert table is not None
    conjugate = t.new("conj", table.shape, table.format)
    out = t.new("mul_backward", grad.shape, grad.format)
    del conjugate
    return (out,)


def divide(t: Tape, x: Tensor, divisor: Tensor) -> Tensor:
    """`x / divisor`; keeps the divisor, and `x` too if the divisor wants a gradient."""
    wanted = x if divisor.node is not None else None
    node = t.record(_divide_backward, (x, divisor), (divisor, wanted))
    return t.like("div", x, node, format=promoted(x.format, divisor.format))


def divide_in_place(t: Tape, x: Tensor, divisor: Tensor) -> Tensor:
    """`x /= divisor`; keeps the divisor and a copy of what `x` was."""
    node = t.record(_divide_backward, (x, divisor), (divisor,))
    if node is not None:
        t.keep(node, (t.new("copy", x.shape, x.format),))
    return Tensor(x.shape, x.format, x.storage, node)


def _divide_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    if not node.needs(1):
        return t.new("div", grad.shape, grad.format), None
    made = [t.new(name, grad.shape, grad.format) for name in ("div", "div", "neg")]
    to_divisor = t.new("mul", grad.shape, grad.format)
    made.clear()
    return t.new("div", grad.shape, grad.format), to_divisor


def unary(
    t: Tape, operation: str, x: Tensor, *, keeps: str = "", backward: Rule = unary_backward
) -> Tensor:
    """An elementwise function of one tensor that keeps its `input`, its `output` or nothing.

    Its backward pass makes one tensor of the input's size if no other is given.
    """
    node = t.record(backward, (x,), (x,) if keeps == "input" else (), operation)
    out = t.like(operation, x, node)
    if keeps == "output":
        keep_output(t, node, out)
    return out


def scale(t: Tape, x: Tensor) -> Tensor:
    """`x` times a plain number; keeps nothing."""
    return unary(t, "mul", x)


def scale_in_place(t: Tape, x: Tensor) -> Tensor:
    """`x *= number`; makes nothing but its gradient."""
    node = t.record(unary_backward, (x,), (), "mul")
    return Tensor(x.shape, x.format, x.storage, node, 0, x.strides)


def shift(t: Tape, x: Tensor) -> Tensor:
    """`x` plus a plain number; keeps nothing and passes its gradient on."""
    node = t.record(same_backward, (x,))
    return t.like("add", x, node)


def neg(t: Tape, x: Tensor) -> Tensor:
    """`-x`."""
    return unary(t, "neg", x)


def silu(t: Tape, x: Tensor) -> Tensor:
    """`x * sigmoid(x)` in one kernel; keeps its input."""
    return unary(t, "silu", x, keeps="input")


def gelu(t: Tape, x: Tensor) -> Tensor:
    """GELU in one kernel, exact or tanh; keeps its input."""
    return unary(t, "gelu", x, keeps="input")


def gelu_new(t: Tape, x: Tensor) -> Tensor:
    """GELU's tanh form written out in Python: five tensors instead of two."""
    return mul(
        t,
        scale(t, x),
        shift(t, tanh(t, scale(t, add(t, x, scale(t, power(t, x)))))),
    )


def relu(t: Tape, x: Tensor) -> Tensor:
    """`max(x, 0)`; keeps its output."""
    return unary(t, "relu", x, keeps="output")


def tanh(t: Tape, x: Tensor) -> Tensor:
    """Keeps its output."""
    return unary(t, "tanh", x, keeps="output")


def sigmoid(t: Tape, x: Tensor) -> Tensor:
    """Keeps its output."""
    return unary(t, "sigmoid", x, keeps="output")


def expm1(t: Tape, x: Tensor) -> Tensor:
    """`exp(x) - 1`; keeps its output. Under autocast it runs in fp32."""
    return unary(t, "expm1", in_fp32(t, x), keeps="output", backward=_expm1_backward)


def _expm1_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    raised = t.new("add", grad.shape, grad.format)
    out = t.like("mul", grad)
    del raised
    return (out,)


def erf(t: Tape, x: Tensor) -> Tensor:
    """The error function; keeps its input."""
    return unary(t, "erf", x, keeps="input", backward=_erf_backward)


def _erf_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    made = [t.new(step, grad.shape, grad.format) for step in ("pow", "neg", "exp", "mul")]
    out = t.like("erf_backward", grad)
    made.clear()
    return (out,)


def power(t: Tape, x: Tensor) -> Tensor:
    """`x ** n`; keeps its input. Under autocast it runs in fp32."""
    return unary(t, "pow", in_fp32(t, x), keeps="input", backward=power_backward)


def power_backward(t: Tape, node: Node, grads: GradList) -> tuple[Tensor]:
    """The gradient of what was raised to a power."""
    grad = first(grads)
    raised = t.new("pow", grad.shape, grad.format)
    scaled = t.new("mul", grad.shape, grad.format)
    out = t.like("pow_backward", grad)
    del raised, scaled
    return (out,)


def rsqrt(t: Tape, x: Tensor) -> Tensor:
    """`1 / sqrt(x)`; keeps its output."""
    return unary(t, "rsqrt", x, keeps="output", backward=power_backward)


def clamp(t: Tape, x: Tensor, bounds: int = 1, limits: Sequence[Tensor] = ()) -> Tensor:
    """`x` within one or two `bounds`, `limits` if they are tensors; keeps its input and these, and
    marks what was within in its backward pass."""
    node = t.record(_clamp_backward, (x,), (x, *limits), bounds)
    return t.like("clamp", x, node)


def _clamp_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    zero = t.new("scalar_tensor", (), grad.format)
    within = [t.new("le", grad.shape, BOOL) for _ in range(node.context)]
    out = t.like("where", grad)
    del zero, within
    return (out,)


def limited(t: Tape, x: Tensor, number: Tensor, operation: str) -> Tensor:
    """The `maximum` or `minimum` of `x` and a number that is a tensor; keeps both."""
    node = t.record(_limited_backward, (x,), (x, number))
    return t.like(operation, x, node)


def _limited_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    halved, same = t.new("div", grad.shape, grad.format), t.new("eq", grad.shape, BOOL)
    out = t.new("where", grad.shape, grad.format)
    beyond = t.new("lt", grad.shape, BOOL)
    del halved, same, beyond
    return (out,)


def where(t: Tape, condition: Tensor, *branches: Tensor) -> Tensor:
    """One of two tensors, or a tensor or a number, by a condition, which it keeps."""
    node = t.record(_where_backward, branches, (condition,))
    format = max((x.format for x in branches), key=lambda format: format.block_bytes)
    shape = broadcast(condition.shape, branches[0].shape)
    return laid_out(t.new("where", shape, format, node), *branches)


def _where_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    made: list[Tensor | None] = []
    for index in range(len(node.edges)):
        zero = t.new("zeros", (), grad.format)
        wanted = node.needs(index)
        made.append(t.like("where", grad) if wanted else None)
        del zero
    return made


def masked_fill(t: Tape, x: Tensor, mask: Tensor) -> Tensor:
    """`x` with a number where the mask says so; keeps the mask."""
    node = t.record(unary_backward, (x,), (mask,), "masked_fill")
    return t.like("masked_fill", x, node)


def to(t: Tape, x: Tensor, format: Format) -> Tensor:
    """`x` in another format; itself if it has that one already."""
    if x.format is format:
        return x
    node = t.record(_to_backward, (x,), (), x.format)
    made = t.like("to", x, node, format=format)
    weight = isinstance(x, Parameter) or (x.storage is None and x.node is not None)
    if weight and made.storage is not None:
        made.storage.becomes("cast")
    return made


def _to_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    return (t.like("to", grad, format=node.context),)


def in_fp32(t: Tape, x: Tensor) -> Tensor:
    """`x` as autocast hands it to a function that it runs in fp32."""
    return to(t, x, FP32) if t.autocast else x


def dropout(t: Tape, x: Tensor, p: float) -> Tensor:
    """Keeps a mask of one byte an element; nothing at all for `p` = 0."""
    if not p or not t.grad:
        return x
    node = t.record(unary_backward, (x,), (), "dropout")
    out = t.like("dropout", x, node)
    mask = t.new("dropout", x.shape, BOOL)
    keep_output(t, node, mask)
    return out


def gated_product(t: Tape, gate: Tensor, up: Tensor) -> Tensor:
    """`activation(gate) * up` in one kernel: keeps both, and writes their gradients over them."""
    node = t.record(_gated_backward, (gate, up), (gate, up))
    return t.new("gated_product", gate.shape, gate.format, node)


def _gated_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return [
        None if x is None else Tensor(x.shape, x.format, x.storage, strides=x.strides)
        for x in node.saved
    ]


def rotate_in_place(t: Tape, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding written over its input, forward and backward; keeps the tables only."""
    node = t.record(same_backward, (x,), (cosines, sines))
    return Tensor(x.shape, x.format, x.storage, node, 0, x.strides)
