"""Adapters that turn a layer's input by trained rotations of blocks of its channels.

peft v0.21, local variables included: in one go as a matrix of the whole width (BOFT), or block by
block (OFT).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsize.anatomy import operations as ops
from llmsize.anatomy.adapters import Adapter
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.linear import Linear
from llmsize.anatomy.operations import GradList, first, keep_output
from llmsize.anatomy.scan_operations import einsum
from llmsize.anatomy.tape import Parameter, Tape
from llmsize.anatomy.tensor import Tensor
from llmsize.errors import LLMSizeError
from llmsize.formats import FP32, INT32, INT64

if TYPE_CHECKING:
    from llmsize.anatomy.trace import Trace


class OFT(Adapter):
    """A trained rotation of each block of a layer's input channels (Qiu et al. 2023).

    arXiv:2306.07280, with the inverse of Cayley's transform as a Neumann series of five terms.
    """

    __slots__ = ()

    def around(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        """peft/tuners/oft/layer.py, `Linear.forward` and `OFTRotationModule.forward`."""
        width, format = x.shape[-1], x.format
        size = dividing(width, CHANNELS)
        angles = size * (size - 1) // 2
        blocks = t.adapter(f"{layer.name}.oft_R.default.weight", (width // size, angles))
        t.add_buffer(2 * angles * INT64.block_bytes)
        x = ops.to(t, x, self.format)
        x = _turned(t, x, blocks, size)
        return ops.to(t, layer.run(t, ops.to(t, x, format)), format)


CHANNELS = 32
"""That OFT rotates together (peft, `oft_block_size`), or as many as divide a layer's inputs."""


def dividing(width: int, wanted: int) -> int:
    """The number next to `wanted` that divides `width`, the smaller of two (peft, `OFTLayer`)."""
    if wanted >= width:
        return width
    lower = next(n for n in range(wanted, 0, -1) if width % n == 0)
    higher = next(n for n in range(wanted, width + 1) if width % n == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _turned(t: Trace, x: Tensor, blocks: Parameter, size: int) -> Tensor:
    shape = x.shape
    rotations = _series(t, blocks, size)
    parts = ops.reshape(t, x, *shape[:-1], blocks.shape[0], size)
    tokens = "xyz"[: len(shape) - 1]
    turned = einsum(t, f"{tokens}rk,rkc->{tokens}rc", parts, rotations)
    return ops.reshape(t, turned, *shape)


def _series(t: Trace, blocks: Parameter, size: int) -> Tensor:
    """`1 + 2 Q + 2 Q² + 2 Q³ + Q⁴` of skew matrices; every power is kept for the next."""
    shape = (blocks.shape[0], size, size)
    zeros = t.new("zeros", shape, blocks.format)
    node = t.record(_picked, (blocks,), (), blocks.shape)
    upper = Tensor(shape, zeros.format, zeros.storage, node)
    del zeros
    skew = ops.sub(t, upper, ops.transpose(t, upper, 1, 2))
    del upper
    eye = t.new("eye", shape[1:], blocks.format)
    total = t.new("repeat", shape, blocks.format)
    del eye
    total = ops.add_in_place(t, total, skew)
    squared = ops.bmm(t, skew, skew)
    total = ops.add_in_place(t, total, squared)
    power = squared
    for _ in range(2):
        power = ops.bmm(t, power, skew)
        total = ops.add_in_place(t, total, power)
    return total


def _picked(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("index", node.context, first(grads).format),)


class BOFT(Adapter):
    """A trained rotation of a layer's input, by blocks (Liu et al. 2024, arXiv:2311.06243).

    The rotation is made as a whole matrix, as wide as the input, beside a permutation of the same
    size that lives through the run. Without peft's CUDA extension there is one butterfly factor.
    """

    __slots__ = ()

    def around(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        """peft/tuners/boft/layer.py, `Linear.forward`."""
        width, out, format = x.shape[-1], layer.out, x.format
        if width % BLOCK:
            raise LLMSizeError(
                f"`{layer.name}` has {width:,} inputs, which are no whole blocks of {BLOCK}",
                hint="choose other `--targets`",
            )
        t.add_buffer(width * width * FP32.block_bytes)
        shape = (1, width // BLOCK, BLOCK, BLOCK)
        blocks = t.adapter(f"{layer.name}.boft_R.default", shape)
        scales = t.adapter(f"{layer.name}.boft_s.default", (out, 1))
        rotation = t.new("eye", (width, width), format)
        factors = t.new("ones", (out, 1), format)
        turns = _rotations(t, blocks.view(*shape[1:]))
        diagonal = _on_diagonal(t, turns, width)
        permutation = ops.to(t, Tensor((1, width, width), FP32, None), format)
        diagonal = ops.to(t, diagonal, format)
        permuted = ops.bmm(t, diagonal, permutation)
        permuted = ops.bmm(t, permutation, permuted)
        whole = ops.select(t, permuted, 0)
        rotation = ops.linear(t, whole, rotation)
        factors = ops.mul(t, scales, factors)
        turned = ops.linear(t, x, ops.to(t, rotation, format), out=width)
        result = layer.run(t, turned)
        if layer.bias is not None:
            result = ops.sub(t, result, layer.bias)
        result = ops.mul(t, result, factors.view(out))
        if layer.bias is not None:
            result = ops.add(t, result, layer.bias)
        return ops.to(t, result, format)


BLOCK = 4
"""Numbers that BOFT rotates together (peft, `boft_block_size`)."""


def _rotations(t: Trace, blocks: Tensor) -> Tensor:
    """Cayley's transform of the skew part of each block, in fp32."""
    skew = ops.scale(t, ops.sub(t, blocks, ops.transpose(t, blocks, 1, 2)))
    eye = t.new("eye", (BLOCK, BLOCK), FP32)
    left, right = ops.add(t, eye, skew), ops.sub(t, eye, skew)
    node = t.record(_solve_backward, (left, right), (left,), left.shape)
    out = t.new("linalg_solve_ex", left.shape, FP32, node)
    keep_output(t, node, t.new("linalg_solve_ex", left.shape, FP32))
    keep_output(t, node, t.new("linalg_solve_ex", left.shape[:2], INT32))
    keep_output(t, node, out)
    return out


def _solve_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    to_right = t.new("linalg_lu_solve", node.context, FP32)
    product = t.new("bmm", node.context, FP32)
    to_left = t.new("neg", node.context, FP32)
    del product
    return to_left, to_right


def _on_diagonal(t: Trace, blocks: Tensor, width: int) -> Tensor:
    """A square matrix of zeros with the blocks along its diagonal; keeps nothing."""
    node = t.record(_off_diagonal, (blocks,), (), blocks.shape)
    return t.new("block_diag", (1, width, width), FP32, node)


def _off_diagonal(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("stack", node.context, first(grads).format),)
