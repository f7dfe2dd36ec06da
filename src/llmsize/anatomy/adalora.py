"""Low-rank adapters as singular vectors and values, which are kept nearly orthogonal.

Zhang et al. 2023, arXiv:2303.10512; peft v0.21, local variables included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmsize.anatomy import operations as ops
from llmsize.anatomy.adapters import Ranked
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.linear import Linear
from llmsize.anatomy.operations import GradList, first
from llmsize.anatomy.tape import Parameter, Tape
from llmsize.anatomy.tensor import Label, Storage, Tensor
from llmsize.formats import FP32

if TYPE_CHECKING:
    from llmsize.anatomy.trace import Trace


class AdaLoRA(Ranked):
    """Three factors beside a linear layer, of which training prunes singular values.

    The scores of importance that it prunes by (`update_and_allocate`) are the caller's to ask for,
    and not counted.
    """

    __slots__ = ()

    def around(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        """peft/tuners/adalora/layer.py, `SVDLinear.forward`."""
        self.check_rank(layer.name, layer.role, x.shape[-1], layer.out)
        down, values, up, left = self.parts(t, layer.name, x.shape[-1], layer.out)
        result = layer.run(t, x)
        count = ops.shift(t, left)
        x = ops.to(t, x, self.format)
        dropped = ops.dropout(t, x, self.dropout)
        low = ops.linear(t, dropped, ops.mul(t, down, values))
        del dropped
        change = ops.divide(t, ops.scale(t, ops.linear(t, low, up)), count)
        if layer.bias is not None and len(x.shape) > 2:
            return _add_to_view(t, result, change)
        return ops.add_in_place(t, result, change)

    def parts(self, t: Trace, name: str, width: int, out: int) -> Sequence[Parameter]:
        """Singular vectors, the values between them, and how many of those are left.

        That number is fixed, but beside 16-bit weights peft casts it, which makes it a parameter
        that is trained (peft/tuners/tuners_utils.py, `_move_adapter_to_device_of_base_layer`).
        """
        cast = t.setting.format is not FP32
        up = t.adapter(f"{name}.lora_B.default", (out, self.rank))
        up.viewed = True
        return (
            t.adapter(f"{name}.lora_A.default", (self.rank, width)),
            t.adapter(f"{name}.lora_E.default", (self.rank, 1)),
            up,
            t.adapter(f"{name}.ranknum.default", (1,), trained=cast),
        )

    def concluded(self, t: Trace, loss: Tensor) -> Tensor:
        """peft/tuners/adalora/model.py, `AdaLoraModel.forward`: the loss takes in how far the
        vectors are from orthogonal."""
        for (layer, name), weight in t.weights.items():
            if name.endswith(VECTORS):
                loss = self._regularized(t, loss, weight, layer)
        return loss

    def _regularized(self, t: Trace, loss: Tensor, weight: Parameter, layer: int) -> Tensor:
        """The loss with the norm of `A Aᵀ - 1` of every weight that `weight` stands for."""
        every, square = (weight.copies, *weight.shape), (weight.copies, self.rank, self.rank)
        format = t.autocast or weight.format
        casts = [t.new("to", every, format) for _ in range(2) if format is not weight.format]
        apart = t.new("sub", square, format)
        norms = t.new("linalg_vector_norm", square[:1], FP32 if t.autocast else weight.format)
        saved = (apart, norms, *casts)
        node = t.record(_towards_orthogonal, (weight, loss), saved, (weight, layer))
        return Tensor(loss.shape, loss.format, loss.storage, node)


def _add_to_view(t: Tape, result: Tensor, change: Tensor) -> Tensor:
    """`result += change`, where a layer with a bias has given a view of its rows."""
    node = t.record(_copy_slices, (result, change))
    return Tensor(result.shape, result.format, result.storage, node, 0, result.strides)


def _copy_slices(t: Tape, node: Node, grads: GradList) -> Grads:
    """Two copies of the gradient: for the rows, and for what was added
    (torch/csrc/autograd/functions/tensor.cpp, `CopySlices`)."""
    grad = first(grads)
    return t.like("new_empty_strided", grad), t.like("clone", grad)


VECTORS = (".lora_A.default", ".lora_B.default")
"""Ends of the names of what is kept nearly orthogonal."""


def _towards_orthogonal(t: Tape, node: Node, grads: GradList) -> Grads:
    """The share of every weight's gradient: all of them come before any layer's, which is added."""
    weight, layer = node.context
    label: Label = "temporary", "mm", layer, weight.shape, weight.format
    others: Label = (*label,)  # an object of its own: a storage is known by that of its label
    t.events.append((weight.bytes * (weight.copies - 1), others))
    share = Storage(t.events, label, weight.bytes)
    return Tensor(weight.shape, weight.format, share, own=True), grads[0]
