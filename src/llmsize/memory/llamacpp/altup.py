"""Alternating updates: several streams, of which each layer computes one and predicts the others.

llama.cpp 0c1e57098, src/models/gemma3n.cpp; Baykal et al. 2023, arXiv:2301.13310. A stack of
streams is (hidden, tokens, streams); the first one is active.
"""

from __future__ import annotations

from llmsize.formats import FP32
from llmsize.memory.llamacpp import tensors as ops
from llmsize.memory.llamacpp.builder import Builder
from llmsize.memory.llamacpp.tensors import Tensor, view


def spread(b: Builder, x: Tensor) -> Tensor:
    """The embeddings as the active stream, and the others projected from them."""
    others = b.needed("altup_proj").shape[2]
    repeated = ops.made("repeat", FP32, (x.shape[0], b.tokens, others), x)
    return _stack(x, _as_large(ops.matmul(b.needed("altup_proj"), repeated), x))


def merged(b: Builder, streams: Tensor) -> Tensor:
    """The mean of all streams, the others projected back."""
    x = stream(b, streams)
    back = ops.matmul(b.needed("altup_unembd_proj"), _others(b, streams))
    back = _as_large(back, stream(b, streams))
    for _ in range(back.shape[2]):
        x = ops.apply("add", x, stream(b, back))
    return x


def predicted(b: Builder, streams: Tensor) -> Tensor:
    """Every stream as the router mixes them, before the layer computes."""
    hidden, tokens, count, _ = streams.shape
    mixed = ops.matmul(b.needed("altup_predict_coef"), _modalities(b, stream(b, streams)))
    mixed = ops.reshape(mixed, count, count, tokens)
    found = ops.matmul(ops.contiguous(streams, count, hidden, tokens), mixed)
    return ops.apply("add", ops.contiguous(found, hidden, tokens, count), streams)


def corrected(b: Builder, predictions: Tensor, computed: Tensor) -> Tensor:
    """The predictions, moved by how far the active one was off."""
    hidden, tokens, count, _ = predictions.shape
    modalities = _modalities(b, computed)
    off = ops.apply("add", computed, stream(b, predictions))
    share = ops.turned(ops.matmul(b.needed("altup_correct_coef"), modalities))
    share = ops.contiguous(share, 1, tokens, count)
    moved = ops.apply("mul", ops.made("repeat", FP32, (hidden, tokens, count), off), share)
    return ops.apply("add", moved, predictions)


def with_others_added(b: Builder, streams: Tensor, x: Tensor) -> Tensor:
    """`x` added to every stream but the active one."""
    return _stack(stream(b, streams), ops.apply("add", _others(b, streams), x))


def laurel(b: Builder, x: Tensor) -> Tensor:
    """A learned augmented residual of low rank."""
    low = ops.matmul(b.needed("laurel_r"), ops.matmul(b.needed("laurel_l"), x))
    return ops.apply("add", b.norm(low, "laurel_post_norm"), x)


def largest_alone(x: Tensor) -> Tensor:
    """Values above a cutoff by their mean and deviation; the others become zero."""
    mean = ops.made("mean", FP32, (1, *x.shape[1:]), x)
    squares = ops.apply("unary", ops.apply("add", x, mean))
    deviation = ops.apply("unary", ops.sum_rows(squares))
    return ops.apply("unary", ops.apply("add", x, ops.apply("add", mean, deviation)))


def stream(b: Builder, streams: Tensor) -> Tensor:
    """One of the streams, without a copy."""
    hidden = streams.shape[0]
    return view(streams, hidden, b.tokens, span=4 * hidden * b.tokens)


def _others(b: Builder, streams: Tensor) -> Tensor:
    hidden, tokens, count, _ = streams.shape
    return view(streams, hidden, tokens, count - 1, span=4 * hidden * tokens * (count - 1))


def _stack(first: Tensor, others: Tensor) -> Tensor:
    hidden, tokens, count, _ = others.shape
    return ops.made("concat", FP32, (hidden, tokens, count + 1), first, others)


def _modalities(b: Builder, x: Tensor) -> Tensor:
    x = ops.matmul(b.needed("altup_router"), b.norm(x, "altup_router_norm"))
    return ops.apply("unary", x)


def _as_large(x: Tensor, model: Tensor) -> Tensor:
    """`x` with the magnitude of `model`."""
    wanted, own = (
        ops.apply("unary", ops.sum_rows(ops.apply("unary", each))) for each in (model, x)
    )
    return ops.apply("div", ops.apply("mul", x, wanted), own)
