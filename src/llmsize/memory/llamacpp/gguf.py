"""A checkpoint as llama.cpp's converter writes it: GGUF names, split, stacked and added tensors.

llama.cpp 0c1e57098: conversion/*.py and gguf-py/gguf/tensor_mapping.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial

from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.trace import Trace
from llmsize.architecture import Architecture
from llmsize.formats import FP32
from llmsize.memory.llamacpp.buffers import Model
from llmsize.memory.llamacpp.families import FAMILIES, SIGMOID_ROUTERS, decoder, shared_layers
from llmsize.memory.weights import Checkpoint, FormatOf, Recipe, Weight, checkpoint, formats_of

NAMES = {
    "embedding": "token_embd", "head": "output", "position": "position_embd", "q": "attn_q",
    "k": "attn_k", "v": "attn_v", "qkv": "attn_qkv", "o": "attn_output", "q_a": "attn_q_a",
    "q_b": "attn_q_b", "kv_a": "attn_kv_a_mqa", "kv_b": "attn_kv_b", "gate": "ffn_gate",
    "up": "ffn_up", "gate_up": "ffn_up", "down": "ffn_down", "router": "ffn_gate_inp",
    "sinks": "attn_sinks", "gate_attention": "attn_gate",
}  # fmt: skip
"""Role → name."""

NORMS = {
    "input_layernorm": "attn_norm", "ln_1": "attn_norm", "self_attn_layer_norm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm", "ln_2": "ffn_norm", "final_layer_norm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "attention_norm": "attn_norm", "norm_1": "attn_norm",
    "norm_2": "ffn_norm", "norm": "attn_norm", "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm", "q_a_layernorm": "attn_q_a_norm", 
    "kv_a_layernorm": "attn_kv_a_norm",
    "q_layernorm": "attn_q_norm", "k_layernorm": "attn_k_norm",
    "query_layernorm": "attn_q_norm", "key_layernorm": "attn_k_norm",
    "ln_mlp": "attn_norm", "ln_attn": "attn_norm_2", "pre_attn_norm": "attn_norm",
    "post_attn_norm": "post_attention_norm", "pre_moe_norm": "ffn_norm",
    "post_moe_norm": "post_ffw_norm",
}  # fmt: skip
"""Last part of a norm's module → name; `post_attention_layernorm` depends on the block."""

MODULES = {
    "conv1d": "ssm_conv1d", "x_proj": "ssm_x", "dt_proj": "ssm_dt", "dt_layernorm": "ssm_dt_norm",
    "b_layernorm": "ssm_b_norm", "c_layernorm": "ssm_c_norm", "in_proj_qkv": "attn_qkv",
    "in_proj_z": "attn_gate", "in_proj_a": "ssm_alpha", "in_proj_b": "ssm_beta",
    "in_proj_ba": "ssm_ba", "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2", "fc1_latent_proj": "ffn_latent_down",
    "fc2_latent_proj": "ffn_latent_up", "operator_norm": "attn_norm",
    "pre_ff_layernorm": "ffn_norm", "embed_tokens_per_layer": "per_layer_token_embd",
    "per_layer_model_projection": "per_layer_model_proj",
    "per_layer_projection_norm": "per_layer_proj_norm", "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj", "post_per_layer_input_norm": "post_norm",
    "modality_router": "altup_router", "router_norm": "altup_router_norm",
    "correction_coefs": "altup_correct_coef", "prediction_coefs": "altup_predict_coef",
    "linear_left": "laurel_l", "linear_right": "laurel_r",
    "post_laurel_norm": "laurel_post_norm", "altup_projections": "altup_proj",
    "altup_unembed_projections": "altup_unembd_proj", "f_a_proj": "ssm_f_a",
    "f_b_proj": "ssm_f_b", "b_proj": "ssm_beta", "g_a_proj": "ssm_g_a", "g_b_proj": "ssm_g_b",
    "o_norm": "ssm_norm",
}  # fmt: skip
"""Last part of a module → name, whatever its role."""

IN_MIXERS = {
    "in_proj.weight": "ssm_in.weight", "out_proj.weight": "ssm_out.weight",
    "in_proj.bias": "ssm_in.bias", "out_proj.bias": "ssm_out.bias",
    "norm.weight": "ssm_norm.weight", "A_log": "ssm_a", "D": "ssm_d", "dt_bias": "ssm_dt.bias",
    "in_proj_qkvz.weight": "attn_qkvz.weight",
}  # fmt: skip
"""Name of a recurrent mixer's tensor in `mixer`, `mamba` or `linear_attn` → name."""

IN_INDEXERS = {"wq_b": "attn_q_b", "wk": "attn_k", "weights_proj": "proj"}
"""Name of a module in an indexer → name."""

WITHOUT_RULES = frozenset(
    {"inp_gate.weight", "proj.weight", "ssm_g_a.weight", "ssm_g_b.weight",
     "indexer.attn_q_b.weight", "indexer.proj.weight"}
)  # fmt: skip
"""Matrices that are quantized as no role is, but as the mix has it for all others."""

UNQUANTIZED = frozenset(
    {"per_layer_model_proj.weight", "altup_proj.weight", "altup_unembd_proj.weight",
     "altup_router.weight", "laurel_l.weight", "laurel_r.weight"}
)  # fmt: skip
"""Matrices that stay as the converter writes them, in 16 bit."""

WITH_FIRST_LAYER = frozenset({"per_layer_model_proj.weight", "per_layer_proj_norm.weight"})
"""Tensors outside of the layers that are loaded where the first one is."""

MIXERS = ("mixer", "mamba", "linear_attn", "forget_gate")

LLAMA_3_1_CONTEXT = 131_072
"""Llama 3.1 and later stretch their rotations to this context by factors of their own."""


@lru_cache(maxsize=8)  # asked for once for every recipe
def gguf(architecture: Architecture, trace: Trace) -> Checkpoint:
    """The checkpoint that `convert_hf_to_gguf.py` writes, from a trace of the model."""
    source = checkpoint(architecture, trace)
    family = FAMILIES.get(source.family, source.family)
    config = Config(architecture.config, architecture.name)
    hidden = next(w.shape[-1] for w in source.weights if w.role == "embedding")
    modules = {
        weight.name.removesuffix(".weight"): weight
        for weight in source.weights
        if weight.role not in ("bias", "expert_bias")
    }
    weights = [
        written
        for weight in map(partial(_stacked, experts=source.experts), _listed(source.weights))
        for written in _written(weight, modules, hidden, config)
    ]
    weights += _rope_factors(family, config, trace.layer_caches())
    if family in ("gemma3n", "gemma4"):
        weights += _unused(weights, shared_layers(config, source.layers))
    weights += _router_biases(source)
    return source._replace(family=family, weights=tuple(weights))


@lru_cache(maxsize=16)  # many tokens and sequences are asked of one file
def model(
    architecture: Architecture,
    trace: Trace,
    recipe: Recipe,
    format_of: FormatOf,
    *,
    imatrix: bool = False,
) -> Model:
    """A GGUF file quantized by `recipe`, ready to be placed on devices.

    Raises `LLMSizeError` for a model whose graph is not that of a decoder with attention.
    """
    file = gguf(architecture, trace)
    stored = formats_of(file, recipe, format_of, own=FP32, imatrix=imatrix)
    unquantized = format_of("fp32" if recipe.base == "fp32" else "fp16")
    stored = [
        (weight, unquantized if weight.role == "projection" else format)
        for weight, format in stored
    ]
    return Model(decoder(file, architecture, trace), tuple(stored))


