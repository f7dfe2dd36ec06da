"""Our named tuples against those of the standard library."""

from __future__ import annotations

import typing
from typing import Any, get_type_hints

import pytest

from llmsize import quick_tuples


def made(base: Any) -> Any:
    """The same class, made by one or the other."""

    class Storage(base):  # type: ignore[misc]
        """How weights are stored."""

        name: str
        bits: int = 16
        roles: tuple[str, ...] = ()

        @property
        def bytes(self) -> int:
            return self.bits // 8

        def __hash__(self) -> int:
            return hash(self.name)

    return Storage


OURS, STANDARD = made(quick_tuples.NamedTuple), made(typing.NamedTuple)


def test_their_classes_say_the_same() -> None:
    """Fields, defaults, annotations, names and docstrings are those of the standard library."""
    for said in ("_fields", "_field_defaults", "__doc__", "__name__", "__module__", "__slots__",
                 "__match_args__", "__mro__"):  # fmt: skip
        ours, standard = getattr(OURS, said), getattr(STANDARD, said)
        assert ours[1:] == standard[1:] if said == "__mro__" else ours == standard
    assert get_type_hints(OURS) == get_type_hints(STANDARD)


@pytest.mark.parametrize(
    ("values", "named"), [(("a",), {}), (("a", 8, ("q",)), {}), ((), {"bits": 4, "name": "b"})]
)
def test_they_have_the_values_that_were_given(values: Any, named: Any) -> None:
    """By place, by name or by default, and what is made of them."""
    ours, standard = OURS(*values, **named), STANDARD(*values, **named)
    assert tuple(ours) == tuple(standard)
    assert (ours.bytes, hash(ours), repr(ours)) == (standard.bytes, hash(standard), repr(standard))
    assert ours._replace(bits=2) == standard._replace(bits=2)
    assert ours._asdict() == standard._asdict()


@pytest.mark.parametrize(("values", "named"), [((), {}), (("a",), {"width": 1}), (range(4), {})])
def test_they_refuse_the_same_calls(values: Any, named: Any) -> None:
    """A value that is missing, unknown or one too many is a `TypeError`."""
    for kind in (OURS, STANDARD):
        with pytest.raises(TypeError):
            kind(*values, **named)


def test_they_do_not_change() -> None:
    """Neither a field nor anything else can be set."""
    for name in ("bits", "width"):
        with pytest.raises(AttributeError):
            setattr(OURS("a"), name, 1)
