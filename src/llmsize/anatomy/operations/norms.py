"""Norms and softmax: what autocast runs in fp32."""

from __future__ import annotations

from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.operations.elementwise import power_backward, to
from llmsize.anatomy.operations.rules import (
    GradList,
    first,
    joined,
    keep_output,
    of_result,
    softmax_input,
)
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Tensor, laid_out
from llmsize.formats import FP16, FP32, Format


def layer_norm(t: Tape, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """LayerNorm in one kernel: keeps its input, the mean and the reciprocal deviation in fp32."""
    weights = [w for w in (weight, bias) if w is not None]
    if t.autocast:
        x, *weights = (to(t, part, FP32) for part in (x, *weights))
    node = t.record(_layer_norm_backward, (x, *weights), (x, *weights), [w.shape for w in weights])
    out = t.new("layer_norm", x.shape, x.format, node)
    statistics = [t.new("layer_norm", (*x.shape[:-1], 1), FP32) for _ in ("mean", "rstd")]
    for made in statistics:
        keep_output(t, node, made)
    return out


def _layer_norm_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    grad = first(grads)
    to_x = t.new("layer_norm_backward", grad.shape, grad.format) if node.needs(0) else None
    return (to_x, *[t.new("layer_norm_backward", s, grad.format) if node.needs(i + 1) else None
                    for i, s in enumerate(node.context)])  # fmt: skip


def fused_norm(t: Tape, x: Tensor, *weights: Tensor) -> Tensor:
    """A norm in one kernel: keeps its input and one fp32 number a token; makes only its result.

    Liger-Kernel v0.6, ops/rms_norm.py; torch's `_fused_rms_norm`.
    """
    node = t.record(_layer_norm_backward, (x, *weights), (x,), [w.shape for w in weights])
    out = t.like("fused_norm", x, node)
    keep_output(t, node, t.new("fused_norm", (*x.shape[:-1], 1), FP32))
    return out


def normalized(t: Tape, x: Tensor, held: list[Tensor] | None = None) -> Tensor:
    """`x * rsqrt(mean(x ** 2) + eps)`, written out in fp32: keeps `x` and the factor.

    Five operations in one node, as half of what a layer makes is made here. The mean is put among
    the `held`, where the caller has a name for it.
    """
    node = t.record(_normalized_backward, (x, x), (x,))
    square = t.like("pow", x)
    mean = laid_out(t.new("mean", (*x.shape[:-1], 1), x.format), x)
    del square
    shifted = t.like("add", mean)
    if held is not None:
        held.append(mean)
    del mean
    factor = t.like("rsqrt", shifted)
    keep_output(t, node, factor)
    del shifted
    return joined(t, "mul", x, factor, node)


def _normalized_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """Of the product, the factor, the mean and the square in turn; `x` gets two gradients.

    What has come so far is in `grads`, the last of it until the record has let go of the node.
    """
    x, factor = node.saved
    assert x is not None and factor is not None
    grad = of_result(grads, x.shape)
    node.saved = ()
    to_x = joined(t, "mul_backward", grad, factor)
    to_factor = joined(t, "mul_backward", grad, x)
    to_factor = t.new("sum", factor.shape, grad.format)
    del grad
    grads[:] = [to_factor]
    del to_factor
    node.send(t, 0, to_x)
    del to_x
    (to_mean,) = power_backward(t, node, grads)
    del factor
    grads.clear()
    grads.append(t.new("mean_backward", x.shape, to_mean.format))
    del to_mean
    return None, *power_backward(t, node, grads)


def softmax(t: Tape, x: Tensor, format: Format | None = None) -> Tensor:
    """Softmax over the last dimension, computed in `format`; keeps its output.

    From fp16 to fp32 it is one kernel, as are the gradients back (aten/src/ATen/native/SoftMax.cpp,
    `half_to_float`).
    """
    if t.autocast and format is None:
        format = FP32
    if format is FP32 and x.format is FP16:
        node = t.record(_to_half, (x,), softmax_input(t, x))
        out = t.like("softmax", x, node, format=FP32)
        keep_output(t, node, out)
        return out
    return native_softmax(t, to(t, x, format) if format else x)


def native_softmax(t: Tape, x: Tensor) -> Tensor:
    """Softmax in the format of its input; keeps its output."""
    node = t.record(_softmax_backward, (x,), softmax_input(t, x))
    out = t.like("softmax", x, node)
    keep_output(t, node, out)
    return out


def _softmax_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """One tensor like the gradient, and within the kernel its product with the output.

    PyTorch v2.13, aten/src/ATen/native/cuda/SoftMax.cu, `softmax_backward_cuda_out`.
    """
    return _from_product(t, first(grads))


def _to_half(t: Tape, node: Node, grads: GradList) -> Grads:
    return _from_product(t, first(grads), FP16)


def _from_product(t: Tape, grad: Tensor, format: Format | None = None) -> Grads:
    made = t.like("softmax_backward", grad, format=format)
    t.within.append((len(t.events), grad.bytes))
    return (made,)
