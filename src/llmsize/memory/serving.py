"""What serving a model takes on every device, by the rules of the engine that runs it.

Engines come in three kinds. transformers and MLX let the cache grow and hold what a pass needs
while it runs: both are simulated tensor by tensor. vLLM, SGLang and TensorRT-LLM give a pool what
weights and a warm-up leave: the warm-up follows constants fitted to logs. llama.cpp allocates
buffers whose sizes its own allocator decides: those are simulated in `memory/llamacpp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import prod
from typing import Literal

from llmsize.anatomy import LoRA, Setting, Trace
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.vision import tower_parameters
from llmsize.architecture import Architecture
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError
from llmsize.formats import FP32, Format
from llmsize.memory import llamacpp
from llmsize.memory.generation import generation
from llmsize.memory.kv_cache import CachePolicy, kv_cache, pool_token_bytes, pool_tokens
from llmsize.memory.llamacpp.gguf import layer_caches, model
from llmsize.memory.reserved import gaps_of_quantizing
from llmsize.memory.weights import (
    FormatOf,
    Recipe,
    Weight,
    checkpoint,
    formats_of,
    weight_bytes,
)
from llmsize.term import Term, fact, term, total

Stored = tuple[tuple[Weight, Format], ...]

SHARDED = frozenset(
    (*("embedding", "head", "q", "k", "v", "qkv", "o", "q_b", "kv_b", "gate", "up", "gate_up"),
     *("down", "expert_gate", "expert_up", "expert_gate_up", "expert_down"),
     *("shared_gate", "shared_up", "shared_gate_up", "shared_down"))
)  # fmt: skip
"""Roles of matrices that tensor parallelism cuts; all others are on every device."""

WARM_UP = "fitted to published logs of the engine"
TRITON = (
    "vLLM v0.19.0, model_executor/layers/fused_moe/fused_moe.py, TritonExperts.workspace_shapes"
)


ELSEWHERE = ("host", "disk")
"""Places that are no device."""

PLAIN_SERVER = llamacpp.Server(context=1)
"""llama.cpp's own defaults."""


@dataclass(frozen=True, slots=True)
class Serving:
    """One engine serving one model: all that decides its memory."""

    architecture: Architecture
    trace: Trace
    engine: Engine
    weights: Stored
    """Every tensor with the format it is stored in."""
    format: Format
    """What is computed in."""
    keys: Format
    values: Format
    recipe: Recipe | None = None
    """How they were quantized, if they are."""
    file: llamacpp.Model | None = None
    """The GGUF file, for llama.cpp."""
    context: int = 4096
    """Tokens of each sequence, prompt and answer together."""
    prompt: int = 0
    """Tokens of each prompt; 0 for the whole context."""
    batch: int = 1
    """Sequences at once."""
    rows: int = 1
    """Continuations of each that are computed side by side: beams, or sequences to return."""
    reordered: bool = False
    """Whether rows change places after every token, as beams do."""
    shared: int = 0
    """Tokens at the beginning that all sequences have in common and keep once."""
    devices: int = 1
    stages: int = 1
    """Of a pipeline; each has `devices` devices."""
    gpu_layers: int | None = None
    """Layers on the devices, the others in host memory; all unless given."""
    offload: Literal["host", "disk"] = "host"
    """Where those others are."""
    beside: tuple[Term, ...] = ()
    """What the first device, or with tensor parallelism every one, has besides: adapters, a draft
    model."""
    server: llamacpp.Server = PLAIN_SERVER
    """Options of llama.cpp that have no name here: its batch, its flash attention, and so on."""

    @property
    def layers(self) -> tuple[LayerCache, ...]:
        """What every layer caches."""
        if self.engine.allocation == "buffers":
            return layer_caches(self.architecture, self.trace)
        return tuple(self.trace.layer_caches())

    @property
    def policy(self) -> CachePolicy:
        """How the engine keeps the cache."""
        return CachePolicy(self.engine.token_block, self.engine.windows, self.engine.latent)


