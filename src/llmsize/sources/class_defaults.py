"""What a model's class takes for a field that its `config.json` does not state."""

from __future__ import annotations

from collections.abc import Mapping

Value = int | float | str | bool

BASICS = frozenset((
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
))  # fmt: skip
"""What the configuration of a whole model states itself: without it, something is wrong. Models
for several media are published with only those fields of their language model that differ."""

SYNONYMS = (
    frozenset(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")),
    frozenset((
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k",
        "top_k_experts",
    )),
    frozenset(("n_shared_experts", "num_shared_experts", "num_shared_expert")),
)  # fmt: skip
"""Fields that say the same in configurations of different age."""

CLASS_DEFAULTS: Mapping[str, Mapping[str, Value]] = {
    "afmoe": {
        "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 1408,
        "num_experts": 64, "num_experts_per_tok": 6, "num_shared_experts": 2,
        "sliding_window": 1024,
    },
    "apertus": {"intermediate_size": 14_336},
    "arcee": {"intermediate_size": 18_432},
    "aria_text": {"intermediate_size": 4096, "moe_num_experts": 8, "moe_topk": 2},
    "axk1": {
        "intermediate_size": 18_432, "kv_lora_rank": 512, "moe_intermediate_size": 2048,
        "n_routed_experts": 192, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "num_key_value_heads": 64, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    "bamba": {"intermediate_size": 14_336, "num_key_value_heads": 8},
    "bart": {"decoder_ffn_dim": 4096, "encoder_ffn_dim": 4096},
    "beam": {
        "head_dim": 128, "intermediate_size": 20_480, "moe_intermediate_size": 2560,
        "num_experts": 256, "num_experts_per_tok": 8, "num_key_value_heads": 8,
        "sliding_window": 512,
    },
    "bert": {"intermediate_size": 3072},
    "biogpt": {"intermediate_size": 4096},
    "bitnet": {"intermediate_size": 6912, "num_key_value_heads": 5},
    "blenderbot": {
        "decoder_ffn_dim": 10_240, "encoder_ffn_dim": 10_240, "max_position_embeddings": 128,
    },
    "blenderbot-small": {
        "decoder_ffn_dim": 2048, "encoder_ffn_dim": 2048, "max_position_embeddings": 512,
    },
    "camembert": {"intermediate_size": 3072},
    "codegen": {"rotary_dim": 64},
    "cohere": {"intermediate_size": 22_528},
    "cohere2": {"intermediate_size": 22_528, "sliding_window": 4096},
    "cohere2_moe": {
        "head_dim": 128, "intermediate_size": 22_528, "num_experts": 8, "num_experts_per_tok": 2,
        "sliding_window": 4096,
    },
    "cwm": {
        "head_dim": 128, "intermediate_size": 21_504, "num_key_value_heads": 8,
        "sliding_window": 8192,
    },
    "deepseek_ocr2_text": {"intermediate_size": 11_008, "n_routed_experts": 64},
    "deepseek_v2": {
        "intermediate_size": 11_008, "kv_lora_rank": 512, "n_routed_experts": 64,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    "deepseek_v3": {
        "intermediate_size": 18_432, "kv_lora_rank": 512, "moe_intermediate_size": 2048,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "num_key_value_heads": 128, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    "deepseek_v32": {
        "head_dim": 64, "index_head_dim": 128, "index_n_heads": 64, "intermediate_size": 18_432,
        "kv_lora_rank": 512, "moe_intermediate_size": 2048, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    "deepseek_v4": {
        "head_dim": 512, "index_head_dim": 128, "index_n_heads": 64, "moe_intermediate_size": 2048,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 6,
        "num_key_value_heads": 1, "o_groups": 8, "o_lora_rank": 1024, "q_lora_rank": 1024,
    },
    "dots1": {"intermediate_size": 10_944, "num_key_value_heads": 32},
    "ernie4_5": {"head_dim": 128, "intermediate_size": 3072, "num_key_value_heads": 2},
    "ernie4_5_moe": {
        "intermediate_size": 12_288, "moe_intermediate_size": 1536, "moe_k": 6,
        "moe_num_experts": 64, "num_key_value_heads": 4,
    },
    "exaone4": {"intermediate_size": 16_384, "num_key_value_heads": 32, "sliding_window": 4096},
    "exaone_moe": {
        "intermediate_size": 16_384, "moe_intermediate_size": 1024, "num_experts": 64,
        "num_experts_per_tok": 8, "num_key_value_heads": 32, "num_shared_experts": 1,
        "sliding_window": 4096,
    },
    "falcon_h1": {"intermediate_size": 14_336, "mamba_d_ssm": 1024, "num_key_value_heads": 8},
    "flex_olmo": {"intermediate_size": 11_008, "num_experts": 7, "num_experts_per_tok": 5},
    "gemma": {"head_dim": 256, "intermediate_size": 24_576, "num_key_value_heads": 16},
    "gemma2": {
        "head_dim": 256, "intermediate_size": 9216, "num_key_value_heads": 4,
        "sliding_window": 4096,
    },
    "gemma3_text": {
        "vocab_size": 262_208, "hidden_size": 2304, "num_hidden_layers": 26,
        "num_attention_heads": 8, "max_position_embeddings": 131_072, "head_dim": 256,
        "intermediate_size": 9216, "num_key_value_heads": 4, "sliding_window": 4096,
    },
    "gemma3n_text": {
        "head_dim": 256, "intermediate_size": 16_384, "num_key_value_heads": 2,
        "sliding_window": 512, "vocab_size_per_layer_input": 262_144,
    },
    "gemma4_text": {
        "head_dim": 256, "intermediate_size": 9216, "num_key_value_heads": 4, "sliding_window": 512,
        "vocab_size_per_layer_input": 262_144,
    },
    "glm": {"head_dim": 128, "intermediate_size": 13_696, "num_key_value_heads": 2},
    "glm4": {"head_dim": 128, "intermediate_size": 13_696, "num_key_value_heads": 2},
    "glm4_moe": {
        "intermediate_size": 10_944, "moe_intermediate_size": 1408, "n_routed_experts": 128,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "num_key_value_heads": 8,
    },
    "glm4_moe_lite": {
        "intermediate_size": 10_240, "kv_lora_rank": 512, "moe_intermediate_size": 1536,
        "n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 4,
        "num_key_value_heads": 20, "q_lora_rank": 768, "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64, "v_head_dim": 256,
    },
    "glm4v_moe_text": {
        "attention_bias": True, "intermediate_size": 10_944, "moe_intermediate_size": 1408,
        "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
    },
    "glm4v_text": {"intermediate_size": 13_696, "num_key_value_heads": 2},
    "glm_moe_dsa": {
        "head_dim": 64, "index_head_dim": 128, "index_n_heads": 32, "intermediate_size": 12_288,
        "kv_lora_rank": 512, "moe_intermediate_size": 2048, "n_routed_experts": 256,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "num_key_value_heads": 64,
        "q_lora_rank": 2048, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
    },
    "glm_ocr_text": {"intermediate_size": 4096, "num_key_value_heads": 8},
    "gpt_oss": {
        "head_dim": 64, "intermediate_size": 2880, "num_experts_per_tok": 4,
        "num_key_value_heads": 8, "num_local_experts": 128, "sliding_window": 128,
    },
    "gptj": {"rotary_dim": 64},
    "granite": {"intermediate_size": 11_008},
    "granite_swa": {"intermediate_size": 8192, "num_key_value_heads": 4, "sliding_window": 128},
    "granitemoe": {"intermediate_size": 11_008, "num_experts_per_tok": 2, "num_local_experts": 8},
    "granitemoe_swa": {
        "intermediate_size": 11_008, "num_experts_per_tok": 2, "num_local_experts": 8,
        "sliding_window": 128,
    },
    "granitemoehybrid": {
        "intermediate_size": 11_008, "num_experts_per_tok": 2, "num_local_experts": 8,
    },
    "granitemoeshared": {
        "intermediate_size": 11_008, "num_experts_per_tok": 2, "num_local_experts": 8,
    },
    "helium": {"head_dim": 128, "intermediate_size": 7040, "num_key_value_heads": 20},
    "hunyuan_v1_dense": {"intermediate_size": 11_008},
    "hunyuan_v1_moe": {"intermediate_size": 11_008, "moe_topk": 1, "num_experts": 1},
    "hunyuan_vl_text": {"intermediate_size": 11_008},
    "hy_v3": {
        "head_dim": 128, "intermediate_size": 13_312, "moe_intermediate_size": 1536,
        "num_experts": 192, "num_experts_per_tok": 8, "num_key_value_heads": 8,
        "num_shared_experts": 1,
    },
    "hyperclovax": {"intermediate_size": 11_008},
    "inkling_text": {
        "head_dim": 128, "intermediate_size": 24_576, "moe_intermediate_size": 3072,
        "n_routed_experts": 256, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "num_key_value_heads": 8, "swa_num_key_value_heads": 16,
    },
    "internlm3": {"head_dim": 128, "intermediate_size": 10_240, "num_key_value_heads": 2},
    "iquestcoder": {"head_dim": 128, "intermediate_size": 27_648, "num_key_value_heads": 8},
    "jais2": {"intermediate_size": 26_624},
    "jamba": {
        "intermediate_size": 14_336, "num_experts": 16, "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
    },
    "kimi_linear": {
        "intermediate_size": 9216, "kv_lora_rank": 512, "moe_intermediate_size": 1024,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "num_key_value_heads": 32,
        "num_local_experts": 256, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    "kolibri1": {
        "head_dim": 128, "moe_intermediate_size": 512, "num_experts": 384, "num_experts_per_tok": 6,
        "num_key_value_heads": 4, "shared_expert_intermediate_size": 512, "sliding_window": 513,
    },
    "laguna": {
        "head_dim": 128, "intermediate_size": 8192, "moe_intermediate_size": 512,
        "num_experts": 256, "num_experts_per_tok": 8, "num_key_value_heads": 8,
        "shared_expert_intermediate_size": 512, "sliding_window": 512,
    },
    "lfm2": {"intermediate_size": 12_288, "num_key_value_heads": 8},
    "lfm2_moe": {"intermediate_size": 7168, "num_key_value_heads": 8},
    "lfm3": {
        "head_dim": 128, "intermediate_size": 7680, "num_key_value_heads": 4, "sliding_window": 256,
    },
    "llama": {
        "vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "intermediate_size": 11_008,
    },
    "llama4_text": {
        "attention_chunk_size": 8192, "head_dim": 128, "intermediate_size": 8192,
        "intermediate_size_mlp": 16_384, "num_experts_per_tok": 1, "num_key_value_heads": 8,
        "num_local_experts": 16,
    },
    "m2m_100": {
        "activation_function": "relu", "attention_dropout": 0.1, "decoder_ffn_dim": 4096,
        "encoder_ffn_dim": 4096,
    },
    "mamba2": {"head_dim": 64},
    "marian": {"decoder_ffn_dim": 4096, "encoder_ffn_dim": 4096},
    "mbart": {"decoder_ffn_dim": 4096, "encoder_ffn_dim": 4096},
    "mellum": {
        "head_dim": 128, "intermediate_size": 7168, "moe_intermediate_size": 896, "num_experts": 64,
        "num_experts_per_tok": 8, "num_key_value_heads": 4, "sliding_window": 1024,
    },
    "mimo_v2_flash": {
        "head_dim": 192, "intermediate_size": 16_384, "moe_intermediate_size": 2048,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "num_key_value_heads": 4,
        "sliding_window": 129, "v_head_dim": 128,
    },
    "minicpm3": {
        "intermediate_size": 6400, "kv_lora_rank": 256, "num_key_value_heads": 40,
        "q_lora_rank": 768, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
    },
    "minimax": {
        "intermediate_size": 14_336, "num_experts_per_tok": 2, "num_key_value_heads": 8,
        "num_local_experts": 8,
    },
    "minimax_m2": {
        "head_dim": 128, "intermediate_size": 1536, "num_experts_per_tok": 8,
        "num_key_value_heads": 8, "num_local_experts": 256,
    },
    "minimax_m3_vl_text": {
        "dense_intermediate_size": 12_288, "head_dim": 128, "intermediate_size": 3072,
        "num_experts_per_tok": 4, "num_key_value_heads": 4, "num_local_experts": 128,
    },
    "ministral": {"intermediate_size": 14_336, "num_key_value_heads": 8, "sliding_window": 4096},
    "ministral3": {"head_dim": 128, "intermediate_size": 14_336, "num_key_value_heads": 8},
    "mistral": {
        "vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 131_072, "intermediate_size": 14_336,
        "num_key_value_heads": 8,
    },
    "mistral4": {
        "intermediate_size": 12_288, "kv_lora_rank": 256, "moe_intermediate_size": 2048,
        "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 4,
        "num_key_value_heads": 32, "q_lora_rank": 1024, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    "mixtral": {
        "intermediate_size": 14_336, "num_experts_per_tok": 2, "num_key_value_heads": 8,
        "num_local_experts": 8,
    },
    "mllama_text_model": {"intermediate_size": 14_336, "num_key_value_heads": 8},
    "mt5": {"d_ff": 1024, "d_kv": 64},
    "muse_glimmer_text": {
        "head_dim": 128, "intermediate_size": 19_968, "num_key_value_heads": 2,
        "sliding_window": 2048,
    },
    "nanochat": {"intermediate_size": 8192},
    "nemotron": {"intermediate_size": 24_576},
    "nemotron_h": {
        "head_dim": 128, "intermediate_size": 21_504, "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688, "n_routed_experts": 8, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "num_key_value_heads": 8,
    },
    "olmo": {"intermediate_size": 11_008},
    "olmo2": {"intermediate_size": 11_008},
    "olmo3": {"intermediate_size": 11_008, "sliding_window": 4096},
    "olmo_hybrid": {"intermediate_size": 11_008},
    "olmoe": {"intermediate_size": 2048, "num_experts": 64, "num_experts_per_tok": 8},
    "opt": {"ffn_dim": 3072},
    "paddleocr_vl_text": {"head_dim": 128, "intermediate_size": 3072, "num_key_value_heads": 2},
    "pegasus": {"decoder_ffn_dim": 4096, "encoder_ffn_dim": 4096},
    "persimmon": {"intermediate_size": 16_384},
    "phi": {"intermediate_size": 8192},
    "phi3": {"intermediate_size": 8192},
    "phi4_multimodal": {"intermediate_size": 8192, "num_key_value_heads": 8},
    "phimoe": {
        "intermediate_size": 6400, "num_experts_per_tok": 2, "num_key_value_heads": 8,
        "num_local_experts": 16,
    },
    "qwen2": {"intermediate_size": 22_016, "num_key_value_heads": 32},
    "qwen2_5_omni_text": {"intermediate_size": 18_944, "num_key_value_heads": 4},
    "qwen2_5_vl_text": {"intermediate_size": 29_568, "num_key_value_heads": 8},
    "qwen2_moe": {
        "intermediate_size": 5632, "moe_intermediate_size": 1408, "num_experts": 60,
        "num_experts_per_tok": 4, "num_key_value_heads": 16,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen2_vl_text": {"intermediate_size": 29_568, "num_key_value_heads": 8},
    "qwen3": {"head_dim": 128, "intermediate_size": 22_016, "num_key_value_heads": 32},
    "qwen3_5_moe_text": {
        "head_dim": 256, "moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8,
        "num_key_value_heads": 2, "shared_expert_intermediate_size": 512,
    },
    "qwen3_5_text": {"head_dim": 256, "intermediate_size": 12_288, "num_key_value_heads": 4},
    "qwen3_moe": {
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_key_value_heads": 4,
    },
    "qwen3_next": {
        "head_dim": 256, "intermediate_size": 5632, "moe_intermediate_size": 512,
        "num_experts": 512, "num_experts_per_tok": 10, "num_key_value_heads": 2,
        "shared_expert_intermediate_size": 512,
    },
    "qwen3_omni_moe_text": {
        "intermediate_size": 18_944, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "num_key_value_heads": 4,
    },
    "qwen3_vl_moe_text": {
        "intermediate_size": 5632, "moe_intermediate_size": 1408, "num_experts": 60,
        "num_experts_per_tok": 4, "num_key_value_heads": 16,
    },
    "qwen3_vl_text": {"head_dim": 128, "intermediate_size": 22_016, "num_key_value_heads": 32},
    "roberta": {"intermediate_size": 3072},
    "seed_oss": {"head_dim": 128, "intermediate_size": 27_648, "num_key_value_heads": 8},
    "smollm3": {"intermediate_size": 11_008, "num_key_value_heads": 4},
    "solar_open": {
        "head_dim": 128, "moe_intermediate_size": 1280, "n_routed_experts": 128,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "num_key_value_heads": 8,
    },
    "stablelm": {"intermediate_size": 6912, "num_key_value_heads": 32},
    "starcoder2": {"intermediate_size": 12_288, "num_key_value_heads": 2},
    "t5": {"d_ff": 2048, "d_kv": 64},
    "umt5": {"d_ff": 1024, "d_kv": 64},
    "vaultgemma": {
        "head_dim": 256, "intermediate_size": 9216, "num_key_value_heads": 4,
        "sliding_window": 4096,
    },
    "xglm": {"ffn_dim": 4096},
    "xlm-roberta": {"intermediate_size": 3072},
    "youtu": {
        "intermediate_size": 6144, "kv_lora_rank": 512, "num_key_value_heads": 16,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    "zaya": {
        "head_dim": 128, "moe_intermediate_size": 2048, "num_experts": 16, "num_experts_per_tok": 1,
        "num_key_value_heads": 2,
    },
}  # fmt: skip
"""Of each `model_type` those fields whose default shapes the model (transformers v5.23.0,
models/*/configuration_*.py)."""


def absent(family: str, config: Mapping[str, object], *, nested: bool) -> Mapping[str, Value]:
    """The fields that the class of that `model_type` adds to `config`, with their values.

    `nested` says that it is the language model's part of a configuration.
    """
    return {
        field: value
        for field, value in CLASS_DEFAULTS.get(family, {}).items()
        if (nested or field not in BASICS) and not _states(config, field)
    }


def _states(config: Mapping[str, object], field: str) -> bool:
    alike = next((group for group in SYNONYMS if field in group), frozenset((field,)))
    return not alike.isdisjoint(config)
