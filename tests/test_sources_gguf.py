"""GGUF headers: tensors, metadata, and the cache that they describe."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest
from checkpoints import gguf, gguf_string, gguf_value

from llmsize import presets
from llmsize.checkpoint import StoredTensor, bytes_by_format, parameters
from llmsize.errors import LLMSizeError
from llmsize.formats import Format
from llmsize.memory.weights import Recipe
from llmsize.sources.gguf import TYPES, read_gguf
from llmsize.sources.gguf_model import architecture, layer_caches
from llmsize.sources.quantization import FILE_TYPES, recipe_name

MIB = 2**20
F16 = 2
LLAMA: dict[str, object] = {
    "general.architecture": "llama",
    "general.name": "Llama 2 7B",
    "llama.block_count": 32,
    "llama.context_length": 4096,
    "llama.embedding_length": 4096,
    "llama.feed_forward_length": 11008,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 32,
    "tokenizer.ggml.tokens": [f"t{i}" for i in range(100)],
}
TENSORS = [
    ("token_embd.weight", [4096, 100], 12, 4096 * 100 // 256 * 144),
    ("output_norm.weight", [4096], 0, 16384),
    ("blk.0.ffn_down.weight", [11008, 4096], 14, 11008 * 4096 // 256 * 210),
]


def test_block_sizes_are_those_of_the_presets() -> None:
    """The ids of the file format and the format presets tell the same sizes."""
    for name, elements, size in TYPES.values():
        format = presets.get(Format, name)
        assert (format.block_elements, format.block_bytes) == (elements, size), name


def test_every_tensor_is_listed_with_its_bytes(tmp_path: Path) -> None:
    """Dimensions are stored innermost first and shown outermost first."""
    checkpoint = read_gguf(gguf(tmp_path / "m.gguf", LLAMA, TENSORS)).checkpoint
    assert checkpoint.tensors[0] == StoredTensor("token_embd.weight", (100, 4096), "q4_k", 230400)
    assert bytes_by_format(checkpoint) == {"q6_k": 36986880, "q4_k": 230400, "fp32": 16384}
    assert parameters(checkpoint) == 100 * 4096 + 4096 + 11008 * 4096


@pytest.mark.parametrize("version", [2, 3])
def test_the_architecture_is_that_of_the_metadata(tmp_path: Path, version: int) -> None:
    """Keys of llama.cpp become the fields of a `config.json`."""
    found = architecture(read_gguf(gguf(tmp_path / "m.gguf", LLAMA, TENSORS, version=version)), "m")
    assert (found.family, found.title, found.context_length) == ("llama", "Llama 2 7B", 4096)
    assert found.config == {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "vocab_size": 100,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _cached(tmp_path: Path, name: str, tokens: int, **keys: object) -> int:
    """Bytes of an f16 cache of `tokens` tokens; llama.cpp rounds windows up to a batch of 512."""
    metadata = {f"{name}.{key}".replace("__", "."): value for key, value in keys.items()}
    read = read_gguf(gguf(tmp_path / "m.gguf", {"general.architecture": name, **metadata}, []))
    return sum(
        layer.kv_heads
        * (layer.key_dim + layer.value_dim)
        * F16
        * min(tokens, -(-(layer.window + 512) // 256) * 256 if layer.window else tokens)
        for layer in layer_caches(read)
    )


def test_caches_are_those_that_llama_cpp_allocates(tmp_path: Path) -> None:
    """Dry runs of llama.cpp 0c1e57098, one sequence, f16, 32,768 tokens."""
    gemma3 = _cached(
        tmp_path, "gemma3", 32768, block_count=62, embedding_length=5376, attention__head_count=32,
        attention__head_count_kv=16, attention__key_length=128, attention__value_length=128,
        attention__sliding_window=1024,
    )  # fmt: skip
    assert gemma3 == 3_338_665_984
    gemma2 = _cached(
        tmp_path, "gemma2", 32768, block_count=42, embedding_length=3584, attention__head_count=16,
        attention__head_count_kv=8, attention__key_length=256, attention__value_length=256,
        attention__sliding_window=4096,
    )  # fmt: skip
    assert gemma2 == 6_429_868_032
    mla = _cached(
        tmp_path, "deepseek2", 32768, block_count=27, embedding_length=2048,
        attention__head_count=16, attention__head_count_kv=1, attention__key_length=576,
        attention__value_length=512, attention__key_length_mla=192,
        attention__value_length_mla=128, attention__kv_lora_rank=512, rope__dimension_count=64,
    )  # fmt: skip
    assert mla == 1_019_215_872
    pattern = [at % 2 == 0 for at in range(24)]
    gpt_oss = _cached(
        tmp_path, "gpt-oss", 32768, block_count=24, embedding_length=2880,
        attention__head_count=64, attention__head_count_kv=8, attention__key_length=64,
        attention__value_length=64, attention__sliding_window=128,
        attention__sliding_window_pattern=pattern,
    )  # fmt: skip
    assert gpt_oss == 824_180_736


def test_a_hybrid_caches_in_one_layer_of_four(tmp_path: Path) -> None:
    """Qwen3.6-27B as llama.cpp reports it: 16384.00 MiB for 262,144 tokens in f16, 598.5 MiB of
    fp32 state for four sequences (lmstudio-ai/lmstudio-bug-tracker, issue 1862)."""
    keys: dict[str, object] = {
        "block_count": 64, "embedding_length": 5120, "attention.head_count": 24,
        "attention.head_count_kv": 4, "attention.key_length": 256, "attention.value_length": 256,
        "ssm.conv_kernel": 4, "ssm.state_size": 128, "ssm.group_count": 16,
        "ssm.inner_size": 6144, "ssm.time_step_rank": 48, "full_attention_interval": 4,
    }  # fmt: skip
    metadata = {"general.architecture": "qwen35"} | {f"qwen35.{k}": v for k, v in keys.items()}
    layers = layer_caches(read_gguf(gguf(tmp_path / "m.gguf", metadata, [])))
    per_token = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
    assert per_token * F16 * 262_144 == 16384 * MIB
    assert sum(layer.state for layer in layers) * 4 * 4 == 598.5 * MIB


def test_heads_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    """An array of `head_count_kv` gives one number a layer; zero means nothing is cached."""
    metadata = LLAMA | {"llama.block_count": 3, "llama.attention.head_count_kv": [8, 0, 4]}
    layers = layer_caches(read_gguf(gguf(tmp_path / "m.gguf", metadata, [])))
    assert [(layer.kind, layer.kv_heads) for layer in layers] == [
        ("full", 8), ("none", 0), ("full", 4),
    ]  # fmt: skip


def _split(folder: Path, present: tuple[int, ...] = (1, 2)) -> list[Path]:
    extra = {"split.count": 2}
    files = {
        1: (LLAMA | extra, TENSORS[:1]),
        2: ({"split.no": 1, **extra}, TENSORS[1:]),
    }
    paths = [folder / f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    for number in present:
        gguf(paths[number - 1], *files[number])  # type: ignore[arg-type]
    return paths


@pytest.mark.parametrize("part", [0, 1])
def test_any_part_stands_for_the_whole(tmp_path: Path, part: int) -> None:
    """A split model is read from all its parts, whichever is named."""
    read = read_gguf(_split(tmp_path)[part])
    assert [tensor.name for tensor in read.checkpoint.tensors] == [name for name, *_ in TENSORS]
    assert architecture(read, "m").family == "llama"


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    """Half a model has no size."""
    path = _split(tmp_path, present=(1,))[0]
    with pytest.raises(LLMSizeError, match=r"`m-00002-of-00002\.gguf` is missing: 1 of 2"):
        read_gguf(path)


def test_a_vocabulary_is_skipped_quickly(tmp_path: Path) -> None:
    """150,000 tokens with their merges; the budget of 0.15 s is doubled for a busy machine."""
    tokens: dict[str, object] = {
        "tokenizer.ggml.tokens": [f"token{i}" for i in range(150_000)],
        "tokenizer.ggml.token_type": [1] * 150_000,
        "tokenizer.ggml.merges": [f"to ken{i}" for i in range(150_000)],
    }
    path = gguf(tmp_path / "m.gguf", LLAMA | tokens, TENSORS)
    started = time.process_time()
    assert architecture(read_gguf(path), "m").config["vocab_size"] == 150_000
    assert time.process_time() - started < 0.3


HEAD = b"GGUF" + struct.pack("<I", 3)
U64 = 2**64 - 1


def _counts(tensors: int, keys: int) -> bytes:
    return HEAD + struct.pack("<QQ", tensors, keys)


ARRAY = gguf_string("k") + struct.pack("<II", 9, 8)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "past its end"),
        (b"GGML" + bytes(40), "does not start with `GGUF`"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is not"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648 is not"),
        (_counts(U64, 0), "it announces 18,446"),
        (_counts(0, U64), "it announces 0 tensors and 18,446"),
        (_counts(0, 1) + struct.pack("<Q", 2**32), "past its end"),
        (_counts(0, 1) + struct.pack("<Q", U64), "past its end"),
        (_counts(0, 1) + gguf_string(b"\xff\xfe") + gguf_value(1), "not UTF-8"),
        (_counts(0, 1) + gguf_string("a\x1b[2J") + gguf_value(1), "control characters"),
        (_counts(0, 1) + gguf_string("k") + struct.pack("<I", 13), "unknown type 13"),
        (_counts(0, 1) + ARRAY + struct.pack("<Q", U64), "it announces 18,446"),
        (_counts(0, 1) + ARRAY + struct.pack("<Q", 9), "past its end"),
        (_counts(0, 1) + ARRAY + struct.pack("<QQ", 1, U64), "past its end"),
        (_counts(0, 1) + gguf_string("k") + struct.pack("<IIQ", 9, 9, 1), "unknown type 9"),
        (_counts(0, 1) + gguf_string("k") + struct.pack("<IIQ", 9, 4, U64), "past its end"),
        (_counts(0, 2) + 2 * (gguf_string("k") + gguf_value(1)), "`k` occurs twice"),
        (_counts(1, 0) + gguf_string("w") + struct.pack("<I", 2**32 - 1), "4,294,967,295 dim"),
        (_counts(1, 0) + gguf_string("w") + struct.pack("<IQQIQ", 2, U64, U64, 0, 0), "shape"),
        (_counts(1, 0) + gguf_string("w") + struct.pack("<IQIQ", 1, 100, 12, 0), "shape"),
        (_counts(1, 0) + gguf_string("w") + struct.pack("<IQIQ", 1, 1, 999, 0), "ggml type 999"),
        (_counts(1, 0) + gguf_string("w") + struct.pack("<IQIQ", 1, 1, 0, 2**63), "cut off"),
        (
            _counts(0, 1) + gguf_string("general.alignment") + gguf_value(0),
            "alignment is 0",
        ),
        (
            _counts(2, 0)
            + gguf_string("w") + struct.pack("<IQIQ", 1, 8, 0, 0)
            + gguf_string("v") + struct.pack("<IQIQ", 1, 8, 0, 16) + bytes(99),
            "overlaps",
        ),
        (
            _counts(2, 0) + 2 * (gguf_string("w") + struct.pack("<IQIQ", 1, 0, 0, 0)) + bytes(99),
            "two tensors",
        ),
    ],
    ids=range(25),
)  # fmt: skip
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    """Counts and lengths are believed only as far as the file reaches."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(LLMSizeError) as failure:
        read_gguf(path)
    assert problem in str(failure.value)