def serving(
    architecture: Architecture, trace: Trace, engine: Engine, recipe: Recipe | None,
    format_of: FormatOf, *, format: Format, keys: Format, values: Format,
) -> Serving:  # fmt: skip
    """A model stored by `recipe`, or in `format`, ready to be asked about.

    Raises `LLMSizeError` for a recipe that the engine cannot load.
    """
    gguf = recipe is not None and recipe.kept == "fp32"
    if gguf != (engine.allocation == "buffers"):
        raise LLMSizeError(
            f"{engine.title} does not run weights in `{recipe.name if recipe else format.name}`",
            hint="llama.cpp and Ollama run GGUF types such as `q4_k_m`; the other engines run "
            "`nf4`, `awq`, `gptq`, `fp8`, …",
        )
    file = None
    if recipe is not None and engine.quantizes:
        recipe = replace(recipe, quantizes=(*recipe.quantizes, *engine.quantizes))
    if recipe is None:
        tensors = checkpoint(architecture, trace).weights
        stored: Stored = tuple((weight, format) for weight in tensors)
    elif gguf:
        file = model(architecture, trace, recipe, format_of)
        stored = file.tensors
    else:
        tensors_of = checkpoint(architecture, trace)
        stored = tuple(formats_of(tensors_of, recipe, format_of, own=format))
    if not gguf and ("any" in engine.unties or (recipe and recipe.name in engine.unties)):
        stored = _untied(stored)
    return Serving(architecture, trace, engine, stored, format, keys, values, recipe, file)


def _untied(stored: Stored) -> Stored:
    """The tensors, with an output matrix of its own in place of a tied one."""
    if any(weight.role == "head" for weight, _ in stored):
        return stored
    return stored + tuple(
        (weight._replace(name="lm_head.weight", role="head"), format)
        for weight, format in stored if weight.role == "embedding"
    )  # fmt: skip


def need(question: Serving) -> tuple[Term, ...]:
    """Bytes in every place: a sum of parts for each device, and for the host if it holds some.

    Raises `LLMSizeError` for a question that makes no sense for the engine.
    """
    _check(question)
    kinds = {"buffers": _buffers, "pool": _pooled, "grown": _grown}
    first, *others = kinds[question.engine.allocation](question)
    return (total(first.name, *first.parts, *_tower(question), *question.beside), *others)


def _tower(question: Serving) -> Iterator[Term]:
    """The vision tower of the checkpoint, in 16 bit; llama.cpp has it in a file of its own."""
    architecture = question.architecture
    parameters = tower_parameters(architecture.config, architecture.name)
    if parameters and question.engine.allocation != "buffers":
        yield term(
            "vision tower", "parameters * element", unit="bytes", parameters=parameters,
            element=question.format.block_bytes, source="vision_config of the checkpoint",
        )  # fmt: skip


def adapters(question: Serving, count: int, lora: LoRA) -> Term:
    """`count` LoRA adapters that are held at once, in the format that is computed in."""
    size = 0
    for weight, _ in question.weights:
        name = weight.name.removesuffix(".weight")
        linear = len(weight.shape) == 2 and weight.role not in ("embedding", "position")
        if linear and lora.adapts(name, weight.role):
            size += sum(weight.shape)
    return term(
        "LoRA adapters", "adapters * rank * channels * element", unit="bytes",
        source="Hu et al. 2021, arXiv:2106.09685", adapters=count, rank=lora.rank, channels=size,
        element=question.format.block_bytes, 
        note="inputs and outputs of every adapted layer; whole on every device",
    )  # fmt: skip


def draft(question: Serving) -> Term:
    """A draft model for speculative decoding, beside the model that it drafts for."""
    place = need(question)[0]
    apart = ["context and libraries", "CUDA graphs"]
    if question.engine.allocation != "buffers":
        apart.append("activations")
    parts = [part for part in place.parts if part.name not in apart]
    return total("draft model", *(replace(part, name=f"draft {part.name}") for part in parts))


def fullest(places: Iterable[Term]) -> Term:
    """The device that needs the most; the host is no device."""
    devices = (place for place in places if place.name not in ELSEWHERE)
    return max(devices, key=lambda place: place.value)


