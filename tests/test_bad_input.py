"""Whatever is wrong with the input: one error, one hint, exit 2, and nothing else happens."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from asking import refused

from llmsize import presets
from llmsize.cli import run
from llmsize.errors import LLMSizeError
from llmsize.formats import Format

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 128, "vocab_size": 1000,
}  # fmt: skip

LINES = [
    "estimate",
    "estimate no-such-model",
    "estimate llama-2-7b --params 7B",
    "estimate llama-2-7b --dtype fp17",
    "estimate llama-2-7b --optimizer adamm",
    "estimate llama-2-7b --recipe mixxed",
    "estimate llama-2-7b --convention paper",
    "estimate llama-2-7b --format yaml",
    "estimate llama-2-7b --units MB",
    "estimate llama-2-7b --presets /no/such/directory",
    "estimate llama-2-7b --batch 0",
    "estimate llama-2-7b --batch two",
    "estimate llama-2-7b --context -5",
    "estimate llama-2-7b --context 1.5",
    "estimate --params 0",
    "estimate --params -1",
    "estimate --params abc",
    "estimate --params 7X",
    "estimate --params 1e400",
    "estimate --params nan",
    "estimate --params",
    "estimate /dev/null",
    "estimate .",
    "estimate \x1b[31mred",
    "estimate [bold]name[/bold]",
    "fits",
    "fits --vram 16",
    "fits --vram -16GB",
    "fits --vram 16Gb/s",
    "fits --gpu rtx-9999",
    "fits llama-2-7b --vram 16GB --job dance",
    "fits --vram 16GB --family no-such-family",
    "optimal --compute 1e-5",
    "optimal --target-loss 1e300",
    "optimal --gpu h100 --gpu-hours nan",
    "train gpt2 --method lora --adapter-dropout nan",
    "train gpt2 --objective grpo --gpu h100 --vllm-share nan",
    "infer gpt2 --adapters 4 --rank 99999",
    "time gpt2 --tokens 1B --method frozen",
    "time gpt2 --tokens 1B --gpu h100 --prices .",
    "loss --params 7B --tokens 1T --experts 8",
    "optimal --compute 1e21 --granularity 8",
    "advise --gpu t4 --days nan",
    "advise --gpu t4 --days -1",
    "time llama-2-7b --tokens 1B --method lora --targets nonsense",
    "loss --params 2B --law no-such-law",
    "loss --params 0",
    "loss",
    "show models no-such-model",
    "show nothing",
    "no-such-command",
    "estimate --no-such-option",
    "estimate ",
    "estimate llama-2-7b --dtype=",
    "train gpt2 --method lora --targets ",
    "train gpt2 --method lora --targets ,",
    "infer gpt2 --quant ",
    "infer gpt2 --offload cpu --fit batch --vram 16GB",
]


@pytest.mark.parametrize("line", LINES)
def test_mistakes_on_the_command_line(
    line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory stays as it was."""
    monkeypatch.chdir(tmp_path)
    refused(capsys, *line.split(" "))
    assert list(tmp_path.iterdir()) == []


HINTS = [
    ("time gpt2 --tokens 1B --gpu h100 --prices .", '{"as_of":'),
    ("loss --params 7B --tokens 1T --calibrate no-such.csv", "a CSV of parameters"),
    ("train mamba-130m --method prefix-tuning", "`prompt-tuning` or `lora`"),
    ("train mamba-130m --method lora --targets q_proj", "in_proj, out_proj"),
    ("train mamba-130m --method ia3", "in_proj, out_proj"),
    ("train llama3", "`llama-3-8b`"),
    ("train qwen25-7b", "`qwen2.5-7b`"),
]


