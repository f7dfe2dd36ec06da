"""Engines whose cache grows: transformers and MLX, simulated tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

from llmsize.anatomy import Setting
from llmsize.anatomy.parameters import vocabulary
from llmsize.errors import LLMSizeError
from llmsize.formats import FP32, Format
from llmsize.memory.generation import generation
from llmsize.memory.reserved import gaps_of_quantizing
from llmsize.memory.serving.parts import cache_of, fitted, runtime, weights_of, within
from llmsize.memory.serving.question import Serving
from llmsize.memory.weights import weight_bytes
from llmsize.term import Term, fact, term, total


def places(question: Serving) -> tuple[Term, ...]:
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
        parts = [weights_of(within(question, first, end)), *held, workspace]
        if question.engine.quantizes:
            parts += _compiled(question)
        if count < layers:
            parts.append(_visiting(question, count))
        places.append(total(f"GPU {device}", *parts, runtime(question)))
    if count < layers:
        places.append(total(question.offload, weights_of(within(question, count, layers))))
    return tuple(places)


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
    yield fitted(engine, "CUDA graphs", engine.graphs)


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