@pytest.mark.parametrize("cut", [1, 100])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, cut: int) -> None:
    """An interrupted download is told from the model that it should become, by a byte."""
    path = gguf(tmp_path / "m.gguf", LLAMA, TENSORS, cut=cut)
    with pytest.raises(LLMSizeError, match="it is cut off"):
        read_gguf(path)


@pytest.mark.parametrize(
    "change",
    [
        {"general.architecture": 3},
        {"general.architecture": ""},
        {"llama.block_count": 0},
        {"llama.block_count": 2**32 - 1},
        {"llama.block_count": 1.5},
        {"llama.attention.head_count_kv": [8, 8]},
        {"llama.attention.head_count": -1.0},
        {"llama.attention.sliding_window_pattern": [True]},
    ],
    ids=str,
)
def test_impossible_metadata_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    """Numbers that no model has are named before they reach a formula."""
    read = read_gguf(gguf(tmp_path / "m.gguf", LLAMA | change, []))
    with pytest.raises(LLMSizeError, match="cannot be right"):
        architecture(read, "m")
        layer_caches(read)


def test_a_file_is_served_as_it_is_stored(tmp_path: Path) -> None:
    """llama.cpp, include/llama.h, `enum llama_ftype`: 15 is Q4_K_M; 1024 marks a guess."""
    made = gguf(tmp_path / "m.gguf", LLAMA | {"general.file_type": 15}, TENSORS)
    found = architecture(read_gguf(made), "m")
    assert recipe_name(found.stored) == "q4_k_m"
    assert recipe_name(found.stored | {"file_type": 15 + 1024}) == "q4_k_m"
    with pytest.raises(LLMSizeError, match="GGUF file type 99"):
        recipe_name(found.stored | {"file_type": 99})


def test_every_known_file_type_has_its_recipe() -> None:
    """What a header says can be looked up."""
    for name in FILE_TYPES.values():
        assert presets.get(Recipe, name).container == "gguf"
