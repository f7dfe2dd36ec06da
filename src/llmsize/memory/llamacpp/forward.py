"""The forward pass of a decoder as llama.cpp builds its graph (src/llama-graph.cpp, src/models).

One pass serves every family: as in llama.cpp, a tensor that a model does not have is skipped.
Scales and soft caps are left out: they overwrite their operand and take no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llmsize.anatomy.cache import LayerCache
from llmsize.formats import FP16, FP32, INT32, INT64, stored_bytes
from llmsize.memory.llamacpp import tensors as ops
from llmsize.memory.llamacpp.cache import Server, aligned, layer_cells
from llmsize.memory.llamacpp.tensors import Graph, Tensor, view

Routing = Literal["softmax", "softmax of chosen", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Decoder:
    """What the graph needs to know of a model beside its tensors."""

    layers: tuple[LayerCache, ...]
    heads: int
    experts_used: int = 0
    routing: Routing = "softmax"
    """What turns router logits into weights of experts."""
    normalized: bool = True
    """Whether the weights of the chosen experts are divided by their sum."""
    expert_groups: int = 1
    groups_used: int = 1
    rope_dim: int = 0
    """Channels of a latent's shared rotary key."""
    layer_norm: bool = False
    """Whether norms subtract the mean, which ggml cannot do in place."""
    parallel: tuple[str, ...] = ()
    """Where attention and MLP run side by side: `mlp`, `attention` and `residual` in the order in
    which they are added up."""
    unrotated: frozenset[int] = frozenset()
    """Layers without rotary positions."""
    late_rows: bool = False
    """Whether the rows to predict are taken after the last layer, not within it; what all tokens
    leave there is then an output, too."""
    residual_first: bool = False
    """Whether the MLP's output is added to the residual in place of the residual to it."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the host fills in for every batch, and what it writes to and reads from."""

    positions: Tensor
    rows: Tensor
    key_rows: Tensor
    value_rows: Tensor | None
    mask: Tensor
    key_rotation: Tensor | None
    value_rotation: Tensor | None


