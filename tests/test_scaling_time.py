"""FLOP, time and cost: against notebooks, reports and the formulas that they print."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from llmsize import presets
from llmsize.anatomy import traced
from llmsize.anatomy.flops import forward_flop_per_token
from llmsize.anatomy.parameters import count
from llmsize.architecture import Architecture
from llmsize.cli import run
from llmsize.errors import LLMSizeError
from llmsize.hardware import Accelerator
from llmsize.throughput import (
    Utilization,
    cost,
    efficiency,
    flop_per_token,
    measured_utilization,
    megatron_flop_per_token,
    training_flop,
)

REFERENCE = Path(__file__).parent / "reference"


def _answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run(["time", *words, "--format", "json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_anatomy_counts_what_nanogpt_counts() -> None:
    """GPT-2 takes 291,648,307,200 FLOP forward for 1024 tokens (transformer_sizing.ipynb)."""
    with (REFERENCE / "scaling_examples.csv").open(newline="") as file:
        (row,) = (r for r in csv.DictReader(file) if r["task"] == "forward_flops")
    forward = forward_flop_per_token(traced(presets.get(Architecture, "gpt2")), 1024)
    assert forward.value * 1024 == float(row["expected"])


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b", "llama-2-7b", "qwen2.5-7b"])
def test_the_anatomy_agrees_with_the_count_of_torchtitan(name: str) -> None:
    """6 (N - embedding) + 12 layers width context, which torchtitan and Megatron-Core print."""
    model = presets.get(Architecture, name)
    trace = traced(model)
    counted = count(trace.weights.values())
    palm = flop_per_token(
        counted.total - counted.embedding, layers=model.config["num_hidden_layers"],
        width=model.config["hidden_size"], context=8192,
    )  # fmt: skip
    # the norms and biases that 6N counts are not matrices
    assert 3 * forward_flop_per_token(trace, 8192).value == pytest.approx(palm.value, rel=2e-4)


def test_only_chosen_experts_and_windows_count() -> None:
    """Mixtral multiplies two of eight experts; Mistral attends to no more than its window."""
    mixtral = traced(presets.get(Architecture, "mixtral-8x7b-v0.1"))
    counted = count(mixtral.weights.values())
    forward = forward_flop_per_token(mixtral, 1)
    assert forward.value == pytest.approx(2 * (counted.active - counted.embedding), rel=1e-3)
    mistral = traced(presets.get(Architecture, "mistral-7b-v0.1"))
    within = forward_flop_per_token(mistral, 4096).value
    assert forward_flop_per_token(mistral, 32_768).value == within


def test_latent_attention_has_wide_queries() -> None:
    """DeepSeek-V3: 128 heads of 192 channels for scores and 128 for values, in 61 layers."""
    trace = traced(presets.get(Architecture, "deepseek-v3"))
    attention = forward_flop_per_token(trace, 4096).part("attention").value
    assert attention == 2 * 4096 * 61 * 128 * (192 + 128)


def test_megatron_time_of_175_billion() -> None:
    """Narayanan et al. 2021: 8 T P / (n X) is 34 days for 175B at 140 TFLOP/s on 1024 A100."""
    flop = training_flop(175e9, 300e9, per_parameter=8).value
    assert round(flop / (1024 * 140e12) / 86_400) == 34


def test_recompute_is_a_third_more() -> None:
    """With every layer recomputed the hardware does exactly four thirds (PaLM, appendix B)."""
    shape = {"layers": 32, "width": 4096, "context": 2048}
    plain = flop_per_token(7e9, **shape)
    assert flop_per_token(7e9, **shape, recompute=True).value == pytest.approx(plain.value * 4 / 3)
    gpt = {"layers": 96, "hidden": 12_288, "context": 2048, "vocabulary": 51_200}
    full = megatron_flop_per_token(**gpt, recompute="full").value
    head = 6 * gpt["hidden"] * gpt["vocabulary"]
    assert full - head == pytest.approx((megatron_flop_per_token(**gpt).value - head) * 4 / 3)


def test_frozen_weights_cost_two_thirds() -> None:
    """Without a gradient of their own, weights take 4N per token: LoRA's bound."""
    shape = {"layers": 32, "width": 4096, "context": 2048}
    full, frozen = flop_per_token(7e9, **shape), flop_per_token(7e9, **shape, trained=0)
    assert full.value - frozen.value == 2 * 7e9
    assert flop_per_token(7e9, **shape, trained=7e9).value == full.value


