"""Finding and reading presets: shipped facts, and the user's own before them.

A preset is one YAML file, `KIND/NAME.yaml`, so one is read without parsing the rest. Directories
are searched in this order: `--presets DIR`, `LLMSIZE_PRESETS`, the platform's configuration
folder, and the presets shipped with llmsize; the first file wins.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from functools import lru_cache
from os import path
from typing import Any, TypeVar

from llmsize import plain_yaml
from llmsize.errors import LLMSizeError, did_you_mean, printable
from llmsize.record import Record, build

R = TypeVar("R", bound=Record)

MAX_FILE = 256 * 1024
MAX_DEPTH = 32
_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]{0,99}")
_extra: list[str] = []


def search_first(directory: str | None) -> None:
    """Search `directory` before every other; `None` undoes it.

    Raises `LLMSizeError` if it is not a directory.
    """
    if directory is not None and not path.isdir(directory):
        raise LLMSizeError(
            f"no directory `{printable(directory)}`",
            hint="`--presets` takes a directory with `models/`, `formats/`, … below it",
        )
    _extra[:] = [] if directory is None else [directory]


def get(kind: type[R], name: str) -> R:
    """The preset `name` (or one with that alias). Raises `LLMSizeError` with close names."""
    preset = find(kind, name)
    if preset is not None:
        return preset
    what = folder(kind).removesuffix("s")
    hint = did_you_mean(name.strip(), names(kind), otherwise=f"see `llmsize show {folder(kind)}`")
    raise LLMSizeError(f"unknown {what} `{printable(name)}`", hint=hint)


def find(kind: type[R], name: str) -> R | None:
    """The preset of that name, alias or Hub id, or `None`."""
    wanted = name.strip().lower()
    if file := _own_file(kind, wanted):
        own: R = _made(kind, wanted, file, _text(file))
        return own
    return (
        _shipped(kind, wanted)
        or next(_with_own_alias(kind, wanted), None)
        or _shipped_as(kind, wanted)
    )


def names(kind: type[Record]) -> list[str]:
    """The names of every preset of `kind`, sorted, without reading one."""
    return names_in(folder(kind))


def names_in(subfolder: str) -> list[str]:
    """The names of every preset in a folder (`models`, `formats`, …), sorted.

    A file whose name could not be asked for is passed over.
    """
    found = {
        path.basename(file).removesuffix(".yaml")
        for place in _places()
        for file in _files(place, subfolder)
    }
    return sorted({name for name in found if _NAME.fullmatch(name)} | _built_in(subfolder).keys())


def every(kind: type[R]) -> dict[str, R]:
    """Every preset of `kind` by name."""
    return {name: get(kind, name) for name in names(kind)}


def origin(kind: type[Record], name: str) -> str:
    """The file that a preset comes from."""
    return _own_file(kind, name) or _shipped_file(kind, name) or "built in"


def folder(kind: type[Record]) -> str:
    """The folder that holds presets of `kind`: `models`, `formats`, …"""
    return kind.__name__.lower().replace("architecture", "model").replace("scalinglaw", "law") + "s"


def _built_in(subfolder: str) -> dict[str, Any]:
    if subfolder == "methods":
        from llmsize.memory.methods import METHODS

        return dict(METHODS)
    from llmsize.formats import NATIVE

    return dict(NATIVE) if subfolder == "formats" else {}


def _places() -> Iterator[str]:
    yield from _own_places()
    yield shipped()


def _own_places() -> list[str]:
    """The folders that may have presets of the user's own."""
    from_environment = os.environ.get("LLMSIZE_PRESETS")
    return [*_extra, *([from_environment] if from_environment else []), user_folder()]


def user_folder() -> str:
    """The platform's configuration folder for the user's own presets; it need not exist."""
    said = "APPDATA" if sys.platform == "win32" else "XDG_CONFIG_HOME"
    return _user_folder(sys.platform, os.environ.get(said), os.environ.get("HOME"))


@lru_cache(maxsize=8)  # every preset that is asked for is looked for there
def _user_folder(platform: str, said: str | None, home: str | None) -> str:
    if platform == "win32":
        base = said or path.expanduser("~/AppData/Roaming")
    elif platform == "darwin":
        base = path.expanduser("~/Library/Application Support")
    else:
        base = said or path.expanduser("~/.config")
    return path.join(base, "llmsize", "presets")


@lru_cache(maxsize=1)
def shipped() -> str:
    """The presets that came with llmsize: in the package, or in the checkout above it.

    Raises `LLMSizeError` where they are gone.
    """
    package = path.dirname(path.realpath(__file__))
    for folder in (package, path.dirname(path.dirname(package))):
        if path.isdir(presets := path.join(folder, "presets")):
            return presets
    raise LLMSizeError("the presets of llmsize are missing", hint="install llmsize again")


