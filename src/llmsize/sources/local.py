"""Models on this computer: a file, or a folder as the Hub and llama.cpp lay it out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmsize.architecture import Architecture
from llmsize.checkpoint import Checkpoint
from llmsize.errors import LLMSizeError, printable
from llmsize.quick_dataclasses import dataclass, replace
from llmsize.sources.config import MAX_CONFIG, read_config
from llmsize.sources.quantized import gguf_models, stem
from llmsize.sources.reading import entries, kind_of, mapping, parse_json, read_small
from llmsize.sources.safetensors import read_safetensors, shards
from llmsize.sources.torch_bin import read_torch

if TYPE_CHECKING:
    from llmsize.anatomy.cache import LayerCache
    from llmsize.sources.gguf import GGUF

CONFIG, ADAPTER = "config.json", "adapter_config.json"
SUFFIXES = (".json", ".safetensors", ".gguf", ".bin", ".pt", ".pth")
WEIGHTS = (
    "model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors",
    "consolidated.safetensors.index.json", "consolidated.safetensors",
    "pytorch_model.bin.index.json", "pytorch_model.bin", "adapter_model.bin",
)  # fmt: skip
"""Names of checkpoints in a folder, best first: only one is read, as they hold the same model."""
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.(safetensors|bin)")


@dataclass(frozen=True, slots=True)
class Source:
    """What was found under the name that a user gave for a model."""

    where: str
    """The file, folder, preset or address."""
    architecture: Architecture | None = None
    checkpoint: Checkpoint | None = None
    caches: tuple[LayerCache, ...] = ()
    """What each layer caches, where the file says so itself (GGUF)."""
    adapter: Mapping[str, Any] | None = None
    """`adapter_config.json` of a LoRA adapter: rank, base model and adapted modules."""
    note: str = ""
    """What was not found, or not read."""


def read_path(path: Path, name: str = "", *, need_weights: bool = True) -> Source:
    """The model in a file or folder; `name` is the model's if it is known.

    Without `need_weights`, shards that are not there leave the checkpoint out (a Hub cache).
    Raises `LLMSizeError` for what is not a model.
    """
    kind = kind_of(path)
    if kind == "folder":
        return _folder(path, name or path.absolute().name, need_weights)
    if kind == "file":
        own = path.suffix == ".json" and not path.name.endswith((CONFIG, ADAPTER, ".index.json"))
        return _file(path, name or (path.stem if own else path.absolute().parent.name))
    raise LLMSizeError(
        f"there is no file or folder `{printable(str(path))}`",
        hint="check the path; a model of the Hub is `organisation/name`, a preset a bare name",
    )


def _file(path: Path, name: str) -> Source:
    match path.suffix:
        case ".gguf":
            return _gguf(path)
        case ".json" if path.name == ADAPTER:
            return _folder(path.parent, name, need_weights=True)
        case ".json" if path.name.endswith(".index.json"):
            return _with_config(path, _checkpoint(path), name)
        case ".json":
            return Source(str(path), read_config(path, name))
        case ".safetensors" | ".bin" | ".pt" | ".pth":
            return _with_config(path, _checkpoint(path), name)
    raise LLMSizeError(
        f"`{printable(str(path))}` is not of a kind that llmsize reads",
        hint=f"it reads {', '.join(SUFFIXES)}, and folders that hold them",
    )


def _checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in one file, or in the shards that an index names."""
    paths = shards(path) if path.name.endswith(".index.json") else [path]
    is_safetensors = path.name.removesuffix(".index.json").endswith(".safetensors")
    return (read_safetensors if is_safetensors else read_torch)(paths, str(path))


def _with_config(path: Path, checkpoint: Checkpoint, name: str) -> Source:
    """A checkpoint file, and the `config.json` beside it if there is one."""
    config = path.parent / CONFIG
    shard = _SHARD.fullmatch(path.name)
    note = f"one of {int(shard[3])} shards: give the folder for the whole" if shard else ""
    if kind_of(config) == "file":
        return Source(str(path), read_config(config, name), checkpoint, note=note)
    without = f"no `{CONFIG}` beside it: bytes and counts only"
    return Source(str(path), None, checkpoint, note="; ".join(filter(None, (without, note))))


def _gguf(path: Path) -> Source:
    from llmsize.sources.gguf import read_gguf

    return gguf_source(read_gguf(path), stem(path.name))


def gguf_source(read: GGUF, name: str) -> Source:
    """The model whose headers were read: its shape, tensors and caches."""
    from llmsize.sources import gguf_model

    if read.checkpoint.adapter or read.metadata.get("general.architecture") == "clip":
        return Source(
            read.checkpoint.source,
            checkpoint=read.checkpoint,
            note="holds no language model of its own",
        )
    return Source(
        read.checkpoint.source,
        gguf_model.architecture(read, name),
        read.checkpoint,
        gguf_model.layer_caches(read),
    )


def _folder(folder: Path, name: str, need_weights: bool) -> Source:
    names = entries(folder)
    architecture = read_config(folder / CONFIG, name) if CONFIG in names else None
    adapter = _adapter(folder / ADAPTER) if ADAPTER in names else None
    paths = _weights(folder, names)
    present = set(names)
    missing = [path.name for path in paths if path.name not in present]
    if missing and need_weights:
        raise LLMSizeError(
            f"`{printable(missing[0])}` is missing: {len(missing)} of {len(paths)} shards are not "
            f"in `{printable(str(folder))}`",
            hint="download the rest, or give the `config.json` alone",
        )
    if paths and not missing:
        read = read_torch if paths[0].suffix == ".bin" else read_safetensors
        return Source(str(folder), architecture, read(paths, str(folder)), adapter=adapter)
    models = gguf_models(names)
    if len(models) == 1:
        source = _gguf(folder / next(iter(models.values())))
        return replace(source, architecture=architecture or source.architecture)
    note = f"{len(models)} GGUF models: give one of the files" if models else "no weights"
    if architecture or adapter:
        return Source(str(folder), architecture, adapter=adapter, note=note)
    raise LLMSizeError(
        f"`{printable(str(folder))}` holds {note if models else 'no model'}",
        hint=f"a model's folder holds `{CONFIG}`, `model.safetensors` or one `.gguf` file",
    )


def _weights(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files of the best checkpoint in a folder; some may be missing."""
    for name in WEIGHTS:
        if name in names:
            path = folder / name
            return shards(path) if name.endswith(".index.json") else [path]
    found = [match for name in names if (match := _SHARD.fullmatch(name))]
    found.sort(key=lambda match: match[4], reverse=True)
    if len({(match[1], match[3]) for match in found if match[4] == found[0][4]}) == 1:
        return _all_shards(folder, found[0])
    alone = [name for name in names if name.endswith(".safetensors")]
    if len(alone) > 1:
        raise LLMSizeError(
            f"`{printable(str(folder))}` holds {len(alone)} checkpoints and no index",
            hint="give one of the `.safetensors` files",
        )
    return [folder / name for name in alone]


def _all_shards(folder: Path, one: re.Match[str]) -> list[Path]:
    stem, width, count, suffix = one[1], len(one[2]), int(one[3]), one[4]
    if not 0 < count <= 4096:
        raise LLMSizeError(
            f"`{printable(one[0])}` is one of {count:,} shards", hint="give a single file"
        )
    return [
        folder / f"{stem}-{number:0{width}}-of-{one[3]}.{suffix}" for number in range(1, count + 1)
    ]


def _adapter(path: Path) -> Mapping[str, Any]:
    where = str(path)
    return mapping(parse_json(read_small(path, MAX_CONFIG), where), where, "an adapter's settings")
