"""What to measure: the settings, and the model that they ask for."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

MLP_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Settings:
    """What to measure; field names follow the columns of the result."""

    config: dict[str, Any]
    mode: str = "full"
    batch: int = 2
    seq: int = 1024
    dtype: str = "bf16"
    autocast: str = "none"
    attn: str = "sdpa"
    checkpoint: bool = False
    every: int = 1
    padded: bool = False
    grad_accum: int = 1
    keep_outputs: bool = False
    lora_r: int = 16
    lora_targets: str = "all-linear"
    lora_dropout: float = 0.0
    lora_bias: str = "none"
    adapter_dtype: str = ""
    frozen_layers: int = 0
    modules_to_save: list[str] = field(default_factory=list)
    virtual_tokens: int = 20
    optimizer: str = "adamw_fused"
    master: bool = False
    main_gradients: bool = False
    base: str = ""
    upcast: bool = False
    selective: bool = False
    offloaded: bool = False
    logits_to_keep: int = 0
    log_ops: bool = False


def make_config(values: dict[str, Any]) -> Any:
    """A transformers configuration from its published fields."""
    from transformers import AutoConfig

    rest = {k: v for k, v in values.items() if k != "model_type"}
    return AutoConfig.for_model(values["model_type"], **rest)


def classifies(config: dict[str, Any]) -> bool:
    """Whether a configuration asks for a classifier's head."""
    return (config.get("architectures") or [""])[0].endswith("ForSequenceClassification")


def unmasks(config: Any) -> bool:
    """Whether the model is an encoder that tells masked tokens, as decoders beside one do not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return not config.is_encoder_decoder and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def model_class(config: Any) -> Any:
    """The Auto class with the head that the configuration asks for."""
    import transformers

    if classifies({"architectures": config.architectures}):
        return transformers.AutoModelForSequenceClassification
    if unmasks(config):
        return transformers.AutoModelForMaskedLM
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def uninitialised(*_: float, size: tuple[int, ...]) -> torch.Tensor:
    """Stands in for `torch.normal`, which some classes draw weights with that nobody reads."""
    return torch.empty(size)


def instantiate(config: Any, *, dtype: torch.dtype, attn: str) -> Any:
    """Build the model class with uninitialised weights, tied as configured."""
    from transformers.initialization import no_init_weights

    factory = model_class(config)
    with no_init_weights(), mock.patch("torch.normal", uninitialised):
        model = factory.from_config(config, dtype=dtype, attn_implementation=attn)
    model.tie_weights()
    return model


def first(config: Any, *names: str, default: Any = 0) -> Any:
    """The first of several configuration fields that is set."""
    for name in names:
        with contextlib.suppress(AttributeError, RuntimeError):  # differs from layer to layer
            if (value := getattr(config, name)) is not None:
                return value
    return default


def layer_count(config: Any) -> int:
    """Number of layers under any of its names."""
    return int(first(config, *LAYER_COUNTS))


def kv_heads(config: Any, heads: int) -> int:
    """Number of key and value heads; Falcon and GPT-BigCode call one head multi-query."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", 0):
        return 1
    return int(first(config, "num_key_value_heads", "num_kv_heads", default=heads))


def architecture(config: Any) -> dict[str, Any]:
    """The configuration's main dimensions under common names."""
    heads = first(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    hidden = first(config, "hidden_size", "n_embd", "d_model")
    experts = first(config, "num_local_experts", "num_experts", "n_routed_experts")
    return {
        "model_type": config.model_type,
        "hidden_size": hidden,
        "num_layers": layer_count(config),
        "num_heads": heads,
        "num_kv_heads": kv_heads(config, heads),
        "head_dim": first(config, "head_dim", default=hidden // heads if heads else 0),
        "intermediate_size": first(config, *MLP_WIDTHS, default=4 * hidden),
        "moe_intermediate_size": first(config, "moe_intermediate_size"),
        "vocab_size": config.vocab_size,
        "tied": bool(first(config, "tie_word_embeddings")),
        "num_experts": experts,
        "top_k": first(config, "num_experts_per_tok", "moe_topk") if experts else 0,
    }


def set_layers(config: dict[str, Any], layers: int) -> None:
    """Replace the number of layers under the name the configuration uses."""
    names = LAYER_COUNTS
    config[next((name for name in names if name in config), names[0])] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
