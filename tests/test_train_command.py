"""`llmsize train`: what it answers, what it refuses."""

import json

import pytest

from llmsize.cli import run


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    code = run(["train", *words, "--format", "json"])
    assert code in (0, 1)
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return document


def device_bytes(document: dict[str, object]) -> int:
    table = document["answer"][0]  # type: ignore[index]
    value: int = table["rows"][-1]["cells"]["memory"]["value"]
    return value


def test_lora_trains_its_adapters_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 32 on q and v of Llama-3.2-3B are 9,175,040 parameters (PEFT's MetaMath benchmark)."""
    words = ("llama-3.2-3b", "--method", "lora", "--rank", "32", "--targets", "q_proj,v_proj")
    notes = answer(capsys, *words)["notes"]
    assert any("9.18M parameters are trained" in note for note in notes)  # type: ignore[attr-defined]


def test_a_small_card_is_too_small_and_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """A full 8B step does not fit 24 GB; the exit code is 1 and a change is named."""
    code = run(["train", "llama-3-8b", "--vram", "24GB", "--format", "plain"])
    told = capsys.readouterr().out
    assert code == 1
    assert "to make it fit:" in told


@pytest.mark.parametrize("what", ["batch", "seq-len"])
def test_the_largest_that_fits_fits_and_the_next_does_not(
    what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A solved knob is a maximum: one more is too much."""
    words = ["smollm-135m", "--method", "lora", "--vram", "8GB", "--fit", what]
    document = answer(capsys, *words)
    key = what.replace("-", "_")
    found = document["question"][key]  # type: ignore[index]
    assert device_bytes(document) <= 8 * 10**9
    more = answer(capsys, *words[:5], f"--{what}", str(found + 1))
    assert device_bytes(more) > 8 * 10**9


@pytest.mark.parametrize(
    "words",
    [
        ["llama-3-8b", "--batch", "0"],
        ["llama-3-8b", "--method", "lorra"],
        ["llama-3-8b", "--method", "lora", "--targets", "nonsense"],
        ["llama-3-8b", "--recompute", "sometimes"],
        ["llama-3-8b", "--optimizer", "adamm"],
        ["llama-3-8b", "--offload-checkpoints"],
        ["llama-3-8b", "--method", "frozen"],
        ["llama-3-8b", "--fit", "batch"],
        ["llama-3-8b", "--fit", "colour", "--vram", "24GB"],
        ["llama-3-8b", "--method", "lora", "--rank", "100000"],
    ],
)
def test_bad_choices_are_refused_with_a_hint(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every mistake is one error, one hint and exit code 2."""
    assert run(["train", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert "\nhint: " in told.err
