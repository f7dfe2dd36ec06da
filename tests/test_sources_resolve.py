"""From what a user writes to the model that is meant."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from checkpoints import gguf, safetensors, torch_bin

from llmsize.checkpoint import total_bytes
from llmsize.errors import LLMSizeError
from llmsize.sources import Source, resolve

CONFIG = {"model_type": "llama", "hidden_size": 64}
METADATA: dict[str, object] = {
    "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
}  # fmt: skip
LINEAR = {"a.weight": ("BF16", [4, 3])}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, an empty Hub cache, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def folder(path: Path, *, config: bool = True) -> Path:
    """A folder with a configuration, for a checkpoint to be added."""
    path.mkdir(parents=True, exist_ok=True)
    if config:
        (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def stored(source: Source) -> int:
    """Bytes of the checkpoint that was found."""
    assert source.checkpoint is not None
    return total_bytes(source.checkpoint)


@pytest.mark.parametrize("text", ["llama-3.1-8b", "Llama-3.1-8B", "meta-llama/Llama-3.1-8B"])
def test_a_name_or_hub_id_is_a_preset(text: str) -> None:
    """What llmsize ships needs neither disk nor network."""
    found = resolve(text)
    assert found.architecture is not None
    assert (found.where, found.architecture.family) == ("preset `llama-3.1-8b`", "llama")


@pytest.mark.parametrize("text", ["bert-base-uncased", "google-bert/bert-base-uncased"])
def test_a_hub_id_is_known_without_who_published_it(text: str) -> None:
    """BERT's first authors and everybody after them write the name alone."""
    assert resolve(text).where == "preset `bert-base`"


def test_a_preset_is_preferred_to_a_folder_of_its_name(here: Path) -> None:
    """A bare name means the same everywhere; `./` asks for the folder."""
    safetensors(folder(here / "gpt2") / "model.safetensors", LINEAR)
    assert resolve("gpt2").where == "preset `gpt2`"
    assert stored(resolve("./gpt2")) == 24


def test_a_folder_is_preferred_to_the_hub(here: Path) -> None:
    """`organisation/name` may be a clone in the working directory."""
    safetensors(folder(here / "meta-llama" / "Llama-3.1-8B") / "model.safetensors", LINEAR)
    assert stored(resolve("meta-llama/Llama-3.1-8B")) == 24


