"""The cache of keys and values: what every layer keeps of the tokens it has seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from llmsize.anatomy.cache import LayerCache
from llmsize.errors import LLMSizeError
from llmsize.formats import FP32, Format, stored_bytes
from llmsize.term import Term, term, total


class CachePolicy(NamedTuple):
    """How an engine keeps the cache."""

    token_block: int = 1
    """Tokens that are allocated together."""
    windows: Literal["capped", "reserved"] = "capped"
    """Whether a window layer keeps its window or room for every token."""
    latent: Literal["latent", "expanded"] = "latent"
    """Whether a latent is cached as it is or decompressed into every head's key and value."""
    index_keys: Format | None = None
    """The format of the keys of indexers; that of all keys unless given."""
    packed_latent: int = 0
    """Bytes of a latent in a kernel's own layout; 0 where it is a vector in the format of keys."""


AS_ASKED = CachePolicy()
"""Room for exactly the tokens that a layer keeps."""


def cached_tokens(layer: LayerCache, context: int, policy: CachePolicy) -> int:
    """Tokens of one sequence that `layer` has room for."""
    kept = -(-context // layer.every)
    if layer.kind == "window" and policy.windows == "capped":
        kept = min(context, layer.window)
    return -(-kept // policy.token_block) * policy.token_block


def token_bytes(
    layer: LayerCache,
    keys: Format,
    values: Format,
    policy: CachePolicy = AS_ASKED,
    tensor_parallel: int = 1,
) -> int:
    """Bytes that one token takes in `layer` on one device.

    With more devices than heads every device keeps a whole head; a latent is on every device, and
    so is what an indexer keeps.
    """
    if layer.kind in ("recurrent", "none"):
        return 0
    if layer.kind == "index":
        return stored_bytes(policy.index_keys or keys, layer.key_dim)
    if layer.kind == "latent":
        if policy.latent == "expanded":
            return stored_bytes(keys, layer.expanded // tensor_parallel)
        return policy.packed_latent or stored_bytes(keys, layer.key_dim)
    heads = max(1, layer.kv_heads // tensor_parallel)
    return stored_bytes(keys, heads * layer.key_dim) + stored_bytes(values, heads * layer.value_dim)


def kv_cache(
    layers: Iterable[LayerCache],
    *,
    context: int,
    keys: Format,
    values: Format,
    sequences: int = 1,
    policy: CachePolicy = AS_ASKED,
    tensor_parallel: int = 1,
    encoder_context: int = 0,
    state: Format = FP32,
) -> Term:
    """Bytes of the cache of `sequences` sequences of `context` tokens on one device.

    Cross-attention keeps `encoder_context` tokens. What several sequences could share (a common
    prefix) is counted for each.
    """
    parts = []
    for layer, count in Counter(layers).items():
        if layer.kind == "recurrent":
            parts.append(_state(layer, count, sequences, state, tensor_parallel))
        elif layer.kind != "none":
            tokens = encoder_context if layer.kind == "cross" else context
            parts.append(
                term(
                    f"{layer.kind} attention cache",
                    "layers * sequences * tokens * bytes_per_token",
                    unit="bytes",
                    source="Ainslie et al. 2023, arXiv:2305.13245",
                    layers=count,
                    sequences=sequences,
                    tokens=cached_tokens(layer, tokens, policy),
                    bytes_per_token=token_bytes(layer, keys, values, policy, tensor_parallel),
                )
            )
    return total("KV cache", *parts, unit="bytes")


def _state(layer: LayerCache, count: int, sequences: int, format: Format, shards: int) -> Term:
    return term(
        "recurrent state",
        "layers * sequences * bytes_per_sequence",
        unit="bytes",
        source="Gu and Dao 2023, arXiv:2312.00752",
        layers=count,
        sequences=sequences,
        bytes_per_sequence=stored_bytes(format, -(-layer.state // shards)),
    )


NEARLY_ALIKE = 1.25
"""Up to this many times as many layers of one kind as of the other, groups are as large as the more
common kind: vLLM's own number, which it has by trial (later versions have 1.5)."""


def pool_token_bytes(
    layers: Iterable[LayerCache],
    keys: Format,
    values: Format,
    policy: CachePolicy,
    tensor_parallel: int = 1,
) -> int:
    """Bytes of a paged pool for one token on one device, as vLLM charges them.

    Layers of different kinds share the pool in groups of as many layers as the rarer kind has, or
    the other one if they are nearly alike; the last group is padded, and a window is charged as if
    it kept every token. vLLM 0.19, v1/core/kv_cache_utils.py,
    `_get_kv_cache_groups_uniform_page_size`; latents and an indexer's keys are of one kind there.
    """
    counts = Counter(layer for layer in layers if layer.kind not in ("recurrent", "none"))
    if len(counts) > 1 and not any(layer.kind == "index" for layer in counts):
        fewest, most = min(counts.values()), max(counts.values())
        group = most if most < NEARLY_ALIKE * fewest else fewest
        counts = Counter({layer: -(-count // group) * group for layer, count in counts.items()})
    return sum(
        count * token_bytes(layer, keys, values, policy, tensor_parallel)
        for layer, count in counts.items()
    )


def pool_tokens(
    layers: Iterable[LayerCache],
    pool: int,
    *,
    keys: Format,
    values: Format,
    policy: CachePolicy,
    tensor_parallel: int = 1,
) -> int:
    """Tokens that a paged pool of `pool` bytes on each device has room for, in whole blocks.

    vLLM prints it as `GPU KV cache size`. Raises `LLMSizeError` for a model that caches nothing
    per token.
    """
    per_token = pool_token_bytes(layers, keys, values, policy, tensor_parallel)
    if not per_token:
        raise LLMSizeError(
            "this model caches nothing per token", hint="ask for the number of sequences instead"
        )
    return pool // (per_token * policy.token_block) * policy.token_block


def paged_sequences(
    layers: Iterable[LayerCache],
    pool: int,
    *,
    context: int,
    keys: Format,
    values: Format,
    policy: CachePolicy,
    state_pages: int,
    tensor_parallel: int = 1,
) -> float:
    """Sequences that a pool has room for whose pages hold tokens or a state (hybrid models).

    vLLM 0.19: a page has as many tokens as the state of a layer has room for; layers form groups of
    as many as the rarer kind has, and a sequence takes pages in every group. Raises `LLMSizeError`
    for a model that has no layers of both kinds.
    """
    kept = Counter(layer for layer in layers if layer.kind != "none")
    recurrent = {layer: count for layer, count in kept.items() if layer.kind == "recurrent"}
    others = {layer: count for layer, count in kept.items() if layer.kind != "recurrent"}
    token = max(
        (token_bytes(layer, keys, values, policy, tensor_parallel) for layer in others), default=0
    )
    if not token or not recurrent:
        raise LLMSizeError(
            "this model is no hybrid of attention and recurrence", hint="ask for tokens instead"
        )
    state = max(stored_bytes(FP32, -(-layer.state // tensor_parallel)) for layer in recurrent)
    block = -(-state // (token * policy.token_block)) * policy.token_block
    group = min(*recurrent.values(), *others.values())
    pages = -(-context // block) * sum(-(-count // group) for count in others.values())
    pages += state_pages * sum(-(-count // group) for count in recurrent.values())
    return pool // (block * token * group) / pages