@pytest.mark.parametrize(("line", "hint"), HINTS)
def test_the_hint_is_about_what_was_asked(
    line: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A price list is no `config.json`, and a model without attention has other layers."""
    assert hint in refused(capsys, *line.split(" ")).splitlines()[-1]


CLOSED = [
    ("train gpt2 --recompute ful", "way to recompute", "`full`"),
    ("train gpt2 --offload optimiser", "part to offload", "`optimizer`"),
    ("train gpt2 --attention eagr", "attention", "`eager`"),
    ("train gpt2 --objective dpoo", "objective", "`dpo`"),
    ("train gpt2 --objective dpo --reference modl", "reference", "`model`"),
    ("train gpt2 --fit batches", "quantity to solve for", "`batch`"),
    ("infer gpt2 --fit contxt", "quantity to solve for", "`context`"),
    ("infer gpt2 --offload disc", "place to offload to", "`disk`"),
    ("estimate gpt2 --convention artcle", "convention", "`article`"),
    ("estimate gpt2 --format jsn", "output format", "`json`"),
    ("fits gpt2 --job qlor", "job", "`qlora`"),
    ("fits gpt2 --which gpus", "kind of hardware", "`gpu`"),
    ("advise --task chatbt", "task", "`chatbot`"),
    ("curve isoflops", "picture", "`isoflop`"),
    ("show modls", "kind of fact", "`models`"),
]


@pytest.mark.parametrize(("line", "what", "close"), CLOSED)
def test_closed_sets_offer_a_close_name(
    line: str, what: str, close: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever takes one of a few names says what it does not know, and what was meant."""
    said = refused(capsys, *line.split(" "))
    assert f"error: unknown {what} `" in said
    assert "hint: did you mean" in said
    assert close in said


CONFIGS: dict[str, bytes] = {
    "empty": b"",
    "truncated": json.dumps(LLAMA).encode()[:40],
    "not JSON": b"hidden_size = 64",
    "not text": bytes(range(256)),
    "a list": b"[1, 2, 3]",
    "a number": b"7",
    "deeply nested": b'{"a": ' * 100_000 + b"1" + b"}" * 100_000,
    "deep lists": b'{"model_type": "llama", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "no family": b"{}",
    "a key twice": b'{"model_type": "llama", "model_type": "gpt2"}',
    "not finite": json.dumps(LLAMA | {"hidden_size": float("nan")}).encode(),
    "a huge number": json.dumps(LLAMA).replace("64", "1" + "0" * 5000).encode(),
}

FIELDS: list[dict[str, Any]] = [
    {"hidden_size": -64},
    {"hidden_size": 0},
    {"hidden_size": 10**30},
    {"hidden_size": "large"},
    {"hidden_size": None},
    {"hidden_size": [64]},
    {"hidden_size": 64.5},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 10**12},
    {"num_hidden_layers": True},
    {"vocab_size": "many"},
    {"vocab_size": 10**15},
    {"num_attention_heads": 5},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 3},
    {"intermediate_size": {}},
    {"model_type": "falcon_h1", "mamba_d_ssm": 2, "mamba_n_heads": 4},
    {"model_type": "no-such-family"},
    {"model_type": 7},
    {"model_type": "\x1b[31mllama"},
    {"model_type": "../../etc/passwd"},
]


