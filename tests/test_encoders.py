"""Encoders: what is known of them, and that nobody is told how they would write."""

import csv
from pathlib import Path

import pytest
from training_runs import check_traced

from llmsize import presets
from llmsize.anatomy import traced
from llmsize.anatomy.parameters import count
from llmsize.architecture import Architecture
from llmsize.cli import run

REFERENCE = Path(__file__).parent / "reference"
QUANTITIES = ("act_end_fwd_bytes", "peak_fwd_bytes", "peak_bwd_bytes", "peak_step_bytes")

with (REFERENCE / "encoder_traces.csv").open() as table:
    ROWS = list(csv.DictReader(table))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case_id"])
def test_an_encoder_keeps_and_peaks_as_traced(row: dict[str, str]) -> None:
    """Four layers with either head, by benchmarks/measure_trace.py (transformers 5.23)."""
    check_traced(row, REFERENCE, QUANTITIES)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("bert-base", 109_514_298), ("bert-large", 335_174_458), ("roberta-base", 124_697_433),
        ("distilbert-base", 66_985_530), ("modernbert-base", 149_655_232),
        ("deberta-v3-base", 184_551_780), ("mpnet-base", 109_516_991),
        ("electra-small", 13_546_682), ("xlm-roberta-xl", 3_482_741_760),
        ("gte-multilingual-base", 306_210_496), ("jina-embeddings-v3", 559_616_146),
        ("rembert", 993_263_548), ("megatron-bert-345m", 333_671_808),
        ("roformer-chinese-base", 124_197_968), ("bigbird-roberta-base", 128_111_286),
        ("esmc-6b", 6_352_005_184), ("mobilebert-uncased", 36_596_538),
    ],
)  # fmt: skip
def test_parameters_are_those_of_transformers(name: str, published: int) -> None:
    """`num_parameters()` of the masked-language models (transformers 5.23)."""
    model = traced(presets.get(Architecture, name))
    assert count(model.weights.values()).total == published


@pytest.mark.parametrize(
    "words",
    [
        ["infer", "bert-base"],
        ["infer", "bert-base", "--engine", "vllm", "--gpu", "h100"],
        ["fits", "roberta-base", "--vram", "16GB"],
        ["train", "bert-base", "--objective", "dpo"],
        ["loss", "bert-base", "--tokens", "1B"],
    ],
)
def test_an_encoder_writes_no_text(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Commands about writing say that it does not."""
    assert run(words) == 2
    assert "encoder, which writes no text" in capsys.readouterr().err


def test_bigbird_by_blocks_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Up to (5 + 2 × 3) blocks of 64 tokens transformers falls back to full attention."""
    words = ["train", "bigbird-roberta-base", "--batch", "1", "--seq-len"]
    assert run([*words, "704"]) == 0
    assert run([*words, "705"]) == 2
    assert "704 tokens at most" in capsys.readouterr().err
