"""Linear layers, as they run and as adapters find them."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, NamedTuple

from llmsize.anatomy import operations as ops
from llmsize.anatomy.tape import Parameter
from llmsize.anatomy.tensor import Tensor
from llmsize.formats import FP16, FP32, Format, quantized_scales

if TYPE_CHECKING:
    from llmsize.anatomy.trace import Trace

LLM_INT8 = "llm-int8"
"""The format whose linear layers multiply in int8 instead of being brought back to 16 bit."""

FOUR_BIT = frozenset(("fp4", "fp4-dq", "nf4", "nf4-dq"))
"""The formats of its Linear4bit."""

GPTQ = "gptq"
"""How the names of GPTQ's formats begin, whose layers are not bitsandbytes'."""


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
            return _run_quantized(t, x, self.weight, self.out)
        return ops.linear(t, x, self.weight, self.bias, self.out)

    def in_4_bit(self, t: Trace) -> bool:
        """Whether it is bitsandbytes' Linear4bit."""
        return self.weight.quantized and getattr(t.setting.quantized, "name", "") in FOUR_BIT

    def by_bitsandbytes(self, t: Trace) -> bool:
        """Whether it is one of bitsandbytes' quantized layers."""
        return self.weight.quantized and not _by_gptq(t)

    def whole(self, t: Trace) -> Tensor:
        """The weight, brought back if it is quantized: int8 by two products in fp32, the rest to 16
        bit (bitsandbytes v0.50, _ops.py, `int8_vectorwise_dequant`)."""
        if not self.weight.quantized:
            return self.weight
        if _in_int8(t):
            scaled = t.new("mul", self.weight.shape, FP32)
            return t.like("mul", scaled)
        return t.new("dequantize", self.weight.shape, t.autocast or t.setting.format)


def bias_format(t: Trace, x: Tensor) -> Format:
    """The format that a quantized layer's bias has once the layer has run on `x`, in place: that
    of `x` in Linear8bitLt, what the layer computes in anywhere else."""
    return x.format if _in_int8(t) else t.autocast or t.setting.format


def _by_gptq(t: Trace) -> bool:
    return t.setting.quantized is not None and t.setting.quantized.name.startswith(GPTQ)


def _in_int8(t: Trace) -> bool:
    return t.setting.quantized is not None and t.setting.quantized.name == LLM_INT8


def expert_linear(t: Trace, x: Tensor, weight: Parameter, out: int) -> Tensor:
    """The linear layers of quantized experts, one after the other, each for its tokens."""
    each = Tensor(weight.shape[1:], weight.format, None)
    return _run_quantized(t, x, each, out)


def _run_quantized(t: Trace, x: Tensor, weight: Tensor, out: int) -> Tensor:
    """bitsandbytes' layers, and those of other formats. Linear4bit computes in 16 bit whatever
    comes, and hands back the same; the others take what comes.

    GPTQModel trains whatever kernel infers by a plain product with the weight that is brought back
    (ModelCloud/GPTQModel 011c00a, gptqmodel/nn_modules/qlinear/{torch,tritonv2}.py).
    """
    format, setting = t.setting.quantized, t.setting
    if setting.keeps_gptq_weights and _by_gptq(t):
        whole = t.new("dequantize", weight.shape, x.format)
        return ops.to(t, ops.linear(t, x, whole, out=out), x.format)
    if _in_int8(t):
        return ops.int8_linear(t, x, weight, out)
    compute = t.autocast or setting.format
    stored = FP16 if setting.quantizes_from_half else compute
    result = ops.dequantized_linear(
        t, ops.to(t, x, compute), weight, out, stored,
        scales=0 if format is None else quantized_scales(format, prod(weight.shape)),
        keeps_input=setting.keeps_quantized_inputs,
    )  # fmt: skip
    return ops.to(t, result, x.format)
