"""From a `quantization_config` to the recipe of the stored weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmsize import presets
from llmsize.errors import LLMSizeError
from llmsize.sources.quantization import recipe_name

WEIGHTS: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                           "group_size": 128}  # fmt: skip


def compressed(format: str, *, activations: bool = False, **weights: object) -> dict[str, Any]:
    """A `quantization_config` as llm-compressor writes it."""
    group = {
        "targets": ["Linear"],
        "weights": WEIGHTS | weights,
        "input_activations": {"num_bits": 8} if activations else None,
    }
    return {
        "quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}
    }  # fmt: skip


def bitsandbytes(**fields: object) -> dict[str, object]:
    """A `quantization_config` as transformers writes it for bitsandbytes."""
    return {"quant_method": "bitsandbytes", **fields}


PUBLISHED = [
    ({}, ""),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True}, "gptq-int4-g128"),
    ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "gptq-int8-g32"),
    ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, "awq-int4-g128"),
    (bitsandbytes(load_in_8bit=True), "llm-int8"),
    (bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "nf4"),
    (
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        "nf4-dq",
    ),
    ({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}, "fp8-block"),
    ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8-tensor"),
    ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fp8"),
    ({"quant_method": "mxfp4", "modules_to_not_convert": []}, "mxfp4"),
    ({"bits": 4, "group_size": 64}, "mlx-int4-g64"),
    (compressed("pack-quantized"), "w4a16"),
    (compressed("pack-quantized", symmetric=False), "w4a16-asym"),
    (compressed("pack-quantized", num_bits=8), "w8a16"),
    (compressed("int-quantized", num_bits=8, activations=True), "w8a8"),
    (compressed("float-quantized", num_bits=8, strategy="channel"), "fp8"),
    (compressed("float-quantized", num_bits=8, strategy="tensor"), "fp8-tensor"),
    (compressed("nvfp4-pack-quantized", activations=True), "nvfp4"),
    (compressed("nvfp4-pack-quantized"), "nvfp4a16"),
]


@pytest.mark.parametrize(("stored", "recipe"), PUBLISHED, ids=lambda value: str(value)[:40])
def test_the_method_names_the_recipe(stored: dict[str, Any], recipe: str) -> None:
    """The configurations that publishers write stand for recipes that llmsize ships."""
    assert recipe_name(stored) == recipe
    if recipe:
        assert (Path(presets.shipped()) / "recipes" / f"{recipe}.yaml").is_file()


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "quip"},
        {"quant_method": ["gptq"]},
        {"quant_method": "gptq"},
        {"quant_method": "gptq", "bits": "4", "group_size": 128},
        {"quant_method": "gptq", "bits": 4, "group_size": -1},
        bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type={}),
        {"quant_method": "hqq", "quant_config": []},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        compressed("dense"),
        compressed("float-quantized", strategy={}),
        {"bits": 4},
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_unknown_method_is_said(stored: dict[str, Any]) -> None:
    """No format is guessed."""
    with pytest.raises(LLMSizeError, match="knows no recipe for"):
        recipe_name(stored)