def test_a_device_without_measurements_says_so() -> None:
    """Whole projects stand in, and the grade tells that it is an assumption."""
    known = presets.every(Utilization).values()
    other = measured_utilization(known, presets.get(Accelerator, "rtx-4090"), "bf16")
    assert other.name == "project"
    assert efficiency(other).grade == "assumed"
    assert "nothing is known" in efficiency(other).note
    with pytest.raises(LLMSizeError, match="no measured"):
        measured_utilization([], presets.get(Accelerator, "rtx-4090"), "bf16")


def test_nanogpt_takes_three_and_a_half_days(capsys: pytest.CaptureFixture[str]) -> None:
    """124,337,664 parameters on 3e11 tokens, eight A100 at 30 %: the notebook prints 3.46 days."""
    document = _answer(capsys, "--params", "124337664", "--tokens", "300B", "--gpu",
                       "a100-sxm-80gb", "--gpus", "8", "--mfu", "0.3")  # fmt: skip
    (table,) = (part for part in document["answer"] if "rows" in part)
    cells = {row["name"]: row["cells"]["given"]["value"] for row in table["rows"]}
    assert cells["time"] / 86_400 == pytest.approx(3.46, abs=0.005)
    assert cells["GPU-hours"] == pytest.approx(8 * 24 * 3.46, rel=0.002)
    assert cells["energy"] == pytest.approx(cells["GPU-hours"] * 0.4)


def test_measured_spread_bounds_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --mfu the answer is the measured median between the slowest and fastest run."""
    document = _answer(capsys, "llama-3.1-8b", "--tokens", "15T", "--gpu", "h100-sxm-80gb",
                       "--gpus", "512", "--price", "2.5", "--recompute")  # fmt: skip
    (table,) = (part for part in document["answer"] if "rows" in part)
    times = [cell["value"] for cell in table["rows"][1]["cells"].values()]
    assert times == sorted(times, reverse=True)
    values = {term["name"]: term["value"] for term in document["answer"] if "value" in term}
    assert values["training compute, by the anatomy"] > values["training compute, by 6ND"]
    assert values["utilization of the hardware (HFU)"] == pytest.approx(0.4 * 4 / 3)
    assert any("70 runs" in said for said in document["assumptions"])


def test_without_a_device_it_is_the_work_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-3 takes 3.15e23 FLOP by 6ND, 3640 PF-days (Brown et al. 2020, Table D.1)."""
    document = _answer(capsys, "--params", "174.6B", "--tokens", "300B")
    assert document["answer"][0]["value"] == pytest.approx(3.14e23, rel=0.0035)


def test_a_cost_needs_a_possible_price() -> None:
    """A negative or infinite price is an error."""
    hours = training_flop(1, 1)
    for price in (-1.0, float("inf"), float("nan")):
        with pytest.raises(LLMSizeError):
            cost(hours, price)


@pytest.mark.parametrize(
    "words",
    [
        "--params 7B",
        "--tokens 1T",
        "--params 7B --tokens 0",
        "llama-2-7b --params 7B --tokens 1T",
        "--params 7B --tokens 1T --gpu no-such-gpu",
        "--params 7B --tokens 1T --gpu a100-sxm-80gb --mfu 0",
        "--params 7B --tokens 1T --gpu a100-sxm-80gb --mfu 1.5",
        "--params 7B --tokens 1T --gpu a100-sxm-80gb --dtype fp8",
        "--params 7B --tokens 1T --gpu a100-sxm-80gb --price -1",
        "--params 7B --tokens 1T --trained 8B",
    ],
)
def test_a_mistake_is_one_error_and_one_hint(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be answered exits with 2, says why, and writes nothing to stdout."""
    assert run(["time", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and "\n\nhint: " in err
    assert "unexpectedly" not in err
