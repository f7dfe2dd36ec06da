"""The shipped models are valid records that can be told apart."""

import dataclasses
from collections import Counter

import pytest

from llmsize import presets
from llmsize.architecture import Architecture, Default
from llmsize.record import build

MODELS = presets.every(Architecture)


@pytest.mark.parametrize("name", MODELS)
def test_shipped_models_pass_the_check_that_a_users_own_must(name):
    """Shipped records are read without pydantic, so their types are proved here."""
    fields = [f.name for f in dataclasses.fields(Architecture) if f.name != "name"]
    entry = {field: getattr(MODELS[name], field) for field in fields}
    given = {field: value for field, value in entry.items() if value is not None}
    assert build(Architecture, name, given, where=name, check=True) == MODELS[name]


@pytest.mark.parametrize("name", presets.names(Default))
def test_shipped_defaults_pass_it_too(name):
    """What a class takes for absent fields is numbers, flags and words."""
    default = presets.get(Default, name)
    given = {"fields": dict(default.fields), "source": default.source}
    assert build(Default, name, given, where=name, check=True) == default


def test_every_name_and_alias_means_one_model():
    """An alias that is also a name, or an alias of two models, would hide one of them."""
    names = Counter(MODELS.keys())
    for model in MODELS.values():
        names.update(model.aliases)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("alias", "base"),
    [
        ("vicuna-7b", "llama-2-7b"),
        ("koalpaca-polyglot-5.8b", "polyglot-ko-5.8b"),
        ("zephyr-7b-beta", "mistral-7b-v0.1"),
        ("tinyllama-1.1b-chat", "tinyllama-1.1b"),
    ],
)
def test_fine_tunes_are_found_at_the_model_they_were_tuned_from(alias, base):
    """A fine-tune has the shape of its base, so it needs no file of its own."""
    assert presets.get(Architecture, alias).name == base
