"""The architecture that GGUF metadata give has the published number of parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import gguf

from llmsize import presets
from llmsize.anatomy import traced
from llmsize.anatomy.parameters import count
from llmsize.architecture import Architecture
from llmsize.sources import resolve


def shape(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, vocabulary: int,
          **more: object) -> dict[str, object]:  # fmt: skip
    """The keys that every architecture has."""
    return {
        "block_count": layers, "embedding_length": hidden, "feed_forward_length": mlp,
        "attention.head_count": heads, "attention.head_count_kv": kv_heads,
        "vocab_size": vocabulary, "context_length": 4096,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip


HEAD, Q_BIAS, MLP_BIAS = "output.weight", "blk.0.attn_q.bias", "blk.0.ffn_down.bias"
MODELS = {
    "llama-3.1-8b": ("llama", [HEAD], shape(32, 4096, 14336, 32, 8, 128256)),
    "qwen2.5-7b": ("qwen2", [HEAD, Q_BIAS], shape(28, 3584, 18944, 28, 4, 152064)),
    "qwen3-8b": ("qwen3", [HEAD], shape(36, 4096, 12288, 32, 8, 151936, attention__key_length=128)),
    "gemma-2-9b": (
        "gemma2", [],
        shape(42, 3584, 14336, 16, 8, 256000, attention__key_length=256,
              attention__sliding_window=4096),
    ),
    "phi-3-mini-4k": ("phi3", [HEAD], shape(32, 3072, 8192, 32, 32, 32064)),
    "granite-3.3-8b": ("granite", [], shape(40, 4096, 12800, 32, 8, 49159)),
    "starcoder2-7b": (
        "starcoder2", [Q_BIAS, MLP_BIAS], shape(32, 4608, 18432, 36, 4, 49152)
    ),
    "gpt2": (
        "gpt2", ["blk.0.attn_qkv.bias", MLP_BIAS],
        shape(12, 768, 3072, 12, 12, 50257, context_length=1024),
    ),
    "mixtral-8x7b": (
        "llama", [HEAD],
        shape(32, 4096, 14336, 32, 8, 32000, expert_count=8, expert_used_count=2),
    ),
    "qwen3-30b-a3b": (
        "qwen3moe", [HEAD],
        shape(48, 2048, 6144, 32, 4, 151936, attention__key_length=128, expert_count=128,
              expert_used_count=8, expert_feed_forward_length=768),
    ),
    "gpt-oss-20b": (
        "gpt-oss", [HEAD, Q_BIAS],
        shape(24, 2880, 2880, 64, 8, 201088, attention__key_length=64, expert_count=32,
              expert_used_count=4, expert_feed_forward_length=2880),
    ),
    "deepseek-v2-lite": (
        "deepseek2", [HEAD],
        shape(27, 2048, 10944, 16, 1, 102400, attention__key_length=576,
              attention__value_length=512, attention__key_length_mla=192,
              attention__value_length_mla=128, attention__kv_lora_rank=512,
              rope__dimension_count=64, leading_dense_block_count=1, expert_count=64,
              expert_used_count=6, expert_shared_count=2, expert_feed_forward_length=1408),
    ),
    "mamba-130m": (
        "mamba", [],
        shape(24, 768, 0, 0, 0, 50280, ssm__conv_kernel=4, ssm__inner_size=1536,
              ssm__state_size=16, ssm__time_step_rank=48),
    ),
    "mamba2-2.7b": (
        "mamba2", [],
        shape(64, 2560, 0, 0, 0, 50288, ssm__conv_kernel=4, ssm__inner_size=5120,
              ssm__state_size=128, ssm__time_step_rank=80, ssm__group_count=1),
    ),
    "falcon-h1-7b": (
        "falcon-h1", [HEAD],
        shape(44, 3072, 12288, 12, 2, 130048, attention__key_length=128, ssm__conv_kernel=4,
              ssm__inner_size=3072, ssm__state_size=256, ssm__time_step_rank=24,
              ssm__group_count=1),
    ),
    "jamba-v0.1": (
        "jamba", [HEAD, *(f"blk.{layer}.ffn_gate_inp.weight" for layer in range(1, 32, 2))],
        shape(32, 4096, 14336, 32, 8, 65536, ssm__conv_kernel=4, ssm__inner_size=8192,
              ssm__state_size=16, ssm__time_step_rank=256, expert_count=16, expert_used_count=2)
        | {"attention.head_count_kv": [8 * (layer % 8 == 4) for layer in range(32)]},
    ),
    "qwen3-next-80b-a3b": (
        "qwen3next", [HEAD],
        shape(48, 2048, 5632, 16, 2, 151936, attention__key_length=256, ssm__conv_kernel=4,
              ssm__inner_size=4096, ssm__state_size=128, ssm__time_step_rank=32,
              ssm__group_count=16, full_attention_interval=4, expert_count=512,
              expert_used_count=10, expert_feed_forward_length=512,
              expert_shared_feed_forward_length=512),
    ),
    "lfm2-1.2b": (
        "lfm2", [],
        shape(16, 2048, 8192, 32, 8, 65536, shortconv__l_cache=3)
        | {"attention.head_count_kv": [0, 0, 8, 0, 0, 8, 0, 0, 8, 0, 8, 0, 8, 0, 8, 0]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
def test_a_converted_model_has_the_published_parameters(tmp_path: Path, model: str) -> None:
    """What llama.cpp keeps of a configuration is enough to count the model to the digit.

    Where nothing is published, the configuration counts.
    """
    name, tensors, keys = MODELS[model]
    metadata = {"general.architecture": name} | {f"{name}.{key}": v for key, v in keys.items()}
    stored = [(tensor, [32], 0, 128) for tensor in ("token_embd.weight", *tensors)]
    path = gguf(tmp_path / "m.gguf", metadata, stored)
    found = resolve(str(path)).architecture
    assert found is not None
    counted = count(traced(found).weights.values()).total
    preset = presets.get(Architecture, model)
    known = preset.published_parameters or count(traced(preset).weights.values()).total
    assert counted == known
