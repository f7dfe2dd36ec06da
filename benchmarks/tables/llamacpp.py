"""Answers to the tables of inference memory that follow from formats, GGUF and llama.cpp."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from benchmarks.answers import Answer
from benchmarks.format_names import preset_of
from llmsize import presets
from llmsize.anatomy import traced
from llmsize.anatomy.trace import Trace
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.formats import FP32, Format, matrix_bytes
from llmsize.memory.kv_cache import CachePolicy, pool_token_bytes
from llmsize.memory.llamacpp.buffers import Buffers, Model, buffers
from llmsize.memory.llamacpp.cache import Server, cache_bytes
from llmsize.memory.llamacpp.families import layer_caches
from llmsize.memory.llamacpp.gguf import gguf, model
from llmsize.memory.weights import Checkpoint, Recipe, formats_of, weight_bytes
from llmsize.sources.config import architecture
from llmsize.units import MIB

Row = Mapping[str, str]

MEASURED_SIDE = 4096
"""Rows and columns of the layer in `quant_formats.csv`."""


@lru_cache(maxsize=256)
def _format(name: str) -> Format:
    return presets.get(Format, name)


@lru_cache(maxsize=256)
def _recipe(name: str) -> Recipe:
    plain = name.lower()
    return presets.get(Recipe, f"gguf-{plain}" if plain in ("f16", "bf16", "f32") else plain)


@lru_cache(maxsize=512)
def _model(name: str, directory: Path) -> tuple[Architecture, Trace]:
    """The model of that name, from the presets or the directory's configurations."""
    plain, untied = re.subn(r" \(untied output\)$", "", name)
    try:
        found = presets.get(Architecture, plain)
    except LLMSizeError:
        file = directory / "configs" / f"{plain}.json"
        if not file.is_file():
            raise
        found = architecture(json.loads(file.read_text()), str(file), plain)
    if untied:
        found = replace(found, config={**found.config, "tie_word_embeddings": False})
    return found, traced(found)


def quant_formats(rows: Iterable[Row]) -> Iterator[Answer]:
    """Bits per weight of one 4096 × 4096 matrix in every format."""
    for row in rows:
        bits, _, per_row = row["bits_per_weight"].partition(" + ")
        expected = float(bits) + (32 / MEASURED_SIDE if per_row else 0)
        format = _format(preset_of(row["format"]))
        stored = matrix_bytes(format, MEASURED_SIDE, MEASURED_SIDE)
        yield Answer(
            f"{row['library']} {row['format']}".strip(),
            "bits_per_weight",
            expected,
            round(8 * stored / MEASURED_SIDE**2, len(bits.partition(".")[2]) if not per_row else 9),
        )


@lru_cache(maxsize=512)
def _gguf(name: str, directory: Path) -> Checkpoint:
    return gguf(*_model(name, directory))


TEXT = {"sentencepiece": 7.4, "byte level": 9.2}
"""Bytes of a token's text, the median of 4 and of 10 published files (one of 2024 has 18)."""

SENTENCEPIECE = frozenset((32_000, 256_000, 262_144))
"""Sizes of vocabularies that are sentencepiece's: Llama 2's and Mistral's, Gemma's, Gemma 3's."""

MERGES = {128_256: 280_147}
"""Merges of a byte-level vocabulary of that size, where they are not one for a token.

Neither `config.json` nor the weights say. Llama 3's are made from ranks, and join a token in every
way there is (the log of a loaded file: github.com/ggml-org/llama.cpp/pull/6745).
"""


def _header_bytes(tokens: int) -> float:
    """The vocabulary in front of the tensors (github.com/ggml-org/ggml, docs/gguf.md).

    A string is its text after 8 bytes of length. A token has one, its type in 4 bytes, and in
    sentencepiece a score in 4 more; a byte-level one has merges, each a string of two parts.
    """
    if tokens in SENTENCEPIECE:
        return tokens * (8 + TEXT["sentencepiece"] + 4 + 4)
    merges = MERGES.get(tokens, tokens)
    return tokens * (8 + TEXT["byte level"] + 4) + merges * (8 + TEXT["byte level"] + 1)


def gguf_sizes(rows: Iterable[Row], directory: Path) -> Iterator[Answer]:
    """Bytes of all tensors, exact in dry runs; sizes of published files, which have a header."""
    for row in rows:
        name = f"{row['model']} {row['quant']} imatrix={row['imatrix']} {row['file']}"
        try:
            file, recipe = _gguf(row["model"], directory), _recipe(row["quant"])
        except LLMSizeError:
            tensors, header = None, 0.0
        else:
            # a row that does not say whether a matrix was used had one where there must be one
            unsaid = recipe.needs_imatrix and not row["imatrix"]
            stored = formats_of(
                file, recipe, _format, own=FP32, imatrix=row["imatrix"] == "yes" or unsaid
            )
            tensors = sum(weight_bytes(weight, format) for weight, format in stored)
            header = _header_bytes(next(w.shape[0] for w in file.weights if w.role == "embedding"))
        yield from _sizes(row, name, tensors, header)


def _sizes(row: Row, name: str, tensors: int | None, header: float) -> Iterator[Answer]:
    """The one size that a row states."""

    def answer(column: str, quantity: str, got: float) -> Answer:
        return Answer(name, quantity, float(row[column]), None if tensors is None else got)

    whole = (tensors or 0) + header
    if row["kind"] == "dry_run":
        yield Answer(name, "tensor_bytes", int(row["tensor_bytes"]), tensors)
    elif row["file_bytes"]:
        yield answer("file_bytes", "file_bytes", whole)
    elif row["bits_per_weight"]:
        yield answer("bits_per_weight", "published bits", 8 * (tensors or 0) / int(row["params"]))
    elif row["file_gb"]:
        yield answer("file_gb", "published file_gb", whole / 1e9)


