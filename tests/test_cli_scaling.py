"""`llmsize loss` and `llmsize optimal` as people type them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from asking import answered, refused

from llmsize.cli import run


def _values(document: dict[str, Any]) -> dict[str, float]:
    return {term["name"]: term["value"] for term in document["answer"] if "value" in term}


def test_the_card_of_two_billion_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """Kaplan et al., Table 5: the loss, what else reaches it, and where 2B is the best size."""
    assert run(["loss", "--params", "2B", "--format", "plain"]) == 0
    shown = capsys.readouterr().out
    for figure in ("2.2537 nats/token", "9.523", "3.251", "10.4B tokens", "38.2B tokens",
                   "27.1 PF-days", "20.1 PF-days", "1.80 PF-days", "2.5808"):  # fmt: skip
        assert figure in shown
    assert "non-embedding" in shown
    assert "WebText2" in shown
    assert "1.5e+09" in shown, "the end of the fitted range"


def test_what_reaches_a_loss(capsys: pytest.CaptureFixture[str]) -> None:
    """Kaplan et al., Equations 1.1 to 1.3, inverted at 2.5 nats."""
    assert run(["loss", "--target-loss", "2.5", "--format", "plain"]) == 0
    shown = capsys.readouterr().out
    for figure in ("511M parameters", "3.50B tokens", "3.41 PF-days"):
        assert figure in shown


def test_figure_1_is_a_law_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """The constant of Figure 1 asks for less compute than that of the text."""
    found = _values(answered(capsys, "loss", "--target-loss", "2.5", "--law", "kaplan-figure1"))
    assert found["compute that reaches it, C_min"] / 8.64e19 == pytest.approx(2.529, rel=1e-3)


def test_every_law_answers_with_its_unit_and_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    """Laws side by side name what their N counts, and that losses are not comparable."""
    document = answered(capsys, "loss", "--params", "70B", "--tokens", "1.4T", "--law", "all")
    rows = {row["name"]: row["cells"] for row in document["answer"][0]["rows"]}
    assert rows["hoffmann"]["loss"]["value"] == pytest.approx(1.9366, abs=1e-4)
    assert rows["chinchilla"]["loss"]["value"] == pytest.approx(1.9739, abs=1e-4)
    assert rows["kaplan"]["N counts"] == "non-embedding"
    assert "not comparable" in document["notes"][0]
    assert "ludziejewski" not in rows
    with_experts = answered(capsys, "loss", "--params", "1B", "--tokens", "20B", "--law", "all",
                           "--experts", "8")  # fmt: skip
    assert "ludziejewski" in {row["name"] for row in with_experts["answer"][0]["rows"]}


def test_a_model_is_counted_as_the_law_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 2 7B has 6,476,271,616 parameters outside its embedding and head."""
    document = answered(capsys, "loss", "llama-2-7b")
    assert document["answer"][0]["inputs"]["N"] == 6_476_271_616
    total = answered(capsys, "loss", "llama-2-7b", "--law", "chinchilla")
    assert total["answer"][0]["inputs"]["N"] == 6_738_415_616


def test_repeated_tokens_change_the_law(capsys: pytest.CaptureFixture[str]) -> None:
    """Muennighoff et al.: L(6.34e9, 242e9, 25e9) by the authors' code."""
    document = answered(capsys, "loss", "--params", "6.34B", "--tokens", "242B",
                       "--unique-tokens", "25B", "--law", "muennighoff")  # fmt: skip
    assert document["answer"][0]["value"] == pytest.approx(2.2256440889984477, rel=1e-9)


def test_steps_and_batch_use_the_critical_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """At an enormous batch S_min is S, and Kaplan's L(N, S_min) is what Table 3 gives."""
    words = ("loss", "--params", "1.5B", "--steps", "250000", "--batch-tokens", "1000T")
    assert answered(capsys, *words)["answer"][0]["value"] == pytest.approx(2.301733988, rel=1e-6)
    small = answered(capsys, *words[:-1], "512K")["answer"][0]["value"]
    assert small > 2.301733988


