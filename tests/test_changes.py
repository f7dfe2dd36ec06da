"""Finding the cheapest change, with questions that are plain numbers."""

from llmsize.errors import LLMSizeError
from llmsize.planning.changes import Change, applied, combination, ranked, single
from llmsize.term import Term, fact

HALVE: Change[int] = Change("halve", 3, "quality", lambda size: size // 2)
TRIM: Change[int] = Change("trim", 1, "a little time", lambda size: size - 10)
NOTHING: Change[int] = Change("nothing", 0, "nothing", lambda size: size)
CHANGES = [HALVE, NOTHING, TRIM]


def test_the_cheapest_change_that_is_enough() -> None:
    """A dearer change is named only where a cheaper one is not enough."""
    assert single(100, CHANGES, lambda size: size <= 90) == TRIM
    assert single(100, CHANGES, lambda size: size <= 50) == HALVE
    assert single(100, CHANGES, lambda size: size <= 45) is None


def test_the_cheapest_combination() -> None:
    """Where no single change is enough, the set with the lowest price is."""
    chosen = combination(100, CHANGES, lambda size: size <= 45)
    assert chosen == (HALVE, TRIM)
    assert applied(100, chosen) == 40
    assert combination(100, CHANGES, lambda size: size <= 1) is None
    assert combination(100, CHANGES, lambda size: size <= 45, below=4) is None


def test_a_change_that_changes_nothing_is_never_named() -> None:
    """Even a free change is left out where it makes no other question."""
    assert single(100, [NOTHING], lambda size: True) is None
    assert combination(100, [NOTHING], lambda size: True) is None


def test_changes_are_ranked_by_what_they_save() -> None:
    """The most first; what saves nothing, or is impossible, is left out."""
    forbid: Change[int] = Change("forbid", 2, "all", lambda size: -1)
    grow: Change[int] = Change("grow", 2, "memory", lambda size: size + 1)

    def need(size: int) -> Term:
        if size < 0:
            raise LLMSizeError("below nothing", hint="stay above")
        return fact("size", size, unit="bytes", source="given")

    found = ranked(100, [*CHANGES, forbid, grow], need)
    assert [(each.change, each.then.value, each.saved) for each in found] == [
        (HALVE, 50, 50),
        (TRIM, 90, 10),
    ]


def test_a_change_that_another_makes_idle_is_not_tried_with_it() -> None:
    """A set in which one change alone does everything is never asked about."""
    first: Change[int] = Change("first", 1, "a little", lambda size: min(size, 80))
    second: Change[int] = Change("second", 2, "more", lambda size: min(size, 60))
    asked: list[int] = []

    def enough(size: int) -> bool:
        asked.append(size)
        return False

    assert combination(100, [first, second], enough) is None
    assert asked == [80, 60]
