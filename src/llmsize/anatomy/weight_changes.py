"""Adapters other than LoRA that change what a linear layer multiplies with.

peft v0.21, local variables included. Some make the change as large as the weight (HiRA, LoHa,
LoKr), others stay small (VeRA, MiSS).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, prod
from typing import TYPE_CHECKING

from llmsize.anatomy import operations as ops
from llmsize.anatomy.adapters import Ranked
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.linear import Linear
from llmsize.anatomy.operations import GradList, first, promoted
from llmsize.anatomy.tape import Parameter, Tape
from llmsize.anatomy.tensor import Tensor
from llmsize.formats import FP32
from llmsize.quick_dataclasses import dataclass

if TYPE_CHECKING:
    from llmsize.anatomy.trace import Trace


class HiRA(Ranked):
    """A low-rank product that the weight is multiplied with (Huang et al. 2025, ICLR).

    Both the product and what it makes of the weight are as large as the weight, in fp32. Of a
    weight stored as (in, out) peft makes a new parameter for every use (peft/utils/other.py,
    `transpose`), which is not frozen: the weight gets a gradient that nobody asked for.
    """

    __slots__ = ()

    def around(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        """peft/tuners/hira/layer.py, `Linear.forward`."""
        out = layer.out
        self.check_rank(layer.name, layer.role, x.shape[-1], out)
        down, up = self.parts(t, layer.name, x.shape[-1], out)
        up.viewed = True
        result = layer.run(t, x)
        product = ops.linear(t, ops.transpose(t, down, 0, 1), up)
        x = ops.dropout(t, ops.to(t, x, self.format), self.dropout)
        weight = layer.whole(t)
        if layer.transposed:
            weight = t.with_gradient(weight)
        changed = ops.mul(t, weight, ops.transpose(t, product, 0, 1))
        change = ops.linear(t, x, changed, out=out)
        del changed
        return ops.to(t, ops.add(t, result, change), result.format)

    def parts(self, t: Trace, name: str, width: int, out: int) -> Sequence[Parameter]:
        """Two factors."""
        return (
            t.adapter(f"{name}.hira_A.default", (self.rank, width)),
            t.adapter(f"{name}.hira_B.default", (out, self.rank)),
        )


class WholeChange(Ranked):
    """A change as large as the weight, made for every use (LyCORIS)."""

    __slots__ = ()

    def around(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        """peft/tuners/loha/layer.py and lokr/layer.py, `Linear.forward`."""
        self.check_rank(layer.name, layer.role, x.shape[-1], layer.out)
        result = layer.run(t, x)
        summed = ops.add(t, result, self._changed(t, x, layer))
        return ops.to(t, summed, x.format)

    def _changed(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        change = self.change(t, layer, x.shape[-1])
        return ops.linear(t, ops.to(t, x, change.format), change)

    def change(self, t: Trace, layer: Linear, width: int) -> Tensor:
        """What is added to the weight of a layer from `width` inputs."""
        raise NotImplementedError


class LoHa(WholeChange):
    """The elementwise product of two low-rank products.

    Hyeon-Woo et al. 2022, arXiv:2108.06098.
    """

    __slots__ = ()

    def change(self, t: Trace, layer: Linear, width: int) -> Tensor:
        """`HadaWeight`: one function that keeps its four factors only."""
        factors = self.parts(t, layer.name, width, layer.out)
        node = t.record(_hadamard_backward, factors, factors)
        grad, t.grad = t.grad, False
        try:
            a, b, c, d = factors
            first_product = ops.linear(t, a, b, out=width)
            second_product = ops.linear(t, c, d, out=width)
            product = ops.mul(t, first_product, second_product)
            del first_product, second_product
            changed = ops.scale(t, product)
            changed.node = node
            return changed
        finally:
            t.grad = grad

    def parts(self, t: Trace, name: str, width: int, out: int) -> Sequence[Parameter]:
        """Four factors."""
        shapes = {"w1_a": (out, self.rank), "w1_b": (self.rank, width),
                  "w2_a": (out, self.rank), "w2_b": (self.rank, width)}  # fmt: skip
        return [t.adapter(f"{name}.hada_{part}.default", shapes[part]) for part in shapes]


def _hadamard_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """Each product is made again for the gradients of the other one's factors."""
    a, b, c, d = (factor for factor in node.saved if factor is not None)
    shape = (a.shape[0], b.shape[1])
    scaled = t.new("mul", shape, first(grads).format)
    wide = promoted(scaled.format, a.format)
    made: list[Tensor | None] = []
    passed: Tensor | None = None
    for one, other in ((a, b), (c, d)):
        remade = t.new("mm", shape, a.format)
        passed = t.new("mul", shape, wide)
        del remade
        made += [t.new("mm", factor.shape, wide) for factor in (one, other)]
    del scaled, passed
    return made


