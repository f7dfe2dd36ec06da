"""The pages on scaling laws show what llmsize says, and name every law."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmsize import presets
from llmsize.cli import run
from llmsize.scaling.laws import ScalingLaw

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("concepts/scaling-laws.md", "guides/eight-h100-for-30-days.md")
TRANSCRIPT = re.compile(r"```console\n\$ llmsize (.*?)\n(.*?)```", re.S)


def _transcripts() -> list[tuple[str, str, str]]:
    return [(page, *found) for page in PAGES
            for found in TRANSCRIPT.findall((DOCS / page).read_text())]  # fmt: skip


@pytest.mark.parametrize(("page", "words", "shown"), _transcripts())
def test_a_transcript_is_what_is_printed(
    page: str, words: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every console block has the words and numbers of its command's output, in order."""
    assert run([*words.split(), "--format", "plain"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"\w[\w.,+/×%-]*", said) == re.findall(r"\w[\w.,+/×%-]*", shown), page


def test_every_law_is_on_the_page() -> None:
    """A new law is not only shipped but explained."""
    page = (DOCS / PAGES[0]).read_text()
    assert [name for name in presets.names(ScalingLaw) if f"`{name}`" not in page] == []
