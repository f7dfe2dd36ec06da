"""safetensors headers."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from checkpoints import header, raw_safetensors, safetensors

from llmsize.checkpoint import StoredTensor, bytes_by_format, parameters, total_bytes
from llmsize.errors import LLMSizeError
from llmsize.sources.safetensors import read_safetensors, shards

LINEAR = {"a.weight": ("BF16", [4, 3]), "a.bias": ("F32", [4])}


def test_every_tensor_is_listed_with_its_bytes(tmp_path: Path) -> None:
    """Shape, format and bytes come from the header alone."""
    checkpoint = read_safetensors([safetensors(tmp_path / "m.safetensors", LINEAR)], "m")
    assert checkpoint.tensors == (
        StoredTensor("a.weight", (4, 3), "bf16", 24),
        StoredTensor("a.bias", (4,), "fp32", 16),
    )
    assert total_bytes(checkpoint) == 40
    assert bytes_by_format(checkpoint) == {"bf16": 24, "fp32": 16}
    assert parameters(checkpoint) == 16


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    """An index names each file many times; each is read once."""
    safetensors(tmp_path / "m-1.safetensors", {"a": ("F16", [2]), "b": ("F16", [2])})
    safetensors(tmp_path / "m-2.safetensors", {"c": ("F16", [3])})
    index = tmp_path / "model.safetensors.index.json"
    names = {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"}
    index.write_text(json.dumps({"metadata": {"total_size": 14}, "weight_map": names}))
    checkpoint = read_safetensors(shards(index), str(index))
    assert [tensor.name for tensor in checkpoint.tensors] == ["a", "b", "c"]
    assert total_bytes(checkpoint) == 14


def test_an_adapter_is_recognised(tmp_path: Path) -> None:
    """PEFT names the two factors of LoRA `lora_A` and `lora_B`."""
    names = {"base_model.model.q_proj.lora_A.weight": ("F32", [8, 64])}
    assert read_safetensors([safetensors(tmp_path / "adapter.safetensors", names)], "a").adapter


def test_scales_are_no_parameters_and_packed_weights_hide_them(tmp_path: Path) -> None:
    """fp8 keeps one element per parameter beside its scales; GPTQ packs eight in an integer."""
    fp8 = {"w.weight": ("F8_E4M3", [128, 128]), "w.weight_scale_inv": ("F32", [1, 1])}
    assert parameters(read_safetensors([safetensors(tmp_path / "f", fp8)], "f")) == 128 * 128
    gptq = {"w.qweight": ("I32", [16, 128]), "w.scales": ("F16", [1, 128])}
    assert parameters(read_safetensors([safetensors(tmp_path / "g", gptq)], "g")) is None


def test_the_reference_library_agrees(tmp_path: Path) -> None:
    """`safetensors` itself reads these files, with the same names, shapes and sizes."""
    library = pytest.importorskip("safetensors")
    path = safetensors(tmp_path / "m.safetensors", LINEAR)
    theirs = {
        name: (t["shape"], len(t["data"])) for name, t in library.deserialize(path.read_bytes())
    }
    ours = read_safetensors([path], "m").tensors
    assert {tensor.name: (list(tensor.shape or ()), tensor.bytes) for tensor in ours} == theirs


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"dtype": "F17"}, "unknown format F17"),
        ({"dtype": ["F32"]}, "incomplete entry"),
        ({"shape": [-4, -3]}, "impossible shape"),
        ({"shape": [2**40, 2**40]}, "impossible shape"),
        ({"shape": [1.5]}, "impossible shape"),
        ({"shape": [True, 12]}, "impossible shape"),
        ({"shape": "12"}, "impossible shape"),
        ({"shape": [1] * 100_000}, "impossible shape"),
        ({"shape": [4, 4]}, "32 bytes in a place for 24"),
        ({"data_offsets": [0]}, "not enough values"),
        ({"data_offsets": [0, 2**63]}, "24 bytes in a place for"),
        ({"data_offsets": [8, 32]}, "overlap|gap"),
        ({"data_offsets": [-24, 0]}, "overlap"),
        ({"data_offsets": [0.0, 24.0]}, "not a whole number"),
        ({"shape": None}, "incomplete entry"),
    ],
    ids=range(15),
)
def test_an_impossible_entry_is_refused(
    tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    """A header that lies about a tensor is never believed."""
    entries = header(LINEAR)
    entries["a.weight"] |= change
    path = raw_safetensors(tmp_path / "m.safetensors", json.dumps(entries).encode(), 40)
    with pytest.raises(LLMSizeError, match=problem):
        read_safetensors([path], "m")


GOOD = json.dumps(header(LINEAR)).encode()


@pytest.mark.parametrize(
    ("head", "data", "announced", "problem"),
    [
        (GOOD, 40, 2**63, "beyond the end"),
        (GOOD, 40, len(GOOD) + 41, "beyond the end"),
        (GOOD, 39, None, "cut off"),
        (GOOD, 41, None, "belong to no tensor"),
        (b"", 0, None, "not readable JSON"),
        (b"[1]", 0, None, "no JSON object"),
        (b'{"a": 1}', 0, None, "no JSON object"),
        (b'{"a\\u001b": {}}', 0, None, "control characters"),
        (GOOD[:-1] + b", " + GOOD[1:], 40, None, "`a.weight` occurs twice"),
        (b'{"' + b"x" * 26_000_000 + b'": 1}', 0, None, "more than 25,000,000"),
        (b'{"x":[' + b"[]," * 3_000_000 + b"[]]}", 0, None, "far larger"),
        (
            b'{"x":"' + "𝄞".encode() + b"y" * 24_000_000 + b'"}',
            0,
            None,
            "no JSON object|far larger",
        ),
    ],
    ids=range(12),
)
def test_a_broken_file_is_refused(
    tmp_path: Path, head: bytes, data: int, announced: int | None, problem: str
) -> None:
    """Lengths, duplicates and sizes are checked before anything is believed."""
    path = raw_safetensors(tmp_path / "m.safetensors", head, data, announced=announced)
    with pytest.raises(LLMSizeError, match=problem):
        read_safetensors([path], "m")


def test_a_git_lfs_pointer_is_told_apart(tmp_path: Path) -> None:
    """`git clone` without LFS leaves a small text in the place of the weights."""
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(LLMSizeError, match="Git LFS pointer") as failure:
        read_safetensors([path], "m")
    assert failure.value.hint == "run `git lfs pull`"


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd", "..", "", "a/b", 3, None])
def test_an_index_stays_in_its_folder(tmp_path: Path, name: object) -> None:
    """A shard is a file beside its index, nothing else."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(LLMSizeError, match="not a file beside it"):
        shards(index)


def test_one_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Else its bytes would be counted twice."""
    paths = [safetensors(tmp_path / name, LINEAR) for name in ("1", "2")]
    with pytest.raises(LLMSizeError, match=r"two tensors are called `a\.weight`"):
        read_safetensors(paths, "m")


def test_ninety_thousand_tensors_are_quick(tmp_path: Path) -> None:
    """DeepSeek-V3 has 91,000; half a second is the budget, doubled here for a busy machine."""
    many = {
        f"model.layers.{i // 1024}.mlp.experts.{i % 1024}.gate_proj.weight": ("BF16", [64, 7])
        for i in range(90_000)
    }
    path = safetensors(tmp_path / "m.safetensors", many)
    started = time.process_time()
    assert len(read_safetensors([path], "m").tensors) == 90_000
    assert time.process_time() - started < 1.0
