"""One question has one answer, whichever command is asked: `fits`, `infer`, `train`, `estimate`."""

import json
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from asking import answered
from hypothesis import assume, example, given
from hypothesis import strategies as st
from properties import tried

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.cli import run

MODELS = st.sampled_from(presets.names(Architecture))
SERVED = st.sampled_from((
    "", "--dtype bf16", "--dtype fp32", "--dtype nf4", "--dtype llm-int8", "--dtype q4_k_m",
    "--engine llama.cpp", "--engine llama.cpp --dtype q8_0", "--engine vllm", "--engine mlx",
    "--engine vllm --dtype fp8", "--engine vllm --dtype awq-int4-g128", "--engine ollama",
    "--engine sglang --dtype w8a8", "--engine tensorrt-llm --dtype fp8",
))  # fmt: skip
TRAINED = st.sampled_from((
    "lora", "lora --dtype llm-int8", "lora --rank 64", "qlora", "full", "full --dtype fp32",
    "full --dtype bf16",
))  # fmt: skip
DEVICES = st.sampled_from((
    "--vram 24GB", "--vram 80GiB", "--gpu rtx-4090", "--gpu t4", "--gpu a100 --reserve 2GB",
    "--gpu h100",
))  # fmt: skip
SEVERAL = st.sampled_from(("", "--gpus 1", "--gpus 2", "--gpus 4"))
SIZE = st.builds(
    "--batch {} --context {}".format, st.sampled_from((1, 3, 16)), st.integers(64, 20_000)
)
SOME = tried(15, shrunk=False)


@pytest.fixture(autouse=True, scope="module")
def _without_advice() -> Iterator[None]:
    """What `fits` advises beside its answer takes most of its time, and is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for advice in ("limits", "remedies"):
            patch.setattr(import_module("llmsize.cli.fits"), advice, lambda *_: ())
        yield


def asked(capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
    """The document of a command line; one that is refused is none of these questions."""
    code = run([*words.split(), "--format", "json"])
    out = capsys.readouterr().out
    assume(code in (0, 1))
    document: dict[str, Any] = json.loads(out)
    return document


def needed(document: dict[str, Any]) -> int:
    """What `fits` says that the fullest device needs, without what an engine leaves alone."""
    rows = {row["name"]: row["cells"]["bytes"]["value"] for row in document["answer"][0]["rows"]}
    *_, whole = rows.values()
    return int(whole - rows.get("left alone by the engine", 0))


def in_detail(document: dict[str, Any]) -> str:
    """The command that it names for the same question."""
    notes = (re.fullmatch("in detail: `llmsize (.*)`", note) for note in document["notes"])
    return next(note[1] for note in notes if note)


@SOME
@example(
    model="gpt-oss-20b", way="--dtype bf16",  # which is not how it is stored
    size="--batch 1 --context 64", devices="--vram 80GiB", several="",
)  # fmt: skip
@example(
    model="gemma-4-e2b", way="--dtype q4_k_m",  # more of which is on the host than on the device
    size="--batch 1 --context 64", devices="--vram 24GB", several="",
)  # fmt: skip
@given(model=MODELS, way=SERVED, size=SIZE, devices=DEVICES, several=SEVERAL)
def test_serving_needs_what_infer_says(
    model: str, way: str, size: str, devices: str, several: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the byte, by the command that `fits` itself names, and with the same verdict."""
    said = asked(capsys, f"fits {model} {way} {size} {devices} {several}")
    infer = answered(capsys, *in_detail(said).split(), codes=(0, 1))
    places = infer["answer"][0]["rows"][-1]["cells"].items()
    assert needed(said) == max(cell["value"] for place, cell in places if place != "host")
    assert said["verdict"] == infer["verdict"]


@SOME
@given(model=MODELS, way=TRAINED, size=SIZE, devices=DEVICES)
def test_training_needs_what_train_says(
    model: str, way: str, size: str, devices: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the byte, by the command that `fits` itself names, and with the same verdict."""
    said = asked(capsys, f"fits {model} --job {way} {size} {devices}")
    train = answered(capsys, *in_detail(said).split(), codes=(0, 1))
    assert needed(said) == train["answer"][0]["rows"][-1]["cells"]["memory"]["value"]
    assert said["verdict"] == train["verdict"]


@SOME
@example(model="mamba-1.4b", dtype="nf4", size="")  # has matrices that are no linear layers
@given(model=MODELS, dtype=st.sampled_from(("bf16", "fp32", "nf4", "llm-int8")), size=SIZE)
def test_serving_needs_what_the_overview_says(
    model: str, dtype: str, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the byte: the column for inference of `estimate` is the engine that `fits` asks about."""
    said = asked(capsys, f"fits {model} --dtype {dtype} {size} --vram 4TB")
    overview = answered(capsys, "estimate", model, "--dtype", dtype, *size.split())
    assert overview["answer"][0]["rows"][-1]["cells"]["inference"]["value"] == needed(said)
