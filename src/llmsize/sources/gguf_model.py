"""What the metadata of a GGUF file say of the model: its architecture, and what its layers cache.

Keys, and the defaults that llama.cpp has for absent ones: llama.cpp 0c1e57098, src/llama-arch.cpp,
src/llama-hparams.cpp and src/models/.
"""

from __future__ import annotations

from typing import Any

from llmsize.anatomy.cache import LayerCache
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError, printable
from llmsize.sources.gguf import GGUF
from llmsize.sources.gguf_hybrid import hybrid

LARGEST = 2**32
MAX_LAYERS = 10_000

FAMILIES = {
    "llama": "llama", "llama4": "llama4_text", "mistral3": "mistral", "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe", "qwen3": "qwen3", "qwen3moe": "qwen3_moe", "qwen3next": "qwen3_next",
    "qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text", "gemma": "gemma",
    "gemma2": "gemma2", "gemma3": "gemma3_text", "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text", "phi2": "phi", "phi3": "phi3", "phimoe": "phimoe", "gpt2": "gpt2",
    "gptj": "gptj", "gptneox": "gpt_neox", "starcoder": "gpt_bigcode",
    "starcoder2": "starcoder2", "stablelm": "stablelm", "falcon": "falcon", "mpt": "mpt",
    "bloom": "bloom", "internlm2": "internlm2", "baichuan": "baichuan", "command-r": "cohere",
    "cohere2": "cohere2", "olmo": "olmo", "olmo2": "olmo2", "olmoe": "olmoe",
    "granite": "granite", "granitemoe": "granitemoe", "exaone": "exaone", "exaone4": "exaone4",
    "nemotron": "nemotron", "nemotron_h": "nemotron_h", "deepseek": "deepseek",
    "deepseek2": "deepseek_v2", "deepseek32": "deepseek_v32", "glm4": "glm4",
    "glm4moe": "glm4_moe", "minimax-m2": "minimax_m2", "gpt-oss": "gpt_oss",
    "smollm3": "smollm3", "mamba": "mamba", "mamba2": "mamba2", "jamba": "jamba",
    "falcon-h1": "falcon_h1", "ernie4_5": "ernie4_5", "kimi-linear": "kimi_linear",
    "granitehybrid": "granitemoehybrid", "lfm2": "lfm2",
    "dbrx": "dbrx", "seed_oss": "seed_oss", "dots1": "dots1", "apertus": "apertus",
}  # fmt: skip
"""`general.architecture` → `model_type`."""

FIELDS = {
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings", "attention.sliding_window": "sliding_window",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    "nextn_predict_layers": "num_nextn_predict_layers",
    "attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank",
    "attention.shared_kv_layers": "num_kv_shared_layers",
}  # fmt: skip
"""Key → field of a `config.json`."""

EXPERTS = {
    "mixtral": "num_local_experts", "phimoe": "num_local_experts",
    "gpt_oss": "num_local_experts", "granitemoe": "num_local_experts",
    "llama4_text": "num_local_experts", "minimax_m2": "num_local_experts",
    "deepseek": "n_routed_experts", "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts", "deepseek_v32": "n_routed_experts",
    "glm4_moe": "n_routed_experts", "dots1": "n_routed_experts",
}  # fmt: skip
"""The field for the number of experts by `model_type`; `num_experts` in all others."""

STATE_SPACE = {
    "mamba": {"ssm.conv_kernel": "conv_kernel", "ssm.state_size": "state_size",
              "ssm.inner_size": "intermediate_size", "ssm.time_step_rank": "time_step_rank"},
    "mamba2": {"ssm.conv_kernel": "conv_kernel", "ssm.state_size": "state_size",
               "ssm.time_step_rank": "num_heads", "ssm.group_count": "n_groups"},
}  # fmt: skip

WINDOW_PATTERNS = {
    "gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "exaone4": 4,
    "exaone-moe": 4, "olmo2": 4, "afmoe": 4, "mellum": 4, "plamo3": 8, "gemma-embedding": 6,
}  # fmt: skip
"""Every n-th layer attends to all tokens where the file gives a window but no pattern."""
FULL_FIRST = {"cohere2moe": 4, "laguna": 4, "smallthinker": 4}
"""The same, where the first of n is the layer that attends to all."""
CHUNK = 8192
"""Llama 4 attends within chunks of so many tokens in three of four layers; no key says so."""
INTERVAL_ARCHITECTURES = ("qwen3next", "qwen35", "qwen35moe")
PARALLEL_STATE = ("falcon-h1",)
"""Every layer has both attention and a recurrent state."""
GEMMA3N_CACHED = 20
"""Layers of Gemma 3n that keep keys and values; the others read theirs."""
SIGMOID = 2


