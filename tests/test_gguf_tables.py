"""llama.cpp's own numbers: quantized sizes, caches and buffers of real models, dry runs."""

import csv
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from benchmarks.answers import Answer
from benchmarks.tables.llamacpp import gguf_sizes, llamacpp_buffers, llamacpp_families
from benchmarks.tables.llamacpp import kv_cache as kv_cache_table
from llmsize import presets
from llmsize.anatomy import traced
from llmsize.anatomy.families import MODULES
from llmsize.anatomy.trace import Trace
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.formats import Format
from llmsize.memory.kv_cache import CachePolicy, kv_cache
from llmsize.memory.llamacpp.buffers import buffers, layer_places, memory
from llmsize.memory.llamacpp.cache import Server
from llmsize.memory.llamacpp.gguf import gguf, model
from llmsize.memory.weights import Recipe
from llmsize.units import GIB

TABLES = Path(__file__).parent / "reference"
Row = dict[str, str]


def by_model(table: str, kind: str = "dry_run") -> list[tuple[str, list[Row]]]:
    """The rows of a table, model by model, for every model whose family llmsize can run."""
    found: dict[str, list[Row]] = defaultdict(list)
    with (TABLES / table).open() as file:
        for row in csv.DictReader(file):
            if row["kind"] == kind and row["model"] in presets.names(Architecture):
                found[row["model"]].append(row)
    return [pair for pair in found.items() if architecture(pair[0]).family in MODULES]


@cache
def architecture(name: str) -> Architecture:
    return presets.get(Architecture, name)


@cache
def trace(name: str) -> Trace:
    return traced(architecture(name))


@cache
def format_of(name: str) -> Format:
    return presets.get(Format, name)


def recipe(quant: str) -> Recipe:
    name = quant.lower()
    return presets.get(Recipe, f"gguf-{name}" if name in ("f16", "bf16") else name)


def disagreements(answers: Iterable[Answer]) -> list[Answer]:
    """Those that are not what was expected, of at least one."""
    found = list(answers)
    assert found
    return [answer for answer in found if answer.got != answer.expected]


@pytest.mark.parametrize(("name", "rows"), by_model("gguf_sizes.csv"))
def test_a_quantized_file_has_the_bytes_that_llama_quantize_reports(
    name: str, rows: list[Row]
) -> None:
    """`llama-quantize --dry-run` of llama.cpp 0c1e57098, every file type, to the byte."""
    file = gguf(architecture(name), trace(name))
    assert sum(weight.elements for weight in file.weights) == int(rows[0]["params"])
    assert not disagreements(gguf_sizes(rows, TABLES))


@pytest.mark.parametrize(("name", "rows"), by_model("kv_cache.csv"))
def test_a_cache_has_the_bytes_that_llama_cpp_allocates(name: str, rows: list[Row]) -> None:
    """Windows, streams, cell and row padding of llama.cpp 0c1e57098, to the byte."""
    assert not disagreements(kv_cache_table(rows, TABLES))


@pytest.mark.parametrize(("name", "rows"), by_model("llamacpp_buffers.csv"))
def test_buffers_are_those_that_llama_cpp_projects(name: str, rows: list[Row]) -> None:
    """Model, KV and compute buffers per device and host, offloaded or not, to the byte."""
    assert not disagreements(llamacpp_buffers(rows, TABLES))


def projected(table: str) -> list[Row]:
    """One row per setting of a model; together they have every block that llmsize knows."""
    with (TABLES / table).open() as file:
        return list(csv.DictReader(file))


PROJECTED = projected("llamacpp_families.csv") + projected("llamacpp_recurrent.csv")


@pytest.mark.parametrize("row", PROJECTED, ids=lambda row: f"{row['model']}-{row['n_ctx']}")
def test_the_blocks_of_other_families_are_those_of_llama_cpp(row: Row) -> None:
    """Projected by llama.cpp 0c1e57098 for a device that answers like a CUDA card; 0.01 MiB.

    Decoders, and what is recurrent, hybrid, or has inputs of its own in every layer.
    """
    answers = list(llamacpp_families([row], TABLES))
    assert answers
    for answer in answers:
        assert answer.got == pytest.approx(answer.expected, abs=0.0101)


