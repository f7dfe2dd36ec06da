"""Vision towers against transformers' own modules."""

from typing import Any

import pytest

from llmsize.anatomy.vision import tower_parameters
from llmsize.errors import LLMSizeError

SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
    "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip

TOWERS: dict[str, tuple[dict[str, Any], int]] = {
    "Gemma 3": (SO400M | {"image_size": 896, "vision_use_head": False}, 416_866_032),
    "SigLIP so400m": (SO400M | {"image_size": 384}, 428_225_600),
    "CLIP ViT-L/14": (
        {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
         "num_hidden_layers": 24, "image_size": 336, "patch_size": 14}, 303_507_456,
    ),
    "Pixtral": (
        {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096,
         "num_hidden_layers": 24, "patch_size": 16}, 403_489_792,
    ),
    "Qwen2-VL-7B": (
        {"model_type": "qwen2_vl", "depth": 32, "embed_dim": 1280, "hidden_size": 3584},
        675_759_104,
    ),
    "Qwen2.5-VL-7B": (
        {"model_type": "qwen2_5_vl", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420,
         "out_hidden_size": 3584}, 676_550_144,
    ),
    "Qwen3-VL-8B": (
        {"model_type": "qwen3_vl", "depth": 27, "hidden_size": 1152, "intermediate_size": 4304,
         "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]}, 576_388_336,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_has_the_parameters_of_its_module(name: str) -> None:
    """Instantiated by transformers 5.23.0 on the meta device."""
    config, expected = TOWERS[name]
    assert tower_parameters({"vision_config": config}, name) == expected


def test_an_unknown_tower_is_not_guessed() -> None:
    """No tower, or one of another kind, has no count."""
    assert tower_parameters({}, "llama") is None
    assert tower_parameters({"vision_config": {"model_type": "other"}}, "m") is None


def test_a_tower_out_of_bounds_is_refused() -> None:
    """What a file says is checked before it is multiplied."""
    with pytest.raises(LLMSizeError, match="patch_size"):
        tower_parameters({"vision_config": SO400M | {"patch_size": -1}}, "m")
