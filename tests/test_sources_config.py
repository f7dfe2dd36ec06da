"""Reading `config.json`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmsize.errors import LLMSizeError
from llmsize.sources.config import architecture, read_config

CONFIGS = sorted((Path(__file__).parent / "reference" / "configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_configurations_keep_every_field(path: Path) -> None:
    """What a publisher states is what the family will see."""
    published = json.loads(path.read_text())
    found = read_config(path)
    assert found.family == published["model_type"]
    kept = {**found.config, **({"quantization_config": found.stored} if found.stored else {})}
    assert {field: kept.get(field) for field in published} == published


def test_a_text_model_is_unfolded() -> None:
    """A model for several media is sized by its language model; tying may be stated outside."""
    found = architecture(
        {
            "model_type": "gemma3",
            "hidden_size": 1,
            "tie_word_embeddings": True,
            "vision_config": {"hidden_size": 1152},
            "text_config": {"model_type": "gemma3_text", "hidden_size": 2560},
        },
        "config.json",
        "gemma-3-4b",
    )
    assert (found.name, found.family) == ("gemma-3-4b", "gemma3_text")
    assert found.config["hidden_size"] == 2560
    assert found.config["tie_word_embeddings"] is True
    assert found.config["vision_config"] == {"hidden_size": 1152}


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("qwen3", "head_dim", 128),
        ("mixtral", "num_key_value_heads", 8),
        ("bert", "intermediate_size", 3072),
    ],
)
def test_an_absent_field_is_as_the_class_has_it(family: str, field: str, value: int) -> None:
    """The defaults that transformers v5.23.0 documents; the answer says that they were taken."""
    stated = {"model_type": family, "hidden_size": 512, "num_hidden_layers": 2}
    found = architecture(stated, "a test", "m")
    assert found.config[field] == value
    assert f"{field} {value:,}" in found.note
    assert architecture({**stated, field: 64}, "a test", "m").config[field] == 64


@pytest.mark.parametrize("tied", [True, False])
def test_the_whole_model_decides_on_its_head(tied: bool) -> None:
    """Whether the head is tied is up to the model that has it, not to the language model inside
    (transformers 5.23.0, modeling_utils.py, `get_expanded_tied_weights_keys`)."""
    found = architecture(
        {
            "model_type": "qwen3_vl_moe",
            "tie_word_embeddings": tied,
            "text_config": {"model_type": "qwen3_vl_moe_text", "tie_word_embeddings": not tied},
        },
        "config.json",
        "",
    )
    assert found.config["tie_word_embeddings"] is tied


@pytest.mark.parametrize("inside", [True, False])
def test_stored_formats_are_kept_apart(inside: bool) -> None:
    """`quantization_config` describes the checkpoint, not the shape."""
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    inner = {"model_type": "llama", **({"quantization_config": stored} if inside else {})}
    outer = {"text_config": inner, **({} if inside else {"quantization_config": stored})}
    found = architecture(outer, "config.json", "")
    assert found.stored == stored
    assert "quantization_config" not in found.config


def test_mamba_may_state_an_infinite_limit(tmp_path: Path) -> None:
    """Mamba 2 is published with `"time_step_limit": [0.0, Infinity]`."""
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "mamba2", "time_step_limit": [0.0, Infinity]}')
    assert read_config(path).family == "mamba2"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "no `model_type`"),
        (b'{"model_type": 3}', "no `model_type`"),
        (b'{"model_type": "a\\u001b[2J"}', "no `model_type`"),
        (b'{"model_type": "llama", "hidden_size": NaN}', "`hidden_size` is nan"),
        (b'{"model_type": "llama", "hidden_size": 1e308}', "`hidden_size` is 1e+308"),
        (b'{"model_type": "llama", "x": {"y": [1, -1e999]}}', "`y` is -inf"),
        (b'{"model_type": "llama", "x": 1' + b"0" * 400 + b"}", "`x` is 1000"),
        (b'{"model_type": "llama", "x": 1' + b"0" * 9000 + b"}", "not readable JSON"),
        (b'{"model_type": "llama", "model_type": "gpt2"}', "`model_type` occurs twice"),
        (b'{"model_type": "ll\xff"}', "not UTF-8"),
        (b'{"x":' + b"[" * 100_000, "too deep"),
        (b'{"x":' + b"[" * 100 + b"]" * 100 + b"}", "nested more than"),
        (b'{"model_type": "x", "text_config": []}', "no JSON object"),
        (b'{"model_type": "x", "quantization_config": "gptq"}', "no JSON object"),
        (b'{"x":[' + b"[]," * 1_000_000 + b"[]]}", "far larger"),
        (b'{"x":"' + b"y" * 5_000_000 + b'"}', "bytes, more than"),
    ],
    ids=range(19),
)
def test_a_broken_configuration_is_named(tmp_path: Path, text: bytes, problem: str) -> None:
    """Each way to be wrong has its own sentence."""
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(LLMSizeError) as failure:
        read_config(path)
    assert problem in str(failure.value)
