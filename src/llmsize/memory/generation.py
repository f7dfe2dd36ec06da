"""The memory of generating text with transformers: the prompt's pass and one token's, folded.

The anatomy runs without a backward pass: a tensor goes when its last name does. The dynamic cache
holds what every layer stores; peaks are of allocated bytes, weights and cache included.
"""

from __future__ import annotations

from functools import lru_cache

from llmsize.anatomy import Setting, Trace, run_forward
from llmsize.architecture import Architecture
from llmsize.formats import INT64
from llmsize.memory.timeline import Stretch, crest, stretches
from llmsize.quick_dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Generation:
    """Bytes of a prefill and of the first decoded token."""

    weights: int
    buffers: int
    cache: int
    """Keys and values of the prompt that later tokens can see, and recurrent states."""
    prefill_peak: int
    """Everything allocated at the highest moment of the prompt's pass, …"""
    decode_peak: int
    """… and at that of the next token's."""


@lru_cache(maxsize=8)
def generation(architecture: Architecture, setting: Setting) -> Generation:
    """Run the prompt of `setting` and then one more token. Raises `LLMSizeError`.

    The same for every way of storing weights that are computed in one format, so it is remembered.
    """
    setting = setting._replace(training=False, cache=True)
    prompt, prompt_parts = _run(architecture, setting)
    token = setting._replace(sequence=1, past=setting.sequence, last_logits=True)
    _, token_parts = _run(architecture, token)
    weights = sum(w.bytes * w.copies for w in prompt.weights.values())
    static = weights + prompt.buffer_bytes + INT64.block_bytes * setting.batch * setting.sequence
    kept = [(change * part.times, operation) for part in prompt_parts for passage in part.passages
            for change, (role, operation, *_) in passage.events if role == "cache"]  # fmt: skip
    stored = sum(change for change, _ in kept)
    states = sum(change for change, operation in kept if operation == "state")
    return Generation(
        weights=weights,
        buffers=prompt.buffer_bytes,
        cache=_nominal(prompt, setting) + states,
        prefill_peak=static + crest(prompt_parts).bytes,
        decode_peak=(
            static + INT64.block_bytes * setting.batch + stored + crest(token_parts).bytes
        ),
    )


def _run(architecture: Architecture, setting: Setting) -> tuple[Trace, list[Stretch]]:
    trace, _ = run_forward(architecture, setting)
    return trace, list(stretches(trace))


def _nominal(trace: Trace, setting: Setting) -> int:
    """The cache that later tokens can see: a window's is one token short of the window.

    Where keys and values are repeated before they are cached, it has those of every query head.
    """
    total = 0
    for cache in trace.layer_caches():
        tokens = setting.past + setting.sequence
        if cache.window:
            tokens = min(tokens, cache.window - 1)
        width = cache.kv_heads * (cache.key_dim + cache.value_dim)
        if cache.kind == "full" and cache.expanded:
            width = cache.expanded
        elements = tokens // cache.every * width + tokens % cache.every * cache.waiting
        total += setting.batch * elements * setting.format.block_bytes
    return total
