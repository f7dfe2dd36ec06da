"""Parameter counts against instantiated models and published numbers."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tables.models import configured
from llmsize import presets
from llmsize.anatomy import traced
from llmsize.anatomy.config import Config
from llmsize.anatomy.mixture import sparse_layers
from llmsize.anatomy.parameters import Parameters, by_component, count
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.sources.config import read_config

REFERENCE = Path(__file__).parent / "reference"

with (REFERENCE / "param_counts.csv").open() as table:
    COUNTED = list(csv.DictReader(table))

CONFIGURED = json.loads((REFERENCE / "model_configs.json").read_text())

MODELS = presets.every(Architecture)

TRACED = {
    str(json.loads(file.read_text()).get("model_type")): file
    for file in sorted((REFERENCE / "trace_configs").glob("*.json"))
}
"""A traced model of every family, whether or not it has a preset."""

NORMS_LEFT_OUT = {"xai-org/grok-1": 2 * 64 * 6144}
"""Rows whose count is wrong, and by how much: this one was taken from Mixtral, whose layers lack
the norms behind attention and behind the experts (xai-org/grok-1, model.py, `DecoderLayer`)."""


def counted(model: Architecture) -> Parameters:
    """The fold over the model's forward pass, which its components must add up to."""
    weights = list(traced(model).weights.values())
    parameters = count(weights)
    assert by_component(weights).value == parameters.total
    return parameters


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: row["model"])
def test_counts_equal_the_instantiated_model(row: dict[str, str]) -> None:
    """Every parameter that the real model has is counted, and by what it means."""
    config = json.loads((REFERENCE / row["config_file"]).read_text())
    parameters = counted(Architecture(row["model"], row["model_type"], config, source=""))
    assert parameters.total == int(row["total_params"])
    assert parameters.embedding == int(row["embedding_params"])
    assert parameters.head == int(row["lm_head_params"])
    assert parameters.active == int(row["active_params"])


@pytest.mark.parametrize("family", sorted(TRACED))
def test_every_weight_of_a_family_belongs_to_a_component(family: str) -> None:
    """Those of families without a preset, too: ESM has a head for contacts."""
    file = TRACED[family]
    assert counted(read_config(file, file.stem)).total > 0


@pytest.mark.parametrize("row", CONFIGURED, ids=lambda row: row["hf_id"])
def test_counts_equal_the_published_configurations(row: dict[str, Any]) -> None:
    """A published `config.json`, sparse as it may be, leads to the count of its model."""
    parameters = counted(configured(row))
    missing = NORMS_LEFT_OUT.get(row["hf_id"], 0)
    assert parameters.total == row["params_total"] + missing
    assert parameters.active == (row["params_active"] or row["params_total"]) + missing


@pytest.mark.parametrize("name", [n for n, model in MODELS.items() if model.published_parameters])
def test_a_preset_counts_to_its_published_number(name: str) -> None:
    """A preset carries its own answer key; where it differs, its note says by how much."""
    model = MODELS[name]
    total, published = counted(model).total, model.published_parameters or 0
    told = (f"{abs(published - total):,}", f"{total:,}")
    assert published == total or any(number in model.note for number in told)


def test_counting_is_fast() -> None:
    """One model in a few milliseconds, so that all of them can be searched."""
    model = MODELS["deepseek-v3"]
    outline = traced.__wrapped__  # not what was remembered of the same model
    times = []
    for _ in range(5):
        start = time.process_time()
        outline(model)
        times.append(time.process_time() - start)
    assert min(times) < 0.05


@pytest.mark.parametrize(
    ("fields", "sparse"),
    [({"decoder_sparse_step": 2}, [1, 3, 5]), ({"decoder_sparse_step": 3}, [2, 5]),
     ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 4]}, [1, 2, 3, 5]),
     ({"first_k_dense_replace": 3, "moe_layer_freq": 2}, [4])],
)  # fmt: skip
def test_experts_are_in_every_kth_layer(fields: dict[str, Any], sparse: list[int]) -> None:
    """Qwen counts from one, `(layer_idx + 1) % decoder_sparse_step == 0`; DeepSeek from zero,
    `layer_idx % moe_layer_freq == 0` (transformers, modeling_qwen2_moe.py; DeepSeek's own code)."""
    layers = sparse_layers(Config(fields, "any"), 6)
    assert [index for index, has_experts in enumerate(layers) if has_experts] == sparse


BAD_VALUES = [None, -1, 0, 10**9, 2**63, 1e308, float("nan"), "x", [], [[]], {}, True, [None] * 500]


@pytest.mark.parametrize("family", {model.family: model for model in MODELS.values()})
def test_no_configuration_breaks_a_family(family: str) -> None:
    """Whatever stands in a field, the answer is a count or one clear error, and soon."""
    model = next(model for model in MODELS.values() if model.family == family)
    for place, field in enumerate(model.config):
        for bad in BAD_VALUES[place % 3 :: 3]:
            config = {**model.config, field: bad}
            try:
                count(traced(Architecture("hostile", family, config, source="")).weights.values())
            except LLMSizeError as refusal:
                assert refusal.hint


ENCODER_DECODERS = {
    "m2m_100": (256_206, 615_073_792),  # NLLB-200-distilled-600M
    "mbart": (250_054, 610_879_488),  # mBART-50 large
    "bart": (50_265, 406_291_456),  # BART large
}
"""Tokens of the vocabulary, and parameters of transformers 5.23's own model of that size."""


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders_have_the_parameters_of_the_instantiated_model(family: str) -> None:
    """Twelve layers each of 1,024 channels, with positions that are weights or not."""
    vocabulary, parameters = ENCODER_DECODERS[family]
    config = {
        "vocab_size": vocabulary, "d_model": 1024, "max_position_embeddings": 1024,
        **{f"{stack}_layers": 12 for stack in ("encoder", "decoder")},
        **{f"{stack}_attention_heads": 16 for stack in ("encoder", "decoder")},
        **{f"{stack}_ffn_dim": 4096 for stack in ("encoder", "decoder")},
    }  # fmt: skip
    assert counted(Architecture("model", family, config, source="")).total == parameters
