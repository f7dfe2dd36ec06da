"""safetensors: names, shapes, formats and bytes from the headers; the weights are not read.

The format: a little-endian u64 with the length of a JSON header, the header, the data.
https://github.com/huggingface/safetensors/blob/v0.6.2/README.md#format
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

from llmsize.checkpoint import Checkpoint, StoredTensor
from llmsize.collector import collector_paused
from llmsize.errors import LLMSizeError, printable
from llmsize.sources.reading import (
    MAX_JSON,
    Budget,
    mapping,
    open_regular,
    parse_json,
    read_exactly,
    read_small,
)

FORMATS = {
    "BOOL": ("bool", 8), "F4": ("fp4_e2m1", 4), "F6_E2M3": ("fp6_e2m3", 6),
    "F6_E3M2": ("fp6_e3m2", 6), "F8_E4M3": ("fp8_e4m3", 8), "F8_E5M2": ("fp8_e5m2", 8),
    "F8_E8M0": ("fp8_e8m0", 8), "F8_E4M3FNUZ": ("fp8_e4m3fnuz", 8),
    "F8_E5M2FNUZ": ("fp8_e5m2fnuz", 8), "F16": ("fp16", 16), "BF16": ("bf16", 16),
    "F32": ("fp32", 32), "F64": ("fp64", 64), "C64": ("complex64", 64), "U8": ("uint8", 8),
    "I8": ("int8", 8), "U16": ("uint16", 16), "I16": ("int16", 16), "U32": ("uint32", 32),
    "I32": ("int32", 32), "U64": ("uint64", 64), "I64": ("int64", 64),
}  # fmt: skip
"""Name of the format and bits of one element, by the name that the header uses."""

MAX_ELEMENTS = 10**15
MAX_DIMENSIONS = 16
MAX_TENSORS = 300_000
MAX_SHARDS = 4096
_LFS_POINTER = b"version "
"""What stands in place of the weights after `git clone` without Git LFS."""


def read_safetensors(paths: Iterable[Path], source: str) -> Checkpoint:
    """The checkpoint in one file or in the shards of one model.

    Raises `LLMSizeError` if a header is broken or two shards hold a tensor of one name.
    """
    tensors: list[StoredTensor] = []
    budget = Budget()
    with collector_paused():
        for path in paths:
            tensors += _file(path, budget)
            if len(tensors) > MAX_TENSORS:
                raise _broken(source, f"it holds more than {MAX_TENSORS:,} tensors")
    return checkpoint(tensors, source)


def checkpoint(tensors: Collection[StoredTensor], source: str) -> Checkpoint:
    """The tensors of all shards as one. Raises `LLMSizeError` if two have one name."""
    if len({tensor.name for tensor in tensors}) != len(tensors):
        twice, _ = Counter(tensor.name for tensor in tensors).most_common(1)[0]
        raise _broken(source, f"two tensors are called `{printable(twice)}`")
    adapter = ".lora_A." in " ".join(tensor.name for tensor in tensors)
    return Checkpoint(tuple(tensors), source, adapter)


def shards(index: Path) -> list[Path]:
    """The files that a `….index.json` names, in its folder, each once.

    Raises `LLMSizeError` if a name leads out of the folder.
    """
    names = shard_names(read_small(index, MAX_JSON), str(index))
    return [index.parent / name for name in names]


def shard_names(index: bytes, where: str) -> list[str]:
    """The names of files in the text of an index, each once, sorted."""
    whole = mapping(parse_json(index, where), where, "an index of shards")
    weight_map = mapping(whole.get("weight_map"), where, "an index of shards")
    names = set(filter(_is_file_name, weight_map.values()))
    if not 0 < len(names) <= MAX_SHARDS:
        raise _broken(where, f"it names {len(names):,} files")
    return sorted(names)


def _is_file_name(name: object) -> bool:
    if isinstance(name, str) and name.isprintable() and name and Path(name).name == name != "..":
        return True
    raise LLMSizeError(
        f"an index of shards names `{printable(str(name))}`, which is not a file beside it",
        hint="shards lie in the folder of their index",
    )


def _file(path: Path, budget: Budget) -> list[StoredTensor]:
    file, size = open_regular(path)
    with file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == _LFS_POINTER:
            raise _broken(
                str(path), "it is a Git LFS pointer, not the file", hint="run `git lfs pull`"
            )
        if len(start) < 8 or length > size - 8:
            raise _broken(str(path), "its header reaches beyond the end of the file")
        if length > MAX_JSON:
            raise _broken(str(path), f"its header has {length:,} bytes, more than {MAX_JSON:,}")
        budget.spend(length, path)
        data = read_exactly(file, length, path)
    return parse_header(data, size - 8 - length, str(path))


def parse_header(data: bytes, data_bytes: int, where: str) -> list[StoredTensor]:
    """The tensors that a header lists, checked against `data_bytes` that follow it.

    Raises `LLMSizeError` for anything that the format does not allow.
    """
    header = _entries(data, where)
    kinds = _Kinds()
    tensors: list[StoredTensor] = []
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        try:
            shape, format, size = kinds[entry["dtype"], tuple(entry["shape"])]
            begin, end = entry["data_offsets"]
            if end - begin != size:
                raise ValueError(f"{size} bytes in a place for {end - begin}")
        except (KeyError, TypeError, ValueError) as failure:
            raise _broken(where, f"the tensor `{printable(name)}` has {_what(failure)}") from None
        spans.append((begin, end))
        tensors.append(StoredTensor(name, shape, format, size))
    _check_spans(spans, data_bytes, where)
    return tensors


def _entries(data: bytes, where: str) -> dict[str, Any]:
    """The tensors' names and entries. A name that occurs twice is refused."""
    header: Any = parse_json(data, where, unique=False)
    entries = dict(mapping(header, where, "a safetensors header"))
    if not all(type(entry) is dict for entry in entries.values()):
        raise _broken(where, "an entry in its header is no JSON object")
    if data.count(b":") != len(entries) + sum(map(len, entries.values())):
        parse_json(data, where)  # colons in text, or a name that occurs twice
    entries.pop("__metadata__", None)
    if not "".join(entries).isprintable():
        raise _broken(where, "the name of a tensor holds control characters")
    return entries


