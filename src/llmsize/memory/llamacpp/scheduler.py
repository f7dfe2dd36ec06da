"""ggml's scheduler: which device computes a node, and what is copied there (ggml-backend.cpp)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llmsize.memory.llamacpp.allocator import Allocator
from llmsize.memory.llamacpp.cache import Memory
from llmsize.memory.llamacpp.tensors import VIEWS, Graph, Tensor

OFFLOAD_BATCH = 32
"""Tokens from which a device computes with weights that are in host memory (ggml-cuda.cu)."""
FLASH_HEADS = frozenset({40, 64, 72, 80, 96, 112, 128, 256, 512})
"""Channels of a head that the CUDA kernels take for keys and values alike (fattn.cu)."""


class Scheduler:
    """Devices in order of priority; the host is the last and computes everything."""

    def __init__(self, memories: Sequence[Memory], copies: int = 1) -> None:
        """`copies` of every input are kept where batches follow each other in a pipeline."""
        self.memories = memories
        self.host = len(memories) - 1
        self.copies = copies
        self.device: dict[int, int] = {}
        self.copied: dict[tuple[int, int], list[Tensor]] = {}

    def buffers(self, graph: Graph) -> list[int]:
        """Bytes of the compute buffer of every device, the host last."""
        self._from_buffers(graph.leaves)
        self._from_buffers(graph.nodes)
        nodes = [node for node in graph.nodes if node.operation not in VIEWS]
        self._expand(nodes, accelerators=True)
        self._expand(nodes, accelerators=False)
        self._fill(graph.nodes)
        leaves, order = self._split(graph.nodes)
        if self.copies > 1:
            inputs = self._input_copies(graph.leaves)
            leaves = inputs + leaves
        leaves += [(leaf, self.device[id(leaf)]) for leaf in graph.leaves]
        return Allocator(self.memories).run(leaves, order)

    def _supports(self, device: int, node: Tensor) -> bool:
        if device == self.host or node.operation != "flash_attention":
            return True
        _, k, v = node.sources[:3]
        if k.shape[0] == 576:
            return v.shape[0] == 512
        return k.shape[0] == v.shape[0] and k.shape[0] in FLASH_HEADS

    def _from_buffers(self, tensors: Iterable[Tensor]) -> None:
        """Pass 1: what is stored, or computes with what is stored, is where that is."""
        for tensor in tensors:
            device = self._current(tensor)
            if device is not None:
                self.device[id(tensor)] = device

    def _current(self, tensor: Tensor) -> int | None:
        place = tensor.base.place if tensor.base is not None else tensor.place
        if place is not None:
            return place if self._supports(place, tensor) else None
        if tensor.is_input:
            return self.host
        if tensor.operation in ("rope", "flash_attention"):
            return None
        for source in tensor.sources:
            if source.is_weight and source.place is not None:
                if source.place == self.host and self.host > 0 and offloaded(tensor):
                    return 0
                return source.place
        return None

    def _expand(self, nodes: list[Tensor], *, accelerators: bool) -> None:
        """Pass 2: a node without a device joins the one before it, then the one after it."""
        for sequence in (nodes, nodes[::-1]):
            current: int | None = None
            for node in sequence:
                device = self.device.get(id(node))
                if device is not None:
                    current = None if accelerators and device == self.host else device
                elif current is not None and self._supports(current, node):
                    self.device[id(node)] = current

    def _fill(self, nodes: list[Tensor]) -> None:
        """Passes 3 and 4: what no device wanted; views follow their base, leaves their user."""
        for node in nodes:
            if node.operation not in VIEWS and id(node) not in self.device:
                self.device[id(node)] = self._most_inputs(node)
        for node in nodes:
            if id(node) not in self.device:
                assert node.base is not None
                self.device[id(node)] = self.device.get(id(node.base), self.host)
            for source in node.sources:
                if id(source) not in self.device:
                    at = self.device.get(id(source.base)) if source.base is not None else None
                    self.device[id(source)] = self.device[id(node)] if at is None else at

    def _most_inputs(self, node: Tensor) -> int:
        able = [d for d in range(self.host + 1) if self._supports(d, node)]
        return max(able, key=lambda d: (sum(self._holds(s, d) for s in node.sources), -d))

    def _holds(self, tensor: Tensor, device: int) -> bool:
        """Whether `device` can read `tensor` where it is."""
        place = tensor.base.place if tensor.base is not None else tensor.place
        if place is None:
            place = self.device.get(id(tensor))
            if place is None and tensor.base is not None:
                place = self.device.get(id(tensor.base))
        return place == device

    def _split(
        self, nodes: list[Tensor]
    ) -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
        """Pass 5: runs of nodes on one device, each after copies of what it takes from others."""
        copies: list[tuple[Tensor, int]] = []
        order: list[tuple[Tensor, int]] = []
        run: list[tuple[Tensor, int]] = []
        inputs: list[Tensor] = []
        current = next(self.device[id(n)] for n in nodes if n.operation not in VIEWS)

        def close() -> None:
            for tensor in inputs:
                there = self.copied[id(tensor), current]
                copies.extend((copy, current) for copy in there if self.copies > 1)
                keep = Tensor("none", tensor.format, tensor.shape, (tensor,), tensor)
                order.append((keep, self.device[id(tensor)]))
                order.append((there[0], current))
            order.extend(run)
            run.clear()
            inputs.clear()

        for node in nodes:
            device = self.device[id(node)]
            if node.operation not in VIEWS:
                foreign_weight = inputs and any(
                    s.is_weight and s.place != current for s in node.sources
                )
                if device != current or foreign_weight:
                    close()
                    current = device
                node.sources = tuple(self._local(s, current, inputs) for s in node.sources)
            run.append((node, device))
        close()
        return copies, order

    def _local(self, tensor: Tensor, device: int, inputs: list[Tensor]) -> Tensor:
        """`tensor` where `device` can read it: itself, or a copy made for this run of nodes."""
        if self.device[id(tensor)] == device or self._holds(tensor, device):
            return tensor
        if (id(tensor), device) not in self.copied:
            self.copied[id(tensor), device] = self._duplicates(tensor, self.copies)
            inputs.append(tensor)
        return self.copied[id(tensor), device][0]

    def _duplicates(self, tensor: Tensor, count: int) -> list[Tensor]:
        made = [
            Tensor("none", tensor.format, tensor.shape, span=tensor.bytes) for _ in range(count)
        ]
        for copy in made:
            copy.is_input = copy.is_output = self.copies > 1
        return made

    def _input_copies(self, leaves: list[Tensor]) -> list[tuple[Tensor, int]]:
        """In a pipeline every input of the graph is kept once for each batch under way."""
        kept: list[tuple[Tensor, int]] = []
        for leaf in leaves:
            if leaf.is_input:
                leaf.is_output = True
                copies = [leaf, *self._duplicates(leaf, self.copies - 1)]
                kept.extend((copy, self.device[id(leaf)]) for copy in copies)
        return kept


def offloaded(node: Tensor) -> bool:
    """Whether a device computes `node` although its weight is in host memory."""
    _, rows, depth, outer = node.shape
    tokens = {"get_rows": 0, "matmul": rows, "matmul_experts": depth}.get(
        node.operation, rows * depth * outer
    )
    return tokens >= OFFLOAD_BATCH
