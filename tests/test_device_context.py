"""What a context takes on cards of different sizes.

PyTorch's error on running out of memory says what the process holds, what of it is allocated and
what is reserved besides: the rest is the context. `device_context.csv` has such errors of single
processes on one named card (the RTX 3080 and one T4 by their capacity), since PyTorch 2.1; left out
are processes above 1 GiB, in which NCCL or other libraries allocate.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from llmsize import presets
from llmsize.hardware import Accelerator
from llmsize.memory.peak import device_context
from llmsize.stack import Stack
from llmsize.units import GIB, MIB

TABLE = Path(__file__).parent / "reference" / "device_context.csv"
with TABLE.open(newline="", encoding="utf-8") as file:
    ERRORS = list(csv.DictReader(file))

TORCH = presets.get(Stack, "transformers")

CARDS = [
    ("t4", 40 * 1024), ("a100-sxm-40gb", 108 * 2048), ("rtx-5090", 170 * 1536),
    ("l4", 58 * 1536), ("a10", 72 * 1536), ("rtx-2080-ti", 68 * 1024), ("p100", 56 * 2048),
]  # fmt: skip
"""By NVIDIA's driver: multiprocessors, and threads of each."""


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error["source"][19:])
def test_contexts_are_those_of_published_processes(error: dict[str, str]) -> None:
    """Nine cards from 24 to 170 multiprocessors, within the spread that the estimate states."""
    process, allocated = float(error["process_gib"]), float(error["allocated_gib"])
    seen = (process - allocated) * GIB - float(error["unallocated_mib"]) * MIB
    context = device_context(TORCH, presets.get(Accelerator, error["card"])).value
    assert 0.81 <= seen / context <= 1.12


@pytest.mark.parametrize(("card", "threads"), CARDS)
def test_resident_threads_are_those_of_the_driver(card: str, threads: int) -> None:
    """Multiprocessors times the threads of each in that generation."""
    assert presets.get(Accelerator, card).resident_threads == threads


def test_a_card_that_is_not_known_leaves_the_context_of_the_stack() -> None:
    """So does a stack that loads every kernel: 1,343 MiB were in use on an idle V100."""
    assert device_context(TORCH, None).value == TORCH.context
    assert device_context(TORCH, presets.get(Accelerator, "mi300x")).value == TORCH.context
    early = presets.get(Stack, "transformers-4-torch-1")
    assert device_context(early, presets.get(Accelerator, "v100-sxm2-16gb")).value == 1343 * MIB
