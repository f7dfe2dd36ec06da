"""What else `llmsize fits` answers: limits, changes, hardware, filters; and that it agrees."""

import json
import re
from typing import Any

import pytest

from llmsize.cli import run


def fits(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    """The exit code and the document of one question."""
    code = run(["fits", *words.split(), "--format", "json"])
    return code, json.loads(capsys.readouterr().out)


def limit(document: dict[str, Any], what: str) -> int:
    """The number in the note on the longest context, the largest batch or the largest rank."""
    note: str = next(note for note in document["notes"] if f"{what} that fits" in note)
    return int(re.findall(r"[\d,]+", note)[0].replace(",", ""))


@pytest.mark.parametrize(
    ("job", "what", "option"),
    [("inference", "context", "--context"), ("inference", "batch", "--batch"),
     ("qlora", "context", "--context"), ("qlora", "batch", "--batch"), ("lora", "rank", "--rank")],
)  # fmt: skip
def test_the_limit_it_names_fits_and_the_next_does_not(
    job: str, what: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked about the named limit it exits with 0, asked about one more with 1."""
    question = f"llama-2-7b --gpu rtx-3090 --job {job}"
    named = limit(fits(question, capsys)[1], what)
    assert fits(f"{question} {option} {named}", capsys)[0] == 0
    assert fits(f"{question} {option} {named + 1}", capsys)[0] == 1


def test_users_and_an_offload_split_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """What is served at once where it fits; where it does not, the layers that would."""
    _, document = fits("llama-2-7b --gpu rtx-4090", capsys)
    assert any("users at once" in note for note in document["notes"])
    _, document = fits("llama-2-13b --gpu t4", capsys)
    note = next(note for note in document["notes"] if "layers on the device" in note)
    kept = int(re.findall(r"\d+", note)[0])
    assert 0 < kept < 40
    memory = document["question"]["memory"]
    words = "infer llama-2-13b --engine transformers --context 4096 --gpu-layers"
    for layers, holds in ((kept, True), (kept + 1, False)):
        run([*words.split(), str(layers), "--vram", f"{memory}B", "--format", "json"])
        device = json.loads(capsys.readouterr().out)["answer"][0]["rows"][-1]["cells"]
        assert (max(c["value"] for c in device.values() if "value" in c) <= memory) == holds


def test_it_agrees_with_train(capsys: pytest.CaptureFixture[str]) -> None:
    """The same step needs the same bytes, whichever command is asked."""
    _, document = fits("llama-2-7b --gpu rtx-3090 --job lora --dtype bf16", capsys)
    needed = document["answer"][0]["rows"][-1]["cells"]["bytes"]["value"]
    words = "train llama-2-7b --method lora --seq-len 4096 --recompute full --gpu rtx-3090"
    run([*words.split(), "--format", "json"])
    trained = json.loads(capsys.readouterr().out)
    assert trained["answer"][0]["rows"][-1]["cells"]["memory"]["value"] == needed


def test_more_memory_never_fits_less(capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict only improves from card to larger card."""
    order = ["does not fit", "tight", "fits"]
    said = [
        order.index(fits(f"llama-2-7b --vram {size}GB", capsys)[1]["question"]["answer"])
        for size in (8, 12, 15, 16, 17, 18, 20, 24, 80)
    ]
    assert said == sorted(said)
    assert set(said) == {0, 1, 2}


def test_strict_refuses_what_is_tight(capsys: pytest.CaptureFixture[str]) -> None:
    """Within the budget and within the error band: 0, and 1 with `--strict`."""
    assert fits("llama-2-7b --vram 17GB", capsys)[0] == 0
    assert fits("llama-2-7b --vram 17GB --strict", capsys)[0] == 1
    assert fits("llama-2-7b --vram 24GB --strict", capsys)[0] == 0


def test_it_names_the_cheapest_change_and_the_devices(capsys: pytest.CaptureFixture[str]) -> None:
    """A 13B in 16 bit is too large for 16 GB: four bits would do, and so would another card."""
    code, document = fits("llama-2-13b --gpu t4", capsys)
    assert code == 1
    assert any("nf4" in note for note in document["notes"])
    assert any(note.startswith("2 such devices would be enough") for note in document["notes"])
    assert fits("llama-2-13b --gpu t4 --gpus 2", capsys)[0] == 0
    assert fits("llama-2-13b --gpu t4 --dtype nf4", capsys)[0] == 0


@pytest.mark.parametrize("kind", ["gpu", "instance"])
def test_a_format_that_a_card_lacks_is_refused(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A T4 has no bf16 and an A100 no fp8; quantized weights are multiplied in what it has."""
    for words, told in (
        ("--gpu t4 --dtype bf16 --job lora", "does not support"),
        ("--gpu a100 --dtype fp8", "needs compute capability 8.9"),
    ):
        assert run(["fits", "llama-2-7b", *words.split()]) == 2
        assert told in capsys.readouterr().err
    assert fits("llama-3.1-8b --gpu t4 --dtype nf4", capsys)[0] == 0
    _, document = fits("llama-3.1-8b --gpu t4", capsys)
    assert document["question"]["dtype"] == "fp16"
    _, document = fits(f"llama-3.1-8b --which {kind} --dtype bf16 --all", capsys)
    assert "T4" not in "".join(row["name"] for row in document["answer"][0]["rows"])


@pytest.mark.parametrize("kind", ["gpu", "instance"])
def test_hardware_is_listed_smallest_first(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What is listed is enough, and what comes first has the least memory in all."""
    _, document = fits(f"llama-2-7b --which {kind} --all", capsys)
    rows = [row["cells"] for row in document["answer"][0]["rows"]]
    memory = [int(c["devices"]) * c["memory of each"]["value"] for c in rows]
    assert len(memory) > 1
    assert memory == sorted(memory)
    assert all(c["needed on each"]["value"] <= c["memory of each"]["value"] for c in rows)


def test_filters_leave_out_models(capsys: pytest.CaptureFixture[str]) -> None:
    """Only models of the family and of the size are listed, by the job that is asked."""
    _, document = fits("--vram 24GB --family qwen2 --min-params 5B --job qlora --all", capsys)
    rows = document["answer"][1]["rows"]
    assert rows
    assert all("qwen" in row["name"] or "qwq" in row["name"] for row in rows)
    assert all(row["cells"]["parameters"]["value"] >= 5e9 for row in rows)
    assert all(row["cells"]["weights in"] == "nf4" for row in rows)


@pytest.mark.parametrize(
    "words", ["--which gpu", "llama-2-7b --which cpu", "llama-2-7b", "--vram 16GB --min-params x"]
)
def test_mistakes_are_told(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A question without a model, a kind, or a machine is misuse."""
    assert run(["fits", *words.split()]) == 2
    assert capsys.readouterr().err.startswith("error: ")