@dataclass(frozen=True, slots=True)
class LoKr(WholeChange):
    """A Kronecker product of a small matrix and a low-rank one.

    Yeh et al. 2024, arXiv:2309.14859.
    """

    factor: int = 0
    """Rows and columns of the small one where it divides those of the weight; 0 for about the
    square root of them."""

    def change(self, t: Trace, layer: Linear, width: int) -> Tensor:
        """`get_delta_weight`: the second matrix is whole where the rank is half of its size."""
        rows, columns = (factors(size, self.factor) for size in (layer.out, width))
        small, large, *right = self.parts(t, layer.name, width, layer.out)
        whole = ops.linear(t, large, right[0], out=columns[1]) if right else large
        product = ops.mul(
            t, small.view(rows[0], 1, columns[0], 1), whole.view(1, rows[1], 1, columns[1])
        )
        return ops.reshape(t, ops.scale(t, product), layer.out, width)

    def parts(self, t: Trace, name: str, width: int, out: int) -> Sequence[Parameter]:
        """The small matrix, and the other one whole or as two factors."""
        rows, columns = (factors(size, self.factor) for size in (out, width))
        shapes = {"w1": (rows[0], columns[0])}
        if self.rank >= max(rows[1], columns[1]) / 2:
            shapes["w2"] = (rows[1], columns[1])
        else:
            shapes |= {"w2_a": (rows[1], self.rank), "w2_b": (self.rank, columns[1])}
        return [t.adapter(f"{name}.lokr_{part}.default", shapes[part]) for part in shapes]


def factors(size: int, wanted: int = 0) -> tuple[int, int]:
    """Two whole numbers whose product is `size`: the `wanted` one first if it divides it.

    If not, the largest divisor up to it, or up to the square root (peft, `factorization`).
    """
    largest = min(wanted or size, isqrt(size))
    if wanted and size % wanted == 0:
        return wanted, size // wanted
    divisor = next(n for n in range(largest, 0, -1) if size % n == 0)
    return divisor, size // divisor


class VeRA(Ranked):
    """Trained scales of two random matrices that all layers share.

    Kopiczko et al. 2024, arXiv:2310.11454.
    """

    __slots__ = ()

    def around(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        """peft/tuners/vera/layer.py, `Linear.forward`: layers take views of the shared ones."""
        width, out, format = x.shape[-1], layer.out, x.format
        inner, outer = self.parts(t, layer.name, width, out)
        down = Tensor((self.rank, width), FP32, None)
        up = Tensor((out, self.rank), FP32, None)
        result = layer.run(t, x)
        x = ops.to(t, x, self.format)
        low = ops.mul(t, inner, ops.linear(t, ops.dropout(t, x, self.dropout), down))
        result = ops.add(t, result, ops.mul(t, outer, ops.linear(t, low, up)))
        return ops.to(t, result, format)

    def parts(self, t: Trace, name: str, width: int, out: int) -> Sequence[Parameter]:
        """Two scales, and what the layer needs of the shared matrices."""
        t.share_buffer("vera_A", self.rank, width)
        t.share_buffer("vera_B", out, self.rank)
        return (
            t.adapter(f"{name}.vera_lambda_d.default", (self.rank,)),
            t.adapter(f"{name}.vera_lambda_b.default", (out,)),
        )


class MiSS(Ranked):
    """One matrix that multiplies the sum of the input's parts, each as long as the rank.

    Kang and Yin 2024, arXiv:2409.15371.
    """

    __slots__ = ()

    def around(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        """peft/tuners/miss/layer.py, `MissLinear.forward`."""
        format, out = x.format, layer.out
        self.check_rank(layer.name, layer.role, x.shape[-1])
        (block,) = self.parts(t, layer.name, x.shape[-1], out)
        result = layer.run(t, x)
        if x.shape[-1] % self.rank:
            x = ops.pad_last(t, x, -x.shape[-1] % self.rank)
        x = ops.to(t, x, self.format)
        parts = (*x.shape[:-1], x.shape[-1] // self.rank, self.rank)
        summed = _sum_of_parts(t, ops.reshape(t, ops.dropout(t, x, self.dropout), *parts))
        result = ops.add(t, result, ops.linear(t, summed, block, out=out))
        return ops.to(t, result, format)

    def parts(self, t: Trace, name: str, width: int, out: int) -> Sequence[Parameter]:
        """One matrix."""
        return (t.adapter(f"{name}.miss_block.default", (self.rank, out)),)


def _sum_of_parts(t: Tape, x: Tensor) -> Tensor:
    """The sum over the last dimension but one; its gradient is a view for every part."""
    node = t.record(_same_for_parts, (x,), (), x.shape)
    return t.new("sum", (*x.shape[:-2], x.shape[-1]), x.format, node)


def _same_for_parts(t: Tape, node: Node, grads: GradList) -> Grads:
    grad, shape = first(grads), node.context
    tokens, size = shape[:-2], shape[-1]
    strides = (*(size * prod(tokens[at + 1 :]) for at in range(len(tokens))), 0, 1)
    return (Tensor(shape, grad.format, grad.storage, strides=strides),)