def test_own_runs_move_a_law(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Runs made by a law with a higher floor and more data need bring that law back."""
    lines = ["parameters,tokens,loss"]
    for n, d in ((1e8, 2e9), (3e8, 6e9), (1e9, 2e10), (1e9, 8e10), (3e9, 6e10), (1e8, 5e10)):
        lines.append(f"{n:.0f},{d:.0f},{2.0 + 500 / n**0.3478 + 2500 / d**0.3658:.12f}")
    table = tmp_path / "runs.csv"
    table.write_text("\n".join(lines) + "\n")
    document = answered(
        capsys, "loss", "--params", "7B", "--tokens", "1T", "--calibrate", str(table)
    )
    expected = 2.0 + 500 / 7e9**0.3478 + 2500 / 1e12**0.3658
    assert document["answer"][0]["value"] == pytest.approx(expected, rel=1e-6)
    constants = {row["name"]: row["cells"] for row in document["answer"][2]["rows"]}
    assert constants["E"]["calibrated"]["value"] == pytest.approx(2.0, rel=1e-6)
    assert constants["B"]["calibrated"]["value"] == pytest.approx(2500, rel=1e-4)
    residuals = [row["cells"]["residual"]["value"] for row in document["answer"][3]["rows"]]
    assert max(map(abs, residuals)) < 1e-6
    assert "95 % of resamples" in document["headline"]


def test_one_run_shifts_without_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    """A single run fixes the level and says that it leaves no spread."""
    document = answered(capsys, "loss", "--params", "1B", "--tokens", "20B",
                       "--calibrate", "1B,20B,2.71")  # fmt: skip
    assert document["answer"][0]["value"] == pytest.approx(2.71, rel=1e-12)
    assert "resamples" not in document["headline"]
    assert any("no interval" in note for note in document["notes"])


def test_the_best_split_of_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """Besiroglu et al.: 72.2B parameters and 18.4 tokens for each at 5.76e23 FLOP."""
    document = answered(capsys, "optimal", "--compute", "5.76e23")
    cells = document["answer"][0]["rows"][0]["cells"]
    assert cells["parameters"]["value"] == pytest.approx(72.2e9, rel=1e-3)
    assert cells["per parameter"]["value"] == pytest.approx(18.39, rel=1e-3)
    assert document["answer"][0]["rows"][1]["name"] == "20 tokens per parameter"
    trade = {row["name"]: row["cells"]["compute ratio"]["value"]
             for row in document["answer"][1]["rows"]}  # fmt: skip
    assert trade.pop("1.00 ×") == pytest.approx(1)
    assert min(trade.values()) > 1


def test_hours_of_a_card_are_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """5,760 hours of an H100 at 40 % of 989 TFLOP/s are 8.2e21 FLOP."""
    document = answered(capsys, "optimal", "--gpu-hours", "5760", "--gpu", "h100-sxm-80gb")
    assert document["question"]["compute"] == pytest.approx(5760 * 3600 * 0.4 * 989e12, rel=1e-3)
    assert "40 %" in document["assumptions"][0]


def test_serving_and_caps_make_the_model_smaller(capsys: pytest.CaptureFixture[str]) -> None:
    """Sardana et al.: 24.18B at loss 1.947 with 2e12 tokens served, from the authors' code."""
    words = ("optimal", "--target-loss", "1.947", "--law", "sardana")
    served = answered(capsys, *words, "--inference-tokens", "2T")
    cells = served["answer"][0]["rows"][0]["cells"]
    assert cells["parameters"]["value"] == pytest.approx(24.18e9, rel=1e-3)
    assert cells["with inference"]["value"] == pytest.approx(4.823e23, rel=1e-3)
    capped = answered(capsys, *words, "--max-params", "10B")
    assert capped["answer"][0]["rows"][0]["cells"]["parameters"]["value"] == 10**10


@pytest.mark.parametrize(
    "words",
    [
        "loss",
        "loss --params 0",
        "loss --params 2B --law nonsense",
        "loss --tokens -5",
        "loss --target-loss 1.7 --law chinchilla",
        "loss --target-loss 0",
        "loss --params 2B --tokens 1B --compute 1e25",
        "loss --params 2B --law gpt3",
        "loss --params 2B --tokens 1T --unique-tokens 1B --law chinchilla",
        "loss --params 2B --law ludziejewski",
        "loss --compute 1e999",
        "loss --params 2B --calibrate 1B,20B",
        "loss --params 2B --calibrate 1B,20B,nan",
        "loss --params 2B --calibrate 1B,20B,0.0001",
        "loss --params 2B --calibrate no-such-file.csv",
        "loss --params 2B --calibrate 1B,20B,2.7 --law kaplan",
        "loss --params 2B --precision 2",
        "loss llama-2-7b --params 2B",
        "loss --params 2B --steps 1000",
        "loss --params 2B --tokens 1T --steps 10 --batch-tokens 5",
        "loss --target-loss 2 --unique-tokens 1B",
        "optimal --target-loss 2 --unique-tokens 1B",
        "optimal",
        "optimal --compute 1e22 --params 7B",
        "optimal --gpu-hours 100",
        "optimal --gpu-hours 100 --gpu h100-sxm-80gb --mfu 2",
        "optimal --compute 1e22 --law gpt3",
        "optimal --compute 1e22 --unique-tokens 1B --inference-tokens 1B",
        "optimal --target-loss 1.9 --max-params 1M",
        "optimal --params 7B --max-params 1B",
    ],
)
def test_a_mistake_is_one_error_and_one_hint(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be answered exits with 2, says why, and writes nothing to stdout."""
    refused(capsys, *words.split())


def test_a_card_without_bf16_trains_in_fp16(capsys: pytest.CaptureFixture[str]) -> None:
    """NVIDIA's T4 datasheet has 65 TFLOP/s in fp16 and none in bf16; asked for, it is refused."""
    words = ("time", "--params", "1B", "--tokens", "1B", "--gpu", "t4")
    found = answered(capsys, *words)
    assert found["question"]["dtype"] == "fp16"
    assert "computed in fp16: Tesla T4 has no bf16" in found["assumptions"]
    assert _values(found)["dense fp16 peak"] == 65e12
    assert refused(capsys, *words, "--dtype", "bf16")


def test_hours_of_a_card_without_bf16_are_counted_in_fp16(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """NVIDIA's data sheet of the T4 has 65 TFLOP/s in FP16 and nothing in BF16."""
    document = answered(capsys, "optimal", "--gpu-hours", "100", "--gpu", "t4")
    assert "of the fp16 peak of Tesla T4" in document["assumptions"][0]


def test_a_price_of_a_list_is_told_with_its_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A price is no fact: it is somebody's, of some day."""
    listed = tmp_path / "prices.json"
    listed.write_text('{"as_of": "2026-11-01", "per_hour": {"h100": 2.5}}')
    words = ("--params", "2B", "--tokens", "40B", "--gpu", "h100", "--prices", str(listed))
    document = answered(capsys, "time", *words)
    assert "2.5 $/GPU-hour, by your prices of 2026-11-01" in document["assumptions"]