class Forward:
    """Builds the graph of one batch."""

    def __init__(
        self,
        decoder: Decoder,
        server: Server,
        weights: Mapping[str, Tensor],
        caches: list[tuple[Tensor, Tensor | None]],
    ) -> None:
        """`weights` by their GGUF names; `caches` of keys and of values, one pair per layer."""
        self.decoder = decoder
        self.server = server
        self.weights = weights
        self.caches = caches
        batch = min(server.ubatch, server.cells * server.streams)
        self.tokens = aligned(batch, server.sequences)
        self.graph = Graph()
        self.layer = -1

    def run(self) -> Graph:
        """The graph from tokens to logits."""
        server, decoder = self.server, self.decoder
        tokens = ops.given(INT32, self.tokens)
        x = self.graph.expand(ops.get_rows(self.weights["token_embd.weight"], tokens))
        self.graph.expand(ops.given(FP32, x.shape[0], self.tokens))
        positions = ops.given(INT32, self.tokens)
        predicted = self.tokens if server.logits_of_all else min(server.sequences, self.tokens)
        rows = ops.given(INT32, predicted)
        inputs: dict[str, Inputs] = {}
        for self.layer, cache in enumerate(decoder.layers):
            if cache.kind not in inputs:
                inputs[cache.kind] = self._inputs(cache, positions, rows)
            x = self._block(x, cache, inputs[cache.kind])
        self.layer = -1
        if decoder.late_rows:
            x.is_output = True
            x = ops.get_rows(x, rows)
        x = self._norm(x, "output_norm")
        self.graph.expand(self._linear(x, "output"))
        return self.graph

    def _inputs(self, cache: LayerCache, positions: Tensor, rows: Tensor) -> Inputs:
        server, tokens = self.server, self.tokens
        heads = tokens * (1 if server.flash_attention else cache.kv_heads * cache.value_dim)
        shape = (layer_cells(cache, server), tokens // server.streams, 1, server.streams)
        latent = cache.kind == "latent"
        return Inputs(
            positions,
            rows,
            ops.given(INT64, tokens),
            None if latent else ops.given(INT64, heads),
            ops.given(FP16 if server.flash_attention else FP32, *shape),
            None
            if latent
            else self._rotation(server.keys.block_elements, cache.key_dim, grow=True),
            None if latent else self._rotation(server.values.block_elements, cache.value_dim),
        )

    def _rotation(self, block: int, channels: int, *, grow: bool = False) -> Tensor | None:
        """A quantized cache holds rotated vectors: the Hadamard matrix that rotates them."""
        if block == 1 or channels % 64:
            return None
        size = 64
        while grow and channels % (2 * size) == 0:
            size *= 2
        return ops.given(FP32, size, size)

    def _block(self, x: Tensor, cache: LayerCache, inputs: Inputs) -> Tensor:
        residual = x
        normed = self._norm(x, "attn_norm")
        attention = self._latent if cache.kind == "latent" else self._attention
        x = attention(normed, cache, inputs)
        if self.layer == len(self.decoder.layers) - 1 and not self.decoder.late_rows:
            x = ops.get_rows(x, inputs.rows)
            residual = ops.get_rows(residual, inputs.rows)
            if self.decoder.parallel and not self._has("ffn_norm"):
                normed = ops.get_rows(normed, inputs.rows)
        if self.decoder.parallel:
            return self._beside(x, residual, normed)
        x = self._norm(x, "post_attention_norm")
        residual = ops.apply("add", x, residual)
        x = self._norm(residual, "ffn_norm")
        x = self._experts(x) if self._has("ffn_gate_inp") else self._mlp(x, "")
        x = self._norm(x, "post_ffw_norm")
        if self.decoder.residual_first:
            return ops.apply("add", residual, x)
        return ops.apply("add", x, residual)

    def _beside(self, attention: Tensor, residual: Tensor, normed: Tensor) -> Tensor:
        """Residual, attention and an MLP that does not wait for it, added up."""
        if self._has("ffn_norm"):
            normed = self._norm(residual, "ffn_norm")
        terms = {"attention": attention, "residual": residual, "mlp": self._mlp(normed, "")}
        first, second, third = (terms[name] for name in self.decoder.parallel)
        return ops.apply("add", ops.apply("add", first, second), third)

    def _name(self, name: str) -> str:
        return name if self.layer < 0 else f"blk.{self.layer}.{name}"

    def _has(self, name: str) -> bool:
        return f"{self._name(name)}.weight" in self.weights

    def _weight(self, name: str, kind: str = "weight") -> Tensor | None:
        return self.weights.get(f"{self._name(name)}.{kind}")

    def _needed(self, name: str) -> Tensor:
        return self.weights[f"{self._name(name)}.weight"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm or layer norm; `x` itself without a weight."""
        weight, bias = self._weight(name), self._weight(name, "bias")
        if weight is None:
            return x
        x = ops.apply("layer_norm" if self.decoder.layer_norm else "norm", x)
        x = ops.apply("mul", x, weight)
        return x if bias is None else ops.apply("add", x, bias)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        x = ops.matmul(self._needed(name), x)
        bias = self._weight(name, "bias")
        return x if bias is None else ops.apply("add", x, bias)

    def _qkv(self, x: Tensor, cache: LayerCache) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = self.decoder.heads, cache.kv_heads
        parts = ((heads, cache.key_dim), (kv_heads, cache.key_dim), (kv_heads, cache.value_dim))
        if self._has("attn_qkv"):
            qkv = self._linear(x, "attn_qkv")
            gap = 4 * qkv.shape[0] * (self.tokens - 1)
            q, k, v = (view(qkv, d, n, self.tokens, span=gap + 4 * n * d) for n, d in parts)
            return q, k, v
        q, k, v = (self._linear(x, f"attn_{part}") for part in "qkv")
        if self._full_norm():
            q, k = self._norm(q, "attn_q_norm"), self._norm(k, "attn_k_norm")
        q, k, v = (
            ops.reshape(y, d, n, self.tokens) for y, (n, d) in zip((q, k, v), parts, strict=True)
        )
        return q, k, v

    def _full_norm(self) -> bool:
        """Whether queries are normed across all heads at once."""
        weight = self._weight("attn_q_norm")
        return weight is not None and weight.shape[0] == self._needed("attn_q").shape[1]

    def _attention(self, x: Tensor, cache: LayerCache, inputs: Inputs) -> Tensor:
        q, k, v = self._qkv(x, cache)
        factors = self._weight("rope_freqs")
        if not self._full_norm():
            q, k = self._norm(q, "attn_q_norm"), self._norm(k, "attn_k_norm")
        if self.layer not in self.decoder.unrotated:
            q = ops.apply("rope", q, inputs.positions, factors)
            k = ops.apply("rope", k, inputs.positions, factors)
        q, k = self._rotate(q, inputs.key_rotation), self._rotate(k, inputs.key_rotation)
        v = self._rotate(v, inputs.value_rotation)
        for tensor in (q, v, k):
            self.graph.expand(tensor)
        key_cache, value_cache = self.caches[self.layer]
        assert value_cache is not None and inputs.value_rows is not None
        self._store(key_cache, k, inputs.key_rows)
        self._store(value_cache, v, inputs.value_rows, transposed=not self.server.flash_attention)
        keys = self._cached(key_cache, cache.key_dim, cache.kv_heads)
        values = self._cached(value_cache, cache.value_dim, cache.kv_heads)
        out = self._attend(q, keys, values, inputs.mask)
        return self._linear(self._rotate(out, inputs.value_rotation), "attn_output")

    def _rotate(self, x: Tensor, matrix: Tensor | None) -> Tensor:
        if matrix is None:
            return x
        elements = x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3]
        rows = elements // matrix.shape[0]
        whole = x.bytes == elements * 4
        flat = (ops.reshape if whole else ops.contiguous)(x, matrix.shape[0], rows)
        return ops.reshape(ops.matmul(matrix, flat), *x.shape)

    def _store(self, cache: Tensor, x: Tensor, rows: Tensor, *, transposed: bool = False) -> None:
        width = x.shape[0] * x.shape[1]
        if transposed:
            whole = x.bytes == 4 * width * self.tokens
            x = (ops.reshape if whole else ops.contiguous)(x, width, self.tokens)
            cache = ops.reshape(cache, 1, cache.shape[0] * cache.shape[1] * cache.shape[2])
            x = ops.reshape(x, 1, width * self.tokens)
        else:
            x = view(x, width, self.tokens, span=x.bytes)
            if self.server.streams > 1:
                cache = ops.reshape(cache, width, cache.shape[1] * cache.shape[2])
        self.graph.expand(ops.set_rows(cache, x, rows))

    def _cached(self, cache: Tensor, channels: int, heads: int) -> Tensor:
        """All cells as (channels, heads, cells, streams)."""
        return view(cache, channels, heads, cache.shape[1], cache.shape[2], span=cache.bytes)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, expand: Tensor | None = None
    ) -> Tensor:
        channels, heads, tokens, _ = q.shape
        streams = self.server.streams
        q = view(q, channels, heads, tokens // streams, streams, span=q.bytes)
        q, k, v = (ops.swap_heads(x) for x in (q, k, v))
        if self.server.flash_attention:
            k, v = (ops.cast(x, FP16) if x.format is FP32 else x for x in (k, v))
            x = ops.flash_attention(q, k, v, mask, self._weight("attn_sinks"))
            if expand is not None:
                x = ops.matmul(expand, ops.swap_heads(x))
                x = ops.contiguous(ops.swap_heads(x))
            x = ops.reshape(x, x.shape[0] * x.shape[1], x.shape[2] * x.shape[3])
        else:
            scores = ops.apply("softmax", ops.matmul(k, q), mask, self._weight("attn_sinks"))
            x = self._weigh(v, scores, expand)
        return self.graph.expand(x)

    def _weigh(self, v: Tensor, scores: Tensor, expand: Tensor | None) -> Tensor:
        """Values times scores: the cache of values is transposed, but that of a latent is not."""
        flipped = (v.shape[1], v.shape[0], *v.shape[2:])
        if expand is None:
            v = Tensor("permute", v.format, flipped, (v,), v, v.bytes)
        else:
            v = ops.contiguous(Tensor("permute", v.format, flipped, (v,), v, v.bytes))
        x = ops.matmul(v, scores)
        if expand is not None:
            x = ops.matmul(expand, x)
        x = ops.swap_heads(x)
        return ops.contiguous(x, x.shape[0] * x.shape[1], x.shape[2] * x.shape[3])

    def _latent(self, x: Tensor, cache: LayerCache, inputs: Inputs) -> Tensor:
        """Attention to compressed vectors; queries are taken into their space (MLA)."""
        d, tokens, heads = self.decoder, self.tokens, self.decoder.heads
        rank = cache.key_dim - d.rope_dim
        if self._has("attn_q_a"):
            q = self._linear(self._norm(self._linear(x, "attn_q_a"), "attn_q_a_norm"), "attn_q_b")
        else:
            q = self._linear(x, "attn_q")
        width = q.shape[0] // heads
        q = ops.reshape(q, width, heads, tokens)
        both = self._linear(x, "attn_kv_a_mqa")
        gap = 4 * both.shape[0] * (tokens - 1)
        compressed = view(both, rank, tokens, span=gap + 4 * rank)
        k_rope = view(both, d.rope_dim, 1, tokens, span=gap + 4 * d.rope_dim)
        k_rope = ops.apply("rope", k_rope, inputs.positions)
        compressed = self._norm(compressed, "attn_kv_a_norm")
        span = q.bytes - 4 * (width - d.rope_dim)
        q_rope = view(q, d.rope_dim, heads, tokens, span=span)
        q_plain = view(q, width - d.rope_dim, heads, tokens, span=q.bytes - 4 * d.rope_dim)
        q_rope = ops.apply("rope", q_rope, inputs.positions)
        absorbed = ops.matmul(self._needed("attn_k_b"), ops.swap_heads(q_plain))
        q = ops.concat(ops.swap_heads(absorbed), q_rope)
        value = ops.reshape(compressed, rank, 1, tokens)
        k = ops.concat(value, k_rope)
        for tensor in (q, value, k):
            self.graph.expand(tensor)
        store, _ = self.caches[self.layer]
        self._store(store, k, inputs.key_rows)
        keys = self._cached(store, cache.key_dim, 1)
        cells, streams = store.shape[1], store.shape[2]
        span = store.bytes - stored_bytes(store.format, d.rope_dim)
        values = view(keys, rank, 1, cells, streams, span=span)
        out = self._attend(q, keys, values, inputs.mask, self._needed("attn_v_b"))
        return self._linear(out, "attn_output")

    def _mlp(self, x: Tensor, suffix: str) -> Tensor:
        up = self._linear(x, f"ffn_up{suffix}")
        if self._has(f"ffn_gate{suffix}"):
            hidden = ops.gated(self._linear(x, f"ffn_gate{suffix}"), up)
        elif self._needed(f"ffn_down{suffix}").shape[0] * 2 == up.shape[0]:
            hidden = ops.gated(up)
        else:
            hidden = ops.apply("unary", up)
        return self._linear(hidden, f"ffn_down{suffix}")

    def _experts(self, x: Tensor) -> Tensor:
        weights, chosen = self._route(self._linear(x, "ffn_gate_inp"))
        self.graph.expand(weights)
        hidden, tokens, _, _ = x.shape
        each = ops.reshape(x, hidden, 1, tokens)
        up = self._chosen(each, "ffn_up_exps", chosen)
        gate = self._chosen(each, "ffn_gate_exps", chosen)
        out = self._chosen(ops.gated(gate, up), "ffn_down_exps", chosen)
        out = self.graph.expand(ops.apply("mul", out, weights))
        used = out.shape[1]
        span = 4 * (hidden * used * (tokens - 1) + hidden)
        parts = [self.graph.expand(view(out, hidden, tokens, span=span)) for _ in range(used)]
        total = parts[0]
        for part in parts[1:]:
            total = self.graph.expand(ops.apply("add", total, part))
        if used == 1:
            total = ops.contiguous(total)
        if self._has("ffn_up_shexp"):
            total = ops.apply("add", total, self._shared(x))
        return total

    def _shared(self, x: Tensor) -> Tensor:
        """The experts that every token uses, with a score of their own in Qwen's models."""
        out = self._mlp(x, "_shexp")
        if not self._has("ffn_gate_inp_shexp"):
            return out
        score = ops.apply("unary", ops.matmul(self._needed("ffn_gate_inp_shexp"), x))
        return ops.apply("mul", out, score)

    def _chosen(self, x: Tensor, name: str, chosen: Tensor) -> Tensor:
        x = ops.matmul_experts(self._needed(name), x, chosen)
        bias = self._weight(name, "bias")
        return x if bias is None else ops.apply("add_id", x, bias, chosen)

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of the chosen experts, and which they are."""
        d = self.decoder
        experts, tokens, _, _ = logits.shape
        how = {"softmax": "softmax", "sigmoid": "unary"}.get(d.routing)
        scores = ops.apply(how, logits) if how else logits
        bias = self._weight("exp_probs_b", "bias")
        ranked = scores if bias is None else ops.apply("add", scores, bias)
        if d.expert_groups > 1:
            ranked = self._best_groups(ranked)
        chosen = ops.top_k(ranked, d.experts_used)
        weights = ops.get_rows(ops.reshape(scores, 1, experts, tokens), chosen)
        if d.routing == "softmax of chosen":
            weights = ops.apply("softmax", ops.reshape(weights, d.experts_used, tokens))
            weights = ops.reshape(weights, 1, d.experts_used, tokens)
        elif d.normalized:
            weights = ops.reshape(weights, d.experts_used, tokens)
            weights = ops.apply("div", weights, ops.apply("unary", ops.sum_rows(weights)))
            weights = ops.reshape(weights, 1, d.experts_used, tokens)
        return weights, chosen

    def _best_groups(self, scores: Tensor) -> Tensor:
        """Scores of the experts outside of the best groups masked out (DeepSeek-V3)."""
        d = self.decoder
        experts, tokens, _, _ = scores.shape
        groups = ops.reshape(scores, experts // d.expert_groups, d.expert_groups, tokens)
        best = ops.top_k(groups, 2)
        columns = ops.reshape(groups, 1, *groups.shape[:3])
        best = ops.get_rows(columns, best)
        best = ops.sum_rows(ops.reshape(best, *best.shape[1:]))
        best = ops.top_k(ops.reshape(best, d.expert_groups, tokens), d.groups_used)
        kept = ops.get_rows(groups, best)
        masked = ops.set_rows(ops.apply("fill", groups), kept, best)
        return ops.reshape(masked, experts, tokens)