def _written(
    weight: Weight, modules: dict[str, Weight], hidden: int, config: Config
) -> Iterator[Weight]:
    """What becomes of one tensor."""
    place = f"blk.{weight.layer}." if weight.layer >= 0 else ""
    if name := _named(weight):
        yield from _mixed(weight, place, name, modules, config)
    elif weight.role == "norm":
        name = place + _norm(weight, modules)
        layer = 0 if name.startswith("token_embd_norm") else weight.layer
        yield weight._replace(name=name, layer=layer)
    elif weight.role in ("bias", "expert_bias"):
        yield from _biases(weight, modules, place)
    elif weight.role == "kv_b":
        yield from _latent(weight, place, config)
    elif weight.role == "router" and weight.shape[0] == 1:
        # one score for the shared experts together
        name = f"{place}ffn_gate_inp_shexp.weight"
        yield weight._replace(name=name, shape=weight.shape[1:])
    elif weight.role == "expert_gate_up":
        for role in ("expert_gate", "expert_up"):
            half = (*weight.shape[:-2], weight.shape[-2] * weight.shape[-1] // hidden // 2, hidden)
            yield Weight(f"{place}{_name(role)}.weight", half, role, weight.layer)
    else:
        role = weight.role.replace("gate_up", "up")
        name = place + _name(role, weight.name)
        if weight.role in NAMES or weight.name.endswith(".weight") or len(weight.shape) > 2:
            name += ".weight"
        yield Weight(name, _oriented(weight, hidden), role, weight.layer)


def _named(weight: Weight) -> str:
    """The name of a tensor that its module tells, not its role; empty for the others."""
    *_, owner, own, last = ("", "", *weight.name.split("."))
    if last == "correct_output_scale":
        return "altup_correct_scale.weight"
    if last == "e_score_correction_bias":
        return "exp_probs_b.bias"
    if own in MODULES:
        return f"{MODULES[own]}.{last}"
    if owner == "indexer":
        return f"indexer.{IN_INDEXERS.get(own, own)}.{last}"
    if owner == "conv":
        return f"shortconv.{own}.{last}"
    if own == "router":
        return {"scale": "ffn_gate_inp.scale", "per_expert_scale": "ffn_down_exps.scale"}.get(
            last, ""
        )
    if own in MIXERS:
        return IN_MIXERS.get(last, "")
    return IN_MIXERS.get(f"{own}.{last}", "") if owner in MIXERS else ""


def _mixed(
    weight: Weight, place: str, name: str, modules: dict[str, Weight], config: Config
) -> Iterator[Weight]:
    """A recurrent mixer's tensor in llama.cpp's shape (conversion/mamba.py, qwen.py)."""
    shape, role, linear = weight.shape, weight.role, "_attn." in weight.name
    first = weight.name.rpartition(".")[0] + ".dt_proj" in modules
    if name == "attn_qkvz.weight":
        heads = config.size("linear_num_value_heads", default=32)
        values = heads * config.size("linear_value_head_dim", default=128)
        rows, columns = shape
        yield Weight(f"{place}attn_qkv.weight", (rows - values, columns), "qkv", weight.layer)
        yield Weight(f"{place}attn_gate.weight", (values, columns), role, weight.layer)
        return
    if name == "ssm_conv1d.weight" and ".self_attn." in weight.name:
        for part in "qkv":  # Kimi Linear's
            each = (shape[0] // 3, *shape[1:])
            yield Weight(f"{place}ssm_conv1d_{part}.weight", each, role, weight.layer)
        return
    if name in ("ssm_conv1d.weight", "shortconv.conv.weight"):
        shape = (shape[0], shape[-1])
    elif name in ("ssm_a", "ssm_d") and len(shape) == 1 and not linear and not first:
        shape = (*shape, 1)
    elif name == "ssm_norm.weight" and not linear:
        groups = config.count("n_groups", "mamba_n_groups", default=1) or 1
        shape = (groups, shape[0] // groups)
    elif name == "attn_qkv.weight":
        role = "qkv"
    elif name == "indexer.attn_k.weight":
        role = "k"  # by the end of its name
    elif name == "per_layer_token_embd.weight":
        shape = (config.size("vocab_size"), shape[1])
    elif name in WITHOUT_RULES:
        role = "ssm"
    elif name in UNQUANTIZED:
        role = "projection"
    layer = 0 if name in WITH_FIRST_LAYER else weight.layer
    yield weight._replace(name=place + name, shape=shape, role=role, layer=layer)


def _listed(weights: Sequence[Weight]) -> Iterator[Weight]:
    """The weights, with those of a list as one stack in place of the first."""
    lists: dict[str, list[Weight]] = {}
    for weight in weights:
        lists.setdefault(_list_of(weight), []).append(weight)
    for weight in weights:
        if not (name := _list_of(weight)):
            yield weight
        elif alike := lists.pop(name, []):
            yield weight._replace(name=f"{name}.weight", shape=(len(alike), *weight.shape))


def _list_of(weight: Weight) -> str:
    """The name of the list of modules that it is in; empty for most.

    Such a list is outside of the layers, or has the norm of every head.
    """
    name, _, index = weight.name.removesuffix(".weight").rpartition(".")
    listed = weight.layer < 0 or name.endswith(".norms")
    return name.removesuffix(".norms") if listed and index.isdecimal() else ""


def _stacked(weight: Weight, experts: int) -> Weight:
    """Experts that a library keeps side by side in one matrix, as a stack."""
    if not weight.role.startswith("expert_") or len(weight.shape) != 2 or "bias" in weight.role:
        return weight
    rows, columns = weight.shape
    return weight._replace(shape=(experts, rows // experts, columns))


def _name(role: str, otherwise: str = "") -> str:
    for kind, suffix in (("expert_", "_exps"), ("shared_", "_shexp")):
        if role.startswith(kind):
            return NAMES[role.removeprefix(kind)] + suffix
    return NAMES.get(role, otherwise.removesuffix(".weight"))


def _oriented(weight: Weight, hidden: int) -> tuple[int, ...]:
    """(outputs, inputs), however the library stores it."""
    if len(weight.shape) < 2 or weight.role in ("embedding", "head", "position", "router"):
        return weight.shape
    *stack, rows, columns = weight.shape
    role = weight.role.removeprefix("expert_").removeprefix("shared_")
    inward = role in ("o", "down")
    if role in ("q", "k", "v", "qkv", "gate", "up", "gate_up", "o", "down"):
        flipped = rows == hidden and columns != hidden
        if flipped != inward and (rows == hidden) != (columns == hidden):
            return (*stack, columns, rows)
    return weight.shape


def _norm(weight: Weight, modules: dict[str, Weight]) -> str:
    module, _, kind = weight.name.rpartition(".")
    parent, _, last = module.rpartition(".")
    if weight.layer < 0:
        first = "embed" in last and last != "embedding_norm"  # LFM2's is the last norm
        return f"{'token_embd_norm' if first else 'output_norm'}.{kind}"
    if last == "post_attention_layernorm":
        after = f"{parent}.post_feedforward_layernorm" in modules
        return f"{'post_attention_norm' if after else 'ffn_norm'}.{kind}"
    return f"{NORMS.get(last, last)}.{kind}"


def _biases(weight: Weight, modules: dict[str, Weight], place: str) -> Iterator[Weight]:
    """The bias of a linear layer, or of the two halves of stacked experts."""
    module = weight.name.removesuffix("_bias").removesuffix(".bias")
    owner = modules.get(module)
    if owner is None:
        yield weight._replace(name=f"{place}{weight.name.rpartition('.')[2]}.bias", role="bias")
    elif owner.role == "expert_gate_up":
        half = (*weight.shape[:-1], weight.shape[-1] // 2)
        for part in ("expert_gate", "expert_up"):
            yield Weight(f"{place}{_name(part)}.bias", half, "bias", weight.layer)
    else:
        name = _name(owner.role.replace("gate_up", "up"), module)
        yield weight._replace(name=f"{place}{name}.bias", role="bias")


def _latent(weight: Weight, place: str, config: Config) -> Iterator[Weight]:
    """Keys and values of every head from the latent, as two stacks of matrices."""
    plain, value = config.size("qk_nope_head_dim"), config.size("v_head_dim")
    rank = weight.shape[-1]
    heads = weight.shape[0] // (plain + value)
    yield Weight(f"{place}attn_k_b.weight", (heads, rank, plain), "k_b", weight.layer)
    yield Weight(f"{place}attn_v_b.weight", (heads, value, rank), "v_b", weight.layer)


def _rope_factors(family: str, config: Config, caches: list[LayerCache]) -> Iterator[Weight]:
    """One factor for every rotated pair of channels, where a config stretches its rotations."""
    scaling = config.value("rope_scaling", "rope_parameters")
    kind = (scaling.get("rope_type") or scaling.get("type")) if isinstance(scaling, dict) else None
    positions = config.count("max_position_embeddings")
    pairs = max((layer.key_dim for layer in caches), default=0) // 2
    stated_elsewhere = kind is None and family == "llama" and positions == LLAMA_3_1_CONTEXT
    if kind == "llama3" or stated_elsewhere or family == "gemma4":
        yield Weight("rope_freqs.weight", (pairs,), "rope")
    elif kind in ("longrope", "su"):
        yield Weight("rope_factors_long.weight", (pairs,), "rope")
        yield Weight("rope_factors_short.weight", (pairs,), "rope")


def _unused(weights: Iterable[Weight], shared: Mapping[int, int]) -> Iterator[Weight]:
    """Keys' and values' matrices of layers that use another's, which are in the checkpoint."""
    parts = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")
    found = {weight.name: weight for weight in weights if weight.name.endswith(parts)}
    for layer, donor in shared.items():
        for part in parts:
            weight = found[f"blk.{donor}.{part}"]
            yield weight._replace(name=f"blk.{layer}.{part}", layer=layer)


def _router_biases(source: Checkpoint) -> Iterator[Weight]:
    """What corrects the choice of experts in every layer, where it is a buffer of the module."""
    corrected = any(weight.name.endswith("e_score_correction_bias") for weight in source.weights)
    if source.family in SIGMOID_ROUTERS and not corrected:
        for weight in source.weights:
            if weight.role == "router":
                name = f"blk.{weight.layer}.exp_probs_b.bias"
                yield Weight(name, weight.shape[:1], "bias", weight.layer)