class _Kinds(dict[tuple[Any, tuple[Any, ...]], tuple[tuple[int, ...], str, int]]):
    """Shape, format and bytes of the tensors of one dtype and shape; most occur many times."""

    def __missing__(self, key: tuple[Any, tuple[Any, ...]]) -> tuple[tuple[int, ...], str, int]:
        dtype, shape = key
        if dtype not in FORMATS:
            raise ValueError(f"the unknown format {dtype}")
        if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError("an impossible shape")
        format, bits = FORMATS[dtype]
        elements = prod(shape)
        if elements > MAX_ELEMENTS or elements * bits % 8:
            raise ValueError("an impossible shape")
        return self.setdefault(key, (shape, format, elements * bits // 8))


def _what(failure: Exception) -> str:
    return printable(str(failure)) if isinstance(failure, ValueError) else "an incomplete entry"


def _check_spans(spans: list[tuple[int, int]], data_bytes: int, where: str) -> None:
    """The format wants the data covered without gap or overlap."""
    if not {int}.issuperset(map(type, chain.from_iterable(spans))):
        raise _broken(where, "a place in it is not a whole number")
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise _broken(where, "its tensors overlap" if begin < reached else "its data has a gap")
        reached = end
    if reached > data_bytes:
        raise _broken(
            where, f"it is cut off: {reached:,} bytes of data announced, {data_bytes:,} there"
        )
    if reached < data_bytes:
        raise _broken(where, f"{data_bytes - reached:,} bytes at its end belong to no tensor")


def _broken(where: str, reason: str, *, hint: str = "download it again") -> LLMSizeError:
    return LLMSizeError(f"`{printable(where)}` is not a sound checkpoint: {reason}", hint=hint)