def kv_cache(rows: Iterable[Row], directory: Path) -> Iterator[Answer]:
    """Bytes of the cache; for vLLM the bytes per token of its pool."""
    for row in rows:
        name = " ".join(
            f"{column}={row[column]}"
            for column in ("model", "tokens", "n_seq", "cache_k", "cache_v", "tp", "n_ubatch")
            if row[column]
        )
        try:
            found, trace = _model(row["model"], directory)
        except LLMSizeError:
            got = None
        else:
            got = _pool(row, trace) if row["tp"] else _cache(row, found, trace)
        if row["tp"]:
            quantity, expected = "bytes_per_token", float(row["bytes_per_token"])
        else:
            quantity = "kv_bytes" if row["kind"] == "dry_run" else "kv_bytes (log)"
            expected = int(row["kv_bytes"])
        yield Answer(f"{row['engine']} {name}", quantity, expected, got)


def _pool(row: Row, trace: Trace) -> int:
    keys, values = _format(row["cache_k"]), _format(row["cache_v"])
    return pool_token_bytes(trace.layer_caches(), keys, values, CachePolicy(16), int(row["tp"]))


def _cache(row: Row, found: Architecture, trace: Trace) -> int:
    server = Server(
        context=int(row["tokens"]),
        ubatch=int(row["n_ubatch"] or 512),
        sequences=int(row["n_seq"] or 1),
        unified=row["kv_unified"] == "1",
        flash_attention=row["flash_attn"] != "0",
        keys=_format(row["cache_k"]),
        values=_format(row["cache_v"]),
        full_windows=row["swa_full"] == "1",
    )
    return cache_bytes(layer_caches(found, trace), server)


@lru_cache(maxsize=128)
def _file(name: str, quant: str, directory: Path) -> Model:
    return model(*_model(name, directory), _recipe(quant), _format)


def llamacpp_buffers(rows: Iterable[Row], directory: Path) -> Iterator[Answer]:
    """Model, KV and compute buffers of every device and of the host."""
    for row in rows:
        try:
            got = buffers(_file(row["model"], row["quant"], directory), _server(row))
        except LLMSizeError:
            got = None
        yield from _places(row, got)


def llamacpp_families(rows: Iterable[Row], directory: Path) -> Iterator[Answer]:
    """Compute buffers of further models, which llama.cpp prints to 0.01 MiB."""
    for row in rows:
        name = " ".join(row[c] for c in ("model", "quant", "n_ctx", "gpu_layers", "cache"))
        server = Server(
            context=int(row["n_ctx"]),
            ubatch=int(row["n_ubatch"]),
            sequences=int(row["n_seq"]),
            flash_attention=row["flash_attn"] == "1",
            keys=_format(row["cache"]),
            values=_format(row["cache"]),
            gpu_layers=_gpu_layers(row),
            logits_of_all=row["logits_rows"] == "ubatch",
        )
        got: list[float | None] = [None, None]
        with suppress(LLMSizeError):
            places = buffers(_file(row["model"], row["quant"], directory), server)
            got = [round(place.compute / MIB, 2) for place in places]
        for column, mib in zip(("gpu_compute_mib", "host_compute_mib"), got, strict=True):
            yield Answer(name, column, float(row[column]), mib)


llamacpp_recurrent = llamacpp_families
"""Recurrent and hybrid ones: a table of the same columns."""

held_out_llamacpp = llamacpp_buffers
"""Lines of logs that were searched for afterwards: a table of the same columns."""


def _gpu_layers(row: Row) -> int | None:
    """How many layers are on the device; `None` for all."""
    return None if row["gpu_layers"] in ("", "all") else int(row["gpu_layers"])


def _server(row: Row) -> Server:
    return Server(
        context=int(row["n_ctx"]),
        ubatch=int(row["n_ubatch"]),
        sequences=int(row["n_seq"] or 1),
        unified=row["kv_unified"] == "1",
        flash_attention=row["flash_attn"] == "1",
        keys=_format(row["cache_k"]),
        values=_format(row["cache_v"]),
        full_windows=row["swa_full"] == "1",
        gpu_layers=_gpu_layers(row),
        cpu_moe_layers=int(row["cpu_moe_layers"] or 0),
        devices=int(row["n_gpu"]),
        cache_on_host=row["kv_offload"] == "0",
        logits_of_all=row["logits_rows"] == "ubatch",
    )


def _places(row: Row, got: Sequence[Buffers] | None) -> Iterator[Answer]:
    name = " ".join(row[c] for c in ("model", "quant", "gpu_layers", "n_ctx", "n_ubatch", "note"))
    log = "" if row["kind"] == "dry_run" else " (log)"
    for column, part in (("model", "model"), ("kv", "cache"), ("compute", "compute")):
        cell = row[f"gpu_{column}_bytes"] if int(row["n_gpu"]) else ""
        for device, expected in enumerate(cell.split(";") if cell else ()):
            value = getattr(got[device], part) if got else None
            yield Answer(f"{name} gpu {device}", f"gpu_{column}{log}", int(expected), value)
        if row[f"host_{column}_bytes"]:
            value = getattr(got[-1], part) if got else None
            expected = int(row[f"host_{column}_bytes"])
            yield Answer(f"{name} host", f"host_{column}{log}", expected, value)
