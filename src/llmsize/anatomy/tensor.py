"""Tensors that have a shape, a format and a lifetime, but no data.

A `Tensor` refers to a `Storage`. A storage reports its birth and, when its last reference goes, its
death: Python's own reference counting releases it where the reference implementation's would,
because a family's forward pass holds its tensors in the same variables.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple
from weakref import ref

from llmsize.anatomy.layout import Strides, elementwise
from llmsize.formats import Format, stored_bytes

if TYPE_CHECKING:
    from llmsize.anatomy.autograd import Node

Role = Literal["temporary", "kept", "gradient", "cast", "cache"]
"""Why a storage is alive: in passing, for the backward pass, as a trained weight's gradient, as
autocast's 16-bit copy of a weight, or as cache for the next token."""


class Dim(int):
    """A whole number that knows what it counts: `Dim(4096, "hidden")`."""

    name: str

    def __new__(cls, size: int, name: str) -> Dim:
        """A dimension of `size`, called `name` where a formula is shown."""
        dim = super().__new__(cls, size)
        dim.name = name
        return dim


Shape = tuple[int, ...]


def named(size: int) -> str:
    """The name of a dimension, or its digits."""
    return getattr(size, "name", None) or str(int(size))


class What(NamedTuple):
    """What a storage holds: enough to explain its bytes."""

    role: Role
    operation: str
    """The operation that made it."""
    layer: int
    """Number of the traced part of a layer it was made in; `OUTSIDE` of them, or `HANDED_ON`."""
    shape: Shape
    format: Format


Label = tuple[Role, str, int, Shape, Format]
"""What a storage holds as events carry it: the parts of a `What`, which takes four times as long to
make. Each is one storage's own, by which events of a storage know each other."""

OUTSIDE = -1
"""Where what belongs to no layer is made: embedding, head, what all layers share."""

HANDED_ON = -2
"""Where what one layer hands the next is made, whichever made it."""

HIDDEN_STATES = "hidden_states"
HIDDEN_STATES_GRADIENT = "hidden_states_gradient"
"""What layers hand each other on the way forward and on the way back."""

blank = object.__new__
"""Makes what is filled by hand, in half the time that a constructor takes."""

Event = tuple[int, Label]
"""Bytes that come to life (positive) or are released (negative)."""


class Later(int):
    """Bytes that go in later turns of a loop of which one turn stands for many."""


class Storage:
    """Bytes on the device, from the operation that makes them to their last reference."""

    __slots__ = ("__weakref__", "bytes", "events", "label", "others")

    def __init__(self, events: list[Event], label: Label, size: int) -> None:
        """Bring `size` bytes to life."""
        self.events = events
        self.bytes = size
        self.others: Others | None = None
        """The like of it, made in the turns of a loop that its turn stands for."""
        self.label = label
        events.append((size, label))

    def __del__(self) -> None:
        self.events.append((-self.bytes, self.label))

    @property
    def what(self) -> What:
        """What it holds."""
        return What(*self.label)

    def repeat(self, times: int) -> None:
        """Stand for `times` more of the kind."""
        role, operation, layer, shape, format = self.label
        label = role, operation, layer, shape, format
        self.others = Others(self.events, label, times * self.bytes)

    def becomes(self, role: Role) -> None:
        """From now on it lives for another reason."""
        before, operation, layer, shape, format = self.label
        if before != role:
            self._relabel((role, operation, layer, shape, format))
            if self.others is not None:
                self.others.becomes(role)

    def hand_on(self, operation: str, shape: Shape, layer: int = HANDED_ON) -> None:
        """From now on it is what layers hand each other."""
        role, _, _, _, format = self.label
        self._relabel((role, operation, layer, shape, format))

    def lend(self, operation: str, shape: Shape) -> Lent:
        """Its bytes as what the first layer is handed, until that is let go of."""
        role, _, _, _, format = self.label
        size, self.bytes = self.bytes, 0
        self.events.append((-size, self.label))
        return Lent(self.events, (role, operation, HANDED_ON, shape, format), size, self)

    def _relabel(self, label: Label) -> None:
        self.events += ((-self.bytes, self.label), (self.bytes, label))
        self.label = label

    def keep(self) -> None:
        """From now on it waits for the backward pass, if nothing else holds it yet."""
        if self.label[0] == "temporary":
            self.becomes("kept")


class Lent(Storage):
    """The bytes of another storage, which has them back if it outlives this one."""

    __slots__ = ("lender",)

    def __init__(self, events: list[Event], label: Label, size: int, lender: Storage) -> None:
        """Take over the bytes of `lender`."""
        super().__init__(events, label, size)
        self.lender = ref(lender)

    def __del__(self) -> None:
        self.events.append((-self.bytes, self.label))
        lender = self.lender()
        if lender is not None:
            lender.bytes = self.bytes
            lender.events.append((lender.bytes, lender.label))


class Others(Storage):
    """What a storage stands for; it goes when the turns do in which it was made."""

    __slots__ = ()

    def __del__(self) -> None:
        self.events.append((Later(-self.bytes), self.label))


class Tensor:
    """A view of a storage, with the edge by which its gradient flows back."""

    __slots__ = ("format", "node", "own", "shape", "slot", "storage", "strides")

    def __init__(
        self,
        shape: Shape,
        format: Format,
        storage: Storage | None,
        node: Node | None = None,
        slot: int = 0,
        strides: Strides = None,
        own: bool = False,
    ) -> None:
        """`storage` is `None` for what lives outside the step: weights and inputs.

        `strides` say how its numbers lie in memory; `None` is row-major.
        """
        self.shape = shape
        self.format = format
        self.storage = storage
        self.node = node
        self.slot = slot
        self.strides = strides
        self.own = own
        """Whether the storage was made for it; what views one made for another does not own it."""

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """What its numbers take in its own format, shared or not."""
        return stored_bytes(self.format, prod(self.shape))

    def view(self, *shape: int) -> Tensor:
        """The same numbers, row-major, in another shape; the gradient passes unchanged."""
        return Tensor(shape, self.format, self.storage, self.node, self.slot)


def laid_out(tensor: Tensor, *like: Tensor) -> Tensor:
    """`tensor`, laid out as an elementwise operation on `like` lays out its result."""
    for operand in like:
        if operand.strides is not None:
            tensor.strides = elementwise(tensor.shape, *[(x.shape, x.strides) for x in like])
            break
    return tensor
