"""How a tensor's numbers lie in memory: strides, and which views need a copy.

PyTorch's rules (aten/src/ATen/TensorUtils.cpp `computeStride`, TensorIterator.cpp
`reorder_dimensions`, v2.13). `None` stands for row-major without gaps, as most tensors are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

Strides = tuple[int, ...] | None
"""Elements from one entry of each dimension to the next."""

Shape = tuple[int, ...]


@lru_cache(maxsize=4096)
def row_major(shape: Shape) -> tuple[int, ...]:
    """The strides of a tensor whose last dimension lies closest."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


@lru_cache(maxsize=4096)
def tidy(shape: Shape, strides: tuple[int, ...]) -> Strides:
    """`None` where strides are row-major; those of dimensions of one entry do not count."""
    usual = row_major(shape)
    if strides == usual:
        return None
    different = any(n > 1 and a != b for n, a, b in zip(shape, strides, usual, strict=True))
    return strides if different else None


@lru_cache(maxsize=4096)
def moved(shape: Shape, strides: Strides, order: tuple[int, ...]) -> Strides:
    """The strides after the dimensions change places."""
    old = strides or row_major(shape)
    return tidy(tuple([shape[i] for i in order]), tuple([old[i] for i in order]))


def channels_last(shape: Shape) -> Strides:
    """The strides of four dimensions whose second one lies closest."""
    batch, channels, height, width = shape
    return moved((batch, height, width, channels), None, (0, 3, 1, 2))


def looks_channels_last(shape: Shape, strides: Strides) -> bool:
    """Whether strides are like those of an image with its channels closest.

    c10/core/MemoryFormat.h, `is_channels_last_strides_2d_s4` (torch v2.13).
    """
    if strides is None or len(shape) != 4:
        return False
    within = 0
    for dim in (1, 3, 2, 0):
        if strides[dim] < within or (dim == 0 and within == strides[1]):
            return False
        within = strides[dim] * shape[dim]
    return strides[1] > 0


def viewed(shape: Shape, strides: Strides, new: Shape) -> tuple[bool, Strides]:
    """Whether a tensor can be seen in the shape `new` without a copy, and its strides then."""
    if strides is None:
        return True, None
    result: list[int] = []
    rest = list(reversed(new))
    at = 0
    runs = _runs(shape, strides)
    for size, step in runs:
        seen = 1
        while at < len(rest) and (seen < size or rest[at] == 1):
            result.append(step * seen)
            seen *= rest[at]
            at += 1
        if seen != size:
            return False, None
    return True, tidy(new, tuple(reversed(result)))


def _runs(shape: Shape, strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Stretches of dimensions that lie one within the other, innermost first: size and step."""
    runs: list[tuple[int, int]] = []
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if runs and step == runs[-1][0] * runs[-1][1]:
            runs[-1] = (runs[-1][0] * size, runs[-1][1])
        else:
            runs.append((size, step))
    return runs or [(1, 1)]


@lru_cache(maxsize=4096)
def elementwise(shape: Shape, *operands: tuple[Shape, Strides]) -> Strides:
    """The strides of a new result of `shape`: its dimensions lie as those of the first operand do,
    and where that is broadcast, of the next."""
    own, given = operands[0]
    if given is not None and own == shape and _is_dense(shape, given):
        return given  # all dimensions lie as the first operand's do, and it leaves nothing out
    steps = [_broadcast(shape, *operand) for operand in operands]
    order: list[int] = []
    for dim in reversed(range(len(shape))):
        place = len(order)
        while place and _closer(dim, order[place - 1], steps):
            place -= 1
        order.insert(place, dim)
    strides = [0] * len(shape)
    step = 1
    for dim in order:
        strides[dim] = step
        step *= shape[dim]
    return tidy(shape, tuple(strides))


def _is_dense(shape: Shape, strides: tuple[int, ...]) -> bool:
    """Whether the numbers fill the memory from the first to the last, each of them alone.

    Not where a dimension has one entry, whose stride says nothing.
    """
    last = sum([(n - 1) * step for n, step in zip(shape, strides, strict=True)])
    return 1 not in shape and 0 not in strides and last + 1 == prod(shape)


def _broadcast(shape: Shape, own: Shape, strides: Strides) -> tuple[int, ...]:
    own_steps = strides or row_major(own)
    kept = [0 if n == 1 else step for n, step in zip(own, own_steps, strict=True)]
    return (*[0] * (len(shape) - len(own)), *kept)


def _closer(dim: int, other: int, steps: Sequence[tuple[int, ...]]) -> bool:
    """Whether `dim` lies closer than `other` by the first operand that has both."""
    for operand in steps:
        if operand[dim] and operand[other] and operand[dim] != operand[other]:
            return operand[dim] < operand[other]
    return False
