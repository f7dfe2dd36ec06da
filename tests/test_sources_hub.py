"""Models of the Hub: the local cache, and a Hub on the loopback interface."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import gguf, header, safetensors
from hub_server import COMMIT, TOKEN, Hub, serve

from llmsize.errors import LLMSizeError
from llmsize.sources import hub

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)
CONFIG = json.dumps({"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}).encode()
LINEAR = {"a.weight": ("BF16", [4, 3]), "a.bias": ("F32", [4])}
ASK = """
import json, sys
from llmsize.checkpoint import total_bytes
from llmsize.errors import LLMSizeError
from llmsize.sources import resolve
try:
    found = resolve(sys.argv[1])
    answer = {
        "family": found.architecture and found.architecture.family,
        "hub_id": found.architecture and found.architecture.hub_id,
        "tensors": found.checkpoint and len(found.checkpoint.tensors),
        "bytes": found.checkpoint and total_bytes(found.checkpoint),
        "adapter": found.adapter,
        "note": found.note,
    }
except LLMSizeError as failure:
    answer = {"error": failure.message, "hint": failure.hint, "exit": failure.exit_code}
answer["imported"] = "huggingface_hub" in sys.modules
print(json.dumps(answer))
"""


def ask(model: str, home: Path, endpoint: str = "http://127.0.0.1:9", **extra: str) -> dict:
    """What `resolve(model)` finds in a fresh process that may only reach `endpoint`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "XDG_"))}
    source = str(Path(__file__).parents[1] / "src")
    environment = {
        **kept, "PYTHONPATH": os.pathsep.join([source, kept.get("PYTHONPATH", "")]),
        "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **extra,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ASK, model], env=environment, capture_output=True, timeout=60,
        check=True, text=True, cwd=home,
    )  # fmt: skip
    return {**json.loads(done.stdout), "stderr": done.stderr}


def weights(tensors: dict[str, tuple[str, list[int]]], folder: Path) -> bytes:
    """The bytes of a safetensors file."""
    return safetensors(folder / "any.safetensors", tensors).read_bytes()


@needs_library
def test_a_single_file_is_read_in_part(tmp_path: Path) -> None:
    """Configuration and header come over; of 4 MB of weights, no more than the first 100 KB."""
    large = {"a.weight": ("F32", [1000, 1000])}
    files = {"o/m/config.json": CONFIG, "o/m/model.safetensors": weights(large, tmp_path)}
    with serve(Hub(files)) as server:
        found = ask("hf:o/m", tmp_path, server.url)
    assert (found["family"], found["hub_id"]) == ("llama", "o/m")
    assert (found["tensors"], found["bytes"]) == (1, 4_000_000)
    assert server.sent < 110_000
    assert {token for _, _, token in server.asked} == {f"Bearer {TOKEN}"}
    assert found["stderr"] == ""


@needs_library
def test_every_shard_is_asked_for_its_header(tmp_path: Path) -> None:
    """An index names the shards; a header beyond 100 KB takes a second, exact request."""
    many = {f"layers.{i}.weight": ("BF16", [1]) for i in range(3000)}
    index = {"weight_map": dict.fromkeys(many, "m-1.safetensors") | {"z": "m-2.safetensors"}}
    files = {
        "o/m/config.json": CONFIG,
        "o/m/model.safetensors.index.json": json.dumps(index).encode(),
        "o/m/m-1.safetensors": weights(many, tmp_path),
        "o/m/m-2.safetensors": weights({"z": ("F32", [5])}, tmp_path),
    }
    with serve(Hub(files)) as server:
        found = ask(f"o/m@{COMMIT}", tmp_path, server.url)
    assert (found["tensors"], found["bytes"]) == (3001, 6020)
    spans = [span for path, span, _ in server.asked if path.endswith("m-1.safetensors")]
    end = 8 + len(json.dumps(header(many))) - 1
    assert spans == ["bytes=0-99999", f"bytes=100000-{end}"]
    assert all(f"/resolve/{COMMIT}/" in path for path, *_ in server.asked)


@needs_library
def test_an_adapter_is_found(tmp_path: Path) -> None:
    """A LoRA repository has its own names and no configuration of a model."""
    files = {
        "o/a/adapter_config.json": json.dumps({"r": 8, "base_model_name_or_path": "o/m"}).encode(),
        "o/a/adapter_model.safetensors": weights({"q.lora_A.weight": ("F32", [8, 4])}, tmp_path),
    }
    with serve(Hub(files)) as server:
        found = ask("o/a", tmp_path, server.url)
    assert (found["family"], found["bytes"], found["adapter"]["r"]) == (None, 128, 8)