def _check(question: Serving) -> None:
    layers, engine = len(question.layers), question.engine
    if question.devices > 1 and engine.split == "none":
        raise LLMSizeError(f"{engine.title} runs on one device", hint="leave out `--gpus`")
    if question.gpu_layers is not None and engine.allocation == "pool":
        raise LLMSizeError(
            f"{engine.title} keeps every layer on the devices",
            hint="`--gpu-layers` and `--offload` are for llama.cpp, Ollama and transformers",
        )
    if question.rows > 1 and engine.allocation != "grown":
        raise LLMSizeError(
            f"{engine.title} keeps no beams", hint="give them as sequences: `--batch`"
        )
    if question.stages > 1 and engine.allocation != "pool":
        raise LLMSizeError(
            f"{engine.title} has no stages of its own", hint="it splits layers by `--gpus` alone"
        )
    if question.offload == "disk" and engine.allocation != "grown":
        raise LLMSizeError(
            f"{engine.title} reads no layers from disk while it runs", hint="`--offload cpu`"
        )
    parts = question.devices if engine.split == "layers" else question.stages
    if parts > max(layers, 1):
        raise LLMSizeError(
            f"{parts} devices for {layers} layers", hint="a layer is the least that one can hold"
        )
    if question.shared and (engine.allocation != "pool" or question.shared > question.context):
        raise LLMSizeError(
            f"{engine.title} shares no prefix of {question.shared:,} tokens",
            hint="vLLM, SGLang and TensorRT-LLM share one that is no longer than the context",
        )
    if engine.split == "tensor":
        _check_heads(_kv_heads(question), question.devices)


def _check_heads(heads: int, devices: int) -> None:
    fewer, more = sorted((max(heads, 1), devices))
    if heads > 1 and more % fewer:
        raise LLMSizeError(
            f"{heads} KV heads are not divided by {devices} devices",
            hint="take a number of devices that divides them, or a multiple of them",
        )


