"""PyTorch `.bin` archives, read without unpickling."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
from checkpoints import torch_bin

from llmsize.checkpoint import parameters, total_bytes
from llmsize.errors import LLMSizeError
from llmsize.sources.torch_bin import read_torch


def test_bytes_come_from_the_directory(tmp_path: Path) -> None:
    """Storages are summed; the pickle and the version are not."""
    checkpoint = read_torch([torch_bin(tmp_path / "pytorch_model.bin", [4096, 24])], "m")
    assert [tensor.bytes for tensor in checkpoint.tensors] == [4096, 24]
    assert total_bytes(checkpoint) == 4120
    assert parameters(checkpoint) is None


def test_sizes_above_four_gigabytes(tmp_path: Path) -> None:
    """Large archives keep sizes, places and the directory itself in 64-bit fields."""
    path, size = tmp_path / "big.bin", 5 * 2**30
    name = b"model/data/0"
    extra = struct.pack("<HHQQ", 1, 16, size, size)
    entry = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1,
        len(name), len(extra), 0, 0, 0, 0, 0,
    )  # fmt: skip
    start = 30 + len(name) + size
    directory = entry + name + extra
    end = start + len(directory)
    with path.open("wb") as file:
        file.truncate(start)
        file.seek(start)
        file.write(directory)
        file.write(
            struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(directory), start)
        )
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 2**32 - 1, 2**32 - 1, 0))
    assert total_bytes(read_torch([path], "m")) == size


def test_the_format_before_1_6_is_not_unpickled(tmp_path: Path) -> None:
    """A bare pickle could run any code; it is refused with a way out."""
    path = tmp_path / "old.bin"
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
    with pytest.raises(LLMSizeError, match=r"before PyTorch 1\.6") as failure:
        read_torch([path], "m")
    assert failure.value.hint == "convert it to safetensors"


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    """PyTorch stores; an archive that compresses claims more than it holds."""
    path = torch_bin(tmp_path / "bomb.bin", [10**6], method=zipfile.ZIP_DEFLATED)
    with pytest.raises(LLMSizeError, match="is compressed"):
        read_torch([path], "m")


def test_entries_cannot_share_bytes(tmp_path: Path) -> None:
    """A thousand entries over the same kilobyte are not a megabyte."""
    path = torch_bin(tmp_path / "overlap.bin", [1000, 1000])
    data = bytearray(path.read_bytes())
    first = data.find(b"PK\1\2")
    places = []
    at = first
    while (at := data.find(b"PK\1\2", at)) >= 0:
        places.append(at)
        at += 4
    for at in places[2:4]:
        data[at + 42 : at + 46] = struct.pack("<I", 100)
    path.write_bytes(data)
    with pytest.raises(LLMSizeError, match="overlaps another entry"):
        read_torch([path], "m")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "m/../data/0", "m\\data\\0"])
def test_names_that_leave_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    """Nothing is extracted, and such an archive is no checkpoint either."""
    path = tmp_path / "tricky.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(LLMSizeError, match="an entry has the name"):
        read_torch([path], "m")


@pytest.mark.parametrize("content", [b"", b"PK", b"hello" * 100, b"PK\5\6" + b"\xff" * 18])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """What is no archive of PyTorch is named as such."""
    path = tmp_path / "m.bin"
    path.write_bytes(content)
    with pytest.raises(LLMSizeError, match="not a sound checkpoint"):
        read_torch([path], "m")