def _own_file(kind: type[Record], name: str) -> str | None:
    """A file of the user's own, which may come and go while the package runs."""
    if below := _below(kind, name):
        for place in _own_places():
            if path.isfile(file := path.join(place, below)):
                return file
    return None


def _shipped_file(kind: type[Record], name: str) -> str | None:
    below = _below(kind, name)
    file = below and path.join(shipped(), below)
    return file if file and path.isfile(file) else None


@lru_cache(maxsize=2048)
def _below(kind: type[Record], name: str) -> str | None:
    """Where the file of a preset is in a folder of presets; `None` for what no file is called."""
    return path.join(folder(kind), f"{name}.yaml") if _NAME.fullmatch(name) else None


@lru_cache(maxsize=2048)
def _shipped(kind: type[R], name: str) -> R | None:
    """What the package has by that name, or is built in: it stays as it is."""
    if file := _shipped_file(kind, name):
        made: R = _made(kind, name, file, _text(file))
        return made
    built_in = _built_in(folder(kind)).values()
    return next((one for one in built_in if name == one.name or name in one.aliases), None)


def _files(place: str, subfolder: str) -> Iterator[str]:
    directory = path.join(place, subfolder)
    if path.isdir(directory):
        yield from (entry.path for entry in os.scandir(directory) if entry.name.endswith(".yaml"))


def _with_own_alias(kind: type[R], wanted: str) -> Iterator[R]:
    for place in _own_places():
        yield from _called(kind, wanted, place)


def _called(kind: type[R], wanted: str, place: str) -> Iterator[R]:
    """The presets of a folder that have an alias or a Hub id of that name, whole or without who
    published it."""
    for file in _files(place, folder(kind)):
        text = _text(file)
        if wanted.encode("utf-8", "surrogatepass") in text.lower():
            record = _made(kind, path.basename(file).removesuffix(".yaml"), file, text)
            hub_id = getattr(record, "hub_id", "")
            known = (*getattr(record, "aliases", ()), hub_id, hub_id.rpartition("/")[2])
            if wanted and wanted in (alias.lower() for alias in known):
                yield record


@lru_cache(maxsize=2048)
def _shipped_as(kind: type[R], wanted: str) -> R | None:
    return next(_called(kind, wanted, shipped()), None)


def _text(file: str) -> bytes:
    return _unchanging(file) if _is_shipped(file) else _bytes(file)


@lru_cache(maxsize=2048)
def _unchanging(file: str) -> bytes:
    """The text of a file of the package."""
    return _bytes(file)


def _bytes(file: str) -> bytes:
    with open(file, "rb") as opened:
        return opened.read()


@lru_cache(maxsize=2048)
def _made(kind: type[R], name: str, where: str, text: bytes) -> R:
    """The record that a file says; the same text is parsed once."""
    if not _is_shipped(where):
        return build(kind, name, parse_yaml(text, where), where=where, check=True)
    entry = plain_yaml.read(text.decode()) or parse_yaml(text, where)
    return build(kind, name, entry, where=where, check=False)


def _is_shipped(where: str) -> bool:
    return where.startswith(shipped() + os.sep)


def parse_yaml(text: bytes, where: str) -> object:
    """The value of a YAML document; duplicate keys, aliases and tags are refused.

    Raises `LLMSizeError` for anything that is not plain, small YAML.
    """
    import yaml

    if len(text) > MAX_FILE or max(map(_depth, text.splitlines()), default=0) > MAX_DEPTH:
        raise LLMSizeError(f"{where}: too large or too deep", hint="a preset is a small mapping")
    try:
        return yaml.load(text, _loader())  # noqa: S506 - a SafeLoader that refuses more
    except (yaml.YAMLError, ValueError, RecursionError) as failure:
        problem = getattr(failure, "problem", None) or str(failure)
        raise LLMSizeError(
            f"{where}: not a valid preset: {printable(problem)}", hint="correct that line"
        ) from None


def _depth(line: bytes) -> int:
    return line.count(b"[") + line.count(b"{") + line.count(b"- ")


@lru_cache(maxsize=1)
def _loader() -> Any:
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        """A safe loader that refuses duplicate keys and aliases."""

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            if node in self.constructed_objects:
                raise yaml.constructor.ConstructorError(
                    None, None, "anchors and aliases are not allowed", node.start_mark
                )
            return super().construct_object(node, deep=True)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(
                        None, None, "a field's name is a word", key.start_mark
                    )
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"`{key.value}` occurs twice", key.start_mark
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep=True)

    return Loader
