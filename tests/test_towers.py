"""Towers and projectors of multimodal models against transformers' own modules.

Every expected number was counted by instantiating the class of transformers 5.23.0 on the meta
device, or is the total that a published checkpoint's safetensors headers state.
"""

from typing import Any

import pytest

from llmsize import presets
from llmsize.anatomy import traced
from llmsize.anatomy.parameters import count
from llmsize.anatomy.prediction import prediction_layers
from llmsize.anatomy.towers import towers
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.sources.config import architecture

SO400M = {
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
    "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14,
}  # fmt: skip

VISION: dict[str, tuple[dict[str, Any], int]] = {
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
    "Mistral Small 3.2": ({"model_type": "pixtral", "patch_size": 14}, 403_305_472),
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
    "Qwen3-Omni": (
        {"model_type": "qwen3_omni_moe_vision_encoder", "out_hidden_size": 2048}, 538_631_408,
    ),
    "Qwen3.5": ({"model_type": "qwen3_5", "out_hidden_size": 4096}, 456_010_480),
    "Gemma 4 E2B": ({"model_type": "gemma4_vision"}, 167_364_608),
    "Gemma 4, larger": (
        {"model_type": "gemma4_vision", "hidden_size": 1152, "intermediate_size": 4304,
         "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
         "head_dim": 72, "standardize": True}, 569_548_080,
    ),
    "Gemma 3n, MobileNetV5 of timm 1.0.31": ({"model_type": "gemma3n_vision"}, 294_126_912),
    "Llama 4 Scout": (
        {"model_type": "llama4_vision_model", "hidden_size": 1408, "intermediate_size": 5632,
         "num_hidden_layers": 34, "image_size": 336, "patch_size": 14}, 850_960_896,
    ),
    "Llama 3.2 Vision": ({"model_type": "mllama_vision_model"}, 836_288_019),
    "GLM-4.1V": ({"model_type": "glm4v_vision"}, 892_498_432),
    "InternViT-300M": ({"model_type": "internvl_vision"}, 303_938_560),
    "InternViT-6B": (
        {"model_type": "internvl_vision", "hidden_size": 3200, "intermediate_size": 12_800,
         "num_hidden_layers": 45, "norm_type": "rms_norm", "use_qk_norm": True,
         "patch_size": [14, 14], "image_size": [448, 448]}, 5_536_496_000,
    ),
    "Kimi K2.5": ({"model_type": "kimi_k25_vision"}, 416_866_032),
    "Idefics 3": ({"model_type": "idefics3_vision"}, 152_395_776),
}  # fmt: skip

AUDIO: dict[str, tuple[dict[str, Any], int]] = {
    "Qwen2-Audio": ({"model_type": "qwen2_audio_encoder"}, 636_968_960),
    "Voxtral": ({"model_type": "voxtral_encoder"}, 636_968_960),
    "Qwen2.5-Omni": ({"model_type": "qwen2_5_omni_audio_encoder"}, 639_647_232),
    "Qwen3-Omni": (
        {"model_type": "qwen3_omni_moe_audio_encoder", "output_dim": 2048}, 647_927_168,
    ),
    "Gemma 3n": ({"model_type": "gemma3n_audio"}, 681_348_640),
    "Gemma 4": ({"model_type": "gemma4_audio"}, 304_824_608),
}  # fmt: skip

PROJECTORS: dict[str, tuple[int, dict[str, Any], dict[str, Any], int]] = {
    "gemma3": (2560, {}, VISION["Gemma 3"][0], 2_950_272),
    "gemma4": (1536, {}, VISION["Gemma 4 E2B"][0], 1_179_648),
    "llama4": (
        5120, {}, VISION["Llama 4 Scout"][0] | {"vision_output_dim": 4096}, 20_971_520,
    ),
    "llava_next": (256, {}, {"model_type": "clip_vision_model"}, 262_656 + 256),
    "mistral3": (5120, {"spatial_merge_size": 2}, VISION["Mistral Small 3.2"][0], 35_652_608),
    "internvl": (3584, {"downsample_ratio": 0.5}, VISION["InternViT-300M"][0], 27_540_480),
    "kimi_k25": (7168, {}, VISION["Kimi K2.5"][0], 54_277_888),
    "idefics3": (4096, {}, VISION["Idefics 3"][0] | {"hidden_size": 1152}, 18_874_368),
    "paligemma": (2048, {}, SO400M, 2_361_344),
    "mllama": (4096, {}, {"model_type": "mllama_vision_model"}, 31_461_376),
}  # fmt: skip

SPOKEN: dict[str, tuple[int, dict[str, Any], int]] = {
    "qwen2_audio": (4096, {"model_type": "qwen2_audio_encoder", "d_model": 1280}, 5_246_976),
    "voxtral": (3072, {"model_type": "voxtral_encoder"}, 25_165_824),
    "gemma3n": (2048, {"model_type": "gemma3n_audio"}, 3_345_408),
    "gemma4": (1536, {"model_type": "gemma4_audio"}, 2_359_296),
}  # fmt: skip

PUBLISHED = {
    "gemma-3-4b": 4_300_079_472, "gemma-3-12b": 12_187_325_040, "gemma-3-27b": 27_432_406_640,
    "mistral-small-3.2-24b": 24_011_361_280,
    "llama-4-scout": 108_641_793_536, "llama-4-maverick": 401_583_781_376,
    "gemma-3n-e4b": 7_849_978_192 - 15 * (2 * 2048 * 512 + 256),  # keys and values never used
}  # fmt: skip


