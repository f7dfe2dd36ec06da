"""The reference pages that are generated from the code."""

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"

PAGES: dict[str, str] = runpy.run_path(str(DOCS / "generate.py"))["pages"]()


@pytest.mark.parametrize("path", PAGES)
def test_generated_pages_are_up_to_date(path: str) -> None:
    """A page says what the code does; `python docs/generate.py` writes it anew."""
    assert (DOCS / path).read_text() == PAGES[path]
