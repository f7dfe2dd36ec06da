"""What the documentation shows is what llmsize prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmsize.cli import commands, run

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/concepts/training.md", "docs/guides/finetune-7b-on-24gb.md")
TRANSCRIPT = re.compile(r"```console\n\$ llmsize (.*?)\n(.*?)```", re.S)


def transcripts() -> list[tuple[str, str, str]]:
    return [
        (page, *found) for page in PAGES for found in TRANSCRIPT.findall((ROOT / page).read_text())
    ]


@pytest.mark.parametrize(("page", "line", "shown"), transcripts())
def test_a_transcript_is_what_is_printed(
    page: str, line: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every console block is the output of its command, to the letter."""
    words, _, head = line.partition(" | head -")
    assert run(words.split()) in (0, 1)
    said = capsys.readouterr().out.splitlines()
    assert [text.rstrip() for text in said[: int(head) if head else None]] == shown.splitlines()


def test_every_command_is_documented() -> None:
    """A command that exists is shown on a page."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    assert [name for name in commands() if f"llmsize {name}" not in text] == []


def test_links_lead_somewhere() -> None:
    """Every relative link of every page is a file."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []
