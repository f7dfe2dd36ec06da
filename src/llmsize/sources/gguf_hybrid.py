"""What the metadata of a GGUF file say of models whose layers differ, as a `config.json` has it.

llama.cpp 0c1e57098, conversion/*.py: one set of `ssm.*` keys stands for the mixers of all families,
and a layer without KV heads for a recurrent one; Gemma 4 gives its heads layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmsize.sources.gguf_model import Keys

Fields = dict[str, Any]


def hybrid(keys: Keys, family: str, tensors: frozenset[str]) -> Fields:
    """Fields of such a model's configuration; none for other families."""
    made = FAMILIES.get(family)
    return made(keys, tensors) if made else {}


def _kv_heads(keys: Keys) -> list[int]:
    return keys.per_layer("attention.head_count_kv", keys.layers(), 0)


def _common(keys: Keys) -> Fields:
    """Where metadata have one number for every layer and a configuration has one for all."""
    return {
        "num_key_value_heads": keys.number("attention.head_count_kv"),
        "num_attention_heads": keys.number("attention.head_count"),
        "intermediate_size": keys.number("feed_forward_length"),
    }


def _layer_types(keys: Keys, recurrent: str, attention: str) -> list[str]:
    heads = _kv_heads(keys)
    flagged = keys.value("attention.recurrent_layers")
    if isinstance(flagged, tuple):
        is_recurrent = [bool(item) for item in flagged[: len(heads)]]
    elif all(heads):
        every = keys.number("full_attention_interval", 4) or 1
        is_recurrent = [bool((layer + 1) % every) for layer in range(len(heads))]
    else:
        is_recurrent = [not count for count in heads]
    return [recurrent if flag else attention for flag in is_recurrent]


