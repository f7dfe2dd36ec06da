"""ggml's graph allocator: the smallest buffers that a graph can be computed in (ggml-alloc.c)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from llmsize.formats import stored_bytes
from llmsize.memory.llamacpp.cache import Memory, aligned
from llmsize.memory.llamacpp.tensors import IN_PLACE, Tensor, flash_scratch
from llmsize.quick_dataclasses import dataclass

ENDLESS = 1 << 62


class Arena:
    """Free blocks of one buffer by address; the last has no end, and the buffer grows into it."""

    def __init__(self) -> None:
        """An empty buffer."""
        self.free = [(0, ENDLESS)]
        self.size = 0

    def take(self, size: int) -> int:
        """The address of the tightest free block that holds `size` bytes."""
        fits = [(room, -i) for i, (_, room) in enumerate(self.free[:-1]) if room >= size]
        index = -min(fits)[1] if fits else len(self.free) - 1
        start, room = self.free[index]
        if room == size:
            del self.free[index]
        else:
            self.free[index] = (start + size, room - size)
        self.size = max(self.size, start + size)
        return start

    def give(self, start: int, size: int) -> None:
        """Return a block and join it with free neighbours, as `ggml_dyn_tallocr_free_bytes` does.

        It looks no further than one neighbour on: blocks of no size, which a graph may have, keep
        others apart.
        """
        free = self.free
        for index, (first, room) in enumerate(free):
            if first + room == start:
                free[index] = (first, room + size)
                self._join(index)
                return
            if start + size == first:
                free[index] = (start, size + room)
                self._join(index - 1)
                return
        free.insert(bisect_left(free, (start, 0)), (start, size))

    def _join(self, index: int) -> None:
        """Join a block with the next one if nothing is between them."""
        if not 0 <= index < len(self.free) - 1:
            return
        (start, room), (after, more) = self.free[index : index + 2]
        if start + room == after:
            self.free[index : index + 2] = [(start, room + more)]


@dataclass(slots=True)
class Use:
    """What is left to do with a tensor, and where it is."""

    children: int = 0
    views: int = 0
    device: int = -1
    start: int = 0
    owned: bool = False


def allocation(tensor: Tensor, memory: Memory) -> int:
    """Bytes that `memory` sets aside for `tensor`."""
    size = tensor.bytes
    if memory.row_padding > 1:
        if tensor.operation == "flash_attention":
            size += flash_scratch(tensor)
        gap = -tensor.shape[0] % memory.row_padding
        if tensor.format.block_elements > 1 and gap:
            size += stored_bytes(tensor.format, gap)
    return aligned(size, memory.alignment)


class Allocator:
    """One pass over a graph whose nodes have a device each."""

    def __init__(self, memories: Sequence[Memory]) -> None:
        """`memories` are the devices', the host last."""
        self.memories = memories
        self.arenas = [Arena() for _ in memories]
        self.uses: dict[int, Use] = {}

    def run(self, leaves: list[tuple[Tensor, int]], nodes: list[tuple[Tensor, int]]) -> list[int]:
        """Bytes of the compute buffer of every device."""
        for leaf, device in leaves:
            self._allocate(leaf, device)
        for node, device in nodes:
            if node.base is not None and node.operation != "none":
                self._use(node.base).views += 1
            if node.is_input:
                self._allocate(node, device)
            for source in node.sources:
                self._use(source).children += 1
                if source.is_input:
                    self._allocate(source, device)
        for node, device in nodes:
            for source in node.sources:
                self._allocate(source, device)
            self._allocate(node, device)
            for source in node.sources:
                self._done(source)
        return [arena.size for arena in self.arenas]

    def _use(self, tensor: Tensor) -> Use:
        use = self.uses.get(id(tensor))
        if use is None:
            use = self.uses[id(tensor)] = Use()
        return use

    def _size(self, tensor: Tensor, device: int) -> int:
        return allocation(tensor, self.memories[device])

    def _allocate(self, tensor: Tensor, device: int) -> None:
        use = self._use(tensor)
        if tensor.place is not None or tensor.base is not None or use.owned:
            return
        use.owned = True
        if tensor.operation in IN_PLACE and self._overwrite(tensor, use):
            return
        use.device = device
        use.start = self.arenas[device].take(self._size(tensor, device))

    def _overwrite(self, tensor: Tensor, use: Use) -> bool:
        """Take over an operand of the same layout that nothing else needs."""
        for source in tensor.sources:
            operand = self._use(source)
            if (
                operand.owned
                and not source.is_output
                and source.shape == tensor.shape
                and source.format is tensor.format
                and operand.children == 1
                and operand.views == 0
            ):
                use.device, use.start = operand.device, operand.start
                operand.owned = False
                arena = self.arenas[use.device]
                before, after = self._size(source, use.device), self._size(tensor, use.device)
                if before > after:
                    arena.give(use.start + after, before - after)
                return True
        return False

    def _done(self, source: Tensor) -> None:
        """One consumer of `source` has run: free it, or what it is a view of, after the last."""
        use = self._use(source)
        use.children -= 1
        if use.children or use.views:
            return
        if source.base is not None:
            source = source.base
            use = self._use(source)
            use.views -= 1
            if use.children or use.views:
                return
        if use.owned and not source.is_output:
            self.arenas[use.device].give(use.start, self._size(source, use.device))
            use.owned = False
