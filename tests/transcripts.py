"""Transcripts in Markdown: every `$ llmsize …` in a console block is run and compared.

`python tests/transcripts.py [--write] FILE_OR_DIR…` exits with 1 where one lies, or rewrites it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from llmsize.cli import run

BLOCK = re.compile(r"(?<=^```console\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
PROMPT = "$ llmsize "
WIDTH = "80"


def pages(paths: list[Path]) -> Iterator[Path]:
    """Markdown files, those in directories included."""
    for path in paths:
        yield from sorted(path.rglob("*.md")) if path.is_dir() else [path]


def rewritten(text: str) -> str:
    """The page with the output that its commands have now."""
    return BLOCK.sub(lambda block: _block(block[0]), text)


def _block(text: str) -> str:
    """A console block; lines before the first prompt of llmsize and other commands stay."""
    shown: list[str] = []
    ours = False
    for line in text.splitlines():
        if line.startswith("$ "):
            ours = line.startswith(PROMPT)
            shown += ["", line] if shown else [line]
            if ours:
                shown += _output(line.removeprefix(PROMPT)).splitlines()
        elif not ours and line:
            shown.append(line)
    return "\n".join(shown) + "\n"


def _output(line: str) -> str:
    """What the command prints into a pipe, errors included; `| head -N` shows the first lines."""
    written = io.StringIO()
    line, _, head = line.partition(" | head -")
    words = shlex.split(line, comments=True)
    environment = mock.patch.dict(os.environ, {"COLUMNS": WIDTH, "NO_COLOR": "1"})
    streams = contextlib.redirect_stdout(written), contextlib.redirect_stderr(written)
    with environment, streams[0], streams[1]:
        run(words)
    lines = written.getvalue().splitlines()[: int(head) if head else None]
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: list[str]) -> int:
    """Check or rewrite; 1 if a page differs."""
    write = "--write" in arguments
    wrong = 0
    for page in pages([Path(a) for a in arguments if a != "--write"]):
        text = page.read_text(encoding="utf-8")
        now = rewritten(text)
        if now == text:
            continue
        if write:
            page.write_text(now, encoding="utf-8")
        else:
            wrong = 1
            sys.stderr.write(f"{page}: a transcript differs; `just docs` rewrites it\n")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