def _delta_net(keys: Keys, tensors: frozenset[str]) -> Fields:
    heads = keys.number("ssm.time_step_rank")
    return {
        "linear_conv_kernel_dim": keys.number("ssm.conv_kernel", 4),
        "linear_key_head_dim": keys.number("ssm.state_size"),
        "linear_num_key_heads": keys.number("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_value_head_dim": keys.number("ssm.inner_size") // heads if heads else 0,
        "layer_types": _layer_types(keys, "linear_attention", "full_attention"),
        "attention_bias": False,
    }


def _mamba_fields(keys: Keys) -> Fields:
    return {
        "mamba_d_conv": keys.number("ssm.conv_kernel", 4),
        "mamba_d_state": keys.number("ssm.state_size"),
    }


def _mamba2_fields(keys: Keys) -> Fields:
    heads, inner = keys.number("ssm.time_step_rank"), keys.number("ssm.inner_size")
    return _mamba_fields(keys) | {
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads if heads else 0,
        "mamba_n_groups": keys.number("ssm.group_count", 1),
        "mamba_expand": _expansion(keys),
    }


def _expansion(keys: Keys) -> int:
    hidden = keys.number("embedding_length")
    return keys.number("ssm.inner_size") // hidden if hidden else 0


def _falcon_h1(keys: Keys, tensors: frozenset[str]) -> Fields:
    return _common(keys) | _mamba2_fields(keys) | {
        "mamba_d_ssm": keys.number("ssm.inner_size"),
        "mamba_rms_norm": "blk.0.ssm_norm.weight" in tensors,
        "mamba_proj_bias": "blk.0.ssm_in.bias" in tensors,
    }  # fmt: skip


def _granite(keys: Keys, tensors: frozenset[str]) -> Fields:
    made = _common(keys) | _mamba2_fields(keys)
    made["layer_types"] = _layer_types(keys, "mamba", "attention")
    made["shared_intermediate_size"] = keys.number("expert_shared_feed_forward_length")
    if not keys.number("expert_count"):  # its one MLP is the shared one
        made["shared_intermediate_size"] = made["intermediate_size"]
    return made


def _jamba(keys: Keys, tensors: frozenset[str]) -> Fields:
    attention = [layer for layer, heads in enumerate(_kv_heads(keys)) if heads]
    experts = [
        layer for layer in range(keys.layers()) if f"blk.{layer}.ffn_gate_inp.weight" in tensors
    ]
    made = _common(keys) | _mamba_fields(keys) | {
        "mamba_dt_rank": keys.number("ssm.time_step_rank"),
        "mamba_expand": _expansion(keys),
    }  # fmt: skip
    return made | _spread("attn_layer", attention) | _spread("expert_layer", experts)


def _spread(name: str, layers: list[int]) -> Fields:
    """The first of some layers, and how far apart they are."""
    if not layers:
        return {}
    period = layers[1] - layers[0] if len(layers) > 1 else layers[0] + 1
    return {f"{name}_offset": layers[0], f"{name}_period": period}


def _nemotron_h(keys: Keys, tensors: frozenset[str]) -> Fields:
    layers, heads = keys.layers(), keys.number("ssm.time_step_rank")
    widths = keys.per_layer("feed_forward_length", layers, 0)
    experts = "E" if keys.number("expert_count") else "-"
    kinds = [
        "*" if kv_heads else experts if width else "M"
        for kv_heads, width in zip(_kv_heads(keys), widths, strict=True)
    ]
    return _common(keys) | {
        "hybrid_override_pattern": "".join(kinds),
        "mamba_num_heads": heads,
        "mamba_head_dim": keys.number("ssm.inner_size") // heads if heads else 0,
        "n_groups": keys.number("ssm.group_count", 1),
        "ssm_state_size": keys.number("ssm.state_size"),
        "conv_kernel": keys.number("ssm.conv_kernel", 4),
        "n_routed_experts": keys.number("expert_count"),
        "moe_shared_expert_intermediate_size": keys.number("expert_shared_feed_forward_length"),
        "moe_latent_size": keys.number("moe_latent_size"),
    }


def _lfm2(keys: Keys, tensors: frozenset[str]) -> Fields:
    return _common(keys) | {
        "conv_L_cache": keys.number("shortconv.l_cache", 3),
        "layer_types": _layer_types(keys, "conv", "full_attention"),
        "block_auto_adjust_ff_dim": False,
    }


def _mamba2(keys: Keys, tensors: frozenset[str]) -> Fields:
    heads = keys.number("ssm.time_step_rank")
    return {
        "head_dim": keys.number("ssm.inner_size") // heads if heads else 0,
        "expand": _expansion(keys),
    }


def _gemma4(keys: Keys, tensors: frozenset[str]) -> Fields:
    windows = keys.value("attention.sliding_window_pattern")
    windows = windows if isinstance(windows, tuple) else ()
    full = [layer for layer, window in enumerate(windows) if not window]
    heads, widths = _kv_heads(keys), keys.per_layer("feed_forward_length", keys.layers(), 0)
    names = ("sliding_attention", "full_attention")
    return _common(keys) | {
        "intermediate_size": min(widths),
        "use_double_wide_mlp": max(widths) > min(widths),
        "layer_types": [names[not window] for window in windows],
        "num_global_key_value_heads": heads[full[0]] if full and full[0] < len(heads) else 0,
        "attention_k_eq_v": bool(full) and f"blk.{full[0]}.attn_v.weight" not in tensors,
        "head_dim": keys.number("attention.key_length_swa"),
        "global_head_dim": keys.number("attention.key_length"),
        "hidden_size_per_layer_input": keys.number("embedding_length_per_layer_input"),
        "enable_moe_block": bool(keys.number("expert_count")),
        "top_k_experts": keys.number("expert_used_count"),
    }


FAMILIES: Mapping[str, Callable[[Keys, frozenset[str]], Fields]] = {
    "qwen3_next": _delta_net, "qwen3_5_text": _delta_net, "qwen3_5_moe_text": _delta_net,
    "falcon_h1": _falcon_h1, "granitemoehybrid": _granite, "jamba": _jamba,
    "nemotron_h": _nemotron_h, "lfm2": _lfm2, "mamba2": _mamba2, "gemma4_text": _gemma4,
}  # fmt: skip
"""`model_type` → what its keys say."""
