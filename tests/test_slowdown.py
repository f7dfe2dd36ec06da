"""What changes of a training step cost in time, against what papers say of the mechanisms."""

from dataclasses import replace

import pytest

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.formats import Format
from llmsize.memory.methods import Choices
from llmsize.optimizers import Optimizer, Precision
from llmsize.planning.slowdown import dequantized, flop_of_token, over_the_bus, slowdown
from llmsize.planning.training import Question
from llmsize.stack import Stack


def question(**chosen: object) -> Question:
    """A step of Llama 2 7B in plain 16 bit."""
    return Question(
        presets.get(Architecture, "llama-2-7b"), Choices(**chosen),  # type: ignore[arg-type]
        presets.get(Stack, "transformers"), presets.get(Precision, "pure-16bit"),
        presets.get(Optimizer, "adamw"),
    )  # fmt: skip


def more(before: Question, after: Question) -> float:
    return flop_of_token(after).value / flop_of_token(before).value - 1


def test_recomputing_every_block_is_a_third_more_for_all_weights() -> None:
    """30 to 40 % in practice (Korthikanti et al. 2022): a forward pass beside three times its FLOP.

    The head is never computed again, so it is a little less than a third in FLOP.
    """
    assert 0.30 < more(question(), question(recompute="full")) < 1 / 3


def test_recomputing_is_half_more_beside_frozen_weights() -> None:
    """Frozen weights want no gradient: forward and backward are 4N, and once more forward 2N."""
    lora = question(method="lora")
    assert 0.45 < more(lora, question(method="lora", recompute="full")) < 0.5


def test_recomputing_every_second_product_is_half_of_that() -> None:
    """torchtitan's selective recompute keeps every second matrix product, and attention."""
    selective = more(question(), question(recompute="selective"))
    assert selective == pytest.approx(more(question(), question(recompute="full")) / 2, rel=0.1)


def test_what_is_recomputed_is_counted_by_hand() -> None:
    """Two FLOP for each number of the layers' matrices, and 4 · layers · context · channels for
    attention (PaLM, arXiv:2204.02311, appendix B); selective: half of the matrices alone."""
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    attention = 4 * 32 * 2048 * 4096
    full, selective = (
        flop_of_token(question(recompute=way)).inputs["again"] for way in ("full", "selective")
    )
    assert full == 2 * matrices + attention
    assert selective == matrices
    every_second = question(recompute="full", recompute_every=2)
    assert flop_of_token(every_second).inputs["again"] == full / 2


def test_only_what_a_change_adds_is_said() -> None:
    """Of 6.74 billion parameters two bytes go back after a step on the host; with weights there
    too, two bytes come twice instead: 2M more. A second micro-batch of QLoRA: 77 bytes each."""
    held, away = question(offload="optimizer"), question(offload="parameters")
    assert list(slowdown(held, away)) == ["13.48 GB over the bus in a step, 214 ms or more"]
    base = presets.get(Format, "nf4")
    once, twice = (question(method="qlora", base=base, accumulation=n) for n in (1, 2))
    (moved,) = slowdown(once, twice)
    weights = 6_738_415_616 + 39_976_960  # the base, and adapters of rank 16
    assert moved == f"{77 * weights / 1e9:.2f} GB moved to dequantize in a step"


def test_zero_offload_moves_four_bytes_a_parameter() -> None:
    """Gradients go in 16 bit and weights come back: 4M (Ren et al. 2021, section 4)."""
    crossing = over_the_bus(question(offload="optimizer")).value
    assert crossing == 4 * 6_738_415_616
    words = " ".join(slowdown(question(), question(offload="optimizer")))
    assert words == "26.95 GB over the bus in a step, 428 ms or more"  # at 63 GB/s


def test_a_quantized_base_is_dequantized_for_every_micro_batch() -> None:
    """Nothing is moved for it in LoRA, and twice as much in two micro-batches as in one."""
    nf4 = presets.get(Format, "nf4")
    once = dequantized(question(method="qlora", base=nf4)).value
    assert once > 0
    assert dequantized(question(method="qlora", base=nf4, accumulation=2)).value == 2 * once
    assert dequantized(question(method="lora")).value == 0


def test_what_changes_nothing_in_time_is_not_said() -> None:
    """States in 8 bit compute as much and cross no bus."""
    changed = replace(question(), optimizer=presets.get(Optimizer, "adamw-8bit"))
    assert list(slowdown(question(), changed)) == []
