"""PyTorch `.bin`: sizes from the directory of the zip archive; the pickle in it is never loaded.

The archive stores each storage uncompressed as `NAME/data/KEY` (torch/serialization.py, v2.6).
Structures: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3.12 to 4.3.16.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llmsize.checkpoint import Checkpoint, StoredTensor
from llmsize.errors import LLMSizeError, printable
from llmsize.sources.reading import Budget, open_regular, read_exactly

MAX_DIRECTORY = 8 * 10**6
"""Bytes of one directory: 100,000 storages."""
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL_HEADER = 30
_LONGEST_END = _END.size + 0xFFFF
_IN_EXTRA = 0xFFFFFFFF
_PICKLE = b"\x80"

NOTE = (
    "storages from the zip directory: their shapes and formats are in a pickle, which is not read"
)


class _Stored(NamedTuple):
    """One entry of the directory."""

    name: str
    offset: int
    bytes: int


def read_torch(paths: Iterable[Path], source: str) -> Checkpoint:
    """The storages in one `.bin` file or in the shards of one model; bytes only.

    Raises `LLMSizeError` for a file that PyTorch cannot have written, and for the format before
    PyTorch 1.6, which is a pickle throughout.
    """
    budget = Budget()
    tensors = tuple(tensor for path in paths for tensor in _storages(path, budget))
    return Checkpoint(tensors, source, note=NOTE)


def _storages(path: Path, budget: Budget) -> Iterator[StoredTensor]:
    file, size = open_regular(path)
    with file:
        if file.read(1) == _PICKLE:
            raise _broken(
                path,
                "it is in the format before PyTorch 1.6, which only unpickling could read",
                hint="convert it to safetensors",
            )
        directory, start = _directory(file, size, path)
    budget.spend(len(directory), path)
    entries = list(_entries(directory, path))
    _check_places(entries, start, path)
    for entry in entries:
        _, _, inner = entry.name.partition("/")
        if inner.startswith("data/"):
            yield StoredTensor(f"{path.name}/{inner}", None, "", entry.bytes)


def _directory(file: BinaryIO, size: int, path: Path) -> tuple[bytes, int]:
    """The bytes of the central directory and where they start."""
    tail_start = max(0, size - _LONGEST_END - _END64_LOCATOR.size)
    file.seek(tail_start)
    tail = read_exactly(file, size - tail_start, path)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise _broken(path, "it is no zip archive, as PyTorch writes it, or it is cut off")
    *_, length, start, _ = _END.unpack_from(tail, at)
    if _IN_EXTRA in (length, start):
        length, start = _directory64(file, tail[max(0, at - _END64_LOCATOR.size) : at], size, path)
    if start + length > size or length > MAX_DIRECTORY:
        raise _broken(path, f"its directory of {length:,} bytes does not fit")
    file.seek(start)
    return read_exactly(file, length, path), start


def _directory64(file: BinaryIO, locator: bytes, size: int, path: Path) -> tuple[int, int]:
    """Length and start of a directory that 32 bits cannot address."""
    if len(locator) == _END64_LOCATOR.size:
        signature, _, at, _ = _END64_LOCATOR.unpack(locator)
        if signature == b"PK\6\7" and at + _END64.size <= size:
            file.seek(at)
            end, *_, length, start = _END64.unpack(read_exactly(file, _END64.size, path))
            if end == b"PK\6\6":
                return length, start
    raise _broken(path, "the end of its zip directory is broken")


def _entries(directory: bytes, path: Path) -> Iterator[_Stored]:
    at = 0
    while at < len(directory):
        if at + _ENTRY.size > len(directory) or directory[at : at + 4] != b"PK\1\2":
            raise _broken(path, "its zip directory is broken")
        fields = _ENTRY.unpack_from(directory, at)
        method, packed, size = fields[4], fields[8], fields[9]
        name_length, extra_length, comment_length = fields[10:13]
        offset = fields[16]
        names_end = at + _ENTRY.size + name_length
        end = names_end + extra_length + comment_length
        if end > len(directory):
            raise _broken(path, "its zip directory is broken")
        name = _name(directory[at + _ENTRY.size : names_end], path)
        extra = directory[names_end : names_end + extra_length]
        size, packed, offset = _wide(extra, [size, packed, offset], path)
        if method or packed != size:
            raise _broken(path, f"`{name}` is compressed, which PyTorch does not do")
        yield _Stored(name, offset, size)
        at = end


def _name(raw: bytes, path: Path) -> str:
    """The name of an entry; one that would leave the archive's folder is refused."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = ""
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or not {"", ".", ".."}.isdisjoint(parts):
        raise _broken(path, f"an entry has the name `{printable(repr(raw))}`")
    return name


def _wide(extra: bytes, values: list[int], path: Path) -> list[int]:
    """`values` with those that need 64 bits taken from the extra field (APPNOTE 4.5.3)."""
    at = 0
    while _IN_EXTRA in values and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1 and at + 4 + length <= len(extra):
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(wide, v) if v == _IN_EXTRA else v for v in values]
        at += 4 + length
    if _IN_EXTRA in values:
        raise _broken(path, "an entry of its zip directory has no size")
    return values


def _check_places(entries: list[_Stored], end: int, path: Path) -> None:
    """Entries that share bytes would let a small file claim any size."""
    if len({entry.name for entry in entries}) != len(entries):
        raise _broken(path, "two entries have one name")
    reached = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.offset < reached:
            raise _broken(path, f"`{entry.name}` overlaps another entry")
        reached = entry.offset + _LOCAL_HEADER + entry.bytes
    if reached > end:
        raise _broken(path, "its entries reach beyond the end of the data")


def _broken(path: Path, reason: str, *, hint: str = "download it again") -> LLMSizeError:
    return LLMSizeError(f"`{printable(str(path))}` is not a sound checkpoint: {reason}", hint=hint)
