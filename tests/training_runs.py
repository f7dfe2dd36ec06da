"""Training runs of presets by the names of what they are made of, and steps that were traced."""

from collections.abc import Collection
from pathlib import Path

from benchmarks.tables.traces import training_memory
from llmsize import presets
from llmsize.memory.methods import Choices
from llmsize.memory.training import TrainingRun
from llmsize.memory.training_run import training_run
from llmsize.optimizers import Optimizer, Precision
from llmsize.stack import Stack


def run_of(
    chosen: Choices,
    precision: str = "pure-16bit",
    optimizer: str = "adamw",
    stack: str = "transformers",
) -> TrainingRun:
    """The run of those choices."""
    return training_run(
        chosen, presets.get(Stack, stack), presets.get(Precision, precision),
        presets.get(Optimizer, optimizer),
    )  # fmt: skip


def check_traced(row: dict[str, str], folder: Path, quantities: Collection[str]) -> None:
    """Each of the `quantities` of a traced step equals what llmsize says, to the byte.

    The configuration that the row names is in `folder`.
    """
    answers = [a for a in training_memory([row], folder) if a.quantity in quantities]
    assert {a.quantity for a in answers} == {*quantities}
    assert {a.quantity: a.got for a in answers} == {a.quantity: a.expected for a in answers}
