"""The search of the catalogue, with needs that are easy to check by eye."""

from functools import partial

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.planning.catalogue import (
    Filter,
    best,
    enough,
    largest_first,
    parameters,
    search,
    wanted,
)

BYTES = {"fp16": 2, "int8": 1}


def model(name: str, parameters: int, **more: object) -> Architecture:
    return Architecture(name, "llama", {}, "made up", published_parameters=parameters, **more)  # type: ignore[arg-type]


SMALL = model("small", 100, released="2023-01", commercial=True, context_length=4096)
NEWER = model("newer", 100, released="2024-12")
LARGE = model("large", 150)
HUGE = model("huge", 1000)
ORDERED = [HUGE, LARGE, NEWER, SMALL]


def need(model: Architecture, format: str) -> int | None:
    assert model.published_parameters is not None
    return model.published_parameters * BYTES[format]


def test_each_model_takes_the_most_precise_format_that_fits() -> None:
    """What fits in no format is left out; the others stay in their order."""
    found = list(search(ORDERED, ["fp16", "int8"], need, 220, band=0.05))
    assert [(c.model.name, c.format, c.verdict, c.headroom) for c in found] == [
        ("large", "int8", "fits", 70),
        ("newer", "fp16", "fits", 20),
        ("small", "fp16", "fits", 20),
    ]


def test_models_are_listed_from_the_largest() -> None:
    """Among equals the newest comes first."""
    assert largest_first([SMALL, NEWER, LARGE, HUGE]) == ORDERED


def test_a_smaller_format_that_fits_is_better_than_a_tight_one() -> None:
    """A tight format is taken only where no other fits."""
    choice = next(search([SMALL], ["fp16", "int8"], need, 200, band=0.1))
    assert (choice.format, choice.verdict) == ("int8", "fits")
    choice = next(search([SMALL], ["fp16"], need, 200, band=0.1))
    assert (choice.format, choice.verdict) == ("fp16", "tight")


def test_more_memory_loses_no_model() -> None:
    """Every model that fits a budget fits a larger one."""
    models = [SMALL, NEWER, LARGE, HUGE]
    before: set[str] = set()
    for budget in range(50, 2500, 50):
        found = {c.model.name for c in search(models, ["fp16", "int8"], need, budget, band=0.05)}
        assert before <= found
        before = found


def test_a_format_that_cannot_hold_a_model_is_skipped() -> None:
    """A need that does not exist is no answer, not zero."""
    found = search([SMALL], ["fp16", "int8"], lambda m, f: None if f == "fp16" else 1, 9, band=0)
    assert [c.format for c in found] == ["int8"]


def test_what_is_unknown_does_not_pass_a_filter() -> None:
    """A licence, a context or a size that is not known is not assumed."""
    assert wanted(SMALL, Filter(commercial=True, context=4096, min_parameters=100))
    assert not wanted(NEWER, Filter(commercial=True))
    assert not wanted(NEWER, Filter(context=1))
    assert not wanted(SMALL, Filter(families=("gpt2",)))
    assert not wanted(SMALL, Filter(min_parameters=101))
    uncounted = Architecture("new", "no-such-family", {}, "made up")
    assert wanted(uncounted, Filter())
    assert not wanted(uncounted, Filter(min_parameters=1))


def test_the_smallest_hardware_comes_first() -> None:
    """Hardware is ordered by its memory, and what is too small is left out."""
    offers = [("two", 2, 60), ("big", 1, 200), ("one", 1, 100), ("tiny", 1, 10)]
    found = enough(offers, lambda devices: 100 // devices, band=0.05)
    assert found == [("one", "tight"), ("two", "fits"), ("big", "fits")]


def test_only_what_is_asked_for_is_counted() -> None:
    """The first answer does not wait for the rest of the catalogue."""
    asked = []

    def counted(model: Architecture, format: str) -> int | None:
        asked.append(model.name)
        return need(model, format)

    next(search(ORDERED, ["fp16"], counted, 400, band=0))
    assert asked == ["huge", "large"]


def test_a_hopeless_model_is_not_asked_about() -> None:
    """What takes more than the budget by a bound that costs nothing is never traced."""
    asked = []

    def counted(model: Architecture, format: str) -> int | None:
        asked.append((model.name, format))
        return need(model, format)

    def least(model: Architecture, format: str) -> float:
        return 0.9 * (need(model, format) or 0)

    found = list(search([LARGE, HUGE], ["fp16", "int8"], counted, 220, band=0, least=least))
    assert [choice.model.name for choice in found] == ["large"]
    assert asked == [("large", "int8")]


def test_what_has_to_be_certain_is_not_tight() -> None:
    """Advice takes nothing that is within the error band while anything else fits."""
    found = search([SMALL], ["fp16"], need, 200, band=0.1, certain=True)
    assert list(found) == []


def test_the_newest_of_the_largest_class_is_the_best() -> None:
    """A newer model of a similar size comes before the largest, and a free one before both."""
    old = model("old", 100, released="2023-01", commercial=True)
    new = model("new", 90, released="2025-03", commercial=True)
    bound = model("bound", 95, released="2026-01", commercial=False)
    tiny = model("tiny", 10, released="2026-02", commercial=True)
    searched = partial(search, formats=["fp16"], need=need, budget=220, band=0.05)
    found = best([old, new, bound, tiny, HUGE], searched, 3)
    assert [choice.model.name for choice in found] == ["new", "old", "bound"]


def test_weights_that_cannot_be_had_fit_nowhere() -> None:
    """GPT-3's shape is published (arXiv:2005.14165) and its weights are not."""
    assert not wanted(model("gpt3", 10, licence="proprietary"), Filter())


def test_a_count_that_is_not_published_is_taken_from_the_anatomy() -> None:
    """Qwen3.5-27B names no count; 27 billion is what its name says."""
    qwen = presets.get(Architecture, "qwen3.5-27b")
    assert qwen.published_parameters is None
    assert 26e9 < parameters(qwen) < 28e9
    unknown = Architecture("new", "no-such-family", {}, "made up")
    assert parameters(unknown) == 0
