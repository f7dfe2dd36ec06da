"""Files that someone made to break the reader: a clear error, soon, in little memory."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import gguf, gguf_string, header, raw_safetensors, safetensors, torch_bin
from hypothesis import given
from hypothesis import strategies as st
from properties import tried

from llmsize.errors import LLMSizeError
from llmsize.sources import resolve

SECONDS = 2.0
MEGABYTES = 200
LINEAR = {"a.weight": ("BF16", [4, 3]), "a.bias": ("F32", [4])}
METADATA: dict[str, object] = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64,
    "llama.attention.head_count": 4, "llama.attention.head_count_kv": [2, 1],
    "tokenizer.ggml.tokens": ["a", "b", "c"], "general.alignment": 32,
}  # fmt: skip
CONFIG = {
    "model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 64},
    "quantization_config": {"bits": 4}, "numbers": [0.5, -1, 1e10, None, True],
}  # fmt: skip


def good_config(folder: Path) -> Path:
    """A configuration with nested parts."""
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def good_index(folder: Path) -> Path:
    """An index and its shard."""
    safetensors(folder / "m-1.safetensors", LINEAR)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": dict.fromkeys(LINEAR, "m-1.safetensors")}))
    return path


GOOD: dict[str, Callable[[Path], Path]] = {
    "config": good_config,
    "index": good_index,
    "safetensors": lambda folder: safetensors(folder / "m.safetensors", LINEAR),
    "gguf": lambda folder: gguf(folder / "m.gguf", METADATA, [("w", [256, 2], 12, 288)]),
    "bin": lambda folder: torch_bin(folder / "m.bin", [64, 7]),
}
INTERESTING = st.sampled_from(
    [b"\x00", b"\xff", b"\xff" * 4, b"\xff" * 8, struct.pack("<Q", 2**63), struct.pack("<I", 2**31),
     struct.pack("<Q", 2**32), b'"', b"{", b"[" * 40, b"1e999", b"NaN", b"-1", b"\\ud800", b"PK"]
)  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1), st.integers(0, 8), st.one_of(INTERESTING, st.binary(max_size=8))
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def test_a_family_named_by_half_a_character_is_refused(tmp_path: Path) -> None:
    """JSON can say half of a surrogate pair, which is no text that could be looked for."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gem\ud800ma", "hidden_size": 64}))
    with pytest.raises(LLMSizeError, match="states no `model_type`"):
        resolve(str(path))


@pytest.mark.parametrize("kind", GOOD)
@tried(150)
@given(edits=EDITS, kept=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_a_damaged_file_is_read_or_refused(
    tmp_path: Path, kind: str, edits: list[tuple[float, int, bytes]], kept: float
) -> None:
    """Bytes replaced, added, removed or cut off never give anything but an answer or an error."""
    path = GOOD[kind](tmp_path)
    data = bytearray(path.read_bytes())
    for place, removed, added in edits:
        at = int(place * len(data))
        data[at : at + removed] = added
    path.write_bytes(data[: int(kept * len(data))])
    try:
        resolve(str(path))
    except LLMSizeError as error:
        assert error.message.isprintable()
        assert error.hint


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@tried(100)
@given(value=JSON, field=st.sampled_from(["dtype", "shape", "data_offsets", "whole"]))
def test_any_json_in_a_header_is_read_or_refused(tmp_path: Path, value: object, field: str) -> None:
    """Every place of the header may hold any JSON."""
    entries: dict[str, dict[str, object]] = header(LINEAR)
    entries["a.bias"] = value if field == "whole" else entries["a.bias"] | {field: value}  # type: ignore[assignment]
    path = raw_safetensors(tmp_path / "m.safetensors", json.dumps(entries).encode(), 40)
    try:
        resolve(str(path))
    except LLMSizeError as error:
        assert error.message.isprintable()


def _dense_config(folder: Path) -> Path:
    path = folder / "lists.json"
    path.write_bytes(b'{"x":[' + b"[]," * 590_000 + b"[]]}")
    return path


def _wide_header(folder: Path) -> Path:
    entry = ',"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ",".join(f'"{i:x}":{{{entry[1:]}' for i in range(149_000))
    return raw_safetensors(folder / "wide.safetensors", f"{{{text}}}".encode(), 0)


def _long_text(folder: Path) -> Path:
    text = b'{"__metadata__":{"x":"' + "𝄞".encode() + b"y" * 6_200_000 + b'"}}'
    return raw_safetensors(folder / "text.safetensors", text, 0)


def _long_ascii(folder: Path) -> Path:
    text = b'{"__metadata__":{"x":"' + b"y" * 24_900_000 + b'"}}'
    return raw_safetensors(folder / "ascii.safetensors", text, 0)


def _many_shards(folder: Path) -> Path:
    text = b'{"__metadata__":{"x":"' + b"y" * 20_000_000 + b'"}}'
    first = raw_safetensors(folder / "s0.safetensors", text, 0)
    names = [f"s{number}.safetensors" for number in range(200)]
    for name in names[1:]:
        os.link(first, folder / name)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {name: name for name in names}}))
    return path