def weights_of(
    stored: Iterable[tuple[Weight, Format]], ways: int = 1, kv_heads: int = 0,
    padded: Mapping[str, int] | None = None,
) -> Term:  # fmt: skip
    """Bytes of the tensors on one of `ways` devices that share their matrices.

    Keys and values are cut by whole heads, so at most `kv_heads` ways. `padded` has the formats
    whose experts' rows the engine pads, and to a multiple of how many elements.
    """
    sizes: dict[str, int] = {}
    stored = list(stored)
    hidden = next((w.shape[-1] for w, _ in stored if w.role == "embedding"), 0)
    for weight, format in stored:
        cut = ways if weight.role in SHARDED else 1
        if weight.role in ("k", "v"):
            cut = min(ways, kv_heads or 1)
        if padded and hidden and weight.role.startswith("expert_") and format.name in padded:
            weight = _padded(weight, padded[format.name], hidden)
        sizes[format.name] = sizes.get(format.name, 0) - (-weight_bytes(weight, format) // cut)
    source = "tensors of the checkpoint, each in the format of the recipe"
    parts = (
        fact(f"tensors in {name}", size, unit="bytes", source=source)
        for name, size in sorted(sizes.items(), key=lambda pair: -pair[1])
    )
    return total("weights", *parts, unit="bytes")


def _padded(weight: Weight, multiple: int, hidden: int) -> Weight:
    """Experts whose inputs are padded, whichever way round the library keeps them."""
    experts, *matrix = weight.shape
    inputs = prod(matrix) // hidden if weight.role.endswith("down") else hidden
    outputs = prod(matrix) // inputs
    return weight._replace(shape=(experts, outputs, -(-inputs // multiple) * multiple))


def cache_of(question: Serving, layers: tuple[LayerCache, ...] | None = None) -> tuple[Term, ...]:
    """The KV cache of all sequences on one device, and the recurrent state if there is one."""
    layers = question.layers if layers is None else layers
    ways = question.devices if question.engine.split == "tensor" else 1
    if question.engine.allocation == "pool" and question.policy.windows == "reserved":
        cached = [_pool_share(question, layers, ways)]
    else:
        rows = question.batch * question.rows
        own = _cached(question, layers, ways, question.context - question.shared, rows)
        common = _cached(question, layers, ways, question.shared, 1) if question.shared else []
        cached = [part for part in (*own, *common) if part.name != "recurrent state"]
    state = [part for part in _cached(question, layers, ways, 1, question.batch * question.rows)
             if part.name == "recurrent state"]  # fmt: skip
    found = (total("KV cache", *cached, unit="bytes"),)
    return (*found, total("recurrent state", *state)) if state else found


def _cached(
    question: Serving, layers: tuple[LayerCache, ...], ways: int, tokens: int, sequences: int
) -> tuple[Term, ...]:
    """What `sequences` of so many tokens keep; an encoder has read the whole prompt."""
    return kv_cache(
        layers, context=tokens, keys=question.keys, values=question.values, sequences=sequences,
        policy=question.policy, tensor_parallel=ways,
        encoder_context=question.prompt or question.context,
    ).parts  # fmt: skip


def _pool_share(question: Serving, layers: tuple[LayerCache, ...], ways: int) -> Term:
    return term(
        "blocks of the pool",
        "(sequences * ceil((tokens - shared) / block) + ceil(shared / block)) * block "
        "* bytes_per_token",
        unit="bytes", sequences=question.batch, tokens=question.context, shared=question.shared,
        block=question.policy.token_block,
        bytes_per_token=pool_token_bytes(
            layers, question.keys, question.values, question.policy, ways
        ),
        source="vLLM v0.19.0, v1/core/kv_cache_utils.py",
    )  # fmt: skip


# ── engines whose cache grows ────────────────────────────────────────────────────────────────────


def _grown(question: Serving) -> tuple[Term, ...]:
    """Layers in order on the devices, and what is left in host memory."""
    layers = len(question.layers)
    count = layers if question.gpu_layers is None else min(question.gpu_layers, layers)
    edges = [round(count * device / question.devices) for device in range(question.devices + 1)]
    places = []
    for device, (first, end) in enumerate(pairwise(edges)):
        # layers on visit leave their keys and values on the device that ran them
        visiting = question.layers[count:] if device == 0 else ()
        held = cache_of(question, (*question.layers[first:end], *visiting))
        workspace = activations(question, first=device == 0, last=end == layers)
        parts = [weights_of(_within(question, first, end)), *held, workspace]
        if question.engine.quantizes:
            parts += _compiled(question)
        if count < layers:
            parts.append(_visiting(question, count))
        places.append(total(f"GPU {device}", *parts, _beside(question)))
    if count < layers:
        places.append(total(question.offload, weights_of(_within(question, count, layers))))
    return tuple(places)


def _within(question: Serving, first: int, end: int) -> Stored:
    """Tensors of the layers from `first` up to `end`.

    Embeddings come with the first layer, the last norm and the output matrix after the last.
    """
    layers = len(question.layers)
    last = end + 1 if end == layers else end

    def place(weight: Weight) -> int:
        if weight.layer >= 0:
            return weight.layer
        return 0 if weight.role in ("embedding", "position") else layers

    return tuple(pair for pair in question.weights if first <= place(pair[0]) < last)


def _visiting(question: Serving, first: int) -> Term:
    """The largest layer of those in host memory: it is copied to the device to run."""
    sizes: dict[int, int] = {}
    for weight, format in question.weights:
        if weight.layer >= first or weight.role == "head":
            sizes[weight.layer] = sizes.get(weight.layer, 0) + weight_bytes(weight, format)
    largest = max(sizes.values(), default=0)
    return fact("layer on visit from the host", largest, unit="bytes", source="accelerate hooks")


def activations(question: Serving, *, first: bool = True, last: bool = True) -> Term:
    """The workspace of the highest moment of prefill and decode, beyond weights and cache.

    The logits are made on the `last` device; if it is not the first, they are returned there.
    """
    every = question.engine.all_logits
    chunk = question.engine.prefill
    prompt = min(question.prompt or question.context, chunk or question.context)
    setting = Setting(
        batch=question.batch * question.rows,
        sequence=prompt,
        format=_computed(question.format),
        last_logits=True,
    )
    begun = generation(question.architecture, setting)
    peak = begun.prefill_peak - begun.weights - begun.buffers - begun.cache
    logits = setting.batch * prompt * vocabulary(question.trace)
    if every and last:
        peak = max(peak, logits * (question.format.block_bytes + FP32.block_bytes))
    elif every and first:
        peak += logits * FP32.block_bytes
    ended = begun
    if prompt != question.context:
        ended = generation(question.architecture, setting._replace(sequence=question.context))
    grown = 0 if chunk else ended.cache - begun.cache
    after = max(
        ended.decode_peak - ended.weights - ended.buffers - ended.cache,
        (question.engine.cache_copies - 1) * sum(int(part.value) for part in cache_of(question)),
        _reordering(question),
    )
    return fact("activations", max(peak - grown, after) + begun.buffers, unit="bytes",
                source="llmsize.memory.generation: the pass, simulated")  # fmt: skip


def _reordering(question: Serving) -> int:
    """The keys of a layer in their new order, before the old ones go."""
    if not question.reordered:
        return 0
    return max(
        int(layers[0].value) * layer.key_dim // (layer.key_dim + layer.value_dim)
        for layer in question.layers if layer.key_dim
        for layers in [cache_of(question, (layer,))]
    )  # fmt: skip


def _compiled(question: Serving) -> Iterator[Term]:
    """What an engine holds that quantizes on the device and compiles: gaps, a matrix, graphs."""
    engine, recipe = question.engine, question.recipe
    matrices = list(_joined(question)) if recipe else []
    if recipe and recipe.quantizing:
        sizes = ((elements, elements * question.format.block_bytes) for elements in matrices)
        yield fact(
            "left by quantizing", gaps_of_quantizing(sizes, recipe.quantizing), unit="bytes",
            source="PyTorch's caching allocator, simulated", grade="formula",
        )  # fmt: skip
    if recipe and recipe.unpacked:
        yield term(
            "matrix unpacked", "elements * element", unit="bytes", source=recipe.source,
            elements=max(matrices, default=0), element=recipe.unpacked,
        )  # fmt: skip
    yield _fitted(engine, "CUDA graphs", engine.graphs)


def _joined(question: Serving) -> Iterator[int]:
    """Elements of every quantized matrix, queries, keys and values of a layer as one."""
    quantized = (weight for weight, format in question.weights if format != question.format)
    layer_by_layer = sorted(quantized, key=lambda weight: weight.layer % len(question.weights))
    for (_, joined), alike in groupby(
        layer_by_layer, key=lambda weight: (weight.layer, weight.role in ("q", "k", "v"))
    ):
        sizes = [weight.elements for weight in alike]
        yield from [sum(sizes)] if joined else sizes


def _computed(format: Format) -> Format:
    if format.block_elements > 1 or format.block_bytes not in (2, 4):
        raise LLMSizeError(
            f"nothing is computed in `{format.name}`", hint="give bf16, fp16 or fp32 as `--dtype`"
        )
    return format


# ── engines with a pool ──────────────────────────────────────────────────────────────────────────


def _pooled(question: Serving) -> tuple[Term, ...]:
    """One device of every stage of the pipeline; the devices of a stage hold the same."""
    layers = len(question.layers)
    edges = [round(layers * stage / question.stages) for stage in range(question.stages + 1)]
    places = []
    for stage, (first, end) in enumerate(pairwise(edges)):
        own = replace(question, weights=_within(question, first, end))
        kept = weights_of(
            own.weights, question.devices, _kv_heads(question), question.engine.padded
        )
        held = cache_of(question, question.layers[first:end])
        parts = [kept, *held, warm_up(own, last=end == layers)]
        if question.engine.graphs:
            parts.append(graphs(own, end - first))
        parts.append(_beside(question))
        name = f"each of {question.devices} GPUs" if question.devices > 1 else f"GPU {stage}"
        if question.stages > 1 and question.devices > 1:
            name += f" of stage {stage}"
        places.append(total(name, *parts))
    return tuple(places)


def _kv_heads(question: Serving) -> int:
    return max((layer.kv_heads for layer in question.layers), default=0)


def _beside(question: Serving) -> Term:
    """What is used before anything is loaded, and beside the framework's allocator."""
    engine = question.engine
    several = question.devices * question.stages > 1
    context = (engine.context_parallel if several else 0) or engine.context
    libraries = (engine.libraries_parallel if question.devices > 1 else 0) or engine.libraries
    return total(
        "context and libraries",
        *(_fitted(engine, name, size)
          for name, size in (("context", context), ("libraries", libraries))),
        unit="bytes",
    )  # fmt: skip


def _fitted(engine: Engine, name: str, size: int) -> Term:
    told = f"n = {engine.fitted_to}" if engine.fitted_to else "as another engine's"
    return Term(
        name, size, "bytes", source=engine.source, note=told,
        grade="fitted" if engine.fitted_to else "assumed",
    )  # fmt: skip


def warm_up(question: Serving, *, last: bool = True) -> Term:
    """Activations that the engine sees when it profiles itself: a full batch, then the sampler.

    The larger of the two, and the workspace that experts in 16 bit keep. Only the `last` stage of
    a pipeline has a sampler.
    """
    engine, ways = question.engine, question.devices
    channels = mlp_channels(question.trace, experts=False)
    hidden = hidden_size(question.trace)
    parts = [
        term(
            "warm-up",
            "max(workspace + sampler * sequences * vocabulary, "
            "element * tokens * (3 * channels / devices + 4 * hidden))",
            unit="bytes", grade="fitted" if engine.fitted_to else "formula",
            source=WARM_UP if engine.fitted_to else engine.source,
            note=f"n = {engine.fitted_to}" if engine.fitted_to else "by its rules",
            workspace=engine.workspace, sampler=engine.sampler_bytes if last else 0,
            sequences=engine.warm_sequences, vocabulary=vocabulary(question.trace),
            element=question.format.block_bytes, tokens=engine.prefill, channels=channels,
            devices=ways, hidden=hidden,
        )
    ]  # fmt: skip
    if question.stages > 1:
        parts.append(term(
            "received from the stage before", "2 * element * tokens * hidden", unit="bytes",
            element=question.format.block_bytes, tokens=engine.prefill, hidden=hidden,
            source="vLLM v0.19.0, IntermediateTensors: hidden states and residual",
        ))  # fmt: skip
    if experts := _expert_workspace(question, hidden):
        parts.append(experts)
    return total("activations", *(replace(part, value=round(part.value)) for part in parts))


def _expert_workspace(question: Serving, hidden: int) -> Term | None:
    """Two buffers for the tokens of a batch, each as often as it has experts."""
    if not question.engine.fitted_to:
        return None
    for weight, format in question.weights:
        if weight.role == "expert_down" and format.block_elements == 1:
            chosen = max(p.chosen for p in question.trace.weights.values())
            width = weight.shape[-1] * weight.shape[-2] // hidden
            return term(
                "experts' workspace",
                "element * tokens * chosen * "
                "(max(width / devices, hidden) + max(2 * width / devices, hidden))",
                unit="bytes", source=TRITON, grade="formula", element=question.format.block_bytes,
                tokens=question.engine.prefill, chosen=chosen, width=width, hidden=hidden,
                devices=question.devices,
            )  # fmt: skip
    return None


def graphs(question: Serving, layers: int) -> Term:
    """Memory of captured CUDA graphs."""
    engine = question.engine
    experts = engine.graphs_experts if _experts(question.trace) else 0
    made = term(
        "CUDA graphs",
        "constant + per_layer * layers + (per_channel * channels + experts "
        "+ 4 * splits * tokens * head_channels) / devices",
        unit="bytes", grade="fitted", source=WARM_UP, note=f"n = {engine.fitted_to}",
        constant=engine.graphs, per_layer=engine.graphs_layer, layers=layers,
        per_channel=engine.graphs_channel, channels=mlp_channels(question.trace),
        experts=experts, splits=_splits(question), tokens=engine.graphs_tokens,
        head_channels=_head_channels(question), devices=question.devices,
    )  # fmt: skip
    return replace(made, value=round(made.value))


def _splits(question: Serving) -> int:
    """Parts that attention keeps results of; FlashAttention computes in 16 bit alone."""
    architecture, engine = question.architecture, question.engine
    both_ways = architecture.family.startswith(engine.unsplit) and bool(engine.unsplit)
    if question.format.block_bytes != 2 or (both_ways and architecture.config.get("vision_config")):
        return 0
    return engine.graphs_splits


def _head_channels(question: Serving) -> int:
    """Channels of attention's result, all heads together; of the latent where there is one."""
    config = Config(question.architecture.config, question.architecture.name)
    heads = config.count("num_attention_heads", "n_head", "num_heads")
    rotary = config.count("qk_rope_head_dim")
    return heads * max(
        (layer.key_dim - rotary if layer.kind == "latent" else layer.value_dim
         for layer in question.layers), default=0,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pool:
    """What a card leaves to the cache."""

    bytes: int
    """On each device; negative where weights and activations do not fit."""
    tokens: int
    sequences: float
    """How many sequences of the asked length there is room for, by what grows with them."""


def pool(question: Serving, memory: int, utilization: float | None = None) -> Pool:
    """The KV pool on a device of `memory` bytes: the engine's share less what is needed first.

    Context and CUDA graphs are outside of that share. Raises `LLMSizeError` for an engine without
    a pool and for an impossible share.
    """
    share = question.engine.utilization if utilization is None else utilization
    if question.engine.allocation != "pool":
        raise LLMSizeError(
            f"{question.engine.title} has no pool", hint="`--engine vllm` allocates ahead"
        )
    if not 0 < share <= 1:
        raise LLMSizeError(f"a share of {share:g} is impossible", hint="give one from 0 to 1")
    place = fullest(need(question))
    outside = ("KV cache", "CUDA graphs", "context")
    spared = sum(int(part.value) for part in place.walk() if part.name in outside)
    left = int(memory * share) - (int(place.value) - spared)
    layers = question.layers[: -(-len(question.layers) // question.stages)]
    if all(layer.kind in ("recurrent", "none") for layer in layers):
        state = sum(int(part.value) for part in place.parts if part.name == "recurrent state")
        return Pool(left, 0, max(0, left + state) * question.batch / state if state else 0.0)
    tokens = 0
    if left > 0:
        tokens = pool_tokens(
            layers, left, keys=question.keys, values=question.values, policy=question.policy,
            tensor_parallel=question.devices,
        )  # fmt: skip
    return Pool(left, tokens, tokens / question.context)


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────────────


def _buffers(question: Serving) -> tuple[Term, ...]:
    """llama.cpp's own buffers, and the context on each device that it opens."""
    if question.file is None:
        raise LLMSizeError("llama.cpp needs a GGUF type", hint="`--quant q4_k_m`")
    server = replace(
        question.server,
        context=question.context * question.batch, sequences=question.batch, keys=question.keys,
        values=question.values, gpu_layers=question.gpu_layers, devices=question.devices,
    )  # fmt: skip
    names = {"model": "weights", "KV cache": "KV cache", "compute buffer": "activations"}
    places = []
    for place in llamacpp.memory(question.file, server).parts:
        parts = [replace(part, name=names[part.name]) for part in place.parts]
        if place.name != "host":
            parts.append(_beside(question))
        places.append(total(place.name, *parts))
    return tuple(places)


# ── the model's sizes ────────────────────────────────────────────────────────────────────────────


def vocabulary(trace: Trace) -> int:
    """Entries of the token embedding."""
    return next(int(w.shape[0]) for w in trace.weights.values() if w.role == "embedding")


def hidden_size(trace: Trace) -> int:
    """Channels of the residual stream."""
    return next(int(w.shape[-1]) for w in trace.weights.values() if w.role == "embedding")


def _experts(trace: Trace) -> bool:
    return any(weight.experts for weight in trace.weights.values())


def mlp_channels(trace: Trace, *, experts: bool = True) -> int:
    """Channels between the matrices of the widest MLP that one token meets."""
    hidden = hidden_size(trace)
    widths = [
        (weight.chosen or 1) * int(weight.shape[-1]) * int(weight.shape[-2]) // hidden
        for weight in trace.weights.values()
        if weight.role.endswith("down") and (experts or not weight.experts)
    ]
    return max(widths, default=0)
