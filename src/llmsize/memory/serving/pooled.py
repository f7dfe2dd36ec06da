"""Engines with a pool: vLLM, SGLang and TensorRT-LLM, whose warm-up was fitted to logs.

The pool is what weights and the warm-up leave of the engine's share of a device.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from llmsize.anatomy import Trace
from llmsize.anatomy.config import Config
from llmsize.anatomy.parameters import hidden_size, vocabulary
from llmsize.memory.serving.beside import beside_weights
from llmsize.memory.serving.parts import apart, cache_of, runtime, weights_of, within
from llmsize.memory.serving.question import Serving
from llmsize.quick_dataclasses import replace
from llmsize.term import Term, fact, term, total

WARM_UP = "fitted to published logs of the engine"
UVA = "vLLM v0.19.0, model_executor/offloader/uva.py: pinned, read over the bus"
TRITON = (
    "vLLM v0.19.0, model_executor/layers/fused_moe/fused_moe.py, TritonExperts.workspace_shapes"
)


def places(question: Serving) -> tuple[Term, ...]:
    """One device of every stage of the pipeline; the devices of a stage hold the same."""
    layers = question.trace.depth
    places, on_host = [], 0
    for stage, (first, end) in enumerate(pairwise(edges(question))):
        own = replace(question, weights=within(question, first, end))
        stored, away = apart(own, own.weights)
        kept = (weights_of(own, stored), *beside_weights(own, stored, end - first))
        on_host += question.devices * int(weights_of(own, away).value)
        held = cache_of(question, question.caches(first, end))
        parts = [*kept, *held, warm_up(own, last=end == layers)]
        if question.engine.graphs:
            parts.append(graphs(own, end - first))
        parts.append(runtime(question))
        name = f"each of {question.devices} GPUs" if question.devices > 1 else f"GPU {stage}"
        if question.stages > 1 and question.devices > 1:
            name += f" of stage {stage}"
        places.append(total(name, *parts))
    if on_host:
        offloaded = fact("weights", on_host, unit="bytes", source=UVA)
        places.append(total("host", offloaded))
    return tuple(places)


def edges(question: Serving) -> list[int]:
    """The first layer of every stage, and their number."""
    each, more = divmod(question.trace.depth, question.stages)
    lengths = [each] * question.stages
    for index in range(more):
        longer = {"first": index, "last": -1 - index, "inner": -2 - index, "final": -1}
        lengths[longer[question.engine.longer_stages]] += 1
    return [0, *accumulate(lengths)]


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
            element=question.format.block_bytes, tokens=batch_tokens(question), channels=channels,
            devices=ways, hidden=hidden,
        )
    ]  # fmt: skip
    if question.stages > 1:
        parts.append(term(
            "received from the stage before", "2 * element * tokens * hidden", unit="bytes",
            element=question.format.block_bytes, tokens=batch_tokens(question), hidden=hidden,
            source="vLLM v0.19.0, IntermediateTensors: hidden states and residual",
        ))  # fmt: skip
    if experts := _expert_workspace(question, hidden):
        parts.append(experts)
    return total("activations", *(replace(part, value=round(part.value)) for part in parts))


def batch_tokens(question: Serving) -> int:
    """Tokens of the warm-up's batch: a chunk of prompts, or a whole one where they are not cut."""
    engine = question.engine
    whole = question.context <= engine.whole_prompts
    return max(engine.prefill, question.context) if whole else engine.prefill


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
                tokens=batch_tokens(question), chosen=chosen, width=width, hidden=hidden,
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
