"""Opening and parsing what a stranger wrote, in bounded time and memory."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llmsize.collector import collector_paused
from llmsize.errors import LLMSizeError, printable

MAX_JSON = 25 * 10**6
"""Bytes of JSON: twice what 90,000 tensors take. (safetensors itself allows 100 MB, which Python
would unfold to gigabytes.)"""
MAX_JSON_VALUES = 1_200_000
MAX_HEADERS = 40 * 10**6
"""Bytes of the headers of all files of one model."""
MAX_ENTRIES = 10_000
"""Files in a checkpoint folder."""

_REASONS = {
    errno.ENOENT: "there is no such file",
    errno.ENOTDIR: "there is no such file",
    errno.ELOOP: "its symbolic links go in a circle",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENAMETOOLONG: "the name is too long",
}


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """`path` opened for reading and its size in bytes.

    Raises `LLMSizeError` for a missing file, a folder, a pipe, a device or a loop of links; it
    never waits for a writer.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    except (OSError, ValueError) as failure:
        raise _refuse(path, _reason(failure)) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise _refuse(path, f"it is {what}, not a file")
    return os.fdopen(descriptor, "rb"), status.st_size


_BINARY: int = getattr(os, "O_BINARY", 0)


def read_small(path: Path, limit: int) -> bytes:
    """All of the file. Raises `LLMSizeError` if it has more than `limit` bytes."""
    file, size = open_regular(path)
    with file:
        if size > limit:
            raise _refuse(
                path, f"it has {size:,} bytes, more than the {limit:,} that such a file needs"
            )
        return read_exactly(file, size, path)


def read_own(path: Path, limit: int, *, hint: str) -> bytes:
    """The same of a file that is the user's own, no model's: `hint` says what belongs there.

    Raises `LLMSizeError` with that hint.
    """
    try:
        return read_small(path, limit)
    except LLMSizeError as failure:
        raise LLMSizeError(failure.message, hint=hint) from None


def read_exactly(file: BinaryIO, count: int, path: Path) -> bytes:
    """The next `count` bytes. Raises `LLMSizeError` if the disk or the file ends before."""
    try:
        data = file.read(count)
    except OSError as failure:
        raise _refuse(path, _reason(failure)) from None
    if len(data) != count:
        raise _refuse(path, "it is cut off")
    return data


class Budget:
    """Bytes that the headers of one model may still take, in all its files together."""

    def __init__(self, left: int = MAX_HEADERS) -> None:
        self.left = left

    def spend(self, count: int, where: Path | str) -> None:
        """Count another header. Raises `LLMSizeError` when it is one too many."""
        self.left -= count
        if self.left < 0:
            raise _refuse(where, "the headers of this model are larger than those of any other")


def entries(folder: Path) -> list[str]:
    """Names of the files in `folder`, sorted. Raises `LLMSizeError` above `MAX_ENTRIES`."""
    names: list[str] = []
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                names.append(entry.name)
                if len(names) > MAX_ENTRIES:
                    raise _refuse(folder, f"it holds more than {MAX_ENTRIES:,} files")
    except (OSError, ValueError) as failure:
        raise _refuse(folder, _reason(failure)) from None
    return sorted(names)


def kind_of(path: Path) -> str:
    """`file`, `folder`, or empty where nothing is. Pipes and devices count as files."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as failure:
        if getattr(failure, "errno", errno.ENOENT) in (errno.ENOENT, errno.ENOTDIR):
            return "file" if _is_link(path) else ""
        raise _refuse(path, _reason(failure)) from None
    return "folder" if stat.S_ISDIR(mode) else "file"


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except (OSError, ValueError):
        return False


def _reason(failure: OSError | ValueError) -> str:
    if isinstance(failure, ValueError):
        return "the name holds a null character"
    known = _REASONS.get(failure.errno or 0)
    return known or (failure.strerror or "the disk does not answer").lower()


def _refuse(where: Path | str, reason: str) -> LLMSizeError:
    hint = "give a `config.json`, a `.safetensors`, `.gguf` or `.bin` file, or their folder"
    if reason == _REASONS[errno.ENOENT]:
        hint = "check the path"
    return LLMSizeError(f"cannot read `{printable(str(where))}`: {reason}", hint=hint)


def parse_json(data: bytes, where: str, *, unique: bool = True) -> Any:
    """The value of a JSON text that a model's publisher wrote.

    Raises `LLMSizeError` for text that is not UTF-8 JSON, gives a name twice, is nested too
    deep or would take more memory than the description of a model can need. With `unique` false
    the last of several equal names counts: the caller looks for them.
    """
    cost = len(data) if data.isascii() else 4 * len(data)  # Python's widest text
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if cost > MAX_JSON or values > MAX_JSON_VALUES:
        raise _not_json(where, "it is far larger than the description of a model")
    try:
        with collector_paused():
            hook = _without_duplicates if unique else None
            return json.loads(data.decode("utf-8-sig"), object_pairs_hook=hook)
    except UnicodeDecodeError:
        raise _not_json(where, "it is not UTF-8 text") from None
    except json.JSONDecodeError as failure:
        place = f"line {failure.lineno}, column {failure.colno}"
        raise _not_json(where, f"{failure.msg.lower()} ({place})") from None
    except RecursionError:
        raise _not_json(where, "it is nested too deep") from None
    except ValueError as failure:
        raise _not_json(where, str(failure)) from None


def _not_json(where: str, reason: str) -> LLMSizeError:
    return LLMSizeError(
        f"`{printable(where)}` is not readable JSON: {printable(reason)}",
        hint="download the file again, or correct it",
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"`{printable(twice)}` occurs twice")
    return found


def mapping(value: object, where: str, what: str) -> Mapping[str, Any]:
    """`value` if it is a JSON object. Raises `LLMSizeError` otherwise."""
    if isinstance(value, dict):
        return value
    raise LLMSizeError(
        f"`{printable(where)}` is not {what}: it holds no JSON object",
        hint="give the `config.json` that the model was published with",
    )
