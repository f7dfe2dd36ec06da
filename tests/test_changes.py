"""Finding the cheapest change, with questions that are plain numbers."""

from llmsize.planning.changes import Change, applied, combination, single

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


def test_a_change_that_changes_nothing_is_never_named() -> None:
    """Even a free change is left out where it makes no other question."""
    assert single(100, [NOTHING], lambda size: True) is None
    assert combination(100, [NOTHING], lambda size: True) is None
