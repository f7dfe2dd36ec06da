"""Named tuples as `typing.NamedTuple` makes them, without its start-up time.

`typing` compiles the annotation of every field, a tenth of the time of an estimate. These keep
annotations as they are written.
"""

from __future__ import annotations

from collections import namedtuple
from typing import TYPE_CHECKING, Any


class _Making(type):
    """Makes a tuple of the fields that a class annotates, with the methods that it has."""

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        if not bases:
            return super().__new__(cls, name, bases, namespace)
        fields = namespace["__annotations__"]
        defaults = [namespace[field] for field in fields if field in namespace]
        module = namespace["__module__"]
        made = namedtuple(name, fields, defaults=defaults, module=module)  # type: ignore[misc]
        for attribute in namespace.keys() - fields.keys() - {"__module__"}:
            setattr(made, attribute, namespace[attribute])
        return made


class _NamedTuple(metaclass=_Making):
    """What named tuples are written as subclasses of."""


if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:
    NamedTuple = _NamedTuple
