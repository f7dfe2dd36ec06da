"""Linear layers, as they run and as adapters find them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from llmsize.anatomy import operations as ops
from llmsize.anatomy.tape import Parameter
from llmsize.anatomy.tensor import Tensor
from llmsize.formats import FP16

if TYPE_CHECKING:
    from llmsize.anatomy.trace import Trace

LLM_INT8 = "llm-int8"
"""The format whose linear layers multiply in int8 instead of being brought back to 16 bit."""


class Linear(NamedTuple):
    """A linear layer without the adapter that it may have."""

    name: str
    role: str
    weight: Parameter
    bias: Parameter | None
    out: int
    transposed: bool = False
    """Whether its weight is stored as (in, out)."""

    def run(self, t: Trace, x: Tensor) -> Tensor:
        """What the layer gives for `x`."""
        if self.weight.quantized:
            return _run_quantized(t, x, self.weight, self.bias, self.out)
        return ops.linear(t, x, self.weight, self.bias, self.out)

    def whole(self, t: Trace) -> Tensor:
        """The weight, brought back to 16 bit if it is quantized."""
        if not self.weight.quantized:
            return self.weight
        return t.new("dequantize", self.weight.shape, t.autocast or t.setting.format)


def expert_linear(t: Trace, x: Tensor, weight: Parameter, out: int) -> Tensor:
    """The linear layers of quantized experts, one after the other, each for its tokens."""
    each = Tensor(weight.shape[1:], weight.format, None)
    return _run_quantized(t, x, each, None, out)


def _run_quantized(t: Trace, x: Tensor, weight: Tensor, bias: Parameter | None, out: int) -> Tensor:
    """bitsandbytes' Linear4bit: it computes in 16 bit whatever comes, and hands back the same."""
    compute = t.autocast or t.setting.format
    keeps_input = t.setting.keeps_quantized_inputs
    if t.setting.quantized is not None and t.setting.quantized.name == LLM_INT8:
        result = ops.int8_linear(t, ops.to(t, x, compute), weight, out)
    else:
        stored = FP16 if t.setting.quantizes_from_half else compute
        result = ops.dequantized_linear(
            t, ops.to(t, x, compute), weight, out, stored, keeps_input=keeps_input
        )
    if bias is not None:
        result = ops.add(t, result, ops.to(t, bias, compute))
    return ops.to(t, result, x.format)
