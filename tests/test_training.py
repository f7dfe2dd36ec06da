"""Training steps against real models that were followed tensor by tensor."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.tables.traces import training_memory
from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.formats import BF16, FP32
from llmsize.memory.methods import Choices
from llmsize.memory.peak import device_memory
from llmsize.memory.training import TrainingRun, training_step
from llmsize.sources.config import architecture
from llmsize.stack import Stack
from tests.training_runs import run_of

REFERENCE = Path(__file__).parent / "reference"
with (REFERENCE / "training_memory.csv").open() as table:
    ROWS = list(csv.DictReader(table))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case_id"])
def test_a_step_agrees_with_the_traced_one_to_the_byte(row: dict[str, str]) -> None:
    """States, kept bytes and the peak of each phase equal what the real step allocated."""
    answers = list(training_memory([row], REFERENCE))
    assert {a.quantity for a in answers} >= {"act_end_fwd_bytes", "peak_total_bytes", "peak_phase"}
    assert {a.quantity: a.got for a in answers} == {a.quantity: a.expected for a in answers}


def test_the_worked_step_of_the_concept_page_by_hand() -> None:
    """What Llama-3-8B keeps of 2,048 tokens, added up from its dimensions alone."""
    tokens, layers, hidden, heads, kv, inner, vocabulary = 2048, 32, 4096, 32, 1024, 14336, 128256
    norm = 4 * hidden + 2 * (2 * hidden) + 4
    attention = 2 * (hidden + kv + kv + hidden) + 4 * heads
    layer = 2 * norm + attention + 4 * (2 * inner)
    assert layer == 200_840
    rotary_tables, random_states = 2 * 128 * 2, 24
    by_hand = tokens * (layers * layer + norm + 4 * vocabulary + rotary_tables)
    step = training_step(presets.get(Architecture, "llama-3-8b"), run_of(Choices()))
    kept = sum(size for what, size in step.moment.live.items() if what.role == "kept")
    assert kept == by_hand + layers * random_states == 14_281_089_792


def test_states_and_copies_name_the_source_of_their_own_kind() -> None:
    """What an optimizer keeps is its library's business, not the model's."""
    static = training_step(
        presets.get(Architecture, "gpt2"), run_of(Choices(sequence=64), "mixed", "adamw-8bit")
    ).static
    assert "bitsandbytes" in static.part("optimizer states").source
    assert "arXiv:1710.03740" in static.part("master weights").source


def test_states_in_8_bit_have_scales_and_maps_that_all_share() -> None:
    """bitsandbytes: a byte for each moment of a matrix and an fp32 scale for every 256 of them,
    two maps of 256 fp32 values for all; tensors below 4,096 numbers keep fp32 moments.

    GPT-2's matrices have 124,318,464 of its 124,439,808 parameters.
    """
    matrices = (50257 + 1024) * 768 + 12 * 12 * 768**2
    found = training_step(
        presets.get(Architecture, "gpt2"), run_of(Choices(sequence=64), "fp32", "adamw-8bit")
    )
    small = 124_439_808 - matrices
    expected = 2 * (matrices + 4 * matrices // 256) + 8 * small + 2 * 256 * 4
    assert found.static.part("optimizer states").value == expected


def test_muon_steps_with_what_its_largest_matrix_takes() -> None:
    """pytorch, torch/optim/_muon.py: the gradient with its momentum, two rounds of it, and two
    matrices of its shorter side, all in 16 bits; of GPT-2 3,072 × 768 at a time."""
    found = training_step(
        presets.get(Architecture, "gpt2"), run_of(Choices(sequence=64), optimizer="muon")
    )
    assert found.step_scratch == 2 * (3 * 3072 * 768 + 2 * 768**2)


def _recomputed_eagerly(sequence: int) -> tuple[Architecture, TrainingRun]:
    """A step of TinyLlama (32 heads), whose peak comes to lie in one layer's scores."""
    chosen = Choices(method="lora", sequence=sequence, batch=8, recompute="full", attention="eager")
    return presets.get(Architecture, "tinyllama-1.1b"), run_of(chosen)