def test_a_piped_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` is standard input."""
    text = io.TextIOWrapper(io.BytesIO(json.dumps(CONFIG | {"_name_or_path": "o/m"}).encode()))
    monkeypatch.setattr("sys.stdin", text)
    found = resolve("-")
    assert found.architecture is not None
    assert (found.architecture.name, found.where) == ("m", "standard input")


def test_a_configuration_alone(here: Path) -> None:
    """A file or a folder with nothing else gives the shape."""
    path = folder(here / "tiny") / "config.json"
    for text in (str(path), str(path.parent), "./tiny/", "tiny"):
        found = resolve(text)
        assert found.architecture is not None
        assert (found.architecture.name, found.checkpoint) == ("tiny", None)
    renamed = path.rename(path.with_name("mine-7b.json"))
    found = resolve(str(renamed))
    assert found.architecture is not None
    assert found.architecture.name == "mine-7b"


def test_a_checkpoint_alone_says_what_is_missing(here: Path) -> None:
    """Without a configuration there are bytes and counts, and a note."""
    safetensors(here / "model.safetensors", LINEAR)
    found = resolve("model.safetensors")
    assert (found.architecture, stored(found)) == (None, 24)
    assert found.note == "no `config.json` beside it: bytes and counts only"


@pytest.mark.parametrize("index", [True, False])
def test_a_sharded_folder(here: Path, index: bool) -> None:
    """Shards are found by their index or by their names; all must be there."""
    names = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        safetensors(folder(here / "m") / name, {f"w{number}": ("F32", [number + 1])})
    if index:
        weight_map = {"w0": names[0], "w1": names[1]}
        text = json.dumps({"weight_map": weight_map})
        (here / "m" / "model.safetensors.index.json").write_text(text)
    assert stored(resolve("./m")) == 12
    assert resolve(f"m/{names[0]}").note == "one of 2 shards: give the folder for the whole"
    (here / "m" / names[1]).unlink()
    with pytest.raises(LLMSizeError, match="1 of 2 shards are not in"):
        resolve("./m")


def test_one_checkpoint_of_a_folder_is_read(here: Path) -> None:
    """Repositories repeat the model in other formats; it is counted once."""
    m = folder(here / "m")
    safetensors(m / "model.safetensors", LINEAR)
    safetensors(m / "consolidated.safetensors", LINEAR)
    torch_bin(m / "pytorch_model.bin", [999])
    assert stored(resolve("./m")) == 24


def test_a_folder_of_pytorch_archives(here: Path) -> None:
    """Old repositories have only `.bin` files."""
    for number in (1, 2):
        torch_bin(folder(here / "m") / f"pytorch_model-{number:05}-of-00002.bin", [100])
    found = resolve("./m")
    assert stored(found) == 200
    assert found.architecture is not None


def test_an_adapter(here: Path) -> None:
    """A LoRA folder has its rank, its base, and no shape of its own."""
    a = folder(here / "a", config=False)
    settings = {"r": 16, "base_model_name_or_path": "meta-llama/Llama-3.1-8B"}
    (a / "adapter_config.json").write_text(json.dumps(settings))
    safetensors(a / "adapter_model.safetensors", {"q.lora_A.weight": ("F32", [16, 4])})
    found = resolve("./a")
    assert (found.architecture, found.adapter, stored(found)) == (None, settings, 256)
    assert found.checkpoint is not None
    assert found.checkpoint.adapter


def test_a_gguf_file_and_its_folder(here: Path) -> None:
    """One model in a folder is the folder's model; its projector is not."""
    path = gguf(folder(here / "m", config=False) / "tiny-q4_0.gguf", METADATA, [])
    gguf(path.with_name("mmproj-tiny.gguf"), {"general.architecture": "clip"}, [])
    for text in (str(path), "./m"):
        found = resolve(text)
        assert found.architecture is not None
        assert (found.architecture.name, len(found.caches)) == ("tiny-q4_0", 2)
    assert resolve("m/mmproj-tiny.gguf").architecture is None


def test_several_gguf_models_are_not_guessed_from(here: Path) -> None:
    """A folder with many quantizations needs a choice."""
    for name in ("q4", "q8"):
        gguf(folder(here / "m", config=False) / f"{name}.gguf", METADATA, [])
    with pytest.raises(LLMSizeError, match="2 GGUF models: give one of the files"):
        resolve("./m")


@pytest.mark.parametrize(
    ("text", "problem", "hint"),
    [
        ("lama-3.1-8b", "unknown model `lama-3.1-8b`", "did you mean `llama-3.1-8b`"),
        ("", "unknown model ``", "give a preset"),
        ("a\x00b", "unknown model `a\\x00b`", "give a preset"),
        ("\udcff", "unknown model", "give a preset"),
        ("x" * 5000, "the name is too long", "config.json"),
        ("./nowhere", "there is no file or folder `nowhere`", "check the path"),
        ("nowhere.gguf", "there is no file or folder", "check the path"),
        ("o/m", "`o/m` is not in the local cache", "unset HF_HUB_OFFLINE"),
        ("hf:x", "`x` is no model of the Hub", "organisation/name"),
    ],
)
def test_what_stands_for_nothing_is_said(text: str, problem: str, hint: str) -> None:
    """Each mistake has its own sentence and its own way out."""
    with pytest.raises(LLMSizeError) as failure:
        resolve(text)
    assert problem in failure.value.message
    assert hint in failure.value.hint


def test_other_files_are_refused(here: Path) -> None:
    """A file of another kind is named, and so are the kinds that can be read."""
    (here / "model.onnx").write_bytes(b"")
    (here / "empty").mkdir()
    with pytest.raises(LLMSizeError, match="not of a kind") as failure:
        resolve("./model.onnx")
    assert ".gguf" in failure.value.hint
    with pytest.raises(LLMSizeError, match="holds no model"):
        resolve("./empty")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["config.json", "m.safetensors", "m.gguf", "m.bin"])
def test_pipes_folders_and_loops_are_refused(here: Path, name: str) -> None:
    """Nothing waits for a writer, and no link is followed for ever."""
    os.mkfifo(here / name)
    with pytest.raises(LLMSizeError, match="a pipe or a device"):
        resolve(f"./{name}")
    (here / name).unlink()
    (here / name).symlink_to(name)
    with pytest.raises(LLMSizeError, match="go in a circle"):
        resolve(f"./{name}")
    (here / name).unlink()
    (here / name).mkdir()
    with pytest.raises(LLMSizeError, match=r"holds no|a folder"):
        resolve(f"./{name}")


def test_a_parameter_count_is_told_where_it_belongs() -> None:
    """Who asks about `7B` wants a model of that size, not one of that name."""
    with pytest.raises(LLMSizeError) as refused:
        resolve("7B")
    assert "`llmsize estimate --params 7B`" in refused.value.hint