class Keys:
    """The keys of the file's architecture, each checked when it is asked for."""

    def __init__(self, gguf: GGUF) -> None:
        name = gguf.metadata.get("general.architecture")
        if not isinstance(name, str) or not name or not name.isprintable() or len(name) > 80:
            raise self.error("it states no `general.architecture`")
        self.name, self.metadata = name, gguf.metadata

    def number(self, key: str, default: int = 0) -> int:
        """A whole number; of an array, the largest item."""
        value = self.metadata.get(f"{self.name}.{key}", default)
        if isinstance(value, tuple):
            value = max(value, default=0)
        return self._whole(key, value)

    def per_layer(self, key: str, layers: int, default: int) -> list[int]:
        """One whole number for each layer."""
        value = self.metadata.get(f"{self.name}.{key}", default)
        if not isinstance(value, tuple):
            return [self._whole(key, value)] * layers
        if len(value) < layers:
            raise self.error(f"`{key}` has {len(value)} items for {layers} layers")
        return [self._whole(key, item) for item in value[:layers]]

    def has(self, key: str) -> bool:
        """Whether the file gives it."""
        return f"{self.name}.{key}" in self.metadata

    def value(self, key: str) -> Any:
        """It as it is, or `None`."""
        return self.metadata.get(f"{self.name}.{key}")

    def _whole(self, key: str, value: object) -> int:
        if not isinstance(value, int) or not 0 <= value <= LARGEST:
            raise self.error(f"`{printable(key)}` is {printable(repr(value), 40)}")
        return int(value)

    def layers(self) -> int:
        """Layers of the model, without those that predict further tokens."""
        count = self.number("block_count") - self.number("nextn_predict_layers")
        if not 0 < count <= MAX_LAYERS:
            raise self.error(f"it has {count:,} layers")
        return count

    def error(self, reason: str) -> LLMSizeError:
        """An error about the metadata."""
        return LLMSizeError(
            f"the metadata of the GGUF file cannot be right: {reason}",
            hint="convert the model again with a current llama.cpp",
        )


def _stored(gguf: GGUF) -> dict[str, Any]:
    """How the weights are stored, in place of a `quantization_config`; empty if it is silent."""
    number = gguf.metadata.get("general.file_type")
    return {} if number is None else {"quant_method": "gguf", "file_type": number}


def architecture(gguf: GGUF, name: str) -> Architecture:
    """The model as its metadata and tensors describe it, in the fields of a `config.json`.

    Without a family of the same meaning, `family` is the name that llama.cpp gives it.
    Raises `LLMSizeError` for metadata that no model can have.
    """
    keys = Keys(gguf)
    family = _family(keys)
    config: dict[str, Any] = {"model_type": family, "num_hidden_layers": keys.layers()}
    for key, field in {**FIELDS, **STATE_SPACE.get(family, {})}.items():
        if keys.has(key):
            value = keys.value(key)
            config[field] = list(value) if isinstance(value, tuple) else value
    if experts := keys.number("expert_count"):
        config[EXPERTS.get(family, "num_experts")] = experts
    config["vocab_size"] = keys.number("vocab_size") or gguf.lengths.get("tokenizer.ggml.tokens")
    config.update(_head_sizes(keys), **_from_tensors(gguf))
    tensors = frozenset(tensor.name for tensor in gguf.checkpoint.tensors)
    config.update(hybrid(keys, family, tensors))
    return Architecture(
        name=name,
        family=family,
        config=config,
        source=gguf.checkpoint.source,
        title=_title(gguf),
        context_length=keys.number("context_length") or None,
        licence=str(gguf.metadata.get("general.license", "")),
        stored=_stored(gguf),
        note="" if keys.name in FAMILIES else "no family of llmsize is known by this name",
    )


def _family(keys: Keys) -> str:
    if keys.name == "llama" and keys.number("expert_count"):
        return "mixtral"
    if keys.name == "deepseek2" and keys.number("expert_gating_func") == SIGMOID:
        return "deepseek_v3"
    return FAMILIES.get(keys.name, keys.name)


def _title(gguf: GGUF) -> str:
    title = gguf.metadata.get("general.name", "")
    return title if isinstance(title, str) and title.isprintable() else ""


def _head_sizes(keys: Keys) -> dict[str, int]:
    rotary = keys.number("rope.dimension_count")
    key, value = (keys.number(f"attention.{which}_length") for which in ("key", "value"))
    if keys.has("attention.kv_lora_rank"):
        key = keys.number("attention.key_length_mla", key)
        value = keys.number("attention.value_length_mla", value)
        return {"qk_rope_head_dim": rotary, "qk_nope_head_dim": key - rotary, "v_head_dim": value}
    return {"head_dim": key} if key else {}


