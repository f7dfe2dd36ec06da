"""What `llmsize inspect` says of models from every kind of source."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmsize.cli import run

SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 100,
}


def asked(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The document that a command line answers with."""
    assert run([*words, "--format", "json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def table(document: dict[str, Any], heading: str) -> dict[str, dict[str, Any]]:
    """One table of a document: cells by row."""
    found = next(part for part in document["answer"] if part.get("heading") == heading)
    return {row["name"]: row["cells"] for row in found["rows"]}


def test_components_add_up_to_the_published_count(capsys: pytest.CaptureFixture[str]) -> None:
    """The components of DeepSeek-V3 are the 671B that its checkpoint holds."""
    components = table(asked(["inspect", "deepseek-v3"], capsys), "component")
    total = components.pop("total")["parameters"]["value"]
    assert total == 671_026_404_352
    assert sum(cells["parameters"]["value"] for cells in components.values()) == total


def test_the_cache_of_one_token_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 3.1 8B keeps 8 heads of 128 channels, twice, in 32 layers of 16 bit: 128 KiB."""
    cache = table(asked(["inspect", "llama-3.1-8b"], capsys), "for")
    assert cache["each token"]["bytes"]["value"] == 128 * 1024


def test_every_tensor_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """The tensors of GPT-2 in its own format take 4 bytes for each of 124,439,808 parameters."""
    tensors = table(asked(["inspect", "gpt2", "--tensors"], capsys), "tensor")
    assert sum(cells["bytes"]["value"] for cells in tensors.values()) == 4 * 124_439_808
    assert tensors["transformer.h.{}.attn.c_attn.weight"]["layers"] == "0–11"


def test_an_unknown_family_is_refused_and_can_be_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A guess is made only where it is asked for, and everything that follows is marked."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**SMALL, "model_type": "lamma"}))
    assert run(["inspect", str(config)]) == 2
    assert "--assume-family llama" in capsys.readouterr().err
    document = asked(["inspect", str(config), "--assume-family", "llama"], capsys)
    total = table(document, "component")["total"]["parameters"]
    assert total["value"] == 2 * 100 * 64 + 2 * (4 * 64**2 + 3 * 64 * 128 + 2 * 64) + 64
    assert total["grade"] == "assumed"


def test_an_assumed_family_is_asked_for_its_own_types(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A family of several types takes the one that is assumed, not the unknown one of the file."""
    counted: list[int] = []
    experts = {**SMALL, "num_key_value_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    for name, words in (("mixtral", []), ("mixtrel", ["--assume-family", "mixtral"])):
        config = tmp_path / "config.json"
        config.write_text(json.dumps({**experts, "model_type": name}))
        document = asked(["inspect", str(config), *words], capsys)
        counted.append(table(document, "component")["total"]["parameters"]["value"])
    assert counted[0] == counted[1]


def test_a_known_family_is_not_assumed_to_be_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`--assume-family` never overrides what is known."""
    assert run(["inspect", "gpt2", "--assume-family", "llama"]) == 2
    assert "leave out `--assume-family`" in capsys.readouterr().err


def test_a_known_vision_tower_is_counted_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Qwen3-VL-8B's tower, as transformers 5.23.0 makes it, is beside the text model's total."""
    tower = {
        "model_type": "qwen3_vl", "depth": 27, "hidden_size": 1152, "intermediate_size": 4304,
        "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24],
    }  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**SMALL, "model_type": "llama", "vision_config": tower}))
    document = asked(["inspect", str(config)], capsys)
    counts = table(document, "count")
    assert counts["vision tower, besides"]["parameters"]["value"] == 576_388_336
    assert counts["total"]["parameters"]["value"] == 2 * 100 * 64 + 2 * (
        4 * 64**2 + 3 * 64 * 128 + 2 * 64
    ) + 64  # fmt: skip
    assert not any("not counted" in note for note in document["notes"])


def test_the_stored_formats_follow_from_the_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The files of gpt-oss-20b have 4.79, 4.80 and 4.17 GB (its page on the Hub), experts MXFP4."""
    formats = table(asked(["inspect", "gpt-oss-20b"], capsys), "stored format")
    assert formats["total"]["bytes"]["value"] == pytest.approx(13.76e9, abs=0.015e9)
    assert set(formats) == {"mxfp4", "bf16", "total"}
    tensors = table(asked(["inspect", "gpt-oss-20b", "--tensors"], capsys), "tensor")
    assert tensors["model.layers.0.mlp.experts.down_proj"]["format"] == "mxfp4"


def test_an_unknown_quantization_does_not_hide_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shape is told all the same, and that the stored formats are not known."""
    config = {**SMALL, "model_type": "llama", "quantization_config": {"quant_method": "quip"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    notes = asked(["inspect", str(tmp_path / "config.json")], capsys)["notes"]
    assert "stored formats unknown: llmsize knows no recipe for `quip`" in notes


def test_what_a_published_text_model_leaves_out_is_its_class_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma-3-4b-it's headers hold 4,300,079,472 parameters, 1152 × 2561 of its projector."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
        "num_hidden_layers": 34, "sliding_window": 1024,
    }  # fmt: skip
    tower = {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "image_size": 896,
        "vision_use_head": False,
    }  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": tower})
    )
    document = asked(["inspect", str(config)], capsys)
    counts = table(document, "count")
    held = sum(counts[name]["parameters"]["value"] for name in ("total", "vision tower, besides"))
    assert held + 1152 * (2560 + 1) == 4_300_079_472
    assert any("as the class has it: vocab_size 262,208" in note for note in document["notes"])
