"""FLOP, time and cost: against notebooks, reports and the formulas that they print."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from asking import answered, refused

from llmsize import presets
from llmsize.anatomy import Setting, run_forward, traced
from llmsize.anatomy.flops import forward_flop_per_token, training_flop_per_token
from llmsize.anatomy.parameters import count
from llmsize.architecture import Architecture
from llmsize.cli import run
from llmsize.errors import LLMSizeError
from llmsize.hardware import Accelerator
from llmsize.memory.methods import Choices, Method
from llmsize.memory.training_run import training_run
from llmsize.optimizers import Optimizer, Precision
from llmsize.stack import Stack
from llmsize.term import fact
from llmsize.throughput import (
    Utilization,
    affordable_flop,
    cost,
    device_hours,
    efficiency,
    energy,
    flop_per_token,
    measured_utilization,
    megatron_flop_per_token,
    training_flop,
)

REFERENCE = Path(__file__).parent / "reference"


def _answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    return answered(capsys, "time", *words)


def test_hours_energy_and_what_a_reservation_is_worth() -> None:
    """Eight devices for two hours are 16 GPU-hours; the 560 W of AMD's MI250X data sheet are those
    of two devices; and an hour of eight at 40 % of 1 PFLOP/s is 1.152e19 FLOP."""
    seconds = fact("time", 7200, unit="seconds", source="made up")
    hours = device_hours(seconds, 8)
    assert hours.value == 16
    mi250x = presets.get(Accelerator, "mi250x")
    assert energy(hours, mi250x).value == pytest.approx(16 * 0.28)
    rate, share = (fact(name, value, unit="", source="made up")
                   for name, value in (("peak", 1e15), ("utilization", 0.4)))  # fmt: skip
    worth = affordable_flop(devices=8, seconds=3600, peak=rate, efficiency=share)
    assert worth.value == pytest.approx(1.152e19)


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


COUNTED = {
    ("full", "all-linear"): 241_041_408,
    ("lora", "all-linear"): 203_685_888,
    ("norms", ""): 177_471_488,
    ("head", ""): 96_731_136,
}
"""FLOP of a forward and a backward pass over 128 tokens of `SMALL`, as torch.utils.flop_counter
counts them for transformers and peft with rank 8 (torch 2.13, eager attention, on a CPU)."""

SMALL = {
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def _trained(method: Method, targets: str) -> int:
    """Our count of the same."""
    choices = Choices(method, 1, 1, rank=8, targets=(targets,))
    setting = training_run(
        choices, presets.get(Stack, "transformers"), presets.get(Precision, "pure-16bit"),
        presets.get(Optimizer, "adamw"),
    ).setting  # fmt: skip
    trace, _ = run_forward(Architecture("small", "llama", SMALL, "test"), setting, outline=True)
    return 128 * int(training_flop_per_token(trace, 128).value)


@pytest.mark.parametrize(("method", "targets"), COUNTED)
def test_training_counts_what_torch_counts(method: Method, targets: str) -> None:
    """Forward all, backward only through what lies above something trained: to the last FLOP."""
    assert _trained(method, targets) == COUNTED[method, targets]


@pytest.mark.parametrize("name", ["gpt2", "mixtral-8x7b-v0.1", "deepseek-v3", "gemma-2-2b"])
def test_training_everything_is_three_forward_passes(name: str) -> None:
    """Where all is trained, backward is twice forward, tied heads and chosen experts included."""
    model = presets.get(Architecture, name)
    trace, _ = run_forward(model, Setting(training=True), outline=True)
    forward = forward_flop_per_token(traced(model), 1024).value
    assert training_flop_per_token(trace, 1024).value == 3 * forward


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
                       "--gpus", "512", "--price", "2.5", "--recompute", "full")  # fmt: skip
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
            cost(hours, fact("price", price, unit="$/GPU-hour", source="given"))


def test_adapters_take_less_than_all_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """Frozen weights need no gradients: between four and six FLOP per parameter and token."""
    full, lora = (
        _answer(capsys, "llama-3.1-8b", "--tokens", "1M", "--method", method)["answer"][0]["value"]
        for method in ("full", "lora")
    )
    assert 4 / 6 < lora / full < 0.75


def test_a_price_list_gives_cost_in_its_currency(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPU-hours times the listed price; a card that is not listed is an error, not a gap."""
    listed = tmp_path / "prices.json"
    listed.write_text('{"as_of": "2026-11-01", "currency": "€", "per_hour": {"h100": 2.5}}')
    words = ("--params", "7B", "--tokens", "1B", "--prices", str(listed), "--mfu", "0.4")
    table = _answer(capsys, *words, "--gpu", "h100")["answer"][-1]
    cells = {row["name"]: row["cells"]["given"] for row in table["rows"]}
    assert cells["cost"]["value"] == pytest.approx(2.5 * cells["GPU-hours"]["value"])
    assert cells["cost"]["unit"] == "€"
    assert run(["time", *words, "--gpu", "t4", "--dtype", "fp16"]) == 2
    assert "no price" in capsys.readouterr().err


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
        "--params 7B --tokens 1T --method lora",
        "llama-2-7b --tokens 1T --trained 40M",
        "gpt2 --tokens 1T --method frozen",
        "llama-2-7b --tokens 1T --method loar",
        "llama-2-7b --tokens 1T --method lora --rank 5000",
        "llama-2-7b --tokens 1T --method lora --targets nothing",
        "llama-2-7b --tokens 1T --gpu h100 --price 2 --prices none.json",
    ],
)
def test_a_mistake_is_one_error_and_one_hint(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be answered exits with 2, says why, and writes nothing to stdout."""
    refused(capsys, "time", *words.split())


def test_every_method_of_all_weights_takes_as_long(capsys: pytest.CaptureFixture[str]) -> None:
    """LOMO steps by SGD and GaLore by AdamW, which takes no FLOP that are counted."""
    said = []
    for method in ("full", "lomo", "galore"):
        assert run(["time", "gpt2", "--tokens", "1B", "--gpu", "h100", "--method", method]) == 0
        said.append(capsys.readouterr().out.splitlines()[0])
    assert len(set(said)) == 1
