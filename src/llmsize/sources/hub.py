"""Models of the Hugging Face Hub: the cache on this computer first, then headers by ranged reads.

The cache is read without huggingface_hub; the network only with it (`pip install llmsize[hub]`).
Weights are never downloaded, and nothing is written.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from llmsize.architecture import Architecture
from llmsize.checkpoint import Checkpoint, StoredTensor
from llmsize.errors import LLMSizeError, UndeterminedError, did_you_mean, printable
from llmsize.quick_dataclasses import dataclass, replace
from llmsize.sources import config, safetensors
from llmsize.sources.local import ADAPTER, CONFIG, WEIGHTS, Source, gguf_source, read_path
from llmsize.sources.quantized import among, gguf_models, labels, stem
from llmsize.sources.reading import MAX_JSON, entries, kind_of, mapping, parse_json, read_small

FIRST_READ = 100_000
"""Bytes asked of a safetensors file at first: most headers are shorter."""
TIMEOUT = 10.0
"""Seconds that the Hub may be silent; `HF_HUB_DOWNLOAD_TIMEOUT` sets another."""
MAX_LISTED = 40
"""GGUF models of a repository that an error names."""
DEADLINE = 120.0
"""Seconds for all of one model."""
CONNECTIONS = 8
GGUF_READ = 2**20
"""Bytes asked of a GGUF file at first; a vocabulary takes some more of such reads."""
MAX_FILES = 1000
"""Files that the Hub lists in one answer."""
QUIET = 1.0
"""Seconds before progress is told."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)


@dataclass(frozen=True, slots=True)
class HubId:
    """A model of the Hub, at a branch, tag or commit."""

    name: str
    """`organisation/name`."""
    revision: str = "main"
    quantization: str = ""
    """Which of its GGUF files, by the end of the name (`Q4_K_M`) or all of it."""

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return self.name + revision + (self.quantization and f":{self.quantization}")


def is_hub_id(text: str) -> bool:
    """Whether `text` is `organisation/name`, with or without `@revision` and `:quantization`."""
    return _ID.fullmatch(text.partition(":")[0].partition("@")[0]) is not None


def parse(text: str) -> HubId:
    """`organisation/name`, optionally `@revision`, optionally `:quantization`.

    Raises `LLMSizeError` for anything else.
    """
    whole, *quantization = text.split(":", 1)
    name, *revision = whole.split("@", 1)
    good = _ID.fullmatch(name) and all(map(_REVISION.fullmatch, revision + quantization))
    if not good or ".." in text:
        raise LLMSizeError(
            f"`{printable(text)}` is no model of the Hub",
            hint="write `hf:organisation/name`, with `@revision` or `:Q4_K_M` behind it if need be",
        )
    return HubId(name, *(revision or ["main"]), *quantization)


def cached(model: HubId) -> Source | None:
    """What the cache of huggingface_hub holds of the model, if it holds its shape or weights."""
    repository = _cache_folder() / f"models--{model.name.replace('/', '--')}"
    snapshot = repository / "snapshots" / _commit(repository, model.revision)
    if kind_of(snapshot) != "folder":
        return None
    names = entries(snapshot)
    models = gguf_models([*names, *_one_deeper(snapshot, names)])
    if model.quantization or (models and CONFIG not in names):
        chosen = among(models, model.quantization)
        source = read_path(snapshot / chosen) if chosen else None
        return source and replace(source, architecture=_named(source.architecture, model))
    if not {CONFIG, ADAPTER, *WEIGHTS}.intersection(names):
        return None
    source = read_path(snapshot, model.name.partition("/")[2], need_weights=False)
    return replace(source, architecture=_named(source.architecture, model))


def _one_deeper(folder: Path, names: Sequence[str]) -> list[str]:
    """Files in the folders of `folder`: split models often have one each."""
    inner = [name for name in names if kind_of(folder / name) == "folder"]
    return [f"{name}/{file}" for name in inner for file in entries(folder / name)]


def _cache_folder() -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := os.environ.get(variable):
            return Path(folder)
    if home := os.environ.get("HF_HOME"):
        return Path(home) / "hub"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "huggingface" / "hub"


def _commit(repository: Path, revision: str) -> str:
    """The commit that a branch or tag stood at when it was cached; a commit is its own."""
    reference = repository / "refs" / revision
    if kind_of(reference) != "file":
        return revision
    commit = read_small(reference, 200).decode("ascii", "replace").strip()
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else "none"


