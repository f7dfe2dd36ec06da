"""The command line as a whole: what holds for every command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from asking import answered, refused

from llmsize import __version__
from llmsize.cli import commands, run


def llmsize(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run of the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "llmsize", *words],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ | environment,
    )  # fmt: skip


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the version of the package."""
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"llmsize {__version__}\n"


def test_an_unknown_command_is_named_with_a_close_one(capsys: pytest.CaptureFixture[str]) -> None:
    """One error, one hint, exit 2, nothing on stdout."""
    assert run(["schem"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: no such command `schem`\n\nhint: did you mean `schema`?\n"


@pytest.mark.parametrize("command", commands())
def test_every_command_has_help_with_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--help` names what arguments are, and ends with examples that start with the command."""
    assert run([command, "--help"]) == 0
    arguments, examples = capsys.readouterr().out.split("Examples:")
    assert "lambda" not in arguments
    assert f"llmsize {command}" in examples


def test_a_crash_is_one_line_and_not_an_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bug exits with 3, never with the 1 of `does not fit`."""
    monkeypatch.setattr("llmsize.answer.schema", lambda: 1 / 0)
    assert run(["schema"]) == 3
    captured = capsys.readouterr()
    assert captured.err.startswith("error: llmsize failed unexpectedly: ZeroDivisionError")
    assert "Traceback" not in captured.err


def test_a_closed_pipe_is_quiet() -> None:
    """`llmsize … | head -1` ends without a traceback."""
    piped = subprocess.run(
        f"{sys.executable} -m llmsize schema | head -1",
        shell=True, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert piped.stdout == "{\n"
    assert piped.stderr == ""


@pytest.mark.parametrize(
    ("redirected", "code"),
    [("show models >&-", 3), ("show models >/dev/full", 3), ("show models nope 2>&-", 2)],
)
def test_nowhere_to_write(redirected: str, code: int) -> None:
    """A closed output and a full disk are told in two lines; a closed stderr hides only words."""
    if "/dev/full" in redirected and not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    ended = subprocess.run(
        f"{sys.executable} -m llmsize {redirected}",
        shell=True, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == code
    assert [line.split()[0] for line in ended.stderr.splitlines() if line] == (
        ["error:", "hint:"] if code == 3 else []
    )
    assert ended.stdout == ""


def test_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    """`llmsize schema` prints the JSON Schema of the documents."""
    assert run(["schema"]) == 0
    assert "headline" in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize(
    ("line", "having"),
    [("train --params 7B", "`estimate`"), ("estimate gpt2 --gpu t4", "`fits`"),
     ("infer gpt2 --method lora", "`train`")],
)  # fmt: skip
def test_an_option_of_another_command_is_known(
    line: str, having: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who mixes commands up is told which one takes the option."""
    assert having in refused(capsys, *line.split()).splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "key"),
    [(["estimate", "gpt2"], "context"), (["infer", "gpt2"], "context"),
     (["fits", "gpt2", "--vram", "8GB"], "context"), (["train", "gpt2"], "seq_len")],
)  # fmt: skip
def test_a_model_is_asked_about_the_tokens_that_it_takes(
    words: list[str], key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 has 1,024 positions; both names of the option say something else, in every command."""
    assert answered(capsys, *words)["question"][key] == 1024
    for name in ("--context", "--seq-len"):
        assert answered(capsys, *words, name, "2048")["question"][key] == 2048


def test_signs_that_an_encoding_lacks_stay_apart() -> None:
    """In ASCII a dash is not written as `?`, which marks what is assumed."""
    done = llmsize("estimate", "gpt2", PYTHONIOENCODING="ascii")
    assert done.stdout.isascii()
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert rows["gradients"].split()[1] == "-"
    assert rows["activations"].split()[-1] == "="
