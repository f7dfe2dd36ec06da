"""Facts as `llmsize show` shows them."""

import json

import pytest
from asking import answered

from llmsize.cli import run
from llmsize.cli.show import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_listed(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each folder of presets has a list, and the first entry can be shown with its source."""
    assert run(["show", kind, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["answer"][0]["rows"]
    assert rows
    assert run(["show", kind, rows[0]["name"], "--format", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)["answer"][0]["rows"]
    assert {"source", "file"} <= {row["name"] for row in shown}


def test_a_model_has_its_parameters_by_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    """Total and non-embedding parameters of Llama 2 7B: the laws need both."""
    assert run(["show", "models", "llama-2-7b", "--format", "json"]) == 0
    counted = json.loads(capsys.readouterr().out)["answer"][1]["rows"]
    values = {row["name"]: row["cells"]["value"]["value"] for row in counted}
    assert values["total"] == 6_738_415_616
    assert values["non-embedding"] == 6_738_415_616 - 2 * 32_000 * 4096


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["show", "modls"], "did you mean `models`"),
        (["show", "models", "lama-2-7b"], "did you mean `llama-2-7b`"),
        (["show", "laws", "kaplann"], "did you mean `kaplan`"),
    ],
)
def test_unknown_names_get_a_close_one(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error and one hint, exit 2, nothing on stdout."""
    assert run(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert hint in captured.err


def test_models_are_chosen_by_family_size_and_licence(capsys: pytest.CaptureFixture[str]) -> None:
    """OPT up to 1.3B is there for research; of Llama's family some may be used commercially."""
    assert (
        run(["show", "models", "--family", "opt", "--max-params", "1.4B", "--format", "json"]) == 0
    )
    rows = json.loads(capsys.readouterr().out)["answer"][0]["rows"]
    assert [row["name"] for row in rows] == ["opt-1.3b", "opt-125m", "opt-350m"]
    assert run(["show", "models", "--commercial", "--format", "json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)["answer"][0]["rows"]}
    assert "gpt2" in names
    assert not names & {"opt-1.3b", "llama-7b", "command-r-35b"}


@pytest.mark.parametrize(
    "words",
    [
        ["show", "laws", "--commercial"],
        ["show", "models", "gpt2", "--family", "gpt2"],
        ["show", "models", "--family", "no-such-family"],
    ],
)
def test_filters_that_mean_nothing_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A filter that cannot apply is an error, not an empty or unfiltered list."""
    assert run(words) == 2
    assert capsys.readouterr().out == ""


def test_what_a_method_does_is_not_shown_as_code(capsys: pytest.CaptureFixture[str]) -> None:
    """An address in memory is no fact."""
    assert run(["show", "methods", "qlora"]) == 0
    assert "<function" not in capsys.readouterr().out


def test_sentences_of_a_record_stand_in_rows_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They have commas and semicolons of their own, which would hide where each ends."""
    document = answered(capsys, "show", "laws", "kaplan")
    names = [row["name"] for row in document["answer"][0]["rows"]]
    assert "contradictions: 1" in names
    assert "contradictions" not in names