def _named(architecture: Architecture | None, model: HubId) -> Architecture | None:
    return replace(architecture, hub_id=model.name) if architecture else None


def fetch(model: HubId) -> Source:
    """Configuration and headers of the model, from the Hub.

    Raises `UndeterminedError` without the extra `hub`, offline, when the Hub does not answer, and
    for a model that is gated or missing.
    """
    if _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"):
        raise UndeterminedError(
            f"`{model}` is not in the local cache, and HF_HUB_OFFLINE forbids to ask the Hub",
            hint=f"unset HF_HUB_OFFLINE, or run `hf download {model.name} {CONFIG}` elsewhere",
        )
    remote = _Remote(model)
    with _progress(f"asking {remote.host} for `{model}`") as tell:
        if model.quantization:
            return _gguf(remote, gguf_models(remote.files()))
        architecture = _architecture(remote)
        checkpoint = _checkpoint(remote, tell)
        adapter = _adapter(remote) if not architecture else None
        if not architecture and not checkpoint:
            return _gguf(remote, gguf_models(remote.files()))
        models = {} if checkpoint else gguf_models(remote.files())
    note = "" if checkpoint else "no safetensors: bytes are estimated, not read"
    if models:
        note += f"; {len(models)} GGUF, to read one: `{_for_example(model, models)}`"
    return Source(remote.url(""), architecture, checkpoint, adapter=adapter, note=note)


def _gguf(remote: _Remote, models: dict[str, str]) -> Source:
    """Header of the one GGUF model, or of the one that the user chose."""
    from llmsize.sources import gguf

    model = remote.model
    if not models:
        what = "no GGUF" if model.quantization else f"neither a `{CONFIG}` nor safetensors nor GGUF"
        raise remote.error(f"`{model.name}` has {what}")
    chosen = among(models, model.quantization)
    if not chosen:
        raise _which(model, models)
    names = gguf.parts(chosen, remote.files())
    read = gguf.read_parts({remote.url(name): partial(remote.open, name) for name in names})
    source = gguf_source(read, stem(chosen).rpartition("/")[2])
    return replace(source, architecture=_named(source.architecture, model))


def _which(model: HubId, models: dict[str, str]) -> LLMSizeError:
    """Names the GGUF models among which the user has to choose."""
    names = sorted(labels(models).values())
    listed = printable(", ".join(names[:MAX_LISTED]))
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    ask = f"name one of them: `{_for_example(model, models)}`"
    count = f"{len(names)} GGUF model" + "s" * (len(names) > 1)
    if not model.quantization:
        return LLMSizeError(f"`{model}` has {count}: {listed}{more}", hint=ask)
    return LLMSizeError(
        f"`{model.name}` has {count}, and none is clearly `{model.quantization}`: {listed}{more}",
        hint=did_you_mean(model.quantization, names, otherwise=ask),
    )


def _for_example(model: HubId, models: dict[str, str]) -> str:
    names = sorted(labels(models).values())
    return printable(str(replace(model, quantization=next(iter(names), ""))))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}


def _architecture(remote: _Remote) -> Architecture | None:
    data = remote.read(CONFIG, config.MAX_CONFIG)
    if data is None:
        return None
    where = remote.url(CONFIG)
    name = remote.model.name.partition("/")[2]
    return _named(config.architecture(parse_json(data, where), where, name), remote.model)


def _adapter(remote: _Remote) -> Any:
    data = remote.read(ADAPTER, config.MAX_CONFIG)
    where = remote.url(ADAPTER)
    return data and mapping(parse_json(data, where), where, "an adapter's settings")


def _checkpoint(remote: _Remote, tell: Callable[[int, int], None]) -> Checkpoint | None:
    """The headers of every shard, or of the single file."""
    from concurrent.futures import ThreadPoolExecutor

    index = remote.read("model.safetensors.index.json", MAX_JSON)
    if index is not None:
        names = safetensors.shard_names(index, remote.url("model.safetensors.index.json"))
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            tensors: list[StoredTensor] = []
            for done, part in enumerate(pool.map(remote.header, names), start=1):
                if part is None:
                    raise remote.error(f"`{remote.model}` lacks a shard that its index names")
                tensors += part
                tell(done, len(names))
        return safetensors.checkpoint(tensors, remote.url(""))
    for name in ("model.safetensors", "adapter_model.safetensors"):
        part = remote.header(name)
        if part is not None:
            return safetensors.checkpoint(part, remote.url(name))
    return None


