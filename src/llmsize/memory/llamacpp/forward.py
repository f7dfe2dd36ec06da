"""The forward pass of a decoder as llama.cpp builds its graph (src/llama-graph.cpp, src/models).

One pass serves every family: as in llama.cpp, a tensor that a model does not have is skipped.
Scales and soft caps are left out: they overwrite their operand and take no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, reduce
from typing import Literal

from llmsize.anatomy.cache import LayerCache
from llmsize.formats import FP16, FP32, INT32, INT64, stored_bytes
from llmsize.memory.llamacpp import altup
from llmsize.memory.llamacpp import tensors as ops
from llmsize.memory.llamacpp.builder import Builder
from llmsize.memory.llamacpp.cache import Server, layer_cells
from llmsize.memory.llamacpp.experts import Experts, mixture, mlp
from llmsize.memory.llamacpp.indexer import Indexer
from llmsize.memory.llamacpp.own_inputs import own_input, own_inputs
from llmsize.memory.llamacpp.recurrent import recurrent
from llmsize.memory.llamacpp.tensors import Graph, Tensor, view
from llmsize.quick_dataclasses import dataclass, field

SPARSE_LAYERS = 10
"""`n_layer_sparsity` of Gemma 3n, src/models/models.h."""

Late = Literal["", "layers", "norm"]

NO_EXPERTS = Experts()


@dataclass(frozen=True, slots=True)
class Decoder:
    """What the graph needs to know of a model beside its tensors."""

    layers: tuple[LayerCache, ...]
    heads: int
    experts: Experts = NO_EXPERTS
    rope_dim: int = 0
    """Channels of a latent's shared rotary key."""
    layer_norm: bool = False
    """Whether norms subtract the mean, which ggml cannot do in place."""
    plain_norms: frozenset[str] = frozenset()
    """Norms without a weight."""
    normed_last: bool = False
    """Whether queries and keys are normed after they are rotated, not before."""
    flash_attention: bool = True
    """Whether it may have flash attention; without it, it is turned off."""
    parallel: tuple[str, ...] = ()
    """Where attention and MLP run side by side: `mlp`, `attention` and `residual`, or `both` for
    the sum of these, in the order in which they are added up."""
    unrotated: frozenset[int] = frozenset()
    """Layers without rotary positions."""
    scaled_queries: bool = False
    """Whether queries of those are scaled by their position."""
    late_rows: Late = ""
    """Whether the rows to predict are taken after the last layer or after the last norm, not within
    the layer; what all tokens leave there is then an output, too."""
    residual_first: frozenset[str] = frozenset()
    """After which of `mixer` and `mlp` the result is added to the residual, not the residual to
    it."""
    positions: int = 1
    """Numbers that say where a token is: four where images have a place, too."""
    normed_values: bool = False
    """Whether values are normed, without a weight."""
    norm_first: bool = False
    """Whether a layer's input is normed before the recurrent cells are read."""
    plain_windows: bool = False
    """Whether the file's rotary factors are for layers without a window alone."""
    shared: Mapping[int, int] = field(default_factory=dict)
    """Layers without keys and values of their own, and whose they attend to."""
    indexed: Mapping[int, LayerCache] = field(default_factory=dict)
    """Layers that choose which tokens they and those after them attend to, and the keys that they
    keep for that."""
    most_relevant: int = 0
    """Tokens that are chosen."""
    states: tuple[tuple[int, ...], ...] = ()
    """Elements of each recurrent cache of every layer: of the convolution, and of the state."""


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


class Forward(Builder):
    """Builds the graph of one batch."""

    def __init__(
        self,
        decoder: Decoder,
        server: Server,
        weights: Mapping[str, Tensor],
        caches: list[tuple[Tensor, Tensor | None]],
        states: Mapping[int, tuple[Tensor, ...]],
        index_keys: Mapping[int, Tensor],
    ) -> None:
        """`weights` by their GGUF names; `caches` of keys and of values, one pair per layer."""
        super().__init__(
            server,
            weights,
            states,
            layer_norm=decoder.layer_norm,
            plain_norms=decoder.plain_norms,
        )
        self.decoder = decoder
        self.caches = caches
        self.own_inputs: Tensor | None = None
        self.scales = ops.given(FP32, 1, 1, self.tokens)
        self.indexer = Indexer(self, index_keys, decoder.most_relevant) if index_keys else None

    def run(self) -> Graph:
        """The graph from tokens to logits."""
        server, decoder = self.server, self.decoder
        positions = ops.given(INT32, self.tokens * decoder.positions)
        x = self._embedded(positions)
        predicted = self.tokens if server.logits_of_all else min(server.sequences, self.tokens)
        rows = ops.given(INT32, predicted)
        inputs: dict[str, Inputs] = {}
        if self.has("per_layer_token_embd"):
            self.own_inputs = own_inputs(self, x)
        streams = self.has("altup_proj")
        if streams:
            x = altup.spread(self, x)
        for self.layer in range(len(decoder.layers)):
            cache = decoder.layers[decoder.shared.get(self.layer, self.layer)]
            if cache.kind not in inputs:
                inputs[cache.kind] = self._inputs(cache, positions, rows)
            block = self._block_of_streams if streams else self._block
            x = block(x, cache, inputs[cache.kind])
        self.layer = -1
        if streams:
            x = altup.merged(self, x)
        if decoder.late_rows == "norm":
            x = self.norm(x, "output_norm")
        if decoder.late_rows:
            x.is_output = True
            x = ops.get_rows(x, rows)
        if decoder.late_rows != "norm":
            x = self.norm(x, "output_norm")
        self.graph.expand(self.linear(x, "output"))
        return self.graph

    def _embedded(self, positions: Tensor) -> Tensor:
        """The tokens as vectors; of the input for vectors in their place llama.cpp keeps room."""
        tokens = ops.given(INT32, self.tokens)
        x = self.graph.expand(ops.get_rows(self.needed("token_embd"), tokens))
        self.graph.expand(ops.given(FP32, x.shape[0], self.tokens))
        if self.has("position_embd"):
            x = ops.apply("add", x, ops.get_rows(self.needed("position_embd"), positions))
        return self.norm(x, "token_embd_norm")

    def _inputs(self, cache: LayerCache, positions: Tensor, rows: Tensor) -> Inputs:
        server, tokens = self.server, self.tokens
        widest = max(layer.kv_heads * layer.value_dim for layer in self.decoder.layers)
        values = tokens * (1 if server.flash_attention else widest)
        shape = (layer_cells(cache, server), tokens // server.streams, 1, server.streams)
        latent = cache.kind == "latent"
        return Inputs(
            positions,
            rows,
            ops.given(INT64, tokens),
            None if latent else ops.given(INT64, values),
            ops.given(FP16 if server.flash_attention else FP32, *shape),
            None
            if latent
            else self._rotation(server.keys.block_elements, cache.key_dim, grow=True),
            None if latent else self._rotation(server.values.block_elements, cache.value_dim),
        )

    def _rotation(self, block: int, channels: int, *, grow: bool = False) -> Tensor | None:
        """A quantized cache holds rotated vectors: the Hadamard matrix that rotates them."""
        if block == 1 or not channels or channels % 64:
            return None
        size = 64
        while grow and channels % (2 * size) == 0:
            size *= 2
        return ops.given(FP32, size, size)

    def _block(self, x: Tensor, cache: LayerCache, inputs: Inputs) -> Tensor:
        residual = x
        normed = self.norm(x, "attn_norm")
        if self.decoder.norm_first:
            self.graph.expand(normed)
        # Falcon-40B's attention has a norm of its own
        x = self._mixer(
            self.norm(x, "attn_norm_2") if self.has("attn_norm_2") else normed, cache, inputs
        )
        if cache.kind != "recurrent" and self.layer in self.states:
            return self._with_state(x, residual, inputs)
        if self._last():
            x = ops.get_rows(x, inputs.rows)
            residual = ops.get_rows(residual, inputs.rows)
            if self.decoder.parallel and not self.has("ffn_norm"):
                normed = ops.get_rows(normed, inputs.rows)
        if self.decoder.parallel:
            return self._beside(x, residual, normed)
        x = self.norm(x, "post_attention_norm")
        residual = self._added(x, residual, "mixer")
        if cache.kind == "none" or not (self.has("ffn_up") or self.has("ffn_gate_inp")):
            return residual
        x = self._added(self._feed_forward(residual), residual, "mlp")
        if self.own_inputs is not None:
            x = ops.apply("add", x, own_input(self, self.own_inputs, x))
        return self._scaled(x)

    def _block_of_streams(self, streams: Tensor, cache: LayerCache, inputs: Inputs) -> Tensor:
        """Gemma 3n's: of several streams one is computed and corrects all."""
        predictions = altup.predicted(self, streams)
        residual = altup.stream(self, predictions)
        normed = self.norm(residual, "attn_norm")
        beside = altup.laurel(self, normed)
        x = self.norm(self._mixer(normed, cache, inputs), "post_attention_norm")
        residual = ops.apply("add", ops.apply("add", x, residual), beside)
        x = self._sparse_mlp(self.norm(residual, "ffn_norm"))
        x = ops.apply("add", self.norm(x, "post_ffw_norm"), residual)
        streams = altup.corrected(self, predictions, x)
        x = ops.apply("mul", altup.stream(self, streams), self.weight("altup_correct_scale"))
        assert self.own_inputs is not None
        return altup.with_others_added(self, streams, own_input(self, self.own_inputs, x))

    def _sparse_mlp(self, x: Tensor) -> Tensor:
        """An MLP whose gates are few in the first layers."""
        up, gate = self.linear(x, "ffn_up"), self.linear(x, "ffn_gate")
        if self.layer < SPARSE_LAYERS:
            gate = altup.largest_alone(gate)
        return self.linear(ops.apply("mul", up, ops.apply("unary", gate)), "ffn_down")

    def _last(self) -> bool:
        """Whether only rows to predict are needed from here on."""
        return self.layer == len(self.decoder.layers) - 1 and not self.decoder.late_rows

    def _mixer(self, x: Tensor, cache: LayerCache, inputs: Inputs) -> Tensor:
        """What mixes tokens; a layer may have an MLP alone in its place."""
        if cache.kind == "recurrent":
            return recurrent(self, x)
        if cache.kind == "latent":
            return self._latent(x, cache, inputs)
        if self.layer in self.decoder.shared:
            return self._attention_to_shared(x, cache, inputs)
        if cache.kind == "none":
            return self._mlp(x)
        return self._attention(x, cache, inputs)

    def _with_state(self, x: Tensor, residual: Tensor, inputs: Inputs) -> Tensor:
        """Attention and a recurrent mixer side by side, then the MLP (Falcon-H1)."""
        x = ops.apply("add", x, recurrent(self, self.norm(residual, "attn_norm")))
        residual = ops.apply("add", x, residual)
        if self._last():
            residual = ops.get_rows(residual, inputs.rows)
        return ops.apply("add", self._feed_forward(residual), residual)

    def _feed_forward(self, residual: Tensor) -> Tensor:
        if self.has("pre_ffw_norm_2"):
            return self._both_feed_forwards(residual)
        x = self.norm(residual, "ffn_norm")
        x = self._mlp(x)
        return self.norm(x, "post_ffw_norm")

    def _mlp(self, x: Tensor) -> Tensor:
        """Experts, or one MLP."""
        if self.has("ffn_gate_inp"):
            return mixture(self, self.decoder.experts, x)
        return mlp(self, x)

    def _both_feed_forwards(self, residual: Tensor) -> Tensor:
        """An MLP and experts, with norms of their own around each (Gemma 4)."""
        dense = mlp(self, self.norm(residual, "ffn_norm"))
        dense = self.norm(dense, "post_ffw_norm_1")
        x = self.norm(residual, "pre_ffw_norm_2")
        scores = ops.apply("scale", ops.apply("norm", residual))
        scores = ops.apply("mul", scores, self.weight("ffn_gate_inp", "scale"))
        x = mixture(self, self.decoder.experts, x, self.linear(scores, "ffn_gate_inp"))
        x = ops.apply("add", dense, self.norm(x, "post_ffw_norm_2"))
        return self.norm(x, "post_ffw_norm")

    def _added(self, x: Tensor, residual: Tensor, after: str) -> Tensor:
        if after in self.decoder.residual_first:
            return ops.apply("add", residual, x)
        return ops.apply("add", x, residual)

    def _scaled(self, x: Tensor) -> Tensor:
        scale = self.weight("layer_output_scale")
        return x if scale is None else ops.apply("mul", x, scale)

    def _beside(self, attention: Tensor, residual: Tensor, normed: Tensor) -> Tensor:
        """Residual, attention and an MLP that does not wait for it, added up."""
        if self.has("ffn_norm"):
            normed = self.norm(residual, "ffn_norm")
        terms = {
            "attention": attention,
            "residual": residual,
            "mlp": self._mlp(normed),
            "both": ops.apply("add", attention, residual),
        }
        return reduce(partial(ops.apply, "add"), (terms[name] for name in self.decoder.parallel))

    def _qkv(self, x: Tensor, cache: LayerCache) -> tuple[Tensor, Tensor, Tensor]:
        heads, kv_heads = self.decoder.heads, cache.kv_heads
        parts = ((heads, cache.key_dim), (kv_heads, cache.key_dim), (kv_heads, cache.value_dim))
        if self.has("attn_qkv"):
            qkv = self.linear(x, "attn_qkv")
            gap = 4 * qkv.shape[0] * (self.tokens - 1)
            q, k, v = (view(qkv, d, n, self.tokens, span=gap + 4 * n * d) for n, d in parts)
            return q, k, v
        q, k = self.linear(x, "attn_q"), self.linear(x, "attn_k")
        v = self.linear(x, "attn_v") if self.has("attn_v") else k
        if self._full_norm():
            q, k = self.norm(q, "attn_q_norm"), self.norm(k, "attn_k_norm")
        if self._gated(cache):
            each = cache.key_dim
            span = 4 * (q.shape[0] * self.tokens - each)
            q = view(q, each, heads, self.tokens, span=span)
        else:
            q = ops.reshape(q, cache.key_dim, heads, self.tokens)
        k, v = (
            ops.reshape(y, d, n, self.tokens) for y, (n, d) in zip((k, v), parts[1:], strict=True)
        )
        return q, k, v

    def _gated(self, cache: LayerCache) -> bool:
        """Whether the queries' matrix makes gates of the result, too (Qwen3-Next)."""
        if not self.has("attn_q"):
            return False
        rows = self.needed("attn_q").shape[1]
        return rows == 2 * self.decoder.heads * cache.key_dim and cache.kind == "full"

    def _full_norm(self) -> bool:
        """Whether queries are normed across all heads at once."""
        weight = self.weight("attn_q_norm")
        return weight is not None and weight.shape[0] == self.needed("attn_q").shape[1]

    def _attention(self, x: Tensor, cache: LayerCache, inputs: Inputs) -> Tensor:
        q, k, v = self._qkv(x, cache)
        gates = q
        q, k = self._turned_and_normed(q, k, cache, inputs)
        q, k = self._rotate(q, inputs.key_rotation), self._rotate(k, inputs.key_rotation)
        if self.decoder.normed_values:
            v = ops.apply("norm", v)
        v = self._rotate(v, inputs.value_rotation)
        for tensor in (q, v, k):
            self.graph.expand(tensor)
        key_cache, value_cache = self.caches[self.layer]
        assert value_cache is not None and inputs.value_rows is not None
        self._store(key_cache, k, inputs.key_rows)
        self._store(value_cache, v, inputs.value_rows, transposed=not self.server.flash_attention)
        out = self._attend_cached(q, cache, inputs, self.layer)
        if self._gated(cache):
            gate = ops.contiguous(gates, out.shape[0], self.tokens)
            out = ops.apply("mul", out, ops.apply("unary", gate))
        if self.has("attn_gate"):
            out = self._gate(out, ops.apply("unary", self.linear(x, "attn_gate")))
        return self.linear(out, "attn_output")

    def _turned_and_normed(
        self, q: Tensor, k: Tensor, cache: LayerCache, inputs: Inputs
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys with their positions, normed before or after."""
        last = self.decoder.normed_last
        if not last and not self._full_norm():
            q, k = self.norm(q, "attn_q_norm"), self.norm(k, "attn_k_norm")
        q, k = self._turn(q, cache, inputs), self._turn(k, cache, inputs)
        if self.decoder.scaled_queries and self.layer in self.decoder.unrotated:
            return ops.apply("mul", q, self.scales), k
        if last:
            q, k = self.norm(q, "attn_q_norm"), self.norm(k, "attn_k_norm")
        return q, k

    def _gate(self, out: Tensor, gate: Tensor) -> Tensor:
        """Attention times a gate of every channel or head."""
        heads = gate.shape[0]
        if heads == out.shape[0]:
            return ops.apply("mul", out, gate)
        each = ops.reshape(out, out.shape[0] // heads, heads, self.tokens)
        each = ops.apply("mul", each, ops.reshape(gate, 1, heads, self.tokens))
        return ops.reshape(each, out.shape[0], self.tokens)

    def _attention_to_shared(self, x: Tensor, cache: LayerCache, inputs: Inputs) -> Tensor:
        """Queries alone, for keys and values of an earlier layer."""
        q = ops.reshape(self.linear(x, "attn_q"), cache.key_dim, self.decoder.heads, self.tokens)
        q = self._turn(self.norm(q, "attn_q_norm"), cache, inputs)
        q = self.graph.expand(self._rotate(q, inputs.key_rotation))
        out = self._attend_cached(q, cache, inputs, self.decoder.shared[self.layer])
        return self.linear(out, "attn_output")

    def _turn(self, x: Tensor, cache: LayerCache, inputs: Inputs) -> Tensor:
        """Rotary positions, by the file's factors if it has them for such a layer."""
        if self.layer in self.decoder.unrotated:
            return x
        plain = self.decoder.plain_windows and cache.kind == "window"
        factors = None if plain else self.weight("rope_freqs")
        return ops.apply("rope", x, inputs.positions, factors)

    def _attend_cached(self, q: Tensor, cache: LayerCache, inputs: Inputs, layer: int) -> Tensor:
        """Attention to what is in the cache of `layer`."""
        key_cache, value_cache = self.caches[layer]
        assert value_cache is not None
        keys = self._cached(key_cache, cache.key_dim, cache.kv_heads)
        values = self._cached(value_cache, cache.value_dim, cache.kv_heads)
        return self._rotate(self._attend(q, keys, values, inputs.mask), inputs.value_rotation)

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
            x = ops.flash_attention(q, k, v, mask, self.weight("attn_sinks"))
            if expand is not None:
                x = ops.matmul(expand, ops.swap_heads(x))
                x = ops.contiguous(ops.swap_heads(x))
            x = ops.reshape(x, x.shape[0] * x.shape[1], x.shape[2] * x.shape[3])
        else:
            scores = ops.apply("softmax", ops.matmul(k, q), mask, self.weight("attn_sinks"))
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
        if self.has("attn_q_a"):
            low = self.norm(self.linear(x, "attn_q_a"), "attn_q_a_norm")
            if self.indexer is not None and self.has("indexer.proj"):
                self.indexer.choose(x, low, inputs.positions)
            q = self.linear(low, "attn_q_b")
        else:
            q = self.linear(x, "attn_q")
        width = q.shape[0] // heads
        q = ops.reshape(q, width, heads, tokens)
        both = self.linear(x, "attn_kv_a_mqa")
        gap = 4 * both.shape[0] * (tokens - 1)
        compressed = view(both, rank, tokens, span=gap + 4 * rank)
        k_rope = view(both, d.rope_dim, 1, tokens, span=gap + 4 * d.rope_dim)
        k_rope = self._turn(k_rope, cache, inputs)
        compressed = self.norm(compressed, "attn_kv_a_norm")
        span = q.bytes - 4 * (width - d.rope_dim)
        q_rope = view(q, d.rope_dim, heads, tokens, span=span)
        q_plain = view(q, width - d.rope_dim, heads, tokens, span=q.bytes - 4 * d.rope_dim)
        q_rope = self._turn(q_rope, cache, inputs)
        absorbed = ops.matmul(self.needed("attn_k_b"), ops.swap_heads(q_plain))
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
        mask = inputs.mask if self.indexer is None else self.indexer.masked(inputs.mask)
        out = self._attend(q, keys, values, mask, self.needed("attn_v_b"))
        return self.linear(out, "attn_output")
