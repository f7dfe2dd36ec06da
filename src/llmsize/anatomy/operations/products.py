"""Matrix products and convolutions: what autocast runs in 16 bit."""

from __future__ import annotations

from math import prod

from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.layout import viewed
from llmsize.anatomy.operations.elementwise import add, scale, to
from llmsize.anatomy.operations.rules import GradList, broadcast, first
from llmsize.anatomy.operations.shapes import copy, expand
from llmsize.anatomy.tape import Parameter, Tape
from llmsize.anatomy.tensor import Shape, Tensor
from llmsize.formats import BOOL, FP16, FP32, INT8, INT32, Format


def cast(t: Tape, x: Tensor) -> Tensor:
    """`x` as autocast hands it to a matrix product; a trained weight's copy is made once.

    A view of a weight is copied for every use.
    """
    if t.autocast is None or x.format is t.autocast or x.format is not FP32:
        return x
    if not isinstance(x, Parameter) or x.node is None:
        return to(t, x, t.autocast)
    copy = t.casts.get(id(x))
    if copy is None:
        copy = to(t, x, t.autocast)
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
    return t.new("bmm", (*a.shape[:-1], b.shape[-1]), a.format, node)


def batched(t: Tape, x: Tensor) -> Tensor:
    """`x` with all dimensions but the last two seen as one, which may take a copy."""
    if x.strides is None or viewed(x.shape, x.strides, (prod(x.shape[:-2]), *x.shape[-2:]))[0]:
        return x
    return copy(t, x)


def flat(t: Tape, x: Tensor) -> Tensor:
    """`x` with all dimensions but the last one seen as one, which may take a copy."""
    if x.strides is None or viewed(x.shape, x.strides, (prod(x.shape[:-1]), x.shape[-1]))[0]:
        return x
    return copy(t, x)


def _matmul_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = batched(t, first(grads))
    grads.clear()  # a view of the product made the copy, and has let go of what came
    to_b = _product(t, "bmm_backward", node, 1, grad)
    return _product(t, "bmm_backward", node, 0, grad), to_b


def _product(t: Tape, operation: str, node: Node, index: int, grad: Tensor) -> Tensor | None:
    """The gradient of a factor that wants one, a view in the shape of what it is for."""
    if node.edges[index] is None:
        return None
    made = t.new(operation, node.context[index], grad.format)
    made.own = False
    return made


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
    operation = "mm" if bias is None else "addmm"
    return t.new(operation, (*x.shape[:-1], out or weight.shape[0]), x.format, node)


def _linear_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = flat(t, first(grads))
    grads.clear()  # a view of the product made the copy, and has let go of what came
    if len(node.edges) == 3:  # addmm: the bias's gradient is summed from what came
        to_x = _product(t, "mm", node, 0, grad)
        return to_x, _product(t, "mm", node, 1, grad), grad
    to_weight = _product(t, "mm", node, 1, grad)
    return _product(t, "mm", node, 0, grad), to_weight


def grouped_linear(t: Tape, x: Tensor, weight: Tensor, ends: Tensor, out: int) -> Tensor:
    """A linear layer of each expert for the rows of its tokens, which end at `ends`.

    One product for all (`torch.nn.functional.grouped_mm`); autocast leaves it alone.
    """
    x = to(t, x, weight.format)
    saved = (x if weight.node is not None else None, weight if x.node is not None else None)
    node = t.record(_linear_backward, (x, weight), (*saved, ends), (x.shape, weight.shape))
    return t.new("grouped_mm", (x.shape[0], out), x.format, node)


