"""What the layers of a model keep of their tokens, against allocations that were observed."""

import pytest

from llmsize import presets
from llmsize.anatomy import traced
from llmsize.architecture import Architecture
from llmsize.formats import BF16, FP16, FP32
from llmsize.memory.kv_cache import kv_cache

MIB = 2**20


def cached(model: str, context: int, sequences: int = 1) -> dict[str, int]:
    """Bytes of a 16-bit cache with an fp32 state, by kind."""
    layers = traced(presets.get(Architecture, model)).layer_caches()
    total = kv_cache(
        layers, context=context, sequences=sequences, keys=FP16, values=FP16, state=FP32
    )
    return {part.name: int(part.value) for part in total.parts}


def test_hybrid_layers_cache_what_llama_cpp_allocates() -> None:
    """llama.cpp allocates 16384.00 MiB on 16 layers and 598.5 MiB of state for 4 sequences of
    Qwen3.6-27B at 262,144 tokens (lmstudio-ai/lmstudio-bug-tracker#1862)."""
    assert cached("qwen3.6-27b", 262_144)["full attention cache"] == 16384 * MIB
    state = cached("qwen3.6-27b", 1, sequences=4)["recurrent state"]
    assert state / MIB == pytest.approx(598.5, abs=0.01)


def test_latent_attention_caches_one_vector_for_all_heads() -> None:
    """DeepSeek-V2 keeps 512 + 64 channels per token and layer (arXiv:2405.04434, section 2.1)."""
    assert cached("deepseek-v2-lite", 1000)["latent attention cache"] == 27 * 1000 * 576 * 2


def test_local_layers_keep_their_window() -> None:
    """Gemma 3 keeps 1,024 tokens in five of six layers (arXiv:2503.19786, section 2)."""
    parts = cached("gemma-3-27b", 100_000)
    per_token = 2 * 16 * 128 * BF16.block_bytes
    assert parts["full attention cache"] == 10 * 100_000 * per_token
    assert parts["window attention cache"] == 52 * 1024 * per_token


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        ("llama-3.1-8b", {"full": 32}),
        ("mistral-7b-v0.1", {"window": 32}),
        ("gpt-oss-20b", {"full": 12, "window": 12}),
        ("llama-4-scout", {"full": 12, "window": 36}),
        ("jamba-v0.1", {"full": 4, "recurrent": 28}),
        ("falcon-h1-7b", {"full": 44, "recurrent": 44}),
        ("gemma-4-e2b", {"full": 3, "window": 12, "none": 20}),
        ("mamba-2.8b", {"recurrent": 64}),
        ("t5-small", {"full": 6, "cross": 6}),
    ],
)
def test_every_layer_says_what_it_keeps(model: str, kinds: dict[str, int]) -> None:
    """Layer patterns come from the configuration: windows, states, keys of an earlier layer."""
    layers = traced(presets.get(Architecture, model)).layer_caches()
    found = [layer.kind for layer in layers]
    assert {kind: found.count(kind) for kind in found} == kinds
