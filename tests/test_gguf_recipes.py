"""Recipes: which tensor of a checkpoint takes which format."""

import pytest

from llmsize import presets
from llmsize.errors import LLMSizeError
from llmsize.formats import BF16, FP32, Format
from llmsize.memory.weights import (
    CONDITIONS,
    PLACES,
    Checkpoint,
    Recipe,
    Weight,
    formats_of,
    weight_bytes,
)


def format_of(name: str) -> Format:
    return presets.get(Format, name)


def checkpoint(*weights: Weight, family: str = "llama", layers: int = 1) -> Checkpoint:
    return Checkpoint(family, layers, 32, 8, experts=0, experts_used=0, weights=weights)


def chosen(recipe: str, *weights: Weight, layers: int = 1) -> list[str]:
    stored = formats_of(
        checkpoint(*weights, layers=layers), presets.get(Recipe, recipe), format_of, own=BF16
    )
    return [format.name for _, format in stored]


@pytest.mark.parametrize("name", presets.names(Recipe))
def test_every_recipe_names_formats_and_conditions_that_exist(name: str) -> None:
    """A rule that cannot be read is found here, not by a user."""
    recipe = presets.get(Recipe, name)
    presets.get(Format, recipe.base)
    for rule in recipe.rules:
        presets.get(Format, rule["format"])
        assert rule.keys() - {"roles", "format"} <= CONDITIONS.keys()
        assert {rule.get("layers", "middle"), rule.get("tensors", "middle")} <= PLACES.keys()


@pytest.mark.parametrize("name", presets.names(Format))
def test_every_fallback_is_a_format(name: str) -> None:
    """A format without smaller blocks falls back to plain 16 bit."""
    format = presets.get(Format, name)
    if format.fallback and format.block_elements > 1:
        fallback = presets.get(Format, format.fallback)
        assert fallback.block_elements < format.block_elements or fallback.block_elements == 1


def test_bitsandbytes_keeps_embeddings_head_and_norms() -> None:
    """`get_memory_footprint` of a model in NF4 counts these in the checkpoint's 16 bit."""
    weights = (
        Weight("embed.weight", (1000, 64), "embedding"),
        Weight("norm.weight", (64,), "norm", 0),
        Weight("q.weight", (64, 64), "q", 0),
        Weight("head.weight", (1000, 64), "head"),
    )
    assert chosen("nf4", *weights) == ["bf16", "bf16", "nf4", "bf16"]


def test_rows_that_k_quants_cannot_hold_fall_back() -> None:
    """Rows of 896 (Qwen2.5-0.5B) are not whole blocks of 256: Q4_K becomes Q5_0."""
    assert chosen("q4_k_m", Weight("k.weight", (128, 896), "k", 0)) == ["q5_0"]
    assert chosen("q4_k_m", Weight("k.weight", (128, 100), "k", 0)) == ["fp16"]


def test_the_embedding_is_stored_as_the_output_where_it_is_both() -> None:
    """A tied embedding takes the output matrix's Q6_K, an untied one the mix's base."""
    embedding = Weight("embed.weight", (1000, 256), "embedding")
    assert chosen("q4_k_m", embedding) == ["q6_k"]
    assert chosen("q4_k_m", embedding, Weight("head.weight", (1000, 256), "head")) == [
        "q4_k",
        "q6_k",
    ]


def test_experts_are_quantized_one_by_one() -> None:
    """Eight stacked experts keep eight sets of group scales."""
    one = weight_bytes(Weight("w", (8, 160), "up"), presets.get(Format, "gptq-int4-g128"))
    stacked = Weight("w", (8, 8, 160), "expert_up")
    assert weight_bytes(stacked, presets.get(Format, "gptq-int4-g128")) == 8 * one


def test_a_rule_with_an_unknown_condition_is_an_error() -> None:
    """A misspelt condition would apply the rule to every layer."""
    recipe = Recipe("x", "q4_k", ("q",), "none", rules=({"roles": ("q",), "format": "q6_k",
                                                         "layer": "first_two"},))  # fmt: skip
    with pytest.raises(LLMSizeError, match="layer") as error:
        formats_of(checkpoint(Weight("q.weight", (8, 256), "q", 0)), recipe, format_of, own=FP32)
    assert "layers" in error.value.hint


def test_a_file_type_of_llama_cpp_is_about_a_gguf_file() -> None:
    """Its roles are those of the file, where fused projections and experts are split."""
    for name in presets.names(Recipe):
        recipe = presets.get(Recipe, name)
        assert (recipe.container == "gguf") is ("llama-quant.cpp" in recipe.source), name
