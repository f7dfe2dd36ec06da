"""`import llmsize`: every command as a function, with the answers of the command line."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

import llmsize
from llmsize.answer import document
from llmsize.cli import run
from llmsize.errors import LLMSizeError
from llmsize.memory import replay
from llmsize.quick_dataclasses import replace

SAME: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("estimate --params 7B --dtype fp16", (), {"params": 7e9, "dtype": "fp16"}),
    ("estimate llama-2-7b --batch 2", ("llama-2-7b",), {"batch": 2}),
    ("fits llama-3-8b --vram 24GB", ("llama-3-8b",), {"vram": 24 * 10**9}),
    ("train gpt2 --method lora --seq-len 512", ("gpt2",), {"method": "lora", "seq_len": 512}),
    ("infer gpt2 --context 1k --batch 4", ("gpt2",), {"context": "1k", "batch": 4}),
    ("inspect gpt2", ("gpt2",), {}),
    ("loss --params 2B --law chinchilla", (), {"params": "2B", "law": "chinchilla"}),
    ("curve loss-vs-params --law kaplan --law chinchilla", ("loss-vs-params",),
     {"law": ["kaplan", "chinchilla"]}),
    ("optimal --compute 1e21", (), {"compute": 1e21}),
    ("time gpt2 --tokens 1B --gpu h100 --gpus 8", ("gpt2",),
     {"tokens": 10**9, "gpu": "h100", "gpus": 8}),
    ("curve kaplan", ("kaplan",), {}),
    ("advise --gpu rtx-4090 --days 14 --task serve", (),
     {"gpu": "rtx-4090", "days": 14, "task": "serve"}),
    ("advise --gpu rtx-4090 --task serve", (), {"gpu": "rtx-4090", "task": "serve"}),
    ("infer gpt2 --context 512,1024 --quant nf4,llm-int8", ("gpt2",),
     {"context": [512, 1024], "quant": ["nf4", "llm-int8"]}),
    ("curve memory-vs-batch gpt2", ("memory-vs-batch", "gpt2"), {}),
    ("train gpt2 --method lora --rank 8 --padded", ("gpt2",),
     {"method": "lora", "rank": 8, "padded": True}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "arguments", "words"), SAME, ids=lambda given: str(given))
def test_a_function_answers_as_its_command(
    line: str, arguments: tuple[Any, ...], words: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers or texts, arguments or words: the document is the one that the command prints."""
    run([*line.split(), "--format", "json"])
    printed = json.loads(capsys.readouterr().out)
    name = line.split()[0]
    assert json.loads(json.dumps(document(getattr(llmsize, name)(*arguments, **words)))) == printed


def test_what_the_allocator_reserves_is_found_when_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asking follows the step and no more; what is refused is refused before."""
    asked: list[Any] = []
    monkeypatch.setattr(replay, "reserved", lambda *words, **_: asked.append(words))
    answer = llmsize.train("gpt2", batch=2)
    assert not asked
    assert answer.headline.startswith("gpt2, full, 2 × 1,024 tokens")
    assert len(asked) == 1
    assert replace(answer, notes=()).headline == answer.headline
    with pytest.raises(LLMSizeError):
        llmsize.train("gpt2", method="lora", targets="nothing")


def test_every_function_is_listed_and_described() -> None:
    """What completion in a notebook shows, and the help of each."""
    assert set(llmsize.COMMANDS) <= set(dir(llmsize))
    commands = {path.stem for path in Path(llmsize.__file__).with_name("cli").glob("*.py")}
    assert set(llmsize.COMMANDS) <= commands
    assert all(getattr(llmsize, name).__doc__ for name in llmsize.COMMANDS)


@pytest.mark.parametrize("words", [{"batch": 0}, {"batch": -1}, {"batch": 1.5}, {"dtype": "fp3"}])
def test_values_are_refused_as_on_the_command_line(words: dict[str, Any]) -> None:
    """A number that is no count is an error, whatever its type."""
    with pytest.raises(LLMSizeError):
        llmsize.estimate("gpt2", **words)


@pytest.mark.parametrize(
    "words",
    [{"recompute": True}, {"padded": "yes"}, {"method": None}, {"rank": 8.5}, {"targets": [True]},
     {"gpu": {"name": "t4"}}],
)  # fmt: skip
def test_a_value_of_another_type_is_refused_with_a_hint(words: dict[str, Any]) -> None:
    """What no command line could say is not taken for something else."""
    with pytest.raises(LLMSizeError, match=next(iter(words))) as refusal:
        llmsize.train("gpt2", **words)
    assert refusal.value.hint


def test_a_model_may_be_a_path(tmp_path: Path) -> None:
    """A configuration in a file is named by its path, as a text or as a `Path`."""
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 100,
              "n_positions": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "config.json"
    assert llmsize.inspect(file).headline == llmsize.inspect(str(file)).headline


def test_help_names_every_word() -> None:
    """`help(llmsize.train)` says what each means, and shows plain types."""
    assert "seq_len: Tokens per sequence." in str(llmsize.train.__doc__)
    assert "Annotated" not in str(inspect.signature(llmsize.train))


def test_unknown_words_and_names_are_pythons_own_errors() -> None:
    """As for any function and any module."""
    with pytest.raises(TypeError):
        llmsize.estimate("gpt2", words=1)
    with pytest.raises(AttributeError):
        llmsize.nothing  # noqa: B018 - the access is the test


@pytest.mark.parametrize("page", ["README.md", "README.ko.md", "docs/guides/python.md"])
def test_the_examples_of_the_pages_run(page: str) -> None:
    """Each Python block, and the comment behind its last expression where there is one."""
    text = (Path(__file__).parents[1] / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)  # noqa: S102 - our own pages
        last, _, said = block.rstrip().splitlines()[-1].partition("  # ")
        assert not said or eval(last, scope) == eval(said)  # noqa: S307