def test_keys_and_values_that_no_layer_uses_are_in_the_file() -> None:
    """Gemma 4 E2B has those of 16 layers with windows and 4 without, which transformers drops."""
    file = gguf(architecture("gemma-4-e2b"), trace("gemma-4-e2b"))
    parts = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
    unused = sum(w.elements for w in file.weights if w.layer >= 15 and w.name.endswith(parts))
    assert unused == 16 * (2 * 256 * 1536 + 256) + 4 * (2 * 512 * 1536 + 512)


VLLM_LOGS = [
    (name, logged)
    for name, rows in by_model("kv_cache.csv", kind="log")
    if (logged := [row for row in rows if row["tp"]])
]


@pytest.mark.parametrize(("name", "rows"), VLLM_LOGS)
def test_bytes_per_token_are_those_of_vllms_pool(name: str, rows: list[Row]) -> None:
    """Pool over tokens in vLLM's start-up log; the log rounds the pool to 0.01 GiB."""
    answers = list(kv_cache_table(rows, TABLES))
    assert answers
    for answer in answers:
        assert answer.got == pytest.approx(answer.expected, rel=3e-4)


@pytest.mark.parametrize(
    ("name", "policy", "gib"),
    [
        ("llama-2-7b", CachePolicy(), 16.0),
        ("qwen2.5-7b", CachePolicy(), 1.75),
        ("mixtral-8x7b", CachePolicy(), 4.0),
        ("deepseek-v3", CachePolicy(), 2.14453125),
        ("gemma-3-12b", CachePolicy(), 2.3125),
        ("gemma-3-12b", CachePolicy(windows="reserved"), 12.0),
    ],
)
def test_the_cache_of_32768_tokens(name: str, policy: CachePolicy, gib: float) -> None:
    """Grouped heads, and windows that an engine caps or reserves (vLLM and llama.cpp logs)."""
    half = format_of("fp16")
    cache = kv_cache(
        trace(name).layer_caches(), context=32_768, keys=half, values=half, policy=policy
    )
    assert cache.value == gib * GIB


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (Server(0), "below one"),
        (Server(4096, sequences=1000), "too many"),
        (Server(4096, flash_attention=False, values=format_of("q8_0")), "flash attention"),
        (Server(4096, devices=2, tensor_split=(1.0,)), "1 shares for 2 devices"),
    ],
)
def test_options_that_llama_cpp_refuses_are_errors(refused: Server, reason: str) -> None:
    """llama.cpp exits with these; an estimate of them would be of nothing."""
    file = model(architecture("llama-3.2-1b"), trace("llama-3.2-1b"), recipe("Q8_0"), format_of)
    with pytest.raises(LLMSizeError, match=reason):
        buffers(file, refused)


def test_an_absurd_number_of_layers_is_an_error() -> None:
    """A configuration of 200,000 layers is refused before its tensors are listed."""
    found = architecture("llama-3.2-1b")
    absurd = replace(found, config={**found.config, "num_hidden_layers": 200_000})
    with pytest.raises(LLMSizeError):
        gguf(absurd, traced(absurd))


def test_a_split_gives_each_device_its_share_of_the_layers() -> None:
    """`--tensor-split 3,1` of 16 layers and the output: the first three quarters on the first."""
    places = layer_places(16, Server(4096, devices=2, tensor_split=(3.0, 1.0)))
    assert places == [0] * 13 + [1] * 4


def test_the_buffers_add_up_by_place() -> None:
    """Every place of the sum holds model, cache and compute, the host included."""
    file = model(architecture("llama-3.2-1b"), trace("llama-3.2-1b"), recipe("Q8_0"), format_of)
    shown = memory(file, Server(4096, gpu_layers=8))
    assert [part.name for part in shown.parts] == ["GPU 0", "host"]
    assert shown.value == sum(place.total for place in buffers(file, Server(4096, gpu_layers=8)))


def test_an_unknown_graph_is_said_not_guessed() -> None:
    """llama.cpp runs T5, but its compute buffers are not simulated."""
    name = "t5-base"
    with pytest.raises(LLMSizeError, match="not known"):
        model(architecture(name), trace(name), recipe("Q8_0"), format_of)


def test_a_convolution_over_one_token_is_refused() -> None:
    """What no model has is an error, not a crash."""
    narrow = architecture("mamba-130m")
    narrow = replace(narrow, config={**narrow.config, "conv_kernel": 1})
    with pytest.raises(LLMSizeError, match="one token"):
        model(narrow, traced(narrow), recipe("Q8_0"), format_of)
