"""`llmsize advise` on the situations that people start from: the plan has to make sense."""

import json
import re
from typing import Any

import pytest
from asking import answered

from llmsize.cli import run

ON_TWO_T4 = ["advise", "--gpu", "t4", "--gpus", "2", "--days", "1", "--tokens", "1M"]


def advice(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The path by step, and the plans in their order."""
    assert run(["advise", *words.split(), "--format", "json"]) == 0
    path, plans = json.loads(capsys.readouterr().out)["answer"]
    return (
        {row["name"]: row["cells"]["result"] for row in path["rows"]},
        {row["name"]: row["cells"] for row in plans["rows"]},
    )


def first(plans: dict[str, Any], way: str) -> dict[str, Any]:
    """The best plan of one way."""
    cells: dict[str, Any] = next(c for name, c in plans.items() if f". {way}: " in name)
    return cells


def test_a_free_t4_tunes_a_7b_by_qlora(capsys: pytest.CaptureFixture[str]) -> None:
    """One 16 GB T4 (Colab): QLoRA of 7B to 14B is the best, in fp16 for want of bf16.

    Unsloth has a T4 notebook for a 14B (huggingface.co/unsloth/Phi-3-medium-4k-instruct-bnb-4bit).
    """
    path, plans = advice("--instance colab-t4 --days 12h --data 20MB", capsys)
    best = next(iter(plans))
    assert best.startswith("1. QLoRA")
    assert 6e9 < plans[best]["parameters"]["value"] < 1.5e10
    assert plans[best]["verdict"] == "fits"
    assert first(plans, "full fine-tuning")["parameters"]["value"] < 1e9
    assert path["best size for it"]["value"] < 3e8


def test_every_plan_can_be_asked_on_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """The command beside a plan needs the same bytes."""
    _, plans = answered(capsys, *ON_TWO_T4)["answer"]
    commands = [row["cells"]["on its own"].split()[1:] for row in plans["rows"]]
    assert "fits" in {command[0] for command in commands}
    for row, command in zip(plans["rows"], commands, strict=True):
        answer = answered(capsys, *command)["answer"]
        if command[0] == "fits":
            needed = answer[0]["rows"][-1]["cells"]["bytes"]["value"]
            assert needed == row["cells"]["memory"]["value"]


def test_every_step_of_the_path_can_be_asked_on_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every command beside a step runs, and what QLoRA can train at most is the same count."""
    path, _ = answered(capsys, *ON_TWO_T4)["answer"]
    steps = {row["name"]: row["cells"] for row in path["rows"]}
    lines = {step["on its own"] for step in steps.values()}
    documents = {line: answered(capsys, *line.split()[1:]) for line in lines}
    most = steps["QLoRA, nf4: at most"]
    table = documents[most["on its own"]]["answer"][0]
    counts = {row["name"]: row["cells"] for row in table["rows"]}
    assert counts["nf4"]["QLoRA"]["value"] == most["result"]["value"]


def test_an_rtx_4090_tunes_a_14b_or_more(capsys: pytest.CaptureFixture[str]) -> None:
    """24 GB: 14B to 34B by QLoRA, about 30B to chat with, 3B to 8B by LoRA."""
    _, plans = advice("--gpu rtx-4090", capsys)
    assert 13e9 < first(plans, "QLoRA")["parameters"]["value"] < 34e9
    assert 13e9 < first(plans, "inference only")["parameters"]["value"] < 35e9
    assert 3e9 < first(plans, "LoRA")["parameters"]["value"] < 9e9


def test_a_g5_xlarge_serves_what_fits_its_a10g(capsys: pytest.CaptureFixture[str]) -> None:
    """One A10G shows 22.5 GiB, so a 30B serves in four bits and a 70B does not."""
    _, plans = advice("--instance g5.xlarge --task serve --commercial", capsys)
    assert next(iter(plans)).startswith("1. inference only")
    sizes = [cells["parameters"]["value"] for cells in plans.values()]
    assert 13e9 < max(sizes) < 40e9


def test_many_users_share_a_paged_cache(capsys: pytest.CaptureFixture[str]) -> None:
    """64 users at once on one A10G: billions of parameters in four to sixteen bits by vLLM.

    Read all at once, 64 prompts alone would fill the card; vLLM reads 8,192 tokens at a time.
    """
    path, plans = advice("--instance g5.xlarge --task serve --users 64", capsys)
    assert path["inference only, 16-bit: at most"]["value"] > 1e9
    name, best = next(iter(plans.items()))
    assert best["parameters"]["value"] > 3e9
    command = best["on its own"].split()
    assert "--engine vllm --batch 64" in best["on its own"]
    assert run([*command[1:], "--format", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)["answer"]
    assert answer[0]["rows"][-1]["cells"]["bytes"]["value"] == best["memory"]["value"]
    words = ["infer", name.split(": ")[1], "--engine", "vllm", "--batch", "64", "--context", "2048"]
    stored = ["--quant", best["weights"]] if best["weights"] != "16-bit" else []
    assert run([*words, *stored, "--gpu", "a10g"]) == 0


def test_newer_models_come_before_older_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """On 24 GB nobody starts from Llama 1 or Falcon: each plan names a model of two years."""
    _, plans = advice("--gpu rtx-4090 --data 20MB", capsys)
    named = [cells["why"] for name, cells in plans.items() if "from scratch" not in name]
    assert named
    assert all("(202" in why and "(2023" not in why for why in named)
    assert "non-commercial" not in " ".join(named)


def test_a_copy_that_is_served_stays_on_one_server(capsys: pytest.CaptureFixture[str]) -> None:
    """1,024 cards serve 128 copies of a model, not one of 40 trillion parameters."""
    path, _ = advice("--gpu h100 --gpus 1024 --days 60 --task pretrain", capsys)
    assert 1e11 < path["inference only, 16-bit: at most"]["value"] < 1e12


def test_alpaca_takes_three_hours_and_a_hundred_dollars(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stanford Alpaca: 7B, 52,000 short samples, 3 epochs, 8 A100: 3 hours, below 100 dollars."""
    _, plans = advice(
        "llama-7b --gpu a100 --gpus 8 --days 1 --task finetune --samples 52000 --tokens 6.8M "
        "--epochs 3 --price 4",
        capsys,
    )
    best = first(plans, "full fine-tuning")
    assert next(iter(plans)) == "1. full fine-tuning: llama-7b"
    assert 2 < best["time"]["value"] / 3600 < 4
    assert 60 < best["cost"]["value"] < 130
    assert best["verdict"] == "fits"


def test_packing_short_samples_would_change_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """8N FLOP a token, by half of what eight A100 do: minutes, where a sample at a time is hours.

    The gradient is 4N and both passes forward 2N each (Korthikanti et al. 2022, section 5).
    """
    words = "llama-7b --gpu a100 --gpus 8 --task finetune --samples 52000 --tokens 6.8M --epochs 3"
    assert run(["advise", *words.split(), "--format", "json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    note = next(note for note in notes if note.startswith("samples packed"))
    minutes = 8 * 6.74e9 * 3 * 6.8e6 / (8 * 0.5 * 312e12) / 60
    told = re.search(r"([\d.]+) minutes", note)
    assert told and float(told[1]) == pytest.approx(minutes, rel=0.02)


def test_falcon_40b_by_qlora_wants_a_card_of_the_30_gb_class(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four bits bring 41B parameters to about 30 GB; 24 GB are not enough."""
    _, plans = advice("falcon-40b --gpu a100-40gb --task finetune --data 50MB", capsys)
    assert 27e9 < first(plans, "QLoRA")["memory"]["value"] < 35e9
    _, small = advice("falcon-40b --gpu rtx-4090 --task finetune", capsys)
    assert not small


@pytest.mark.parametrize(
    ("words", "compute", "parameters"),
    [("--gpu h100 --days 30", (0.8e21, 1.2e21), (2e9, 4e9)),
     ("--gpu h100 --gpus 1024 --days 60", (1.8e24, 2.4e24), (1e11, 2e11))],
)  # fmt: skip
def test_pretraining_spends_what_there_is(
    words: str,
    compute: tuple[float, float],
    parameters: tuple[float, float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One H100 for a month, 1,024 for two: FLOP at the measured 40 %, split Chinchilla's way."""
    path, plans = advice(f"{words} --task pretrain", capsys)
    assert next(iter(plans)) == "1. from scratch: a new model"
    flop = next(cell for name, cell in path.items() if name.startswith("compute in"))
    assert compute[0] < flop["value"] < compute[1]
    assert parameters[0] < path["best size for it"]["value"] < parameters[1]


@pytest.mark.parametrize(
    ("words", "hint"),
    [("", "--gpu"), ("--vram 24GB", "--gpu"), ("--gpu t4 --task chat", "chatbot"),
     ("--gpu t4 --tokens 1M --data 1MB", "give one"), ("--gpu t4 --days 0", "zero"),
     ("--gpu t4 --days never", "3h"), ("--gpu t4 --epochs 0", "zero"),
     ("--gpu rtx4091", "rtx-4090"),
     ("--gpu t4 --gpus 0", "from 1"), ("--gpu apple-m5", "accelerator"),
     ("nonesuch-7b --gpu t4", "show")],
)  # fmt: skip
def test_mistakes_are_told(words: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One error, one hint, no answer: exit 2, or 3 where nothing is published."""
    assert run(["advise", *words.split()]) in (2, 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert hint in captured.err


def test_several_users_are_served_where_no_paged_engine_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """vLLM's installation page knows no Apple GPU; Meta's 8B in four bits is 5 GB of 36."""
    _, plans = advice("--gpu m3-pro --task serve --users 4", capsys)
    best = next(iter(plans.values()))
    assert best["parameters"]["value"] > 8e9
    assert "--engine" not in best["on its own"]
    assert "--batch 4" in best["on its own"]
