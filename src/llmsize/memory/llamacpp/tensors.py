"""ggml's tensors and graph: shapes and sizes without data (ggml.c of llama.cpp 0c1e57098).

A shape is innermost first, as in ggml. A view has the extent of what it spans in its base, which
is what a copy of it takes on another device.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from llmsize.formats import FP16, FP32, INT32, Format, stored_bytes

Shape = tuple[int, int, int, int]

VIEWS = frozenset({"view", "reshape", "permute"})
"""Operations that the scheduler passes over."""
IN_PLACE = frozenset(
    {"fill", "scale", "add", "add_id", "mul", "div", "unary", "rope", "norm", "softmax"}
)
"""Operations that may overwrite an operand: `ggml_op_can_inplace`."""


class Tensor:
    """A node or a leaf of the graph."""

    __slots__ = (
        "base", "bytes", "format", "is_input", "is_output", "is_weight", "operation", "place",
        "shape", "sources",
    )  # fmt: skip

    def __init__(
        self,
        operation: str,
        format: Format,
        shape: Shape,
        sources: tuple[Tensor, ...] = (),
        base: Tensor | None = None,
        span: int = 0,
    ) -> None:
        """A new tensor, or a view of `base` that spans `span` bytes."""
        self.operation = operation
        self.format = format
        self.shape = shape
        self.sources = sources
        self.base: Tensor | None = (base.base or base) if base is not None else None
        self.bytes = span or stored_bytes(format, shape[0]) * prod(shape[1:])
        self.place: int | None = None
        """The device of a weight or a cache, which lives outside of the compute buffer."""
        self.is_weight = False
        self.is_input = False
        self.is_output = False


def stored(format: Format, shape: Iterable[int], place: int, *, weight: bool) -> Tensor:
    """A weight, or a cache, in a buffer of its own on device `place`."""
    tensor = Tensor("none", format, full(shape))
    tensor.place = place
    tensor.is_weight = weight
    return tensor


def given(format: Format, *shape: int) -> Tensor:
    """An input that the host fills in for every batch."""
    tensor = Tensor("none", format, full(shape))
    tensor.is_input = True
    return tensor


def full(shape: Iterable[int]) -> Shape:
    """`shape` with four dimensions."""
    a, b, c, d = (*shape, 1, 1, 1, 1)[:4]
    return a, b, c, d


def view(x: Tensor, *shape: int, span: int) -> Tensor:
    """A part of `x`, `span` bytes from its first to its last element."""
    return Tensor("view", x.format, full(shape), (x,), x, span)


def reshape(x: Tensor, *shape: int) -> Tensor:
    """The same elements in another shape."""
    return Tensor("reshape", x.format, full(shape), (x,), x, x.bytes)


def swap_heads(x: Tensor) -> Tensor:
    """The second and third dimension exchanged, without a copy."""
    a, b, c, d = x.shape
    return Tensor("permute", x.format, (a, c, b, d), (x,), x, x.bytes)


def matmul(weight: Tensor, x: Tensor) -> Tensor:
    """`weight` (inputs, outputs) times `x` (inputs, tokens, …): fp32."""
    return Tensor("matmul", FP32, (weight.shape[1], *x.shape[1:]), (weight, x))


def matmul_experts(weights: Tensor, x: Tensor, chosen: Tensor) -> Tensor:
    """Every token times the weights of the experts `chosen` for it."""
    shape = (weights.shape[1], chosen.shape[0], x.shape[2], 1)
    return Tensor("matmul_experts", FP32, shape, (weights, x, chosen))


def get_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of `x` that `rows` names, in fp32."""
    shape = (x.shape[0], rows.shape[0], rows.shape[1], rows.shape[2])
    return Tensor("get_rows", FP32, shape, (x, rows))


def set_rows(cache: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """Write `x` into rows of `cache`."""
    return Tensor("set_rows", cache.format, cache.shape, (x, rows, cache), cache, cache.bytes)


def apply(operation: str, x: Tensor, *others: Tensor | None) -> Tensor:
    """An operation whose result has the shape of `x`."""
    return Tensor(operation, x.format, x.shape, (x, *(o for o in others if o is not None)))


def gated(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """A gated activation of two tensors, or of the two halves of one."""
    if up is not None:
        return Tensor("glu", gate.format, gate.shape, (gate, up))
    return Tensor("glu", gate.format, (gate.shape[0] // 2, *gate.shape[1:]), (gate,))


def concat(a: Tensor, b: Tensor) -> Tensor:
    """Two tensors side by side in the innermost dimension."""
    return Tensor("concat", a.format, (a.shape[0] + b.shape[0], *a.shape[1:]), (a, b))


def made(operation: str, format: Format, shape: Iterable[int], *sources: Tensor) -> Tensor:
    """A result of its own shape."""
    return Tensor(operation, format, full(shape), sources)


def turned(x: Tensor) -> Tensor:
    """The first two dimensions exchanged, without a copy."""
    a, b, c, d = x.shape
    return Tensor("permute", x.format, (b, a, c, d), (x,), x, x.bytes)


def written(cache: Tensor, x: Tensor) -> Tensor:
    """`x` copied into `cache`."""
    return Tensor("cpy", cache.format, cache.shape, (x, cache), cache, cache.bytes)


def contiguous(x: Tensor, *shape: int) -> Tensor:
    """A copy without gaps, in `shape` if one is given."""
    return Tensor("contiguous", x.format, full(shape) if shape else x.shape, (x,))


def cast(x: Tensor, format: Format) -> Tensor:
    """A copy in another format."""
    return Tensor("cast", format, x.shape, (x,))


def top_k(x: Tensor, k: int) -> Tensor:
    """The indices of the `k` largest: a view of all of them, sorted."""
    order = Tensor("argsort", INT32, x.shape, (x,))
    rows = prod(x.shape[1:])
    return view(order, k, *x.shape[1:], span=4 * (x.shape[0] * (rows - 1) + k))


def sum_rows(x: Tensor) -> Tensor:
    """The sum of every row."""
    return Tensor("sum_rows", x.format, (1, *x.shape[1:]), (x,))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
    """Fused attention over heads-second views: (value channels, heads, tokens, streams)."""
    shape = (v.shape[0], q.shape[2], q.shape[1], q.shape[3])
    sources = (q, k, v, mask, *((sinks,) if sinks is not None else ()))
    return Tensor("flash_attention", FP32, shape, sources)


def flash_scratch(node: Tensor) -> int:
    """Bytes of K and V in fp16 that the CUDA kernel keeps behind its result for other formats.

    ggml-cuda/fattn-common.cuh, `ggml_cuda_flash_attn_ext_get_f16_extra_data`.
    """
    _, k, v = node.sources[:3]
    end = node.bytes
    for tensor in (k,) if v.base is k.base else (k, v):
        if tensor.format is not FP16:
            end = -(-end // 128) * 128 + FP16.block_bytes * prod(tensor.shape)
    return end - node.bytes


class Graph:
    """Nodes in the order they are computed, and the leaves they start from."""

    def __init__(self) -> None:
        """An empty graph."""
        self.nodes: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self._seen: set[int] = set()

    def expand(self, tensor: Tensor) -> Tensor:
        """Append what `tensor` needs, operands from left to right, then `tensor` itself."""
        if id(tensor) not in self._seen:
            self._seen.add(id(tensor))
            for source in tensor.sources:
                self.expand(source)
            (self.leaves if tensor.operation == "none" else self.nodes).append(tensor)
        return tensor
