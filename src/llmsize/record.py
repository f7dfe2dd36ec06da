"""Facts: frozen records with a name and a source, built from plain mappings.

A record class is a frozen dataclass with `name` and `source`. Shipped records are proved valid by
the tests and are built without further checks; a user's own go through pydantic here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, get_type_hints

from llmsize.errors import LLMSizeError, did_you_mean, printable
from llmsize.quick_dataclasses import field_names

if TYPE_CHECKING:
    from pydantic import TypeAdapter


class Record(Protocol):
    """What every fact has."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...


R = TypeVar("R", bound=Record)


def build(kind: type[R], name: str, entry: object, *, where: str, check: bool) -> R:
    """A record of `kind` from a YAML entry; lists become tuples.

    `where` names the file in errors; `check` validates every type with pydantic.
    Raises `LLMSizeError` for an unknown, missing or wrongly typed field.
    """
    if not isinstance(entry, dict) or not all(isinstance(key, str) for key in entry):
        raise LLMSizeError(
            f"{where}: `{printable(name)}` is not a mapping of fields",
            hint="write `field: value` lines, as in the shipped presets",
        )
    known, required = _fields(kind)
    for key in entry:
        if key not in known:
            raise LLMSizeError(
                f"{where}: `{printable(name)}` has an unknown field `{printable(key)}`",
                hint=did_you_mean(key, known, otherwise=f"known fields: {', '.join(known)}"),
            )
    missing = [key for key in required if key not in entry]
    if missing:
        raise LLMSizeError(
            f"{where}: `{printable(name)}` has no `{missing[0]}`",
            hint=f"required fields: {', '.join(required)}",
        )
    values = {key: _freeze(value) for key, value in entry.items()}
    if check:
        return _validated(kind, {"name": name, **values}, where)
    made: R = kind(name=name, **values)  # type: ignore[call-arg]
    return made


@lru_cache(maxsize=64)
def _fields(kind: type[Record]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    known, required = (tuple(n for n in names if n != "name") for names in field_names(kind))
    return known, required


def _freeze(value: object) -> object:
    if isinstance(value, list):
        return tuple(_freeze(item) for item in value)
    if isinstance(value, dict):
        return {key: _freeze(item) for key, item in value.items()}
    return value


def _validated(kind: type[R], values: Mapping[str, object], where: str) -> R:
    from pydantic import ValidationError

    read = {}
    for field, value in values.items():
        try:
            read[field] = _checker(kind, field).validate_python(value, strict=True)
        except ValidationError as failure:
            raise LLMSizeError(
                f"{where}: field `{field}`: {printable(failure.errors()[0]['msg'])}",
                hint="compare with a shipped preset: `llmsize show`",
            ) from None
        if not _sound(read[field]):
            raise LLMSizeError(
                f"{where}: field `{field}`: a number is not finite or beyond all measure",
                hint="write a number of at most 30 digits",
            )
    made: R = kind(**read)
    return made


LARGEST = 10**30
"""Above every number that a fact has; arithmetic with more could take for ever."""


def _sound(value: object) -> bool:
    """Whether every number in it is finite, and none beyond all measure."""
    if isinstance(value, int | float):
        return -LARGEST < value < LARGEST  # which no comparison with NaN is
    if isinstance(value, Mapping):
        return all(map(_sound, value.values()))
    return all(map(_sound, value)) if isinstance(value, tuple) else True


@lru_cache(maxsize=256)
def _checker(kind: type[Record], field: str) -> TypeAdapter[Any]:
    """What checks one field; strict mode refuses to build a dataclass from a mapping."""
    from pydantic import TypeAdapter

    return TypeAdapter(get_type_hints(kind)[field])
