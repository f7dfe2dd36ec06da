"""Training steps against real models that were followed tensor by tensor."""

import csv
from pathlib import Path

import pytest

from benchmarks.tables.traces import training_memory
from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.memory.methods import Choices
from llmsize.memory.peak import device_memory
from llmsize.memory.training import TrainingStep, training_step
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


def _recomputed_eagerly(sequence: int) -> TrainingStep:
    """A step of TinyLlama (32 heads), whose peak comes to lie in one layer's scores."""
    chosen = Choices(
        method="lora", sequence=sequence, batch=8, recompute="full", attention="eager"
    )  # fmt: skip
    return training_step(presets.get(Architecture, "tinyllama-1.1b"), run_of(chosen))


def test_softmax_takes_a_product_within_its_kernel() -> None:
    """The backward pass of CUDA's softmax holds gradient times output, in fp32, beside its result:
    allocated as PyTorch counts it, though no trace of tensors sees it.
    """
    step = _recomputed_eagerly(1024)
    traced, own, *_ = device_memory(step, presets.get(Stack, "transformers")).parts
    assert traced.value == step.total
    assert own.value == 8 * 32 * 1024**2 * 4


def test_what_kernels_take_matters_at_the_peak_alone() -> None:
    """Where logits are the peak, a temporary in a layer is beneath it."""
    assert _recomputed_eagerly(128).within_kernels == 0


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
