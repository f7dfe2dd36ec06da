"""Attention to the most relevant tokens alone, which an indexer chooses (DeepSeek-V3.2, GLM-5).

llama.cpp 0c1e57098, src/models/deepseek32.cpp and src/llama-graph.cpp. The scores are those of the
fused kernel, as on CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from llmsize.formats import FP16, FP32, INT32, INT64
from llmsize.memory.llamacpp import tensors as ops
from llmsize.memory.llamacpp.builder import Builder
from llmsize.memory.llamacpp.tensors import Tensor, view


class Indexer:
    """What all layers' indexers share, and the tokens that the last of them chose."""

    def __init__(self, b: Builder, caches: Mapping[int, Tensor], most: int) -> None:
        """`caches` of keys by layer, of which at `most` so many tokens are chosen."""
        self.builder = b
        self.caches = caches
        self.most = most
        head, self.cells, self.streams, _ = next(iter(caches.values())).shape
        self.rotation = ops.given(FP32, head, head)
        self.rows = ops.given(INT64, b.tokens)
        self.mask = ops.given(FP16, self.cells, b.tokens // self.streams, 1, self.streams)
        self.chosen: Tensor | None = None

    def choose(self, x: Tensor, low: Tensor, positions: Tensor) -> None:
        """The tokens for each of `x`, whose low-rank queries are `low`."""
        b = self.builder
        head, heads = self.rotation.shape[0], b.needed("indexer.proj").shape[1]
        q = ops.reshape(b.linear(low, "indexer.attn_q_b"), head, heads, b.tokens)
        q = ops.apply("rope", q, positions)
        k = ops.apply("layer_norm", b.linear(x, "indexer.attn_k"))
        k = ops.apply("mul", k, b.needed("indexer.k_norm"))
        k = ops.apply("add", k, b.weight("indexer.k_norm", "bias"))
        k = ops.apply("rope", ops.reshape(k, head, 1, b.tokens), positions)
        q, k = ops.matmul(self.rotation, q), ops.matmul(self.rotation, k)
        cache = self.caches[b.layer]
        b.graph.expand(ops.set_rows(_flat(cache), view(k, head, b.tokens, span=k.bytes), self.rows))
        weights = b.linear(x, "indexer.proj")
        each = b.tokens // self.streams
        q = view(q, head, heads, each, self.streams, span=q.bytes)
        weights = view(weights, heads, each, 1, self.streams, span=weights.bytes)
        weights = ops.apply("scale", weights)
        keys = view(cache, head, 1, self.cells, self.streams, span=cache.bytes)
        shape = (self.cells, each, 1, self.streams)
        scores = ops.made("lightning_indexer", FP32, shape, q, keys, weights, self.mask)
        best = (min(self.cells, self.most), *shape[1:])
        self.chosen = ops.contiguous(ops.made("top_k", INT32, best, scores))

    def masked(self, mask: Tensor) -> Tensor:
        """`mask` with all tokens hidden but those that were chosen."""
        assert self.chosen is not None
        cells, tokens, _, streams = mask.shape
        hidden = ops.apply("fill", mask)
        hidden = view(hidden, 1, cells, tokens, streams, span=hidden.bytes)
        count = self.chosen.shape[0]
        chosen = view(self.chosen, count, tokens, streams, span=self.chosen.bytes)
        zeros = ops.apply("fill", ops.made("none", FP32, (1, count, tokens, streams)))
        kept = ops.set_rows(hidden, zeros, chosen)
        return ops.apply("add", view(kept, *mask.shape, span=kept.bytes), mask)


def _flat(cache: Tensor) -> Tensor:
    """The cells of all streams as rows of one matrix."""
    if cache.shape[2] == 1:
        return cache
    return ops.reshape(cache, cache.shape[0], prod(cache.shape[1:]))
