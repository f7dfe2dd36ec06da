"""The command line: parse, ask, print.

A command is one file here with a function of the file's name that returns an `Estimate`; it is
found by existing, and only the one that was asked for is imported. The options that every command
has are added to its own. Errors are shown once, and no failure looks like an answer.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from llmsize.errors import MISUSE, UNDETERMINED, LLMSizeError, printable

if TYPE_CHECKING:
    import typer

INTERRUPTED = 130
"""128 + SIGINT, as shells count."""

RARELY = 1_000_000
"""New objects between two searches for garbage. Hardly anything that starts up is garbage, and
looking for it at the usual 700 takes a tenth of the time of an estimate; so many objects, of all
traces of a catalogue, are some 130 MB."""

_NOT_COMMANDS = {
    "__init__", "answering", "application", "asking", "catalogue", "declare", "direct",
    "fits_advice", "infer_answer", "jobs", "laws", "machines", "options", "processes", "served",
    "train_answer",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 answered, 1 does not fit, 2 misuse, 3 no answer."""
    gc.set_threshold(RARELY)
    words = list(sys.argv[1:] if arguments is None else arguments)
    code = run(words)
    gc.freeze()  # what is left goes with the process, unexamined
    sys.exit(code)


def run(words: Sequence[str]) -> int:
    """The exit code of one command line; everything it has to say is written."""
    if sys.stdout is None:
        return _fail("standard output is closed", "send the answer to a file", UNDETERMINED)
    try:
        return _invoke(words)
    except LLMSizeError as mistake:
        return _fail(mistake.message, mistake.hint, mistake.exit_code)
    except BrokenPipeError:
        from llmsize.cli.answering import abandon_stdout

        abandon_stdout()
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except MemoryError:
        return _fail("out of memory", "ask for less at once", UNDETERMINED)
    except Exception as failure:
        if hasattr(failure, "format_message"):
            return _misused(failure, words)
        if os.environ.get("LLMSIZE_DEBUG"):
            raise
        what = f"{type(failure).__name__}: {failure}"
        return _fail(
            f"llmsize failed unexpectedly: {what}",
            "this is a bug; report it with the output of `LLMSIZE_DEBUG=1 llmsize …`",
            UNDETERMINED,
        )


def commands() -> list[str]:
    """The names of every command."""
    names = {entry.name.removesuffix(".py") for entry in os.scandir(__path__[0])
             if entry.name.endswith(".py")}  # fmt: skip
    return sorted(names - _NOT_COMMANDS)


def app() -> typer.Typer:
    """The whole application, every command imported."""
    from llmsize.cli.application import application

    return application(commands())


def _invoke(words: Sequence[str]) -> int:
    completing = "_LLMSIZE_COMPLETE" in os.environ
    asked = next((word for word in words if not word.startswith("-")), "")
    _refuse_empty(words)
    known = commands()
    only = asked in known and not completing
    if only and words[0] == asked and (code := _directly(asked, words[1:])) is not None:
        return code
    from llmsize.cli.application import application

    needed = [asked] if only else known
    if list(words) == ["--version"]:
        needed = []
    made = application(needed)
    exit_code = made(args=list(words), prog_name="llmsize", standalone_mode=False)
    return exit_code if isinstance(exit_code, int) else 0


def _refuse_empty(words: Sequence[str]) -> None:
    """Raise `LLMSizeError` for an empty word, such as an unset variable of a shell leaves."""
    from llmsize.cli.direct import EMPTY_HINT

    for before, word in pairwise(("llmsize", *words)):
        if not word or (word.startswith("--") and word.endswith("=")):
            raise LLMSizeError(f"nothing follows `{word or before}`", hint=EMPTY_HINT)


def _directly(name: str, words: Sequence[str]) -> int | None:
    """The exit code of a command line that can be read without Typer, else `None`."""
    from llmsize.cli import answering, direct

    _, command = answering.load(name)
    values = direct.read(words, answering.parameters(command))
    return None if values is None else answering.answer(command, values)


def _misused(failure: Exception, words: Sequence[str]) -> int:
    """A command line that Typer could not read: what it says becomes an error and a hint."""
    message: str = failure.format_message()  # type: ignore[attr-defined]
    if not message:  # no arguments: the help was shown
        return MISUSE
    named = next((f"llmsize {word}" for word in words if word in commands()), "llmsize")
    where = getattr(getattr(failure, "ctx", None), "command_path", named)
    error, hint = _in_two(" ".join(message.split()))
    if hasattr(failure, "possibilities"):  # there is no such option
        hint = _having(getattr(failure, "option_name", "")) or hint
    hint = hint or f"see `{where} --help`"
    return _fail(error[:1].lower() + error[1:], hint, MISUSE)


def _having(option: str) -> str:
    """Which commands have an option that the one that was asked has not; empty if none has."""
    from llmsize.cli import answering

    found = [
        f"`{name}`"
        for name in commands()
        for parameter in answering.parameters(answering.load(name)[1])
        if option in parameter.annotation.__metadata__[0].names
    ]
    return f"an option of {', '.join(found)}" if found else ""


def _in_two(message: str) -> tuple[str, str]:
    """`No such command 'fit'. Did you mean 'fits'?` as what is wrong and what to do."""
    for beginning in ("Did you mean", "(Possible options"):
        error, found, rest = message.partition(beginning)
        if found:
            hint = (found + rest.split(beginning)[0]).strip("() ")  # old versions say it twice
            return _backticks(error.rstrip(" .")), _backticks(hint[:1].lower() + hint[1:])
    return _backticks(message.rstrip(".")), ""


def _backticks(text: str) -> str:
    return text.replace("'", "`")


def _fail(message: str, hint: str, code: int) -> int:
    """Write the error and its hint to stderr, each on one line."""
    lines = (f"error: {printable(message, 300)}", f"hint: {printable(hint, 300)}")
    try:
        sys.stderr.write("\n\n".join(lines) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # nobody reads stderr; the exit code speaks
        pass
    return code
