"""Scaled dot-product attention as a CUDA device would run it, and what kernels allocate."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F

aten = torch.ops.aten


def choose_sdpa_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    gqa: bool,
) -> str:
    """Name the kernel that CUDA's `_fused_sdp_choice` would take on an Ampere or newer card."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    dims = {query.size(-1), key.size(-1), value.size(-1)}
    same_heads = query.size(1) == key.size(1) == value.size(1)
    same_batch = query.size(0) == key.size(0) == value.size(0)
    square = not causal or query.size(2) == key.size(2)
    flash = half and mask is None and len(dims) == 1 and max(dims) <= 256 and square
    if flash and same_batch and (same_heads or gqa):
        return "flash"
    alignment = 8 if half else 4
    aligned = query.size(-1) == key.size(-1) and all(d % alignment == 0 for d in dims)
    return "efficient" if aligned and same_heads and same_batch else "math"


def additive_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Turn a boolean mask into an additive one, as `convert_boolean_attn_mask` does."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.scalar_tensor(0.0, dtype=dtype, device=mask.device)
    minus_inf = torch.scalar_tensor(-math.inf, dtype=dtype, device=mask.device)
    return torch.where(mask, zero, minus_inf)


def expand_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Broadcast the mask to all heads, padding its last dimension to 8 elements if need be."""
    last = mask.size(-1)
    if last % 8:
        mask = F.pad(mask, (0, 8 - last % 8))[..., :last]
    return mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))


def sdpa_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Run the flash kernel, with head dimensions padded to a multiple of 8."""
    size = query.size(-1)
    options["scale"] = options["scale"] or 1 / math.sqrt(size)
    if size % 8:
        query, key, value = (F.pad(x, (0, 8 - size % 8)) for x in (query, key, value))
    out: torch.Tensor = aten._scaled_dot_product_flash_attention(query, key, value, **options)[0]
    return out[..., :size] if size % 8 else out


class AttentionKernels:
    """Stands in for `scaled_dot_product_attention` and remembers which kernels ran."""

    def __init__(self) -> None:
        self.used: Counter[str] = Counter()

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled("cuda"):
            query, key, value, attn_mask = autocast_arguments([query, key, value, attn_mask])
            with torch.autocast("cuda", enabled=False):
                return self(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        kernel = choose_sdpa_kernel(query, key, value, attn_mask, causal=is_causal, gqa=enable_gqa)
        self.used[kernel] += 1
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if kernel == "flash":
            return sdpa_flash(query, key, value, **options)
        mask = additive_mask(attn_mask, query.dtype)
        if kernel == "math":
            result: torch.Tensor = aten._scaled_dot_product_attention_math(
                query, key, value, mask, **options, enable_gqa=enable_gqa
            )[0]
            return result
        mask = None if mask is None else expand_mask(mask, query, key)
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        out: torch.Tensor = aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, grad, **options
        )[0]
        return out


def autocast_arguments(tensors: list[Any]) -> list[Any]:
    """Cast fp32 tensors to autocast's dtype, as its rule for attention does."""
    dtype = torch.get_autocast_dtype("cuda")
    return [x.to(dtype) if x is not None and x.dtype == torch.float32 else x for x in tensors]


def kernel_workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a kernel allocates and frees within one call, where a rule is known.

    Flash backward: an fp32 accumulator of dq over the sequence and head size rounded up, row
    sums, and dk and dv over all query heads when KV heads are shared. Safe softmax: the plain
    softmax and a boolean mask beside its result.
    """
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        return flash_backward_workspace(*args[1:4])
    if func is aten._safe_softmax.default:
        scores: torch.Tensor = args[0]
        return scores.numel() * (scores.element_size() + 1)
    return 0


def flash_backward_workspace(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Workspace of flash-attention 2's backward (csrc/flash_attn/flash_api.cpp, `mha_bwd`)."""
    batch, heads, seq, size = query.shape
    rows = -(-seq // 128) * 128
    columns = -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64
    accumulator = batch * heads * rows * (columns + 1) * 4
    if key.size(1) == heads:
        return accumulator
    return accumulator + 2 * batch * key.size(2) * heads * size * query.element_size()
