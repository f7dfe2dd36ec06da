"""The part of the standard library's `dataclasses` that llmsize uses, without its start-up time.

`dataclasses` writes the methods of every class as source code and compiles it, and imports
`inspect` for that: a fifth of the time of an estimate. Here all classes share their methods. They
are dataclasses for everyone who asks: `dataclasses.fields`, pydantic, type checkers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

_REQUIRED: Any = object()
"""In place of a default: there is none."""


class _Field:
    """What a class says of one field."""

    __slots__ = ("default", "factory", "hashed", "type")

    def __init__(
        self,
        *,
        default: object = _REQUIRED,
        default_factory: Callable[[], object] | None = None,
        hash: bool = True,
    ) -> None:
        self.default = default
        self.factory = default_factory
        self.hashed = hash
        self.type = ""

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is _REQUIRED and self.factory is None


class _Shape:
    """The fields of a class by name, those of its bases first, as its methods need them."""

    __slots__ = ("fields", "hashed", "named", "setters", "values")

    def __init__(self, fields: Mapping[str, _Field]) -> None:
        self.fields = fields
        self.named = tuple(fields.items())
        self.values = _values_of(*fields)
        self.hashed = _values_of(*(name for name, field in fields.items() if field.hashed))
        self.setters: Sequence[Callable[[object, object], None]] = ()


def _values_of(*names: str) -> Callable[[object], object]:
    """What gives the values of these fields, to compare or to hash them."""
    return attrgetter(*names) if names else lambda instance: ()


def _setter(kind: type, name: str) -> Callable[[object, object], None]:
    """What sets a field also where the class is frozen."""
    if hasattr(kind, name):  # a slot
        return getattr(kind, name).__set__  # type: ignore[no-any-return]
    return lambda instance, value: object.__setattr__(instance, name, value)


def _init(self: Any, /, *values: object, **named: object) -> None:
    shape: _Shape = self._shape
    if named or len(values) != len(shape.named):
        values = _complete(type(self), values, named)
    for assign, value in zip(shape.setters, values, strict=True):
        assign(self, value)


def _complete(kind: Any, values: Sequence[object], named: dict[str, object]) -> tuple[object, ...]:
    """A value for every field: by its place, by its name, or its default."""
    shape: _Shape = kind._shape
    made = [*values]
    for name, field in shape.named[len(values) :]:
        if name in named:
            made.append(named.pop(name))
        elif field.factory:
            made.append(field.factory())
        elif field.default is _REQUIRED:
            raise TypeError(f"{kind.__name__}: `{name}` is missing")
        else:
            made.append(field.default)
    if named:
        raise TypeError(f"{kind.__name__}: no `{next(iter(named))}`, or it is given twice")
    if len(values) > len(shape.named):
        raise TypeError(f"{kind.__name__} has {len(shape.named)} fields")
    return tuple(made)


def _comparing(shape: _Shape, frozen: bool) -> dict[str, Any]:
    """The methods that compare and hash, with what they need at hand."""
    values, hashed = shape.values, shape.hashed

    def equal(self: object, other: object) -> Any:
        if type(self) is not type(other):
            return NotImplemented
        return self is other or values(self) == values(other)

    return {"__eq__": equal, "__hash__": (lambda self: hash(hashed(self))) if frozen else None}


def _repr(self: Any) -> str:
    said = (f"{name}={getattr(self, name)!r}" for name in self._shape.fields)
    return f"{type(self).__qualname__}({', '.join(said)})"


def _refuse(self: object, name: str, value: object = None) -> None:
    raise AttributeError(f"cannot assign to field `{name}` of a frozen {type(self).__name__}")


class _StandardFields:
    """The fields as the standard library has them, made when they are first asked for."""

    def __get__(self, instance: object, kind: Any) -> dict[str, Any]:
        from dataclasses import field, fields, make_dataclass

        def standard(said: _Field) -> Any:
            if said.factory:
                return field(default_factory=said.factory)
            return field() if said.required else field(default=said.default)

        named = [(name, said.type, standard(said)) for name, said in kind._shape.fields.items()]
        made = {one.name: one for one in fields(make_dataclass("Fields", named))}
        kind.__dataclass_fields__ = made
        return made


def _said(kind: type, name: str) -> _Field:
    """The field that an annotated name of a class is."""
    value = vars(kind).get(name, _REQUIRED)
    field = value if isinstance(value, _Field) else _Field(default=value)
    field.type = kind.__annotations__[name]
    return field


def _dataclass(
    *, frozen: bool = False, slots: bool = False, eq: bool = True, repr: bool = True
) -> Callable[[type], type]:
    """`dataclasses.dataclass`; methods that the class has of its own stay."""
    methods: dict[str, object] = {"__init__": _init}
    if repr:
        methods["__repr__"] = _repr
    if frozen:
        methods |= {"__setattr__": _refuse, "__delattr__": _refuse}

    def decorate(kind: type) -> type:
        own = {name: _said(kind, name) for name in kind.__annotations__}
        inherited = kind._shape.fields if hasattr(kind, "_shape") else {}
        shape = _Shape({**inherited, **own})
        left_out = {*own, "__dict__", "__weakref__"}
        compared = _comparing(shape, frozen) if eq else {}
        namespace = methods | compared
        namespace |= {name: v for name, v in vars(kind).items() if name not in left_out}
        if slots:
            namespace["__slots__"] = tuple(name for name in own if name not in inherited)
        namespace |= {
            "__qualname__": kind.__qualname__, "__match_args__": tuple(shape.fields),
            "__dataclass_fields__": _StandardFields(), "_shape": shape,
        }  # fmt: skip
        made = type(kind)(kind.__name__, kind.__bases__, namespace)
        shape.setters = [_setter(made, name) for name in shape.fields]
        return made

    return decorate


def _replace(instance: Any, /, **changes: object) -> Any:
    """The same with some fields changed."""
    kind = type(instance)
    values = [
        changes.pop(name) if name in changes else getattr(instance, name)
        for name in kind._shape.fields
    ]
    return kind(*values, **changes)  # a name that is left is no field


def field_names(kind: Any) -> tuple[list[str], list[str]]:
    """The names of all fields of a class, and of those without a default, in order."""
    shape: _Shape = kind._shape
    return list(shape.fields), [name for name, field in shape.named if field.required]


if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
    from dataclasses import field as field
    from dataclasses import replace as replace
else:
    dataclass, field, replace = _dataclass, _Field, _replace