@pytest.mark.parametrize("name", VISION)
def test_a_vision_tower_has_the_parameters_of_its_module(name: str) -> None:
    """To the digit, mergers that are inside of it included."""
    config, expected = VISION[name]
    assert towers({"vision_config": config}, name)[0] == ("vision tower", expected)


@pytest.mark.parametrize("name", AUDIO)
def test_an_audio_tower_has_the_parameters_of_its_module(name: str) -> None:
    """To the digit, from the fields that its class has for what is not stated."""
    config, expected = AUDIO[name]
    assert towers({"audio_config": config}, name)[0] == ("audio tower", expected)


@pytest.mark.parametrize("kind", PROJECTORS)
def test_what_is_between_vision_and_language_is_counted(kind: str) -> None:
    """The projector follows from the whole model, its tower and the width of its text model."""
    width, fields, tower, expected = PROJECTORS[kind]
    whole = {"model_type": kind, "text_config": {"model_type": "llama", "hidden_size": width}}
    config = architecture(whole | fields | {"vision_config": tower}, "config.json", "m").config
    assert dict(towers(config, "m"))["projector"] == expected


@pytest.mark.parametrize("kind", SPOKEN)
def test_what_is_between_audio_and_language_is_counted(kind: str) -> None:
    """The same for those that hear."""
    width, tower, expected = SPOKEN[kind]
    whole = {"model_type": kind, "text_config": {"model_type": "llama", "hidden_size": width}}
    config = architecture(whole | {"audio_config": tower}, "config.json", "m").config
    assert dict(towers(config, "m"))["projector"] == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_with_its_towers_is_the_published_checkpoint(name: str) -> None:
    """Language model, towers and projector together are what the safetensors headers hold."""
    known = presets.get(Architecture, name)
    beside = sum(parameters or 0 for _, parameters in towers(known.config, name))
    assert count(traced(known).weights.values()).total + beside == PUBLISHED[name]


def test_an_unknown_tower_is_not_guessed() -> None:
    """No tower has no count, and one of another kind or description is named as unknown."""
    assert towers({}, "llama") == ()
    assert towers({"vision_config": {"model_type": "other"}}, "m") == (("vision tower", None),)
    assert towers({"audio_config": "loud"}, "m") == (("audio tower", None),)


def test_an_unknown_projector_is_named() -> None:
    """A tower that is known in a model that is not: what is between them is not guessed."""
    config = {"model_type": "other", "vision_config": SO400M}
    assert towers(config, "m")[1] == ("projector", None)


@pytest.mark.parametrize(
    ("config", "field"),
    [({"vision_config": SO400M | {"patch_size": -1}}, "patch_size"),
     ({"vision_config": SO400M | {"image_size": ["a"]}}, "image_size"),
     ({"audio_config": {"model_type": "gemma4_audio", "subsampling_conv_channels": [1]}},
      "subsampling_conv_channels"),
     ({"vision_config": VISION["InternViT-300M"][0], "hidden_size": 64,
       "model_type": "internvl", "downsample_ratio": 1e-9}, "downsample_ratio")],
)  # fmt: skip
def test_a_tower_out_of_bounds_is_refused(config: dict[str, Any], field: str) -> None:
    """What a file says is checked before it is multiplied."""
    with pytest.raises(LLMSizeError, match=field):
        towers(config, "m")


def predicted(name: str, **fields: int) -> tuple[tuple[str, int | None], ...]:
    """What is behind a preset's own layers."""
    known = presets.get(Architecture, name)
    return prediction_layers({**known.config, **fields}, known.family, traced(known))


def test_prediction_layers_are_the_rest_of_the_published_checkpoint() -> None:
    """Headers hold as many numbers; those of Qwen3.5 have a vision tower, too.

    DeepSeek-V3's 684,531,386,000 with 41,540,496 scales. GLM-4.5 and it have a correction bias for
    each expert of 90 and 59 layers, which are buffers.
    """
    checkpoints = {
        "qwen3.5-9b": 9_653_104_368,
        "qwen3.5-27b": 27_781_427_952, "qwen3.5-35b-a3b": 35_951_822_704,
        "qwen3.6-27b": 27_781_427_952, "qwen3.6-35b-a3b": 35_951_822_704,
        "qwen3.5-122b-a10b": 125_086_497_008, "qwen3.5-397b-a17b": 403_397_928_944,
        "qwen3-next-80b-a3b": 81_324_862_720, "glm-4.5": 358_337_791_296 - 90 * 160,
        "deepseek-v3": 684_531_386_000 - 41_540_496 - 59 * 256,
    }  # fmt: skip
    for name, held in checkpoints.items():
        (part,) = predicted(name, num_nextn_predict_layers=1)
        known = presets.get(Architecture, name)
        main = count(traced(known).weights.values()).total
        main += sum(parameters or 0 for _, parameters in towers(known.config, name))
        assert part == ("1 multi-token-prediction layer", held - main), name


def test_prediction_layers_of_other_families_are_named() -> None:
    """None where there are none, no count where their shape is not known."""
    assert predicted("llama-2-7b") == ()
    assert predicted("llama-2-7b", num_nextn_predict_layers=0) == ()
    assert predicted("llama-2-7b", num_mtp_modules=3) == (
        ("3 multi-token-prediction layers", None),
    )
