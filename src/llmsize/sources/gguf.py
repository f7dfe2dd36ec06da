"""GGUF: metadata and tensors from the start of the file; vocabularies and weights are skipped.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from functools import partial
from math import prod
from pathlib import Path
from typing import Protocol

from llmsize.checkpoint import Checkpoint, StoredTensor
from llmsize.errors import LLMSizeError, printable
from llmsize.quick_dataclasses import dataclass, replace
from llmsize.sources.quantized import PART
from llmsize.sources.reading import Budget, entries, open_regular
from llmsize.sources.safetensors import MAX_ELEMENTS, checkpoint

TYPES = {
    0: ("fp32", 1, 4), 1: ("fp16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24), 8: ("q8_0", 32, 34), 9: ("q8_1", 32, 36),
    10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210), 15: ("q8_k", 256, 292),
    16: ("iq2_xxs", 256, 66), 17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50), 20: ("iq4_nl", 32, 18), 21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136), 24: ("int8", 1, 1), 25: ("int16", 1, 2),
    26: ("int32", 1, 4), 27: ("int64", 1, 8), 28: ("fp64", 1, 8), 29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2), 34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18), 42: ("q2_0", 64, 18),
}  # fmt: skip
"""`ggml_type` → name, elements and bytes of a block (llama.cpp 0c1e57098, ggml/include/ggml.h)."""

MAX_HEADER = 32 * 2**20
"""Bytes of metadata and tensor infos; a vocabulary of 262,144 with its merges takes 17 MiB."""
MAX_KEYS = 2000
MAX_STRINGS = 2_000_000
MAX_TENSORS = 65_536
"""Experts are stored together, so that even the largest models have a few thousand tensors."""
MAX_PARTS = 1000
MAX_KEPT_TEXT = 4096
MAX_KEPT_ARRAY = 1024
"""Longer texts (chat templates) and arrays (vocabularies) are skipped; arrays leave a length."""
_CHUNK = 2**20
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"),
    3: struct.Struct("<h"), 4: struct.Struct("<I"), 5: struct.Struct("<i"),
    6: struct.Struct("<f"), 7: struct.Struct("<?"), 10: struct.Struct("<Q"),
    11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
_U32, _U64 = _SCALARS[4], _SCALARS[10]

Value = int | float | bool | str | tuple[int | float | bool, ...]


@dataclass(frozen=True, slots=True)
class GGUF:
    """What the headers of a model say, of all its parts together."""

    metadata: Mapping[str, Value]
    """Numbers, short texts and short arrays by key."""
    lengths: Mapping[str, int]
    """Items of every array by key, vocabularies among them."""
    checkpoint: Checkpoint


class Readable(Protocol):
    """A file, here or elsewhere, that is read on from its start."""

    def read(self, count: int, /) -> bytes:
        """The next `count` bytes, fewer only at the end."""

    def close(self) -> None:
        """No more will be read."""


Opening = Callable[[], tuple[Readable, int]]
"""Opens a file, and says how many bytes it has."""


def read_gguf(path: Path) -> GGUF:
    """Metadata and tensors of a file, or of every part of a split one.

    Raises `LLMSizeError` for a file that is broken or cut off, and for a part that is missing.
    """
    names = parts(path.name, entries(path.parent) if PART.fullmatch(path.name) else ())
    paths = [path.parent / name for name in names]
    return read_parts({str(part): partial(open_regular, part) for part in paths})


def read_parts(openings: Mapping[str, Opening]) -> GGUF:
    """Metadata and tensors of a model in one or more files, by what each is called."""
    (where, first_opening), *others = openings.items()
    first = _file(where, first_opening, Budget(MAX_HEADER))
    later = Budget(MAX_HEADER // 4)  # no vocabulary is repeated in them
    rest = [_file(*other, later).checkpoint.tensors for other in others]
    tensors = (*first.checkpoint.tensors, *(tensor for part in rest for tensor in part))
    announced = first.metadata.get("split.count", len(openings))
    if others and announced != len(openings):
        raise _broken(where, f"it has {len(openings)} parts, its header announces {announced}")
    adapter = first.metadata.get("general.type") == "adapter"
    source = f"{where} and {len(others)} more" if others else where
    whole = replace(checkpoint(tensors, source), adapter=adapter)
    return GGUF(first.metadata, first.lengths, whole)


def parts(name: str, beside: Collection[str]) -> Sequence[str]:
    """The files of a split model, of which `name` is any and `beside` are all; else `name` alone.

    Raises `LLMSizeError` if one is not there.
    """
    match = PART.fullmatch(name)
    if not match:
        return [name]
    stem, count = match[1], int(match[3])
    names = [f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    if not 0 < count <= MAX_PARTS or name not in names:
        raise _broken(name, "its name is not that of a part")
    missing = sorted(set(names).difference(beside))
    if missing:
        raise LLMSizeError(
            f"`{printable(missing[0])}` is missing: {len(missing)} of {count} parts are not there",
            hint="every part must lie in the same folder",
        )
    return names


def _file(where: str, opening: Opening, budget: Budget) -> GGUF:
    file, size = opening()
    with closing(file):
        cursor = _Cursor(file, min(size, budget.left), size, where)
        if cursor.take(4) != b"GGUF":
            raise _broken(where, "it does not start with `GGUF`")
        version = cursor.number(_U32)
        if version not in (2, 3):
            raise _broken(where, f"version {version} is not 2 or 3 (little-endian)")
        tensor_count, key_count = cursor.number(_U64), cursor.number(_U64)
        if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
            raise _broken(where, f"it announces {tensor_count:,} tensors and {key_count:,} keys")
        metadata, lengths = _metadata(cursor, key_count)
        infos = [_tensor_info(cursor) for _ in range(tensor_count)]
    budget.spend(cursor.place, where)
    _check_places(infos, cursor.place, metadata.get("general.alignment", 32), size, where)
    return GGUF(metadata, lengths, Checkpoint(tuple(tensor for tensor, _ in infos), where))


class _Cursor:
    """Reads on from the start of a file, never past `limit`."""

    def __init__(self, file: Readable, limit: int, size: int, where: str) -> None:
        self.file, self.where = file, where
        self.limit = limit
        self.is_capped = limit < size
        self.data = bytearray()
        self.place = self.strings = 0

    def reach(self, count: int) -> None:
        """Have the next `count` bytes in `data`, or refuse the file."""
        end = self.place + count
        if end <= len(self.data):
            return
        if end <= self.limit:
            ahead = max(_CHUNK, len(self.data))  # doubled: few requests where a read is one
            self.data += self.file.read(
                max(end, min(self.limit, len(self.data) + ahead)) - len(self.data)
            )
        if end > len(self.data):
            past = f"{self.limit:,} bytes of header" if self.is_capped else "its end"
            raise _broken(self.where, f"it goes on past {past}")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        self.reach(count)
        self.place += count
        return bytes(self.data[self.place - count : self.place])

    def skip(self, count: int) -> None:
        """Leave out `count` bytes."""
        self.reach(count)
        self.place += count

    def number(self, kind: struct.Struct) -> int:
        """The next number, which is whole."""
        self.reach(kind.size)
        value: int = kind.unpack_from(self.data, self.place)[0]
        self.place += kind.size
        return value

    def text(self) -> str:
        """The next string. It must be printable: keys and names of tensors are shown."""
        raw = self.take(self.number(_U64))
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _broken(self.where, "a name in it is not UTF-8") from None
        if not text.isprintable():
            raise _broken(self.where, f"a name in it has control characters: {printable(text)}")
        return text

    def skip_strings(self, count: int) -> None:
        """Leave out `count` strings; the only loop over a vocabulary, so it is tight."""
        self.strings += count
        if self.strings > MAX_STRINGS:
            raise _broken(self.where, f"it announces {self.strings:,} strings")
        unpack, place, end = _U64.unpack_from, self.place, len(self.data)
        for _ in range(count):
            if place + 8 > end:
                self.place = place
                self.reach(8)
                end = len(self.data)
            place += 8 + unpack(self.data, place)[0]
        self.place = place
        self.reach(0)


def _metadata(cursor: _Cursor, count: int) -> tuple[dict[str, Value], dict[str, int]]:
    metadata: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    seen: set[str] = set()
    for _ in range(count):
        key = cursor.text()
        if key in seen:
            raise _broken(cursor.where, f"the key `{printable(key)}` occurs twice")
        seen.add(key)
        kind = cursor.number(_U32)
        if kind == _ARRAY:
            array = _array(cursor, key, lengths)
            if array is not None:
                metadata[key] = array
        elif kind == _STRING:
            length = cursor.number(_U64)
            if length <= MAX_KEPT_TEXT:
                metadata[key] = cursor.take(length).decode("utf-8", "replace")
            else:
                cursor.skip(length)
        else:
            metadata[key] = cursor.number(_scalar(kind, cursor.where))
    return metadata, lengths


def _array(
    cursor: _Cursor, key: str, lengths: dict[str, int]
) -> tuple[int | float | bool, ...] | None:
    kind, count = cursor.number(_U32), cursor.number(_U64)
    lengths[key] = count
    if kind == _STRING:
        cursor.skip_strings(count)
        return None
    scalar = _scalar(kind, cursor.where)
    if count > MAX_KEPT_ARRAY:
        cursor.skip(count * scalar.size)
        return None
    return tuple(value for (value,) in scalar.iter_unpack(cursor.take(count * scalar.size)))


def _scalar(kind: int, where: str) -> struct.Struct:
    if kind not in _SCALARS:
        raise _broken(where, f"a value in it is of the unknown type {kind}")
    return _SCALARS[kind]


def _tensor_info(cursor: _Cursor) -> tuple[StoredTensor, int]:
    """A tensor and the place of its data, from where the data of all begin."""
    name = cursor.text()
    dimensions = cursor.number(_U32)
    if dimensions > 4:
        raise _broken(cursor.where, f"`{printable(name)}` has {dimensions:,} dimensions")
    innermost_first = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
    kind, offset = cursor.number(_U32), cursor.number(_U64)
    if kind not in TYPES:
        raise LLMSizeError(
            f"`{printable(cursor.where)}`: `{printable(name)}` is of ggml type {kind}, "
            "which llmsize does not know",
            hint="it may be newer than this llmsize, or a type that llama.cpp has removed",
        )
    format, block_elements, block_bytes = TYPES[kind]
    elements, row = prod(innermost_first), innermost_first[0] if dimensions else 1
    if elements > MAX_ELEMENTS or row % block_elements:
        raise _broken(cursor.where, f"`{printable(name)}` has the shape {innermost_first}")
    size = elements // block_elements * block_bytes
    return StoredTensor(name, innermost_first[::-1], format, size), offset


def _check_places(
    infos: list[tuple[StoredTensor, int]], end: int, alignment: Value, size: int, where: str
) -> None:
    if type(alignment) is not int or not 0 < alignment <= 2**20:
        raise _broken(where, f"its alignment is {printable(str(alignment))}")
    start = -(-end // alignment) * alignment
    reached = 0
    for tensor, offset in sorted(infos, key=lambda info: info[1]):
        if offset < reached:
            raise _broken(where, f"`{tensor.name}` overlaps another tensor")
        reached = offset + tensor.bytes
    if infos and start + reached > size:
        raise _broken(where, f"it is cut off: {size:,} of {start + reached:,} bytes are there")


def _broken(where: str, reason: str) -> LLMSizeError:
    return LLMSizeError(
        f"`{printable(where)}` is not a sound GGUF file: {reason}", hint="download it again"
    )
