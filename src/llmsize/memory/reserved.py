"""What PyTorch's allocator takes beyond the tensors of a model: whole blocks, and gaps.

The caching allocator (c10/cuda/CUDACachingAllocator.cpp of v2.6) takes segments from the driver and
cuts them into blocks. No remainder of 1 MiB or less is cut off: the tensor has it, and it counts as
allocated. A segment goes back only when nothing is left in it. A matrix that is quantized on the
device was loaded into a segment of its own; the smaller, quantized ones are cut from segments of
matrices and temporaries before them, and their remainders stay. Small blocks (up to 1 MiB) are
left out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from math import inf

from llmsize.errors import LLMSizeError
from llmsize.units import MIB

SMALL = MIB
"""Blocks up to this size have a pool of their own, and no remainder of this size is cut off."""
BLOCK = 512
"""Blocks are multiples of so many bytes."""
MIDDLE, MIDDLE_SEGMENT = 10 * MIB, 20 * MIB
"""Blocks below 10 MiB share segments of 20 MiB."""
SEGMENT_UNIT = 2 * MIB
PAGE = MIDDLE_SEGMENT
"""What a segment that is expandable grows and shrinks by."""
ENDLESS = 2**62
"""Addresses that it may grow to: far beyond any device."""

FIELD = 64
"""Bits of an address: a number with bytes above them is ordered as PyTorch orders free blocks, and
compared faster than a pair."""
LOW = (1 << FIELD) - 1

Block = tuple[int, int]
"""Where a block starts, and its bytes."""


def whole(size: int) -> int:
    """The size in whole blocks (`round_size`)."""
    return -(-size // BLOCK) * BLOCK


class OutOfMemory(Exception):
    """No free block is large enough, and the device has no room for more of them."""

    def __init__(self, reserved: int) -> None:
        """`reserved` is what would have to be."""
        super().__init__(reserved)
        self.reserved = reserved


class Segments:
    """The large pool: segments by address, and their free blocks."""

    least_rest = SMALL + 1
    """The smallest remainder that is cut off."""

    def __init__(self, free: Iterable[int] = (), room: float = inf) -> None:
        """Nothing reserved but blocks of those sizes, none of which is used."""
        self.room = room
        """Bytes that the device has for segments."""
        self.reserved = 0
        """Bytes of all segments."""
        self.most = 0
        """The most that they were at once."""
        self.asked = 0
        """Bytes that the driver was asked for, whether or not they went back."""
        self.free: list[int] = []
        """Bytes and start of free blocks in one number each (`FIELD`), the tightest first."""
        self.at: dict[int, int] = {}
        """Start → bytes of free blocks."""
        self.before: dict[int, int] = {}
        """End → start of free blocks."""
        self.segments: dict[int, int] = {}
        """Start → bytes."""
        self.unmapped: dict[int, int] = {}
        """Start → end of what has addresses and no pages, where those are apart."""
        self.end = 0
        for size in free:
            self._add(self.end, size)
            self.end += size + 1

    def take(self, size: int) -> Block:
        """A block of at least `size` bytes: from the tightest free one, or from more memory.

        Raises `OutOfMemory` where there is none even once free segments have gone back.
        """
        return self.place(whole(size)) if size > SMALL else (0, 0)

    def place(self, size: int) -> Block:
        """The same for a size that is `whole`."""
        free = self.free
        index = bisect_left(free, size << FIELD)
        if self.unmapped:
            index = self._not_growing(index)
        if index < len(free):
            key = free.pop(index)
            start, room = key & LOW, key >> FIELD
            del self.at[start]
        else:
            start, room = self._more(size)
        rest = room - size
        if rest < self.least_rest:
            self.before.pop(start + room, None)
            return start, room
        after = start + size
        self.at[after], self.before[start + room] = rest, after
        insort(free, rest << FIELD | after)
        return start, size

    def give(self, block: Block) -> None:
        """Return a block, joined with its free neighbours."""
        start, size = block
        if not size:
            return
        at, before, free, end = self.at, self.before, self.free, start + size
        if end in at:
            more = at.pop(end)
            del free[bisect_left(free, more << FIELD | end)]
            end += more
        if start in before:
            start = before.pop(start)
            del free[bisect_left(free, at[start] << FIELD | start)]
        at[start], before[end] = end - start, start
        insort(free, end - start << FIELD | start)

    def sizes(self) -> list[int]:
        """Bytes of the free blocks, the tightest first."""
        return [key >> FIELD for key in self.free]

    def release(self) -> None:
        """Give back what no block is used of: whole segments (`release_cached_blocks`)."""
        for start, size in list(self.segments.items()):
            if self.at.get(start) == size:
                self._remove(start)
                del self.segments[start]
                self.reserved -= size

    def _not_growing(self, index: int) -> int:
        """A block that pages may follow counts with them, so others go first (`get_free_block`)."""
        while index + 1 < len(self.free):
            (start, end), (following, last) = _ends(self.free[index]), _ends(self.free[index + 1])
            if self.unmapped.get(end, end) - start <= self.unmapped.get(last, last) - following:
                break
            index += 1
        return index

    def _more(self, size: int) -> Block:
        """What the driver has, or has once all that is free went back (`malloc`)."""
        try:
            return self._new(size)
        except OutOfMemory:
            self.release()
            return self._new(size)

    def _new(self, size: int) -> Block:
        """A new segment, whole; neighbours are not joined."""
        size = MIDDLE_SEGMENT if size < MIDDLE else -(-size // SEGMENT_UNIT) * SEGMENT_UNIT
        self._reserve(size)
        start, self.end = self.end, self.end + size + 1
        self.segments[start] = size
        return start, size

    def _reserve(self, size: int) -> None:
        if self.reserved + size > self.room:
            raise OutOfMemory(self.reserved + size)
        self.reserved += size
        self.asked += size
        self.most = max(self.most, self.reserved)

    def _add(self, start: int, size: int) -> None:
        self.at[start], self.before[start + size] = size, start
        insort(self.free, size << FIELD | start)

    def _remove(self, start: int) -> int:
        size = self.at.pop(start)
        del self.before[start + size]
        del self.free[bisect_left(self.free, size << FIELD | start)]
        return size


class Expandable(Segments):
    """The same with `expandable_segments:True`: one segment of pages, mapped as they are needed."""

    least_rest = BLOCK

    def __init__(self, free: Iterable[int] = (), room: float = inf) -> None:
        """Nothing of it has pages."""
        super().__init__(free, room)
        self.unmapped = {self.end: ENDLESS}

    def release(self) -> None:
        """Give back the pages that are free altogether (`unmap_block`)."""
        for start, size in list(self.at.items()):
            first, last = -(-start // PAGE) * PAGE, (start + size) // PAGE * PAGE
            if first < last:
                self._remove(start)
                if start < first:
                    self._add(start, first - start)
                if last < start + size:
                    self._add(last, start + size - last)
                self.reserved -= last - first
                self._unmap(first, last)

    def _unmap(self, start: int, end: int) -> None:
        end = self.unmapped.pop(end, end)
        start = next((first for first, last in self.unmapped.items() if last == start), start)
        self.unmapped[start] = end

    def _new(self, size: int) -> Block:
        """Pages at the first place for them, with what is free there (`find_expandable_block`)."""
        start = self._place(size)
        while (free := self.at.get(start, 0)) < size:
            page = start + free
            end = self.unmapped[page]
            more = min(-(-(size - free) // PAGE) * PAGE, end - page)
            self._reserve(more)
            del self.unmapped[page]
            if page + more < end:
                self.unmapped[page + more] = end
            self.give((page, more))
        return start, self._remove(start)

    def _place(self, size: int) -> int:
        """The first address that is followed by enough that is unmapped or free."""
        for page in sorted(self.unmapped):
            start = end = self.before.get(page, page)
            while end - start < size and (end in self.at or end in self.unmapped):
                end = self.unmapped.get(end) or end + self.at[end]
            if end - start >= size:
                break
        return start


def _ends(key: int) -> Block:
    """Start and end of a free block."""
    start = key & LOW
    return start, start + (key >> FIELD)


def beyond_tensors(layers: Iterable[Sequence[int]]) -> int:
    """Bytes of the blocks that the tensors of each of `layers` get in turn, less their own."""
    beyond = 0
    free: tuple[int, ...] = ()
    large = [tuple([size for size in sizes if size > SMALL]) for sizes in layers]
    least = min(chain.from_iterable(large), default=0)
    for sizes in large:
        more, free = _beyond(sizes, least, free)
        beyond += more
    return beyond


@lru_cache(maxsize=1024)  # layers repeat, and soon leave what they found
def _beyond(sizes: Sequence[int], least: int, free: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """The same of one layer, and the free blocks after it; `free` are those before it.

    Of blocks below the `least` tensor none is ever taken, so they are not told.
    """
    pool = Segments(free)
    beyond = sum(pool.take(size)[1] - size for size in sizes)
    return beyond, tuple([size for size in pool.sizes() if size >= least])


def gaps_of_quantizing(matrices: Iterable[tuple[int, int]], steps: str) -> int:
    """Bytes reserved and unused after matrices of (elements, bytes) were quantized in turn.

    `steps` is what quantizing one allocates and frees: `+name:bytes per element`, `-name`, in the
    order of the library; at its end the matrix itself is freed, and what is left is the result.
    Raises `LLMSizeError` for steps that cannot be read.
    """
    pool = Segments()
    loaded = [(pool.take(size), elements) for elements, size in matrices if size > SMALL]
    for block, elements in loaded:
        live: dict[str, Block] = {}
        for step in steps.split():
            name, _, size = step[1:].partition(":")
            try:
                if step[0] == "-":
                    pool.give(live.pop(name))
                else:
                    live[name] = pool.take(int(elements * float(size)))
            except (KeyError, ValueError):
                raise LLMSizeError(
                    f"cannot read the step `{step}` of quantizing",
                    hint="write `+name:bytes` for what is allocated, `-name` for what is freed",
                ) from None
        pool.give(block)
    pool.release()
    return sum(pool.sizes())
