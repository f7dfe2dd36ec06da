"""The answer of every command and its JSON document."""

import json

from jsonschema import Draft202012Validator

from llmsize.answer import Absent, Estimate, Row, Table, document, schema
from llmsize.term import Term, fact, term, total


def example() -> Estimate:
    """A table with every kind of cell, and a term beside it."""
    weights = term(
        "weights", "parameters * 2", unit="bytes", parameters=7 * 10**9, source="IEEE 754"
    )
    guess = fact("overhead", 10**9, unit="bytes", source="a guess", grade="assumed")
    rows = (
        Row("weights", {"inference": weights, "training": weights}),
        Row("KV cache", {"inference": guess, "training": Absent("training keeps no cache")}),
        Row("verdict", {"inference": "fits [bold]", "training": "tight"}),
    )
    table = Table("memory", ("inference", "training"), rows)
    both = total("both", weights, guess)
    return Estimate("estimate", {"params": 7 * 10**9}, "14 GB", (table, both), ("batch 1",))


def test_the_document_is_what_the_schema_says() -> None:
    """Every field that is written is described, and nothing required is left out."""
    written = json.loads(json.dumps(document(example())))
    assert list(Draft202012Validator(schema()).iter_errors(written)) == []


def test_the_schema_refuses_a_wrong_document() -> None:
    """The schema is not so wide that it accepts anything."""
    written = document(example()) | {"answer": [{"name": "weights", "value": "many"}]}
    assert list(Draft202012Validator(schema()).iter_errors(written))


def test_bytes_stay_whole_numbers() -> None:
    """A machine that reads the document gets every byte."""
    cell = document(example())["answer"][0]["rows"][0]["cells"]["inference"]
    assert cell["value"] == 14_000_000_000
    assert isinstance(cell["value"], int)


def test_terms_are_those_that_the_answer_shows() -> None:
    """The parts of a total are below it, not beside it."""
    shown = [t.name for t in example().terms() if isinstance(t, Term)]
    assert shown == ["weights", "weights", "overhead", "both"]