def _gguf(folder: Path, name: str, body: bytes, *, tensors: int = 0, keys: int = 0) -> Path:
    path = folder / name
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body)
    return path


def _empty_strings(folder: Path) -> Path:
    array = gguf_string("k") + struct.pack("<IIQ", 9, 8, 2_000_000) + bytes(16_000_000)
    return _gguf(folder, "strings.gguf", array, keys=1)


def _kept_arrays(folder: Path) -> Path:
    body = b"".join(
        gguf_string(f"{key}") + struct.pack("<IIQ", 9, 12, 1024) + bytes(8192)
        for key in range(2000)
    )
    return _gguf(folder, "arrays.gguf", body, keys=2000)


def _tensor_infos(folder: Path) -> Path:
    infos = (gguf_string(f"{i:x}") + struct.pack("<IIQ", 0, 24, i) for i in range(65_536))
    return _gguf(folder, "tensors.gguf", b"".join(infos), tensors=65_536)


def _gguf_parts(folder: Path) -> Path:
    body = gguf_string("k") + struct.pack("<IIQ", 9, 8, 2_000_000) + bytes(16_000_000)
    first = _gguf(folder, "p-00001-of-00100.gguf", body, keys=1)
    for part in range(2, 101):
        os.link(first, folder / f"p-{part:05}-of-00100.gguf")
    return first


def _zip_directory(folder: Path) -> Path:
    entry = struct.Struct("<4s6H3I5H2I")
    directory = b"".join(
        entry.pack(b"PK\1\2", *[0] * 9, 6, 0, 0, 0, 0, 0, at) + f"{at:06x}".encode()
        for at in range(150_000)
    )
    path = folder / "many.bin"
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0, 0, len(directory), 0, 0)
    path.write_bytes(directory + end)
    return path


def _bomb(folder: Path) -> Path:
    path = folder / "bomb.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", b"")
        archive.writestr("m/data/0", bytes(50_000_000))
    return path


WORST = (
    _dense_config, _wide_header, _long_text, _long_ascii, _many_shards, _empty_strings,
    _kept_arrays, _tensor_infos, _gguf_parts, _zip_directory, _bomb,
)  # fmt: skip
MEASURE = """
import json, sys, time
from llmsize.errors import LLMSizeError
from llmsize.sources import gguf, hub, resolve, safetensors

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

idle, started = peak(), time.process_time()
try:
    resolve(sys.argv[1])
    said = "read"
except LLMSizeError as failure:
    said = failure.message
print(json.dumps([time.process_time() - started, peak() - idle, said]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
@pytest.mark.parametrize("make", WORST, ids=lambda make: make.__name__.strip("_"))
def test_the_worst_files_cost_little(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    """At most two seconds of one core and 200 MB more than before the file was opened."""
    source = str(Path(__file__).parents[1] / "src")
    environment = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(make(tmp_path))], env=environment, text=True,
        capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    seconds, megabytes, said = json.loads(done.stdout)
    assert (seconds < SECONDS, megabytes < MEGABYTES) == (True, True), (seconds, megabytes, said)
