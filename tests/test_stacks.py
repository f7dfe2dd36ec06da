"""Training frameworks that put layers together in their own way."""

import csv
from pathlib import Path

import pytest

from benchmarks.tables.training import measured_training
from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.memory.methods import Choices, training_run
from llmsize.memory.training import training_step
from llmsize.optimizers import Optimizer, Precision
from llmsize.stack import Stack

MEASURED = Path(__file__).parent / "reference" / "measured_training.csv"
LITGPT = [
    row
    for row in csv.DictReader(MEASURED.open(newline=""))
    if row["source"] == "litgpt" and row["method"] == "lora" and row["batch_per_device"] == "1"
    and row["gpus"] == "1" and row["kind"] == "measured"
]  # fmt: skip


def trained(model: str, stack: str, **choices: object) -> int:
    """Parameters that a run with query and value adapters of rank 8 trains."""
    chosen = Choices(**{"method": "lora", "rank": 8, "targets": ("q_proj", "v_proj"), **choices})  # type: ignore[arg-type]
    precision, optimizer = presets.get(Precision, "pure-16bit"), presets.get(Optimizer, "adamw")
    run = training_run(chosen, presets.get(Stack, stack), precision, optimizer)
    return training_step(presets.get(Architecture, model), run).trained


@pytest.mark.parametrize("row", LITGPT, ids=lambda row: row["model"])
def test_one_projection_of_q_k_and_v_trains_what_its_authors_print(row: dict[str, str]) -> None:
    """LitGPT's resource table names the trainable parameters of adapters on q and v."""
    assert trained(row["model"], "litgpt") == int(row["trainable_params"])


def test_the_projection_is_adapted_as_a_whole_by_no_other_method() -> None:
    """DoRA takes the norms of whole weights, and is refused for a part of one."""
    with pytest.raises(LLMSizeError, match="one projection"):
        trained("llama-2-7b", "litgpt", method="dora")


def test_runs_of_2023_are_met_within_a_tenth() -> None:
    """What Lit-GPT's authors read from the allocator, quantized bases included."""
    rows = [row for row in csv.DictReader(MEASURED.open(newline="")) if row["source"] == "litgpt"]
    answers = [a for a in measured_training(rows) if a.got is not None]
    assert len(answers) >= 13
    assert max(abs(a.got / a.expected - 1) for a in answers) <= 0.1  # type: ignore[operator]


def test_torchtunes_own_table_is_met_within_an_eighth() -> None:
    """Each step of the README's cumulative table, from nothing saved to QLoRA."""
    rows = [
        row for row in csv.DictReader(MEASURED.open(newline="")) if row["source"] == "torchtune"
    ]
    errors = {
        a.id: abs(a.got / a.expected - 1) for a in measured_training(rows) if a.got is not None
    }
    assert len(errors) >= 9
    assert sorted(errors.values())[len(errors) // 2] <= 0.02
    assert max(errors.values()) <= 0.125