def test_softmax_takes_a_product_within_its_kernel() -> None:
    """The backward pass of CUDA's softmax holds gradient times output, in fp32, beside its result:
    allocated as PyTorch counts it, though no trace of tensors sees it.
    """
    asked = _recomputed_eagerly(1024)
    traced, own, *_ = device_memory(*asked, presets.get(Stack, "transformers")).parts
    assert traced.value == training_step(*asked).total
    assert own.value == 8 * 32 * 1024**2 * 4


def test_what_kernels_take_matters_at_the_peak_alone() -> None:
    """Where logits are the peak, a temporary in a layer is beneath it."""
    assert training_step(*_recomputed_eagerly(128)).within_kernels == 0


def test_a_step_passes_every_layer_there_and_back() -> None:
    """GPT-2's twelve, between the embedding and the head; then the optimizer steps."""
    points = training_step(presets.get(Architecture, "gpt2"), run_of(Choices(sequence=64))).timeline
    forward, backward = (
        [point for point in points if point.phase == phase] for phase in ("forward", "backward")
    )
    for passed, ends in (
        (forward, ["embedding", "layer 0", "layer 11", "head and loss"]),
        (backward, ["head and loss", "layer 11", "layer 0", "embedding"]),
    ):
        assert [passed[index].place for index in (0, 1, -2, -1)] == ends
        assert sum(point.layers for point in passed if "layer" in point.place) == 12
        assert all(point.highest >= point.after for point in passed)
    assert points[-1].place == "optimizer"


def test_layers_that_repeat_in_a_pattern_are_all_named() -> None:
    """Gemma 2's 26 layers see a window and all tokens in turn: each is named once, both ways."""
    model = presets.get(Architecture, "gemma-2-2b")
    points = training_step(model, run_of(Choices(sequence=64))).timeline
    for phase in ("forward", "backward"):
        passed = [p.place.split()[1::2] for p in points if p.phase == phase and "layer" in p.place]
        named = [i for ends in passed for i in range(int(ends[0]), int(ends[-1]) + 1)]
        assert sorted(named) == list(range(26))


def test_the_backward_pass_leaves_gradients_and_the_loss() -> None:
    """Of GPT-2's 124,439,808 parameters two bytes each, whatever the optimizer makes to step."""
    run = run_of(Choices(sequence=64), optimizer="adamw-foreach")
    found = training_step(presets.get(Architecture, "gpt2"), run)
    assert found.step_scratch > 0
    assert 0 <= found.left - 2 * 124_439_808 <= 4


FUSED = (
    ("adafactor", "pure-16bit", 5_619_928_444),
    ("lion", "pure-16bit", 3_356_550_408),
    ("adamw-foreach", "pure-16bit", 4_246_820_104),
    ("adafactor", "fp32", 4_934_188_412),
)


@pytest.mark.parametrize(("optimizer", "precision", "traced"), FUSED)
def test_a_fused_backward_pass_steps_on_each_weight_as_its_gradient_comes(
    optimizer: str, precision: str, traced: int
) -> None:
    """Three layers of Llama-3.2-1B, an optimizer of its own for each weight, as traced with
    transformers 5.23 and torch 2.13: the step on the tied embedding is the highest moment."""
    base = presets.get(Architecture, "llama-3.2-1b")
    model = replace(base, config={**base.config, "num_hidden_layers": 3})
    format = FP32 if precision == "fp32" else BF16
    choices = Choices(sequence=64, format=format, fused_backward=True)
    run = run_of(choices, precision, optimizer=optimizer)
    assert training_step(model, run).peaks["backward"] == traced


@pytest.mark.parametrize(
    ("family", "hidden", "heads"), [("llama", 512, 3), ("olmoe", 128, 3), ("exaone4", 256, 3)]
)
def test_heads_that_leave_channels_over_are_refused(family: str, hidden: int, heads: int) -> None:
    """transformers 5.23 was tried with each: Llama checks it, OLMoE's norms are as wide as the
    hidden states, and 85 channels cannot be turned in pairs."""
    config = {
        "model_type": family, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": 1,
    }  # fmt: skip
    model = architecture(config, "config.json", family)
    with pytest.raises(LLMSizeError, match=f"{heads} heads that do not divide {hidden}"):
        training_step(model, run_of(Choices(sequence=64)))