@needs_library
def test_each_refusal_has_its_own_line(tmp_path: Path) -> None:
    """Gated, missing, wrong revision and empty are four different things to do."""
    files = {"o/gated/config.json": CONFIG, "o/empty/README.md": b"#", "o/m/config.json": CONFIG}
    with serve(Hub(files, gated={"o/gated"})) as server:
        gated = ask("o/gated", tmp_path, server.url)
        missing = ask("o/nothing", tmp_path, server.url)
        revision = ask("o/m@v9", tmp_path, server.url)
        empty = ask("o/empty", tmp_path, server.url)
    assert gated["error"] == "`o/gated` is gated: its publisher grants access"
    assert gated["hint"] == f"accept the licence on {server.url}/o/gated and set HF_TOKEN"
    host = server.url.removeprefix("http://")
    assert missing["error"] == f"there is no model `o/nothing` on {host}, or it is private"
    assert revision["error"] == "`o/m` has no revision `v9`"
    assert empty["error"] == "`o/empty` has neither a `config.json` nor safetensors nor GGUF"
    assert [gated["exit"], missing["exit"], revision["exit"], empty["exit"]] == [3, 3, 3, 2]


@needs_library
def test_an_unreachable_hub_is_told_from_a_slow_one(tmp_path: Path) -> None:
    """No answer at all and none in time have different remedies; waiting is announced."""
    unreachable = ask("o/m", tmp_path)
    assert unreachable["error"].startswith("cannot reach 127.0.0.1:9: ")
    with serve(Hub({"o/m/config.json": CONFIG}, seconds=3.0)) as server:
        slow = ask("o/m", tmp_path, server.url, HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert slow["error"].endswith("did not answer within 2 s")
    assert "HF_HUB_DOWNLOAD_TIMEOUT" in slow["hint"]
    assert slow["stderr"] == f"asking {server.url.removeprefix('http://')} for `o/m` …\n"


@needs_library
@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"config.json": b"<html>"}, "not readable JSON"),
        ({"config.json": b"x" * 5_000_000}, "more than 4,000,000"),
        ({"model.safetensors": b"\xff" * 100}, "header of impossible length"),
        ({"model.safetensors": b""}, "header of impossible length"),
        ({"m.gguf": b"GGUF" + bytes(8)}, "version 0 is not"),
        ({"m.gguf": b"GGUF\3"}, "goes on past its end"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../b"}}'}, "not a file beside"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "b"}}'}, "lacks a shard"),
    ],
    ids=range(8),
)
def test_a_hostile_hub_is_refused(tmp_path: Path, files: dict[str, bytes], problem: str) -> None:
    """What comes over the network is believed as little as what lies on the disk."""
    with serve(Hub({f"o/m/{name}": body for name, body in files.items()})) as server:
        assert problem in ask("o/m", tmp_path, server.url)["error"]


@needs_library
def test_a_hub_that_ignores_ranges_does_not_send_the_weights(tmp_path: Path) -> None:
    """The connection is closed after the header, whatever the server would send."""
    large = {"a.weight": ("F32", [4000, 4000])}
    files = {"o/m/config.json": CONFIG, "o/m/model.safetensors": weights(large, tmp_path)}
    with serve(Hub(files, ignores_ranges=True)) as server:
        found = ask("o/m", tmp_path, server.url)
    assert found["bytes"] == 64_000_000
    assert server.sent < 1_000_000


