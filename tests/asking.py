"""Command lines, asked in this process."""

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest

from llmsize.cli import run


def answered(
    capsys: pytest.CaptureFixture[str], *words: str, codes: Sequence[int] = (0,)
) -> dict[str, Any]:
    """The JSON document of a run that exits with one of `codes`."""
    code = run([*words, "--format", "json"])
    assert code in codes
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (code == 1) == (document.get("verdict") is False)
    return document


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """The error of a run that fails as it should: at once, with one line of error and one hint."""
    begin = time.monotonic()
    assert run(words) == code
    assert time.monotonic() - begin < 10
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("error: ")
    assert lines[-1].startswith("hint: ")
    assert len(lines) == 3
    assert "unexpectedly" not in captured.err
    assert captured.err.replace("\n", "").isprintable()
    return captured.err