class _Remote:
    """The files of one model on the Hub, read in parts."""

    def __init__(self, model: HubId) -> None:
        from threading import Lock

        self.model = model
        self.timeout = _timeout()
        try:
            library = import_module("huggingface_hub")
            utils = import_module("huggingface_hub.utils")
            session = utils.get_session()
            self.stream = session.stream
        except (ImportError, AttributeError):
            raise UndeterminedError(
                f"`{model}` is not in the local cache; asking the Hub needs huggingface_hub 1.0",
                hint="install the extra: `pip install 'llmsize[hub]'`",
            ) from None
        self.http: Any = import_module(type(session).__module__.partition(".")[0])
        self.headers = {**utils.build_hf_headers(), "accept-encoding": "identity"}
        self._url: Callable[..., str] = library.hf_hub_url
        self.host = self.url("").split("/")[2]
        self.until = time.monotonic() + DEADLINE
        self.tensors = 0
        self.parsing = Lock()
        self._files: list[str] | None = None

    def url(self, file: str) -> str:
        """The address of a file, or of the model."""
        address = self._url(self.model.name, file or CONFIG, revision=self.model.revision)
        return address if file else address.partition("/resolve/")[0]

    def read(self, file: str, limit: int) -> bytes | None:
        """The whole of a small file; `None` if the model has none of that name."""
        got = self.get(file, 0, limit)
        if got is None:
            return None
        data, size = got
        if size > limit or len(data) != size:
            raise self.error(f"`{self.url(file)}` has {size:,} bytes, more than {limit:,}")
        return data

    def files(self) -> list[str]:
        """Paths of all files of the model, from the first answer of the Hub's listing."""
        if self._files is None:
            self._files = self._listing()
        return self._files

    def _listing(self) -> list[str]:
        from urllib.parse import quote

        site = self.url("").removesuffix(f"/{self.model.name}")
        revision = quote(self.model.revision, safe="")
        address = f"{site}/api/models/{self.model.name}/tree/{revision}?recursive=true&expand=false"
        with self._answer(address, {}) as response:
            data = self._bytes(response, MAX_JSON) if response else b"[]"
        listed = parse_json(data, address)
        if not isinstance(listed, list) or len(listed) >= MAX_FILES:
            raise self.error(f"`{self.model.name}` has too many files, or no list of them")
        paths = [entry.get("path") for entry in listed if isinstance(entry, dict)]
        return [path for path in paths if isinstance(path, str) and _is_plain(path)]

    def open(self, file: str) -> tuple[_Ranges, int]:
        """A file to read on from its start, and its bytes."""
        got = self.get(file, 0, GGUF_READ)
        if got is None:
            raise self.error(f"`{self.model.name}` lacks a file that it lists")
        return _Ranges(self, file, got[0]), got[1]

    def header(self, file: str) -> list[StoredTensor] | None:
        """The tensors that the header of a safetensors file lists."""
        got = self.get(file, 0, FIRST_READ)
        if got is None:
            return None
        data, size = got
        length = int.from_bytes(data[:8], "little")
        if size < 8 or length > min(size - 8, MAX_JSON):
            raise self.error(f"`{self.url(file)}` has a header of impossible length")
        if 8 + length > len(data):
            more = self.get(file, len(data), 8 + length - len(data))
            data += more[0] if more else b""
        with self.parsing:  # one at a time: an unfolded header takes ten times its bytes
            if self.tensors > safetensors.MAX_TENSORS:
                raise self.error(f"`{self.model}` has more than {self.tensors:,} tensors")
            part = safetensors.parse_header(data[8 : 8 + length], size - 8 - length, self.url(file))
            self.tensors += len(part)
        return part

    def get(self, file: str, start: int, count: int) -> tuple[bytes, int] | None:
        """At most `count` bytes from `start`, and the size of the file; `None` if it is missing."""
        span = {"range": f"bytes={start}-{start + count - 1}"}
        with self._answer(self.url(file), span) as response:
            if response is None:
                return None
            size = _size(response)
            if size is None or (start and response.status_code != 206):
                raise self.error(f"{self.host} does not answer for parts of a file")
            return self._bytes(response, count), size

    @contextmanager
    def _answer(self, address: str, headers: dict[str, str]) -> Iterator[Any]:
        """The response for an address, its body not yet read; `None` if nothing is there."""
        http = self.http
        try:
            with self.stream(
                "GET", address, headers=self.headers | headers, timeout=self.timeout,
                follow_redirects=True,
            ) as response:  # fmt: skip
                yield response if self._is_there(response) else None
        except http.TimeoutException:
            raise UndeterminedError(
                f"{self.host} did not answer within {self.timeout:g} s",
                hint="try again, or set HF_HUB_DOWNLOAD_TIMEOUT to more seconds",
            ) from None
        except (http.HTTPError, http.InvalidURL, http.StreamError, OSError) as failure:
            raise UndeterminedError(
                f"cannot reach {self.host}: {printable(str(failure))}",
                hint="check the network and HF_ENDPOINT, or give a local folder or preset",
            ) from None

    def _bytes(self, response: Any, count: int) -> bytes:
        """At most `count` bytes of the body, as they come."""
        if response.headers.get("content-encoding", "identity") != "identity":
            raise self.error(f"{self.host} answers in an encoding that was not asked for")
        data = bytearray()
        for chunk in response.iter_raw():
            data += chunk
            if len(data) >= count:
                break
            if time.monotonic() > self.until:
                raise self.http.ReadTimeout("too slow")
        return bytes(data[:count])

    def _is_there(self, response: Any) -> bool:
        """Whether the file came. Raises `UndeterminedError` if the model cannot be read at all."""
        status, code = response.status_code, response.headers.get("x-error-code", "")
        if status in (200, 206):
            return True
        if status == 416 or (status == 404 and code in ("EntryNotFound", "")):
            return False
        raise self._refusal(status, code)

    def _refusal(self, status: int, code: str) -> UndeterminedError:
        model, page = self.model, self.url("")
        if code == "GatedRepo" or status == 403:
            return UndeterminedError(
                f"`{model.name}` is gated: its publisher grants access",
                hint=f"accept the licence on {page} and set HF_TOKEN",
            )
        if code == "RevisionNotFound":
            return UndeterminedError(
                f"`{model.name}` has no revision `{model.revision}`", hint=f"see {page}"
            )
        if status in (401, 404):
            return UndeterminedError(
                f"there is no model `{model.name}` on {self.host}, or it is private",
                hint="check the spelling; for a private model set HF_TOKEN",
            )
        reason = "too many requests" if status == 429 else f"status {status}"
        return UndeterminedError(
            f"{self.host} refuses `{model}`: {reason}", hint="try again later, or set HF_TOKEN"
        )

    def error(self, message: str) -> LLMSizeError:
        """An error about what the Hub holds."""
        return LLMSizeError(message, hint=f"see {self.url('')}")