def _from_tensors(gguf: GGUF) -> dict[str, bool]:
    """What metadata leave out and the presence of a tensor tells."""
    names = {tensor.name for tensor in gguf.checkpoint.tensors}
    if not names:
        return {}
    return {
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": not names.isdisjoint({"blk.0.attn_q.bias", "blk.0.attn_qkv.bias"}),
        "mlp_bias": "blk.0.ffn_down.bias" in names,
    }


def layer_caches(gguf: GGUF) -> tuple[LayerCache, ...]:
    """What each layer keeps of the tokens, by the file's own keys."""
    keys = Keys(gguf)
    layers = keys.layers()
    heads = keys.per_layer("attention.head_count", layers, 0)
    kv_heads = _kv_heads(keys, heads)
    windows = _windows(keys, layers)
    state = _state(keys, max(heads))
    cached = layers - keys.number("attention.shared_kv_layers")
    if keys.name == "gemma3n":
        cached = min(layers, GEMMA3N_CACHED)
    return tuple(
        _layer(keys, heads[at], kv_heads[at], windows[at], state)
        if at < cached
        else LayerCache("none")
        for at in range(layers)
    )


def _layer(keys: Keys, heads: int, kv_heads: int, window: int, state: int) -> LayerCache:
    if not kv_heads:
        return LayerCache("recurrent", state=state) if state else LayerCache("none")
    even = keys.number("embedding_length") // heads if heads else 0
    key, value = (keys.number(f"attention.{which}_length", even) for which in ("key", "value"))
    if keys.has("attention.key_length_mla"):
        expanded = keys.number("attention.key_length_mla") + keys.number(
            "attention.value_length_mla"
        )
        return LayerCache("latent", 1, key, expanded=heads * expanded)
    if window:
        key = keys.number("attention.key_length_swa", key)
        value = keys.number("attention.value_length_swa", value)
    beside = state if keys.name in PARALLEL_STATE else 0
    return LayerCache("window" if window else "full", kv_heads, key, value, window, state=beside)


def _kv_heads(keys: Keys, heads: list[int]) -> list[int]:
    """KV heads of each layer; none in a recurrent one."""
    layers = len(heads)
    if keys.has("attention.head_count_kv"):
        counts = keys.per_layer("attention.head_count_kv", layers, 0)
    else:
        counts = heads
    recurrent = keys.value("attention.recurrent_layers")
    if isinstance(recurrent, tuple):
        is_recurrent = [bool(item) for item in recurrent[:layers]]
    elif keys.name in INTERVAL_ARCHITECTURES:
        interval = keys.number("full_attention_interval", 4) or 1
        is_recurrent = [bool((at + 1) % interval) for at in range(layers)]
    else:
        return counts
    return [0 if r else n for n, r in zip(counts, is_recurrent, strict=True)]


def _windows(keys: Keys, layers: int) -> list[int]:
    """The window of each layer; 0 where it attends to all tokens."""
    window = keys.number("attention.sliding_window")
    if keys.name == "llama4" and (window or not keys.has("attention.sliding_window")):
        window = CHUNK
    pattern = keys.value("attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        if len(pattern) < layers:
            raise keys.error(f"a pattern of {len(pattern)} windows for {layers} layers")
        return [window if item else 0 for item in pattern[:layers]]
    full_first = FULL_FIRST.get(keys.name, 0)
    known = full_first or {**WINDOW_PATTERNS, "llama4": 4}.get(keys.name, 0)
    every = keys.number("attention.sliding_window_pattern", known)
    if not every:
        return [0] * layers
    full = 0 if full_first else every - 1
    return [0 if at % every == full else window for at in range(layers)]


def _state(keys: Keys, heads: int) -> int:
    """Elements of a recurrent layer's state for one sequence (`n_embd_r` + `n_embd_s`)."""
    if width := keys.number("kda.head_dim"):
        kernel = keys.number("ssm.conv_kernel", 4)
        return 3 * (kernel - 1) * heads * width + width * width * heads
    if width := keys.number("wkv.head_size"):
        hidden = keys.number("embedding_length")
        return keys.number("token_shift_count", 2) * hidden + hidden * width
    if kernel := keys.number("shortconv.l_cache"):
        return keys.number("embedding_length") * (kernel - 1)
    inner, state = keys.number("ssm.inner_size"), keys.number("ssm.state_size")
    kernel = keys.number("ssm.conv_kernel")
    convolved = inner + 2 * keys.number("ssm.group_count") * state
    return max(0, kernel - 1) * convolved + state * inner
