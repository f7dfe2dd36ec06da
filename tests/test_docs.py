"""What the documentation shows is what llmsize prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmsize.cli import commands
from tests.transcripts import rewritten

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_transcripts_are_what_is_printed(page: Path) -> None:
    """Every console block of every page is the output of its command, to the letter."""
    text = page.read_text(encoding="utf-8")
    assert rewritten(text) == text, "`just docs` writes the pages anew"


def test_every_command_is_documented() -> None:
    """A command that exists is shown on a page."""
    text = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in commands() if f"llmsize {name}" not in text] == []


def test_links_lead_somewhere() -> None:
    """Every relative link of every page is a file."""
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []
