"""Training runs of presets, by the names of what they are made of."""

from llmsize import presets
from llmsize.memory.methods import Choices, training_run
from llmsize.memory.training import TrainingRun
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
