"""What llama.cpp's graph of each architecture is: a family's facts, and what its config says.

llama.cpp 0c1e57098: src/llama-arch.cpp and src/models/*.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.trace import Trace
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.memory.llamacpp.experts import Experts, Routing
from llmsize.memory.llamacpp.forward import Decoder, Late
from llmsize.memory.weights import Checkpoint, Weight

FAMILIES = {
    "mistral": "llama", "mixtral": "llama", "smollm3": "smollm3", "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3", "gpt_oss": "gpt-oss", "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2", "RefinedWeb": "falcon", "RefinedWebModel": "falcon",
    "gemma3n_text": "gemma3n", "gemma4_text": "gemma4", "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35", "qwen3_5_moe_text": "qwen35moe", "falcon_h1": "falcon-h1",
    "falcon_mamba": "mamba",
    "kimi_linear": "kimi-linear", "granitemoehybrid": "granitehybrid", "nemotron_h": "nemotron_h",
    "olmo3": "olmo2", "exaone4_5": "exaone4", "exaone4_5_text": "exaone4",
    "exaone_moe": "exaone-moe", "mimo_v2": "mimo2", "mimo_v2_flash": "mimo2",
    "cohere2_moe": "cohere2moe", "llama4_text": "llama4", "granite_swa": "granite-swa",
    "deepseek_v32": "deepseek32", "glm_moe_dsa": "glm-dsa", "muse_glimmer_text": "muse-glimmer",
    "grok-1": "grok", "hunyuan_v1_moe": "hunyuan-moe",
    "hunyuan_v1_dense": "hunyuan-dense",
}  # fmt: skip
"""`model_type` → llama.cpp's architecture, where they differ."""

WINDOWED = frozenset(
    {"gemma2", "gemma3", "gemma3n", "gpt-oss", "cohere2", "olmo2", "exaone4", "gemma4", "llama4",
     "exaone-moe", "mimo2", "cohere2moe", "laguna", "mellum", "granite-swa", "afmoe",
     "muse-glimmer"}
)  # fmt: skip
"""Architectures whose windows llama.cpp uses; Mistral's and Phi-3's layers keep every token."""

SIGMOID_ROUTERS = frozenset(
    {"deepseek_v3", "kimi_k2", "kimi_linear", "glm4_moe", "glm4_moe_lite", "dots1", "minimax_m2",
     "nemotron_h", "deepseek_v32", "glm_moe_dsa", "exaone_moe", "mimo_v2", "mimo_v2_flash",
     "solar_open", "laguna"}
)  # fmt: skip
"""Families whose router scores every expert by itself and corrects the choice by a bias, a buffer
of the library's module that is a tensor of the file."""

PARALLEL = {
    "cohere": ("mlp", "residual", "attention"),
    "cohere2": ("mlp", "residual", "attention"),
    "cohere2moe": ("mlp", "residual", "attention"),
    "gpt_neox": ("mlp", "residual", "attention"),
    "phi": ("attention", "mlp", "residual"),
    "falcon": ("mlp", "attention", "residual"),
    "stablelm": ("mlp", "both"),
}
"""Families whose attention and MLP run side by side, and the order of the sum (src/models)."""

UNNORMALIZED = frozenset({"deepseek", "jamba", "llama4", "olmoe", "qwen2_moe"})
"""Architectures that leave the weights of chosen experts as they are, whatever a config says."""

UNROTATED = frozenset({"kimi-linear", "jamba", "nemotron_h", "gpt2", "gpt_bigcode", "bloom", "mpt"})
"""Architectures without rotary positions: recurrent layers tell the order, or embeddings of
positions do, or biases of attention."""

NORMED_LAST = frozenset({"hunyuan-moe", "hunyuan-dense", "llama4"})
"""Architectures that norm queries and keys after they are rotated."""

LATE: Mapping[str, Late] = {
    "gpt-oss": "layers", "gemma3n": "layers", "gemma4": "norm", "qwen3next": "norm",
    "qwen35": "norm", "qwen35moe": "norm", "nemotron_h": "norm", "cohere2moe": "norm",
}  # fmt: skip
"""Architectures that take the rows to predict after the last layer, or norm every token for a head
that predicts further ones."""

RESIDUAL_FIRST = {
    "phi3": frozenset({"mlp"}),
    "lfm2": frozenset({"mixer", "mlp"}),
    "jamba": frozenset({"mixer", "mlp"}),
}

NOT_CONVERTED = frozenset(
    {"aria", "aria_text", "axk1", "bart", "beam", "biogpt", "blenderbot", "blenderbot-small",
     "codegen", "cwm", "flex_olmo", "gpt_neo", "gptj", "helium", "hyperclovax", "inkling",
     "inkling_text", "kolibri1", "lfm3", "m2m_100", "marian", "mbart", "mimo", "mllama",
     "mllama_text_model", "nanochat", "olmo_hybrid", "opt", "pegasus", "persimmon", "vaultgemma",
     "xglm", "zaya"}
)  # fmt: skip
"""Families that no class of `conversion/` is registered for."""