class _Ranges:
    """A file on the Hub, read on range by range."""

    def __init__(self, remote: _Remote, file: str, start: bytes) -> None:
        self.remote, self.file, self.held = remote, file, start
        self.place = len(start)

    def read(self, count: int, /) -> bytes:
        """The next `count` bytes, fewer only at the end."""
        part, self.held = self.held[:count], self.held[count:]
        if len(part) < count and (got := self.remote.get(self.file, self.place, count - len(part))):
            part += got[0]
            self.place += len(got[0])
        return part

    def close(self) -> None:
        """Nothing stays open between two ranges."""


def _is_plain(path: str) -> bool:
    """Whether a listed path can stand in an address and on a screen as it is."""
    return path.isprintable() and ".." not in path and not path.startswith("/")


def _timeout() -> float:
    text = os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or f"{TIMEOUT:g}"
    if not re.fullmatch(r"[0-9]{1,4}", text):
        raise LLMSizeError(
            f"HF_HUB_DOWNLOAD_TIMEOUT is `{printable(text)}`", hint="give it whole seconds"
        )
    return float(text)


def _size(response: Any) -> int | None:
    """Bytes of the whole file, of which the response may be a part."""
    total = response.headers.get("content-range", "").rpartition("/")[2]
    text = total if response.status_code == 206 else response.headers.get("content-length", "")
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Tells on standard error what is going on, once a second, after the first."""
    from threading import Timer

    said = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= QUIET:
            said = time.monotonic()
            sys.stderr.write(f"{what}: {done} of {total} files\n")

    first = Timer(QUIET, lambda: sys.stderr.write(f"{what} …\n"))
    first.daemon = True
    first.start()
    try:
        yield tell
    finally:
        first.cancel()