def test_offline_is_obeyed_before_anything_is_imported(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE means that not even the library is loaded."""
    found = ask("o/m", tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids" in found["error"]
    assert (found["imported"], found["exit"]) == (False, 3)


def test_without_the_extra_the_hint_installs_it(tmp_path: Path) -> None:
    """A Hub id without huggingface_hub is answered with the command that helps."""
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError")
    found = ask(
        "o/m", tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}/src"
    )
    assert found["hint"] == "install the extra: `pip install 'llmsize[hub]'`"


def quantized(folder: Path, tokens: int = 8, kind: int = 12, *, part: int = 0) -> bytes:
    """A small llama in GGUF with one matrix of q4_k (12) or q8_0 (8)."""
    metadata = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.context_length": 512,
        "llama.embedding_length": 256, "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "tokenizer.ggml.tokens": [f"token-{i:020}" for i in range(tokens)],
    }  # fmt: skip
    if part:
        metadata = {"general.architecture": "llama"} if part > 1 else metadata
        metadata |= {"split.no": part - 1, "split.count": 2}
    matrix = ("token_embd.weight" if part < 2 else "output.weight", [256, 4096], kind)
    size = 256 * 4096 // (256 if kind == 12 else 32) * (144 if kind == 12 else 34)
    return gguf(folder / "any.gguf", metadata, [(*matrix, size)]).read_bytes()


@needs_library
def test_a_gguf_repository_is_read_by_ranges(tmp_path: Path) -> None:
    """A vocabulary beyond the first range takes more ranges, and the weights stay there."""
    body = quantized(tmp_path, tokens=60_000) + bytes(20_000_000)
    files = {"o/m-GGUF/m.Q4_K_M.gguf": body, "o/m-GGUF/mmproj-f16.gguf": b"", "o/x/a": b""}
    with serve(Hub(files)) as server:
        found = ask("o/m-GGUF", tmp_path, server.url)
    assert (found["family"], found["hub_id"]) == ("llama", "o/m-GGUF")
    assert (found["tensors"], found["bytes"]) == (1, 4096 * 144)
    asked = [(path, span) for path, span, _ in server.asked if path.endswith("Q4_K_M.gguf")]
    assert [span for _, span in asked] == ["bytes=0-1048575", "bytes=1048576-2097151"]
    assert server.sent < 2_200_000
    assert {token for _, _, token in server.asked} == {f"Bearer {TOKEN}"}


@needs_library
def test_of_several_quantizations_one_is_asked_for(tmp_path: Path) -> None:
    """They are named by what tells them apart, and each can be asked for by that or by its file."""
    small, large = quantized(tmp_path), quantized(tmp_path, kind=8)
    files = {
        "o/m/m-1b-Q4_K_M.gguf": small, "o/m/m-1b-Q4_K_S.gguf": small, "o/m/m-1b-Q8_0.gguf": large,
        "o/m/config.json": b"{}", "o/n/m-UD-Q4_K_M.gguf": small, "o/n/m-Q4_K_M.gguf": large,
    }  # fmt: skip
    with serve(Hub(files)) as server:
        chosen = ask("o/m:Q8_0", tmp_path, server.url)
        by_file = ask(f"hf:o/m@{COMMIT}:m-1b-q4_k_m.gguf", tmp_path, server.url)
        wrong = ask("o/m:Q4_K_X", tmp_path, server.url)
        which = ask("o/n", tmp_path, server.url)
        exact = ask("o/n:q4_k_m", tmp_path, server.url)
    assert (chosen["bytes"], by_file["bytes"], exact["bytes"]) == (
        4096 * 8 * 34, 4096 * 144, 4096 * 8 * 34,
    )  # fmt: skip
    listed = "Q4_K_M, Q4_K_S, Q8_0"
    message = f"`o/m` has 3 GGUF models, and none is clearly `Q4_K_X`: {listed}"
    assert (wrong["error"], wrong["exit"]) == (message, 2)
    assert which["error"] == "`o/n` has 2 GGUF models: Q4_K_M, UD-Q4_K_M"
    assert which["hint"] == "name one of them: `o/n:Q4_K_M`"


@needs_library
def test_the_parts_of_a_split_gguf_are_all_read(tmp_path: Path) -> None:
    """Parts lie in a folder of their quantization; one that is missing is named."""
    first, second = (quantized(tmp_path, part=part) for part in (1, 2))
    path = "o/m/Q4_K_M/m-Q4_K_M-0000{}-of-00002.gguf"
    whole = {path.format(1): first, path.format(2): second}
    with serve(Hub(whole)) as server:
        found = ask("o/m:Q4_K_M", tmp_path, server.url)
    with serve(Hub({path.format(1): first})) as server:
        missing = ask("o/m", tmp_path, server.url)
    assert (found["tensors"], found["bytes"]) == (2, 2 * 4096 * 144)
    assert "m-Q4_K_M-00002-of-00002.gguf` is missing" in missing["error"]


def test_a_cached_gguf_needs_no_library(tmp_path: Path) -> None:
    """A quantization that was downloaded is found by its name in the cache."""
    folder = cache(tmp_path)
    (folder / "m-Q4_K_M.gguf").write_bytes(quantized(tmp_path))
    found = ask("o/m:Q4_K_M", tmp_path)
    assert (found["bytes"], found["hub_id"]) == (4096 * 144, "o/m")
    assert not found["imported"]


def cache(home: Path, *, reference: str = COMMIT) -> Path:
    """A Hub cache as huggingface_hub lays it out: references, and links to blobs."""
    repository = home / "hub" / "models--o--m"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(reference)
    (repository / "blobs" / "1").write_bytes(CONFIG)
    (snapshot / "config.json").symlink_to("../../blobs/1")
    return snapshot


@pytest.mark.parametrize("text", ["o/m", "hf:o/m", f"o/m@{COMMIT}"])
def test_the_cache_answers_without_the_library(tmp_path: Path, text: str) -> None:
    """What is on the disk needs neither the network nor an import."""
    safetensors(cache(tmp_path) / "model.safetensors", LINEAR)
    found = ask(text, tmp_path)
    assert (found["family"], found["hub_id"], found["bytes"]) == ("llama", "o/m", 40)
    assert not found["imported"]


def test_a_cache_without_weights_still_gives_the_shape(tmp_path: Path) -> None:
    """An index whose shards were not downloaded is no error in a cache."""
    index = cache(tmp_path) / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors"}}))
    found = ask("o/m", tmp_path)
    assert (found["family"], found["bytes"], found["note"]) == ("llama", None, "no weights")


def test_a_reference_cannot_lead_out_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference is a commit, not a path."""
    cache(tmp_path, reference="../../../..")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert hub.cached(hub.parse("o/m")) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "o",
        "o/",
        "/m",
        "o/m/x",
        "../m",
        "o/..",
        "o/m@",
        "o/m@../x",
        "o/m@a..b",
        "ö/m",
        "o/m:",
        "o/m:../x",
    ],
)
def test_other_texts_are_no_ids(text: str) -> None:
    """An id becomes part of paths and addresses, so its form is strict."""
    with pytest.raises(LLMSizeError, match="no model of the Hub"):
        hub.parse(text)