KNOWN = frozenset({"full", "window", "latent", "recurrent", "none"})
"""Kinds of layers whose graph is known."""

INDEXED = frozenset({"deepseek32", "glm-dsa"})
"""Architectures whose layers attend to tokens that an indexer chooses."""

BAICHUAN_7B = 32
"""Layers of Baichuan's 7B."""

MOST = 512
"""`LLAMA_MAX_LAYERS` and `LLAMA_MAX_EXPERTS`, src/llama-hparams.h."""


def layer_caches(architecture: Architecture, trace: Trace) -> tuple[LayerCache, ...]:
    """What every layer keeps in llama.cpp, which knows fewer windows than the models have."""
    family = FAMILIES.get(architecture.family, architecture.family)
    found = tuple(
        layer._replace(kind="full", window=0)
        if layer.kind == "window" and family not in WINDOWED
        else layer
        for layer in trace.layer_caches()
    )
    if family != "falcon-h1":
        return _every_layer(trace, found)
    states, attention = (
        [layer for layer in found if (layer.kind == "recurrent") is recurrent]
        for recurrent in (True, False)
    )
    return tuple(
        full._replace(state=state.state) for full, state in zip(attention, states, strict=True)
    )


def decoder(file: Checkpoint, architecture: Architecture, trace: Trace) -> Decoder:
    """What the graph needs to know of the model in `file` beside its tensors.

    Raises `LLMSizeError` for a model whose graph is not known.
    """
    config = Config(architecture.config, architecture.name)
    caches = layer_caches(architecture, trace)
    indexed: dict[int, LayerCache] = {}
    if file.family in INDEXED:
        caches, indexed = _apart(trace)
    _check_graph(file, architecture, caches)
    states = tuple(_state_sizes(file, caches))
    return Decoder(
        layers=caches,
        states=states,
        norm_first=file.family in ("qwen3next", "qwen35", "qwen35moe", "kimi-linear"),
        positions=4 if file.family in ("qwen35", "qwen35moe") else 1,
        normed_values=file.family in ("gemma3n", "gemma4"),
        plain_windows=file.family == "gemma4",
        heads=file.heads,
        experts=_experts(file, architecture, config),
        rope_dim=config.count("qk_rope_head_dim"),
        layer_norm=_layer_norm(file),
        plain_norms=_plain_norms(file.family, config),
        normed_last=file.family in NORMED_LAST,
        flash_attention=file.family != "grok",
        parallel=_parallel(file),
        unrotated=_unrotated(file.family, caches),
        scaled_queries=file.family == "llama4",
        late_rows=LATE.get(file.family, ""),
        residual_first=RESIDUAL_FIRST.get(file.family, frozenset()),
        shared=shared_layers(config, len(caches)),
        indexed=indexed,
        most_relevant=config.count("index_topk"),
    )


def _apart(trace: Trace) -> tuple[tuple[LayerCache, ...], dict[int, LayerCache]]:
    """What every layer attends to, and the keys of those that choose tokens for it."""
    caches: dict[int, LayerCache] = {}
    indexed: dict[int, LayerCache] = {}
    for layer, cache in trace.numbered_caches():
        (indexed if cache.kind == "index" else caches)[layer] = cache
    return tuple(caches.values()), indexed


def _parallel(file: Checkpoint) -> tuple[str, ...]:
    """How attention and MLP are added up; StableLM's are side by side where they share a norm."""
    own = any(weight.name.endswith("ffn_norm.weight") for weight in file.weights)
    return () if file.family == "stablelm" and own else PARALLEL.get(file.family, ())


def _check_graph(
    file: Checkpoint, architecture: Architecture, caches: tuple[LayerCache, ...]
) -> None:
    """Raise `LLMSizeError` for a graph that is not known, or that llama.cpp does not run."""
    biased = file.family == "falcon" and any(w.role == "bias" for w in file.weights)
    if architecture.family in NOT_CONVERTED or biased:
        raise LLMSizeError(
            f"llama.cpp does not run `{architecture.name}`",
            hint="its converter writes no file of this family: ask about another engine",
        )
    kinds = {cache.kind for cache in caches}
    unnamed = kinds & {"recurrent", "none"} and any(map(_unnamed, file.weights))
    if not kinds or unnamed or not kinds <= KNOWN:
        raise LLMSizeError(
            f"the compute buffer of `{architecture.name}` in llama.cpp is not known",
            hint="llmsize knows the graphs of decoders with attention, Mamba, the gated delta "
            "rule and short convolutions",
        )
    if max(file.layers, file.experts_used) > MOST:
        raise LLMSizeError(
            f"`{architecture.name}` has more layers or active experts than llama.cpp runs",
            hint=f"it runs at most {MOST} of each",
        )
    if len(caches) != file.layers:
        raise LLMSizeError(
            f"`{architecture.name}` caches more than keys and values in llama.cpp",
            hint="llmsize knows the indexers of DeepSeek-V3.2 and GLM-5, and no others",
        )


