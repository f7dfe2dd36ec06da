"""`quantization_config` of a checkpoint → the recipe that its weights are stored by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmsize.errors import LLMSizeError, printable

FILE_TYPES = {
    0: "gguf-f32", 1: "gguf-f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 8: "q5_0", 9: "q5_1",
    10: "q2_k", 11: "q3_k_s", 12: "q3_k_m", 13: "q3_k_l", 14: "q4_k_s", 15: "q4_k_m",
    16: "q5_k_s", 17: "q5_k_m", 18: "q6_k", 19: "iq2_xxs", 20: "iq2_xs", 21: "q2_k_s",
    22: "iq3_xs", 23: "iq3_xxs", 24: "iq1_s", 25: "iq4_nl", 26: "iq3_s", 27: "iq3_m", 28: "iq2_s",
    29: "iq2_m", 30: "iq4_xs", 31: "iq1_m", 32: "gguf-bf16", 36: "tq1_0", 37: "tq2_0",
    38: "mxfp4_moe", 40: "q1_0", 41: "q2_0",
}  # fmt: skip
"""`general.file_type` → recipe. llama.cpp 0c1e57098, include/llama.h: `enum llama_ftype`."""
GUESSED = 1024
"""The flag of a file type that was told by the tensors."""

HINT = "give the recipe yourself; `llmsize show recipes` lists them"


def recipe_name(stored: Mapping[str, Any]) -> str:
    """Name of the recipe preset for `Architecture.stored`; empty where it is not quantized.

    It is the recipe that the method names; there need not be a preset for every group size.
    Raises `LLMSizeError` for a method that llmsize does not know.
    """
    if not stored:
        return ""
    method = str(stored.get("quant_method", "")).lower().replace("_", "-")
    match method:
        case "gptq" | "awq":
            return f"{method}-{_width(stored, 'bits')}-g{_whole(stored, 'group_size')}"
        case "bitsandbytes":
            return _bitsandbytes(stored)
        case "fp8":
            return "fp8-block" if stored.get("weight_block_size") else "fp8-tensor"
        case "fbgemm-fp8":
            return "fp8"
        case "mxfp4":
            return "mxfp4"
        case "gguf":
            return _file_type(stored)
        case "hqq":
            weights = _part(_part(stored, "quant_config"), "weight_quant_params")
            return f"hqq-{_width(weights, 'nbits')}-g{_whole(weights, 'group_size')}"
        case "compressed-tensors":
            return _compressed(stored)
        case "" if "group_size" in stored:
            return f"mlx-{_width(stored, 'bits')}-g{_whole(stored, 'group_size')}"
    raise _unknown(f"`{printable(method, 40)}`")


def _bitsandbytes(stored: Mapping[str, Any]) -> str:
    if stored.get("load_in_8bit"):
        return "llm-int8"
    kind = stored.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise _unknown(f"bitsandbytes with the type {printable(repr(kind), 40)}")
    return f"{kind}-dq" if stored.get("bnb_4bit_use_double_quant") else str(kind)


def _compressed(stored: Mapping[str, Any]) -> str:
    """The schemes of llm-compressor; the first group of layers speaks for all."""
    groups = _part(stored, "config_groups")
    group = _part(groups, next(iter(groups), ""))
    weights, format = _part(group, "weights"), stored.get("format") or group.get("format")
    match format:
        case "pack-quantized":
            scheme = f"w{_whole(weights, 'num_bits')}a16"
            return scheme if weights.get("symmetric", True) else f"{scheme}-asym"
        case "int-quantized":
            return "w8a8"
        case "float-quantized":
            by_strategy = {"tensor": "fp8-tensor", "channel": "fp8", "block": "ct-fp8-block"}
            strategy = str(weights.get("strategy"))
            if strategy in by_strategy:
                return by_strategy[strategy]
        case "nvfp4-pack-quantized":
            return "nvfp4" if group.get("input_activations") else "nvfp4a16"
        case "mxfp4-pack-quantized":
            return "ct-mxfp4"
    raise _unknown(f"compressed-tensors in the format {printable(repr(format), 40)}")


def _file_type(stored: Mapping[str, Any]) -> str:
    number = stored.get("file_type")
    known = FILE_TYPES.get(number & ~GUESSED) if type(number) is int else None
    if known is None:
        raise _unknown(f"the GGUF file type {printable(repr(number), 40)}")
    return known


def _part(whole: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = whole.get(key)
    if isinstance(part, dict):
        return part
    raise _unknown(f"a `quantization_config` without `{printable(key)}`")


def _width(part: Mapping[str, Any], key: str) -> str:
    return f"int{_whole(part, key)}"


def _whole(part: Mapping[str, Any], key: str) -> int:
    value = part.get(key)
    if type(value) is int and 0 < value <= 2**20:
        return value
    raise _unknown(f"a `quantization_config` with `{key}` = {printable(repr(value), 40)}")


def _unknown(what: str) -> LLMSizeError:
    return LLMSizeError(f"llmsize knows no recipe for {what}", hint=HINT)
