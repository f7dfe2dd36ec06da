"""A model whose linear layers bitsandbytes has quantized, on the fake device.

bitsandbytes v0.50's own layers and autograd functions run. What they call on CUDA is written out
here as its CUDA backend does it (backends/cuda/ops.py), as it allocates inside of custom operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

BASES = ("nf4", "nf4-dq", "llm-int8")
BLOCK, NESTED_BLOCK = 64, 256


def quantize(model: Any, base: str, compute: torch.dtype, *, upcast: bool) -> None:
    """Replace linear layers, all but the head, and what is left by fp32 if it is to be `upcast`.

    transformers' `replace_with_bnb_linear`, and peft's `prepare_model_for_kbit_training`.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    install_operators()
    left = [*get_keys_to_not_convert(model), *model._keep_in_fp32_modules]
    for name, module in list(model.named_modules()):
        if type(module) in (torch.nn.Linear, Conv1D) and should_convert_module(name, left):
            model.set_submodule(name, quantized_linear(module, base, compute))
    setattr(model, "is_loaded_in_8bit" if base == "llm-int8" else "is_loaded_in_4bit", True)
    model.requires_grad_(requires_grad=False)
    if upcast:
        raise_to_fp32(model)


def raise_to_fp32(model: Any) -> None:
    """Make what is not quantized fp32; biases of quantized layers change as they run."""
    again: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for key, p in list(module.named_parameters(recurse=False)):
            if p.is_floating_point():
                wide = torch.nn.Parameter(torch.empty_like(p, dtype=torch.float32), False)
                setattr(module, key, again.setdefault(id(p), wide))


def quantized_linear(linear: Any, base: str, compute: torch.dtype) -> Any:
    """bitsandbytes' layer in the place of a linear one."""
    import bitsandbytes as bnb

    weight, bias = linear.weight, linear.bias
    out, width = weight.shape if isinstance(linear, torch.nn.Linear) else weight.T.shape
    eight = base == "llm-int8"
    kind: Any = bnb.nn.Linear8bitLt if eight else bnb.nn.Linear4bit
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    layer.in_features, layer.out_features = width, out
    layer.bias = None if bias is None else torch.nn.Parameter(bias.detach(), requires_grad=False)
    if eight:
        fill_8bit(layer, out, width)
    else:
        fill_4bit(layer, (out, width), weight.dtype, compute, nested=base.endswith("-dq"))
    return layer


def fill_8bit(layer: Any, out: int, width: int) -> None:
    """Weight and scales as `init_8bit_state` leaves them."""
    import bitsandbytes as bnb

    state = layer.state = bnb.MatmulLtState()
    state.threshold, state.has_fp16_weights, state.use_pool = 6.0, False, True
    weight = torch.nn.Parameter(torch.empty((out, width), dtype=torch.int8), requires_grad=False)
    attributes: Any = weight
    attributes.has_fp16_weights, attributes.CB, attributes.SCB = False, None, None
    layer.weight, layer.index = weight, None
    state.CB, state.SCB = weight.data, torch.empty(out)


