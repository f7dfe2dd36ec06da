"""Our dataclasses against those of the standard library."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from llmsize import quick_dataclasses


def shapes(module: ModuleType) -> dict[str, Any]:
    """The same classes, made by one module or the other."""

    @module.dataclass(frozen=True, slots=True)
    class Shape:
        """A shape."""

        layers: int
        sizes: tuple[int, ...] = ()
        config: Mapping[str, int] = module.field(default_factory=dict, hash=False)

        @property
        def deep(self) -> bool:
            return self.layers > 1

    @module.dataclass(frozen=True, slots=True)
    class Named(Shape):
        """A shape with a name, and another default."""

        name: str = "a"
        sizes: tuple[int, ...] = (1,)

    @module.dataclass(frozen=True)
    class Format:
        """One with a hash of its own."""

        name: str
        bits: int

        def __hash__(self) -> int:
            return hash(self.name)

    @module.dataclass(slots=True)
    class Tape:
        """One that changes."""

        events: list[int] = module.field(default_factory=list)
        grad: bool = True

    @module.dataclass(frozen=True, slots=True, eq=False)
    class Law:
        """One that equals itself alone."""

        name: str

    return {kind.__name__: kind for kind in (Shape, Named, Format, Tape, Law)}


STANDARD, OURS = shapes(dataclasses), shapes(quick_dataclasses)
CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("Shape", (2,), {}),
    ("Shape", (2, (3, 4), {"a": 1}), {}),
    ("Shape", (2,), {"config": {"a": 1}}),
    ("Named", (2,), {"name": "b"}),
    ("Named", (2, (), {}, "c"), {}),
    ("Format", ("fp16", 16), {}),
    ("Format", (), {"bits": 16, "name": "fp16"}),
    ("Tape", (), {}),
    ("Tape", ([1],), {"grad": False}),
    ("Law", ("kaplan",), {}),
]
MISTAKES: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("Shape", (), {}),
    ("Shape", (1,), {"layers": 2}),
    ("Shape", (1,), {"depth": 2}),
    ("Shape", (1, (), {}, 4), {}),
    ("Named", (), {"name": "b"}),
    ("Law", (), {}),
]


def test_they_have_the_fields_that_were_given() -> None:
    """Values by place and by name, and defaults, make what the standard library makes of them."""
    for name, values, named in CALLS:
        ours, standard = OURS[name](*values, **named), STANDARD[name](*values, **named)
        assert dataclasses.asdict(ours) == dataclasses.asdict(standard)
        assert repr(ours) == repr(standard)
        assert OURS[name].__match_args__ == STANDARD[name].__match_args__
        assert hasattr(ours, "__dict__") == hasattr(standard, "__dict__")


def test_they_refuse_the_same_calls() -> None:
    """A value that is missing, unknown, given twice or one too many is a `TypeError`."""
    for name, values, named in MISTAKES:
        for kinds in (OURS, STANDARD):
            with pytest.raises(TypeError):
                kinds[name](*values, **named)


def test_they_compare_and_hash_alike() -> None:
    """Any two are equal, and can be hashed, where those of the standard library are and can."""

    def pairs(kinds: dict[str, Any]) -> list[bool]:
        made = [kinds[name](*values, **named) for name, values, named in CALLS * 2]
        return [one == other for one in made for other in made]

    def hashes(kinds: dict[str, Any]) -> list[bool]:
        return [kind.__hash__ is not None for kind in kinds.values()]

    assert pairs(OURS) == pairs(STANDARD)
    assert hashes(OURS) == hashes(STANDARD)
    for name, values, named in CALLS:
        if name in ("Shape", "Named", "Format"):
            once, again = (hash(OURS[name](*values, **named)) for _ in range(2))
            assert once == again


def test_mappings_that_are_not_hashed_are_still_compared() -> None:
    """Two that differ in a field without hash are different and have one hash."""
    one, other = OURS["Shape"](1, (), {"a": 1}), OURS["Shape"](1, (), {"a": 2})
    assert one != other
    assert hash(one) == hash(other)


def test_frozen_ones_do_not_change() -> None:
    """Neither a field nor anything else can be set or deleted; others can."""
    shape = OURS["Shape"](1)
    for change in (lambda: setattr(shape, "layers", 2), lambda: delattr(shape, "layers")):
        with pytest.raises(AttributeError, match="cannot assign to field `layers`"):
            change()
    tape = OURS["Tape"]()
    tape.grad = False
    assert not tape.grad
    with pytest.raises(AttributeError):
        tape.unknown = 1  # it has slots


def test_a_default_that_changes_is_made_for_each() -> None:
    """Two tapes do not share their events."""
    one, other = OURS["Tape"](), OURS["Tape"]()
    one.events.append(1)
    assert other.events == []


def test_replace_changes_what_is_named() -> None:
    """All other fields stay; a field that there is not is a `TypeError`."""
    for replace in (quick_dataclasses.replace, dataclasses.replace):
        changed = replace(OURS["Named"](1, name="x"), layers=3)
        assert (changed.layers, changed.name, changed.deep) == (3, "x", True)
        with pytest.raises(TypeError):
            replace(changed, depth=2)


def test_they_are_dataclasses_for_everyone_who_asks() -> None:
    """`dataclasses.fields` and pydantic find the fields, their types and defaults."""
    for name, kind in OURS.items():
        assert dataclasses.is_dataclass(kind)
        found, standard = dataclasses.fields(kind), dataclasses.fields(STANDARD[name])
        assert [(f.name, f.type, f.default) for f in found] == [
            (f.name, f.type, f.default) for f in standard
        ]
    checker: TypeAdapter[Any] = TypeAdapter(OURS["Format"])
    assert checker.validate_python({"name": "fp16", "bits": 16}) == OURS["Format"]("fp16", 16)
    with pytest.raises(ValidationError):
        checker.validate_python({"name": "fp16", "bits": "many"})
