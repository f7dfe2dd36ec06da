"""Small checkpoints, written byte by byte from the description of each format."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U8": 1, "I64": 8, "F8_E4M3": 1}


def header(tensors: dict[str, tuple[str, list[int]]]) -> dict[str, dict[str, object]]:
    """A safetensors header that places the tensors one behind the other."""
    at, entries = 0, {}
    for name, (dtype, shape) in tensors.items():
        size = SIZES[dtype]
        for n in shape:
            size *= n
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return entries


def safetensors(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> Path:
    """A whole file; the data are a hole in it."""
    return raw_safetensors(path, json.dumps(header(tensors)).encode(), _data(header(tensors)))


def raw_safetensors(path: Path, head: bytes, data: int, *, announced: int | None = None) -> Path:
    """A file with any header, true or not, before `data` bytes."""
    length = len(head) if announced is None else announced
    path.write_bytes(struct.pack("<Q", length) + head)
    with path.open("r+b") as file:
        file.truncate(8 + len(head) + data)
    return path


def _data(entries: dict[str, dict[str, object]]) -> int:
    return max((entry["data_offsets"][1] for entry in entries.values()), default=0)  # type: ignore[index]


def torch_bin(path: Path, storages: list[int], *, method: int = zipfile.ZIP_STORED) -> Path:
    """An archive with the entries that `torch.save` writes."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("model/byteorder", b"little")
        for key, size in enumerate(storages):
            archive.writestr(f"model/data/{key}", bytes(size))
        archive.writestr("model/version", b"3\n")
    return path


GGUF_TYPES = {"u8": 0, "u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "arr": 9, "u64": 10}
_PACK = {0: "<B", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}


def gguf_string(text: str | bytes) -> bytes:
    """A length and the bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(value: object, kind: str = "") -> bytes:
    """A type and a value; a list becomes an array of its first item's type."""
    kind = kind or _kind(value)
    if isinstance(value, list):
        inner = GGUF_TYPES[_kind(value[0]) if value else "u32"]
        body = b"".join(_plain(item, inner) for item in value)
        return struct.pack("<IIQ", GGUF_TYPES["arr"], inner, len(value)) + body
    return struct.pack("<I", GGUF_TYPES[kind]) + _plain(value, GGUF_TYPES[kind])


def _kind(value: object) -> str:
    kinds = {bool: "bool", int: "u32", float: "f32", str: "str"}
    return "arr" if isinstance(value, list) else kinds[type(value)]


def _plain(value: object, kind: int) -> bytes:
    if kind == GGUF_TYPES["str"]:
        assert isinstance(value, str)
        return gguf_string(value)
    return struct.pack(_PACK[kind], value)


def gguf(
    path: Path,
    metadata: dict[str, object],
    tensors: list[tuple[str, list[int], int, int]],
    *,
    version: int = 3,
    cut: int = 0,
) -> Path:
    """A file; a tensor is its name, its dimensions innermost first, its type and its bytes."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += gguf_string(key) + gguf_value(value)
    at = 0
    for name, dimensions, kind, size in tensors:
        head += gguf_string(name) + struct.pack(
            f"<I{len(dimensions)}Q", len(dimensions), *dimensions
        )
        head += struct.pack("<IQ", kind, at)
        at += -(-size // 32) * 32
    head += bytes(-len(head) % 32)
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(len(head) + at - cut)
    return path