@pytest.mark.parametrize("kind", CONFIGS)
def test_broken_files(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A configuration that is no configuration."""
    path = tmp_path / "config.json"
    path.write_bytes(CONFIGS[kind])
    refused(capsys, "estimate", str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("fields", FIELDS, ids=json.dumps)
def test_impossible_fields(
    fields: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A configuration that describes no model."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | fields))
    refused(capsys, "estimate", str(path))


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_missing_fields_are_named(
    field: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The error says which field is not there."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in LLAMA.items() if key != field}))
    assert field in refused(capsys, "estimate", str(path))


def test_a_family_that_asks_its_tokens_is_refused_for_that(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """LongCat-Flash runs expert after expert on the tokens that chose it (transformers v5.23)."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "model_type": "longcat_flash"}))
    assert run(["inspect", str(path)]) == 2
    assert "its memory depends on them" in capsys.readouterr().err


def test_a_huge_file_is_refused_by_its_size(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """100 MB are not read; the file is sparse and costs nothing."""
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(100 * 10**6)
    refused(capsys, "estimate", str(path))


def test_a_folder_without_a_configuration(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The error names the folder."""
    refused(capsys, "estimate", str(tmp_path))
    refused(capsys, "estimate", str(tmp_path / "missing" / "config.json"))


PRESETS = {
    "a key twice": "family: llama\nfamily: gpt2\n",
    "a tag": "!!python/object/apply:os.system ['true']\n",
    "an unknown tag": "family: !secret llama\n",
    "an anchor bomb": "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
    "an alias": "source: &s text\nfamily: *s\n",
    "a merge": "base: &b {family: llama}\n<<: *b\n",
    "deep in one line": "a: " + "[" * 500 + "]" * 500 + "\n",
    "deep in many lines": "".join(" " * i + f"k{i}:\n" for i in range(400)),
    "deep lists in many lines": "".join(" " * (2 * i) + "-\n" for i in range(2000)),
    "two documents": "family: llama\n---\nfamily: gpt2\n",
    "a list": "- family: llama\n",
    "text": "llama\n",
    "nothing": "",
    "an unknown field": "famly: llama\nconfig: {}\nsource: here\n",
    "a missing field": "family: llama\nsource: here\n",
    "a wrong type": "family: 7\nconfig: {}\nsource: here\n",
    "a control character": "family: ll\x07ama\nconfig: {}\nsource: here\n",
    "not UTF-8": "family: \udcff\n",
    "a huge file": "# " + "x" * 10**6,
    "a complex key": "? [a, b]\n: c\n",
}


@pytest.mark.parametrize("kind", PRESETS)
def test_broken_presets(kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A preset of the user's own that is no preset."""
    folder = tmp_path / "models"
    folder.mkdir()
    path = folder / "mine.yaml"
    path.write_bytes(PRESETS[kind].encode("utf-8", "surrogateescape"))
    refused(capsys, "estimate", "mine", "--presets", str(tmp_path))


def test_presets_beside_the_shipped_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder whose name only begins as that of the shipped presets is checked as any other."""
    mine = tmp_path / "presets-of-mine"
    (mine / "formats").mkdir(parents=True)
    (mine / "formats" / "mine.yaml").write_text(
        "block_elements: many\nblock_bytes: 1\nsource: none\n"
    )
    monkeypatch.setattr(presets, "shipped", lambda: str(tmp_path / "presets"))
    monkeypatch.setattr(presets, "_extra", [str(mine)])
    with pytest.raises(LLMSizeError, match="block_elements"):
        presets.get(Format, "mine")


SHIPPED = Path(__file__).parents[1] / "presets"
IMPOSSIBLE = [
    ("recipes/q4_k_m", ["rules", 0, "roles"], 7, "estimate llama-3.2-1b --dtype q4_k_m"),
    ("recipes/q4_k_m", ["rules", 0, "layers"], "last", "estimate llama-3.2-1b --dtype q4_k_m"),
    ("formats/nf4", ["beside"], {"scales": {}}, "train gpt2 --method qlora --base nf4"),
    ("optimizers/adamw", ["states"], {"moment": "fp17"}, "estimate gpt2"),
    ("optimizers/adamw", ["states"], {"moment": "fp17"}, "train gpt2"),
    ("precisions/amp", ["weights"], "fp17", "train gpt2 --recipe amp"),
    ("precisions/amp", ["gradients"], "fp17", "train gpt2 --recipe amp"),
    ("stacks/transformers", ["adapters"], "fp17", "train gpt2 --method lora"),
    ("stacks/transformers", ["allocator_slack"], math.nan, "train gpt2"),
    ("stacks/transformers", ["allocator_slack"], math.inf, "train gpt2"),
    ("engines/vllm", ["token_block"], 0, "infer gpt2 --engine vllm --gpu h100-sxm"),
    ("accelerators/t4", ["peak_tflops", "fp16"], 0, "infer gpt2 --gpu t4"),
    ("utilizations/a100-bf16", ["median"], 0, "time gpt2 --tokens 1B --gpu a100-sxm-80gb"),
    ("ladders/dense", ["rungs"], {}, "estimate --params 3B"),
    ("ladders/dense", ["rungs", "gpt2"], 0, "estimate --params 3B"),
    ("laws/chinchilla", ["fitted", "N"], [1], "loss --params 2B --tokens 40B --law chinchilla"),
    (
        "laws/chinchilla",
        ["constants", "alpha"],
        10**29,
        "loss --params 2B --tokens 40B --law chinchilla",
    ),
]


@pytest.mark.parametrize(("kind", "where", "value", "line"), IMPOSSIBLE)
def test_a_preset_that_says_the_impossible(
    kind: str, where: list[str | int], value: object, line: str,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    """A shipped preset of which one field is changed to what no arithmetic can use."""
    entry = yaml.safe_load((SHIPPED / f"{kind}.yaml").read_text())
    place = entry
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    own = tmp_path / f"{kind}.yaml"
    own.parent.mkdir()
    own.write_text(yaml.safe_dump(entry))
    refused(capsys, *line.split(), "--presets", str(tmp_path))


def test_the_own_preset_wins_and_says_where_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A file of the user's comes before a shipped one of the same name."""
    (tmp_path / "models").mkdir()
    own = tmp_path / "models" / "llama-2-7b.yaml"
    own.write_text(f"family: llama\nconfig: {json.dumps(LLAMA)}\nsource: mine\n")
    assert run(["show", "models", "llama-2-7b", "--presets", str(tmp_path)]) == 0
    assert str(own) in capsys.readouterr().out.replace("\n", "")
    assert run(["show", "models", "llama-2-7b"]) == 0
    assert str(own) not in capsys.readouterr().out.replace("\n", "")


IGNORED = [
    "infer gpt2 --rank 64", "infer gpt2 --gpu-memory-utilization 0.8",
    "infer gpt2 --engine vllm --gpu-memory-utilization 0.8", "infer gpt2 --quant mxfp4",
    "estimate --params 7B --dtype mxfp4", "optimal --compute 1e22 --gpu h100",
    "optimal --compute 1e22 --mfu 0.5", "time --params 7B --tokens 1T --gpus 8",
    "time --params 7B --tokens 1T --price 2", "time --params 7B --tokens 1T --seq-len 8192",
    "time gpt2 --tokens 1B --rank 8", "curve kaplan gpt2", "curve loss-vs-data gpt2",
    "curve memory-vs-context gpt2 --law kaplan", "curve memory-vs-context gpt2 --context 8192",
    "curve loss-vs-params --compute 1e21", "curve isoflop --law kaplan --law chinchilla",
    "advise --gpu t4 --epochs 3", "advise --gpu t4 --samples 100",
    "advise gpt2 --gpu t4 --commercial", "train gpt2 --reserve 2GB", "infer gpt2 --reserve 2GB",
]  # fmt: skip


@pytest.mark.parametrize("line", IGNORED)
def test_what_would_change_nothing_is_refused(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option that says nothing about the question is a mistake of who asks, and is told."""
    refused(capsys, *line.split())


def test_a_missing_value_points_to_the_help_of_its_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The help of all commands does not say what the option takes."""
    assert run(["estimate", "gpt2", "--dtype"]) == 2
    assert "hint: see `llmsize estimate --help`" in capsys.readouterr().err