def dequantized_linear(
    t: Tape,
    x: Tensor,
    weight: Tensor,
    out: int,
    stored: Format,
    *,
    scales: int = 0,
    keeps_input: bool = False,
) -> Tensor:
    """`x @ weight.T` for a frozen weight that is stored quantized, with a bias if it has one.

    It is brought back to the 16 bit that it was quantized from, cast if `x` has others, and let go
    of; so again in the backward pass. Before it, `scales` that are quantized themselves are
    (bitsandbytes v0.50, bitsandbytes/autograd/_functions.py, MatMul4Bit, and
    bitsandbytes/backends/cuda/ops.py, `_dequant_linear_fallback`, which 1,537 tokens take).
    With `keeps_input` the node itself holds `x`, unless a checkpoint runs it without gradients.
    """
    held = keeps_input and t.checkpoint is None
    saved = (x,) if keeps_input and not held else ()
    node = t.record(_dequantized_backward, (x,), saved, (x.shape, weight, stored, scales))
    if held and node is not None:
        t.hold_in_graph(x)
    absmax = [t.new(name, (scales,), FP32) for name in ("dequantize", "add") if scales]
    whole = _dequantized(t, weight, stored, x.format)
    result = t.new("gemm_4bit", (*x.shape[:-1], out), x.format, node)
    del whole, absmax
    return result


def int8_linear(t: Tape, x: Tensor, weight: Tensor, out: int) -> Tensor:
    """`x @ weight.T` in int8 for a frozen weight in int8: `x` is quantized for it by rows.

    The node itself holds `x`, which no checkpoint drops and which goes with the graph. The weight
    is brought back in the backward pass only (bitsandbytes v0.50,
    bitsandbytes/autograd/_functions.py, MatMul8bitLt; backends/cuda/ops.py); outliers are looked
    for and not counted.
    """
    node = t.record(_dequantized_backward, (x,), (), (x.shape, weight, x.format, 0))
    if node is not None:
        t.hold_in_graph(x)
    half = to(t, Tensor(x.shape, x.format, x.storage), FP16)
    statistics = t.new("int8_vectorwise_quant", x.shape[:-1], FP32)
    quantized = t.new("int8_vectorwise_quant", x.shape, INT8)
    size = t.new("abs", x.shape, FP16)
    outlying = t.new("ge", x.shape, BOOL)
    del size, outlying, half
    product = t.new("int8_linear_matmul", (*x.shape[:-1], out), INT32)
    result = t.new("int8_mm_dequant", product.shape, FP16, node)
    if x.format is not FP16:
        result = t.new("to", product.shape, x.format, node)
    del quantized, statistics, product
    return result


def _dequantized_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    shape, weight, stored, scales = node.context
    whole = _dequantized(t, weight, stored, grad.format, scales)
    to_x = t.new("mm", shape, grad.format)
    del whole
    return (to_x,)


def _dequantized(
    t: Tape, weight: Tensor, stored: Format, wanted: Format, scales: int = 0
) -> Tensor:
    absmax = t.new("dequantize", (scales,), FP32) if scales else None
    whole = t.new("dequantize", weight.shape, stored)
    del absmax
    return to(t, whole, wanted)


def merged_adapter(t: Tape, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """`weight + up @ down` as a tensor of its own, from their product in the factors' format."""
    change = to(t, scale(t, linear(t, up, down, out=weight.shape[1])), weight.format)
    return add(t, weight, change)


def add_product(t: Tape, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`base + scale * a @ b` in one kernel (`baddbmm`), broadcast; keeps the factors."""
    base, a, b = (cast(t, x) for x in (base, a, b))
    node = t.record(_add_product_backward, (a, b), (a, b))
    shape = broadcast(base.shape, (*a.shape[:-1], b.shape[-1]))
    return t.new("baddbmm", shape, a.format, node)


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


def convolution(t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Shape) -> Tensor:
    """A convolution along the last dimension; keeps its input and weight."""
    offsets = [cast(t, bias)] if bias is not None else []
    weight = cast(t, weight)
    inputs = [cast(t, x), weight, *offsets]
    node = t.record(_convolution_backward, inputs, inputs[:2], [i.shape for i in inputs])
    return t.new("convolution", shape, inputs[0].format, node)


def _convolution_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    return [
        t.new("convolution_backward", shape, grad.format) if node.needs(index) else None
        for index, shape in enumerate(node.context)
    ]
