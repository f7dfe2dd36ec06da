"""The tutorial, in English and Korean, and the laptop guide show commands that work."""

import re
from pathlib import Path

import pytest

from llmsize.cli import run

ROOT = Path(__file__).parents[1]
PAGES = ("docs/tutorial.md", "docs/guides/laptop.md", "README.ko.md")
COMMAND = re.compile(r"^\$ llmsize ([^|\n]*)", re.M)


def commands() -> list[str]:
    """Every command of the pages, each once."""
    return sorted({c.strip() for page in PAGES for c in COMMAND.findall((ROOT / page).read_text())})


@pytest.mark.parametrize("words", commands())
def test_a_command_of_the_pages_answers(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is answered, with yes or no."""
    assert run([*words.split(), "--format", "plain"]) in (0, 1)
    assert capsys.readouterr().out


def test_the_korean_tutorial_takes_the_same_steps() -> None:
    """Both languages run the same commands in the same order."""

    def steps(page: str, start: str) -> list[str]:
        return COMMAND.findall((ROOT / page).read_text().split(start, 1)[1])

    korean = steps("README.ko.md", "## 따라 하기")
    assert korean == steps("docs/tutorial.md", "## 1.")


def test_the_korean_first_screen_shows_the_same() -> None:
    """Both READMEs begin with the same commands; questions and set-up have the same, too."""

    def code(page: str) -> list[str]:
        first = re.split(r"^## (?:Read on|따라 하기)", (ROOT / page).read_text(), flags=re.M)[0]
        return re.findall(r"^(?:\$ |\.venv/|python3 ).*|`llmsize [^`]*`", first, flags=re.M)

    assert code("README.ko.md") == code("README.md") != []
