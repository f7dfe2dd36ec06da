"""`config.json`: the shape of a model as its publisher states it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmsize.anatomy.towers import WHOLE
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError, printable
from llmsize.sources.class_defaults import absent
from llmsize.sources.reading import mapping, parse_json, read_small

MAX_CONFIG = 4 * 10**6
MAX_DEPTH = 32
LARGEST = 1e39
"""Just above the largest fp32 number, which stands in configurations as a mask value."""

TEXT_MODELS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where models for several media keep the configuration of their language model."""
SHARED = ("tie_word_embeddings", "torch_dtype", "dtype", "architectures", "vision_config",
          "audio_config", "vision_tower_config")  # fmt: skip
"""What such models may state only outside of it."""
DECIDED = ("tie_word_embeddings",)
"""What is as the whole model says, whatever its language model says (transformers v5.23.0,
modeling_utils.py, `get_expanded_tied_weights_keys`): the head is not part of the latter."""
CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len",
           "seq_length", "n_ctx")  # fmt: skip
STORED = ("quantization_config", "compression_config")
_UNLIMITED = "time_step_limit"
"""The one field that is published with infinities in it (Mamba 2)."""


def read_config(path: Path, name: str = "") -> Architecture:
    """The architecture in a `config.json`; `name` is the model's if it is known."""
    data = read_small(path, MAX_CONFIG)
    return architecture(parse_json(data, str(path)), str(path), name or path.absolute().parent.name)


def read_stdin() -> Architecture:
    """The architecture in a `config.json` that is piped in. Raises `LLMSizeError` at a terminal."""
    if sys.stdin is None or sys.stdin.isatty():
        raise LLMSizeError(
            "`-` reads a `config.json` from standard input, which is a terminal",
            hint="pipe one in: `llmsize inspect - < config.json`",
        )
    data = sys.stdin.buffer.read(MAX_CONFIG + 1)
    if len(data) > MAX_CONFIG:
        raise LLMSizeError(
            f"standard input has more than {MAX_CONFIG:,} bytes",
            hint="pipe in a `config.json`, not weights",
        )
    return architecture(parse_json(data, "standard input"), "standard input", "")


def architecture(value: object, where: str, name: str) -> Architecture:
    """The `Architecture` that the JSON value of a `config.json` describes.

    Fields of the family are kept as they are: the family checks them when it is traced.
    Raises `LLMSizeError` without a `model_type`, or for a number that no model can have.
    """
    outer = mapping(value, where, "a model's configuration")
    _check_numbers(outer, where)
    config, added = _completed(_text_model(outer, where), outer)
    family = config.get("model_type") or outer.get("model_type")
    if not isinstance(family, str) or not family.isprintable() or len(family) > 80:
        raise LLMSizeError(
            f"`{printable(where)}` states no `model_type`",
            hint="llmsize takes the `config.json` of a Transformers model, which names its family",
        )
    return Architecture(
        name=name or _given_name(outer) or family,
        family=family,
        config={key: entry for key, entry in config.items() if key not in STORED},
        source=where,
        context_length=_context(config),
        stored=_stored(config, outer, where),
        note=f"not in the file, so as the class has it: {added}" if added else "",
    )


def _text_model(outer: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The configuration of the language model, unfolded to one level."""
    for key in TEXT_MODELS:
        if key in outer:
            inner = mapping(outer[key], f"{where}: {key}", "a model's configuration")
            shared = {field: outer[field] for field in SHARED if field in outer}
            decided = {field: outer[field] for field in DECIDED if outer.get(field) is not None}
            whole = {k: v for k, v in outer.items() if not isinstance(v, dict) and k not in SHARED}
            return _text_model({**shared, **inner, **decided, WHOLE: whole}, where)
    return outer


def _completed(
    config: Mapping[str, Any], outer: Mapping[str, Any]
) -> tuple[Mapping[str, Any], str]:
    """A configuration with the fields that its class has for it, and these in words."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return config, ""
    added = absent(kind, config, nested=config is not outer)
    words = (f"{k} {v:,}" if isinstance(v, int) else f"{k} {v}" for k, v in added.items())
    return {**config, **added}, ", ".join(words)


def _stored(config: Mapping[str, Any], outer: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    for holder in (outer, config):
        for key in STORED:
            if holder.get(key):
                return mapping(holder[key], f"{where}: {key}", "a description of stored formats")
    return {}


def _given_name(outer: Mapping[str, Any]) -> str:
    given = outer.get("_name_or_path")
    name = given.rstrip("/").rpartition("/")[2] if isinstance(given, str) else ""
    return name if name.isprintable() and len(name) <= 96 else ""


def _context(config: Mapping[str, Any]) -> int | None:
    stated = (config.get(key) for key in CONTEXT)
    return next((n for n in stated if type(n) is int and 0 < n < 10**12), None)


def _check_numbers(value: Mapping[str, Any], where: str) -> None:
    for field, number in _numbers(value, where):
        if number != number or (abs(number) > LARGEST and field != _UNLIMITED):
            raise LLMSizeError(
                f"`{printable(where)}`: `{printable(field)}` is {printable(str(number))[:24]}",
                hint="no model has that; download the file again, or correct it",
            )


def _numbers(value: Mapping[str, Any], where: str) -> Iterator[tuple[str, int | float]]:
    """Every number with the name of the field that holds it."""
    level: list[tuple[str, Any]] = list(value.items())
    for _ in range(MAX_DEPTH):
        below: list[tuple[str, Any]] = []
        for field, entry in level:
            if isinstance(entry, dict):
                below.extend(entry.items())
            elif isinstance(entry, list):
                below.extend((field, item) for item in entry)
            elif isinstance(entry, int | float):
                yield field, entry
        if not below:
            return
        level = below
    raise LLMSizeError(
        f"`{printable(where)}` is nested more than {MAX_DEPTH} deep",
        hint="give the `config.json` that the model was published with",
    )