def fill_4bit(
    layer: Any, shape: tuple[int, int], stored: torch.dtype, compute: torch.dtype, *, nested: bool
) -> None:
    """Packed weight and its `QuantState`."""
    from bitsandbytes.functional import QuantState

    size = shape[0] * shape[1]
    blocks = -(-size // BLOCK)
    packed = torch.empty((-(-size // 2), 1), dtype=torch.uint8)
    weight: Any = torch.nn.Parameter(packed, requires_grad=False)
    second = QuantState(
        absmax=torch.empty(-(-blocks // NESTED_BLOCK)), code=torch.empty(256),
        blocksize=NESTED_BLOCK, dtype=torch.float32,
    )  # fmt: skip
    weight.quant_state = QuantState(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size(shape), code=torch.empty(16), blocksize=BLOCK, quant_type="nf4",
        dtype=stored, offset=torch.empty(()) if nested else None, state2=second if nested else None,
    )  # fmt: skip
    weight.compress_statistics, weight.quant_type = nested, "nf4"
    layer.weight, layer.quant_state = weight, weight.quant_state
    layer.compute_dtype, layer.compute_type_is_set = compute, True
    layer.quant_storage, layer.support_avx512bf16_for_cpu = torch.uint8, False


def scales(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What is beside packed weights."""
    for module in model.modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.state2.absmax, state.state2.code, state.offset)
        if (state := getattr(module, "state", None)) is not None and hasattr(state, "SCB"):
            yield state.SCB


def install_operators() -> None:
    """Put what the CUDA backend does in the place of custom operators.

    Devices are told, since autograd's thread has a default of its own.
    """
    namespace: Any = torch.ops.bitsandbytes
    own = {"gemm_4bit": gemm_4bit, "int8_vectorwise_quant": vectorwise_quant,
           "int8_mixed_scaled_mm": mixed_scaled_mm, "dequantize_4bit": dequantize_4bit,
           "dequantize_blockwise": dequantize_blockwise}  # fmt: skip
    from peft.tuners.lora import dora

    dora.dequantize_module_weight = dequantize_module_weight
    for name, function in own.items():
        call: Any = function
        call.default = function
        setattr(namespace, name, call)


def dequantize_module_weight(module: Any) -> torch.Tensor:
    """peft's function of that name, which asks for classes that fake parameters do not have."""
    from bitsandbytes.functional import dequantize_4bit as whole

    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        dequantized: torch.Tensor = whole(module.weight.data, state)
        return dequantized
    if module.weight.dtype is not torch.int8:
        return module.weight  # type: ignore[no-any-return]
    return module.weight.data * module.state.SCB.view(-1, 1) * (1 / 127)  # type: ignore[no-any-return]


def dequantize_blockwise(
    a: torch.Tensor, absmax: Any, code: Any, blocksize: int, dtype: torch.dtype
) -> torch.Tensor:
    """One new tensor."""
    return torch.empty_like(a, dtype=dtype)


def dequantize_4bit(
    a: torch.Tensor, absmax: Any, blocksize: int, quant_type: str, shape: Any, dtype: torch.dtype
) -> torch.Tensor:
    """One new tensor."""
    return torch.empty(shape, dtype=dtype, device=a.device)


def gemm_4bit(
    a: torch.Tensor, b: Any, shape: Any, absmax: torch.Tensor, blocksize: int, quant_type: str,
    bias: Any = None, absmax_8bit: Any = None, absmax_code: Any = None, absmax_offset: Any = None,
) -> torch.Tensor:  # fmt: skip
    """`_dequant_linear_fallback`, which more than 1,536 tokens go through on every card.

    What is around an operator does not see the product in it, of which there is one result.
    """
    if absmax_8bit is not None:
        first = torch.empty_like(absmax_8bit, dtype=torch.float32)
        absmax = first + absmax_offset
    weight = torch.empty(shape, dtype=a.dtype, device=a.device)
    result = torch.empty((*a.shape[:-1], shape[0]), dtype=a.dtype, device=a.device)
    del weight, absmax
    return result


def vectorwise_quant(a: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, ...]:
    """int8 rows, their scales, and no outliers among them."""
    row_stats = torch.empty(a.numel() // a.shape[-1], device=a.device)
    out = torch.empty(a.shape, dtype=torch.int8, device=a.device)
    outliers = a.abs() >= threshold
    columns = torch.empty(0, dtype=torch.int64, device=a.device)
    del outliers
    return out, row_stats, columns


def mixed_scaled_mm(
    a: torch.Tensor, ca: torch.Tensor, cb: torch.Tensor, sca: Any, scb: Any, columns: Any, bias: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in int32, which is scaled in fp16 and then cast."""
    outlying = torch.empty(0, dtype=a.dtype, device=a.device)
    product = torch.empty((*ca.shape[:-1], cb.shape[0]), dtype=torch.int32, device=a.device)
    out = torch.empty_like(product, dtype=torch.float16)
    return out.to(a.dtype), outlying
