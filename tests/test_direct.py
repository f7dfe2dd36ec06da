"""Reading a command line without Typer gives what Typer gives, or leaves it to Typer."""

import sys
from inspect import signature
from typing import Annotated, Any, NamedTuple

import pytest

from llmsize.cli import answering, application, commands, direct, run
from llmsize.cli.declare import Option, choosing, counting

LINES = [
    "estimate llama-2-7b --format json",
    "estimate --params 7B --dtype fp16",
    "estimate --params=7B --dtype=fp16 --explain",
    "estimate gpt2 --batch 4 --context 512 --optimizer lion --recipe amp --units GiB",
    "fits --vram 16GB --all",
    "fits llama-2-7b --gpu t4 --gpus 2 --job qlora --reserve 1GB",
    "show models gpt2",
    "loss --params 2B --calibrate 1B,20B,2.71 --calibrate 3B,60B,2.45 --law chinchilla",
    "loss --target-loss 2.5 --precision 8",
    "optimal --gpu-hours 5760 --gpu h100-sxm-80gb --mfu 0.4 --max-params 7B",
    "time llama-2-7b --tokens 1T --gpu t4 --rank 8 --recompute full",
    "train gpt2 --method lora --rank 8 --adapter-dropout 0.1 --every 2 --timeline",
    "infer llama-2-7b --gpu-layers 12 --kv-dtype q8_0 --gpu-memory-utilization 0.8",
    "inspect gpt2 --tensors",
    "advise --users 4 --commercial",
]

LEFT_TO_TYPER = [
    "estimate --help", "estimate -h", "estimate --unknown", "estimate gpt2 extra",
    "estimate --batch", "estimate --explain=yes", "estimate --params -1",
    "estimate --batch 1 --batch 2",
    "estimate -- x", "train gpt2 --every 0", "train gpt2 --every two", "infer gpt2 --rank 1.5",
    "infer gpt2 --no-flash-attention", "curve loss-vs-params gpt2 llama-2-7b",
    "optimal --gpu-hours nan",
]  # fmt: skip


def captured(words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The values that Typer hands to the command."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(application, "answer", lambda command, values: seen.update(values) or 0)
    application.application([words[0]])(args=words, prog_name="llmsize", standalone_mode=False)
    return seen


@pytest.mark.parametrize("line", LINES)
def test_both_readers_agree(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value is the same, defaults and parsed counts included."""
    name, *words = line.split()
    _, command = answering.load(name)
    values = direct.read(words, answering.parameters(command))
    assert values == captured([name, *words], monkeypatch)


class Inner(NamedTuple):
    """What is inside."""

    rank: Annotated[int, counting("--rank", what="rank")] = 16


class Outer(NamedTuple):
    """What is outside."""

    inner: Inner
    way: Annotated[str, choosing("--way", known=("north", "south"), what="way")] = "north"


def grouped(*, outer: Outer, loud: Annotated[bool, Option("--loud")] = False) -> tuple[Outer, bool]:
    """A command of groups."""
    return outer, loud


def test_a_group_is_flat_on_the_command_line_and_whole_for_the_command() -> None:
    """Fields of groups within groups are options, each below the heading of its own group."""
    parameters = answering.parameters(grouped)
    headings = {p.name: p.annotation.__metadata__[0].settings.get("rich_help_panel", "")
                for p in parameters if p not in answering.SHARED}  # fmt: skip
    assert headings == {"rank": "What is inside", "way": "What is outside", "loud": ""}
    values = direct.read(["--rank", "8", "--loud", "--way", "SOUTH"], parameters)
    assert values is not None
    assert answering.ask(grouped, values) == (Outer(Inner(8), "south"), True)


@pytest.mark.parametrize("name", commands())
def test_every_completion_completes(name: str) -> None:
    """What a shell asks of an option is a list of words, none of them for an absurd beginning."""
    for parameter in answering.parameters(answering.load(name)[1]):
        complete = parameter.annotation.__metadata__[0].settings.get("autocompletion")
        if complete is not None and "ctx" not in signature(complete).parameters:
            assert complete("")
            assert complete("no such beginning") == []


@pytest.mark.parametrize("line", LEFT_TO_TYPER)
def test_what_is_not_certain_is_left_to_typer(line: str) -> None:
    """Help, mistakes and repetitions are Typer's business."""
    name, *words = line.split()
    _, command = answering.load(name)
    assert direct.read(words, answering.parameters(command)) is None


@pytest.mark.parametrize("format", ["json", "table"])
def test_an_estimate_imports_nothing_heavy(format: str) -> None:
    """Neither Typer, rich, PyYAML nor pydantic is loaded, and no part that was not asked for."""
    import subprocess

    heavy = (
        "typer", "click", "rich", "yaml", "pydantic", "numpy", "jsonschema", "decimal", "fractions",
        "inspect", "dataclasses", "ast", "pathlib", "llmsize.sources", "llmsize.hardware",
        "llmsize.memory.llamacpp.buffers", "llmsize.memory.serving.pooled",
        "llmsize.memory.methods", "llmsize.anatomy.vision", "llmsize.anatomy.prompts",
        "llmsize.planning.training", "llmsize.ladder",
    )  # fmt: skip
    code = (
        "import sys; from llmsize.cli import run; "
        f"run(['estimate', 'llama-2-7b', '--format', '{format}']); "
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr.strip() == "[]"


def test_a_mistake_reads_the_same_by_both(capsys: pytest.CaptureFixture[str]) -> None:
    """The error of a parser does not depend on who calls it."""
    assert run(["estimate", "--params", "7X"]) == 2
    direct_error = capsys.readouterr().err
    assert run(["estimate", "--params", "7X", "--batch", "1", "--batch", "1"]) == 2
    assert capsys.readouterr().err == direct_error
