"""Operations that pick entries of a tensor, or put them into one, by index."""

from __future__ import annotations

from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.operations.rules import (
    GradList,
    first,
    unary_backward,
    whole_backward,
)
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Tensor
from llmsize.formats import INT64


def embedding(t: Tape, table: Tensor, *shape: int, indices: Tensor | None = None) -> Tensor:
    """Rows of `table` for `indices` of `shape`, which it keeps; its backward pass fills a table.

    The model's input needs no `indices`: it lives through the step.
    """
    node = t.record(whole_backward, (table,), (indices,), ("embedding_dense_backward", table.shape))
    return t.new("embedding", (*shape, table.shape[-1]), table.format, node)


def topk(t: Tape, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of the last dimension and where they are, which it keeps."""
    shape = (*x.shape[:-1], k)
    values, indices = t.new("topk", shape, x.format), t.new("topk", shape, INT64)
    values.node = t.record(_scatter_backward, (x,), (indices,), x.shape)
    return values, indices


def highest(t: Tape, x: Tensor) -> Tensor:
    """The highest of the last dimension, which stays as 1; keeps where it was."""
    shape = (*x.shape[:-1], 1)
    values, indices = t.new("max", shape, x.format), t.new("max", shape, INT64)
    values.node = t.record(_scatter_backward, (x,), (indices,), x.shape)
    return values


def gather(t: Tape, x: Tensor, indices: Tensor) -> Tensor:
    """The entries of the last dimension at `indices`; keeps both (`gather_backward`)."""
    node = t.record(_scatter_backward, (x,), (x, indices), x.shape)
    return t.new("gather", indices.shape, x.format, node)


def index(t: Tape, x: Tensor, indices: Tensor) -> Tensor:
    """The rows of `x` at `indices`, which it keeps."""
    node = t.record(_scatter_backward, (x,), (indices,), x.shape)
    return t.new("index", (*indices.shape, *x.shape[1:]), x.format, node)


def pick(t: Tape, x: Tensor, dim: int) -> Tensor:
    """One entry of a dimension, which stays as 1, as a copy (indexing with a list)."""
    node = t.record(_scatter_backward, (x,), (t.new("to", (1,), INT64),), x.shape)
    return t.new("index", (*x.shape[:dim], 1, *x.shape[dim + 1 :]), x.format, node)


def scattered(t: Tape, x: Tensor, indices: Tensor) -> Tensor:
    """A copy of `x` with a number at `indices` of the last dimension, which it keeps."""
    node = t.record(unary_backward, (x,), (indices,), "scatter")
    return t.new("scatter", x.shape, x.format, node)


def scatter_in_place(t: Tape, x: Tensor, source: Tensor, indices: Tensor) -> Tensor:
    """`source` written into a constant `x` at `indices` of the last dimension, which it keeps."""
    node = t.record(whole_backward, (source,), (indices,), ("gather", source.shape))
    return Tensor(x.shape, x.format, x.storage, node, 0, x.strides)


def index_copy(t: Tape, source: Tensor, size: int) -> Tensor:
    """Zeros with the columns of `source` in some places of their `size` columns; keeps it."""
    node = t.record(whole_backward, (source,), (source,), ("index_select", source.shape))
    return t.new("index_copy", (*source.shape[:-1], size), source.format, node)


def with_rows(t: Tape, table: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """A copy of a frozen `table` with `rows` in some places, both of which it keeps."""
    node = t.record(whole_backward, (rows,), (places, rows), ("index_select", rows.shape))
    return t.new("index_copy", table.shape, table.format, node)


def _scatter_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    zeros = t.new("zeros", node.context, first(grads).format)
    filled = t.new("scatter", node.context, first(grads).format)
    del zeros
    return (filled,)