def shared_layers(config: Config, layers: int) -> dict[int, int]:
    """Layers without keys and values of their own, and whose they attend to.

    These are the last ones; theirs are of the last window or full layer before them.
    """
    first = layers - config.count("num_kv_shared_layers")
    kinds = config.sequence("layer_types") or ()
    return {
        layer: first - (2 if kind == "sliding_attention" else 1)
        for layer, kind in enumerate(kinds)
        if layer >= first > 1
    }


def _unnamed(weight: Weight) -> bool:
    """Whether it still has the name of the library's module."""
    return weight.layer >= 0 and f".{weight.layer}." in weight.name.removeprefix("blk.")[3:]


def _every_layer(trace: Trace, caches: tuple[LayerCache, ...]) -> tuple[LayerCache, ...]:
    """The caches by layer, where some layers have an MLP alone and keep nothing."""
    layers = {index for p in trace.weights.values() for index in p.indices}
    mixing = {
        index for p in trace.weights.values() if p.role in ("o", "conv") for index in p.indices
    }
    if len(mixing) != len(caches) or len(layers) == len(caches):
        return caches
    kept = dict(zip(sorted(mixing), caches, strict=True))
    return tuple(kept.get(layer, LayerCache("none")) for layer in sorted(layers))


def _state_sizes(file: Checkpoint, caches: tuple[LayerCache, ...]) -> Iterator[tuple[int, ...]]:
    """Elements of a sequence's recurrent caches in every layer: columns, then the state."""
    shapes = {weight.name: weight.shape for weight in file.weights}
    for layer, cache in enumerate(caches):
        names = ("ssm_conv1d", "shortconv.conv", *(f"ssm_conv1d_{part}" for part in "qkv"))
        kernels = [shapes[name] for name in (f"blk.{layer}.{name}.weight" for name in names)
                   if name in shapes]  # fmt: skip
        if not kernels:
            yield ()
        else:
            columns = sum((kernel[-1] - 1) * kernel[0] for kernel in kernels)
            if not columns:
                raise LLMSizeError(
                    "a convolution over one token keeps nothing",
                    hint="llama.cpp runs no such model",
                )
            yield tuple(size for size in (columns, cache.state - columns) if size)


def _experts(file: Checkpoint, architecture: Architecture, config: Config) -> Experts:
    return Experts(
        used=file.experts_used,
        routing=_routing(architecture),
        normalized=file.family not in UNNORMALIZED
        and config.flag("norm_topk_prob", default=file.family != "deepseek2"),
        groups=config.count("n_group", default=1) or 1,
        groups_used=config.count("topk_group", default=1) or 1,
        weighed_first=file.family == "llama4",
    )


def _routing(architecture: Architecture) -> Routing:
    if architecture.family in SIGMOID_ROUTERS | {"llama4_text"}:
        return "sigmoid"
    return "softmax of chosen" if architecture.family == "gpt_oss" else "softmax"


def _layer_norm(file: Checkpoint) -> bool:
    """Whether norms are layer norms: those have biases, but for Cohere's, MPT's and OLMo's."""
    biased = any(
        w.role == "norm" and w.name.endswith(".bias") and ".indexer." not in w.name
        for w in file.weights
    )
    return file.family in ("cohere", "cohere2", "cohere2moe", "mpt", "olmo") or (
        biased and file.family != "phimoe"
    )


def _plain_norms(family: str, config: Config) -> frozenset[str]:
    """Norms without a weight: OLMo's all, and those of Llama 4's queries and keys."""
    if family == "olmo":
        return frozenset({"attn_norm", "ffn_norm", "output_norm"})
    if family == "llama4" and config.flag("use_qk_norm", default=True):
        return frozenset({"attn_q_norm", "attn_k_norm"})
    return frozenset()


def _unrotated(family: str, caches: tuple[LayerCache, ...]) -> frozenset[int]:
    """Layers without rotary positions: all, every fourth, or those without a window."""
    # Baichuan's 13B, which llama.cpp knows by its layers, has biases of attention instead
    if family in UNROTATED or (family == "baichuan" and len(caches) != BAICHUAN_7B):
        return frozenset(range(len(caches)))
    if family == "smollm3":
        return frozenset(range(3, len(caches), 4))
    if family in ("cohere2", "cohere2moe", "exaone4", "llama4") and any(
        cache.kind == "window" for cache in caches
    ):
        return frozenset(layer for layer, cache in enumerate(caches) if cache.kind == "full")
    return frozenset()
