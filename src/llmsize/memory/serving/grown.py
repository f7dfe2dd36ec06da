"""Engines whose cache grows: transformers and MLX, simulated tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import prod

from llmsize.anatomy import Setting
from llmsize.anatomy.parameters import hidden_size, vocabulary
from llmsize.errors import LLMSizeError
from llmsize.formats import FP32, Format
from llmsize.memory.generation import generation
from llmsize.memory.reserved import gaps_of_quantizing
from llmsize.memory.serving.beside import beside_weights
from llmsize.memory.serving.parts import (
    apart,
    cache_of,
    fitted,
    matrix_of,
    runtime,
    weights_of,
    within,
)
from llmsize.memory.serving.question import Serving
from llmsize.memory.weights import Stored, Weight, one_by_one, unfolded, weight_bytes
from llmsize.term import Term, fact, term, total


def places(question: Serving) -> tuple[Term, ...]:
    """Layers in order on the devices, and what is left in host memory."""
    layers = question.trace.depth
    count = layers if question.gpu_layers is None else min(question.gpu_layers, layers)
    edges = [round(count * device / question.devices) for device in range(question.devices + 1)]
    places = []
    left = within(question, count, layers) if count < layers else ()
    left += apart(question, within(question, 0, count))[1]
    for device, (first, end) in enumerate(pairwise(edges)):
        # layers on visit leave their keys and values on the device that ran them
        visiting = question.caches(count, layers) if device == 0 else ()
        held = cache_of(question, (*question.caches(first, end), *visiting))
        stored, _ = apart(question, within(question, first, end))
        beside = (*beside_weights(question, stored, end - first), *held)
        workspace = activations(question, beside, first=device == 0, last=end == layers)
        parts = [weights_of(question, stored), *beside, workspace, *_unpacked(question)]
        if question.engine.quantizes:
            parts += _compiled(question)
        if left:
            parts.append(_visiting(left))
        places.append(total(f"GPU {device}", *parts, runtime(question)))
    if left:
        places.append(total(question.offload, weights_of(question, left)))
    return tuple(places)


def _visiting(left: Stored) -> Term:
    """The largest layer of what is in host memory: it is copied to the device to run."""
    sizes: dict[int, int] = {}
    for weight, format in one_by_one(left):
        if weight.layer >= 0 or weight.role == "head":
            sizes[weight.layer] = sizes.get(weight.layer, 0) + weight_bytes(weight, format)
    largest = max(sizes.values(), default=0)
    return fact("layer on visit from the host", largest, unit="bytes", source="accelerate hooks")


def activations(
    question: Serving, beside: Iterable[Term] = (), *, first: bool = True, last: bool = True
) -> Term:
    """The workspace of the highest moment of prefill and decode, beyond weights and cache.

    Or of loading, when nothing that is `beside` the weights is there yet. The logits are made on
    the `last` device; if it is not the first, they are returned there.
    """
    every = question.engine.all_logits
    chunk = question.engine.prefill
    prompt = question.prompt or question.context
    prompt = min(prompt, chunk or prompt)
    setting = Setting(
        batch=question.batch * question.rows, sequence=prompt, format=_computed(question.format),
        last_logits=True,
    )  # fmt: skip
    begun = generation(question.architecture, setting)
    peak = begun.prefill_peak - begun.weights - begun.buffers - begun.cache
    logits = setting.batch * prompt * vocabulary(question.trace)
    if every and last:
        last_states = setting.batch * prompt * hidden_size(question.trace)
        made = logits * (question.format.block_bytes + FP32.block_bytes)
        peak = max(peak, made + last_states * question.format.block_bytes)
    elif every and first:
        peak += logits * FP32.block_bytes
    ended = begun
    if prompt != question.context:
        ended = generation(question.architecture, setting._replace(sequence=question.context))
    grown = 0 if chunk else ended.cache - begun.cache
    held = sum(int(part.value) for part in beside)
    after = max(
        ended.decode_peak - ended.weights - ended.buffers - ended.cache,
        (question.engine.cache_copies - 1) * sum(int(part.value) for part in cache_of(question)),
        _reordering(question),
    )
    running = max(peak - grown, after) + begun.buffers + question.engine.workspace
    loading, what = _loading(question)
    if running >= loading - held:
        loading, what = running + held, "llmsize.memory.generation: the pass, simulated"
    return fact("activations", loading - held, unit="bytes", source=what)


def _loading(question: Serving) -> tuple[int, str]:
    """The most that is there for a moment while the model is loaded, and what it is."""
    tying = "the output matrix before it is tied to the embedding, as was measured"
    order = "copies of the largest matrix while it is put in the order of its kernels"
    return max((_tying(question), tying), (_repacking(question), order))


def _tying(question: Serving) -> int:
    """A second output matrix, which is there until it is tied to the embedding."""
    late = question.engine.ties_late
    if "any" not in late and not (question.recipe and question.recipe.name in late):
        return 0
    held = {weight.role: weight_bytes(weight, format) for weight, format in question.weights
            if weight.role in ("embedding", "head")}  # fmt: skip
    return 0 if "head" in held else held.get("embedding", 0)


def _repacking(question: Serving) -> int:
    recipe = question.recipe
    if recipe is None or not recipe.repacked:
        return 0
    return recipe.repacked * max(map(prod, _matrices(question)), default=0)


def _reordering(question: Serving) -> int:
    """The keys of a layer in their new order, before the old ones go."""
    if not question.reordered:
        return 0
    keys = (
        int(layers[0].value) * layer.key_dim // (layer.key_dim + layer.value_dim)
        for layer in question.layers
        if layer.key_dim
        for layers in [cache_of(question, (layer,))]
    )
    return max(keys, default=0)  # a recurrent model has none


def _unpacked(question: Serving) -> Iterator[Term]:
    """What kernels keep for the product that needs the most."""
    recipe = question.recipe
    if recipe is None or not recipe.unpacked:
        return
    needs = ((rows * (columns * recipe.unpacked + recipe.scratch), rows, columns)
             for rows, columns in _matrices(question))  # fmt: skip
    _, rows, columns = max(needs, default=(0, 0, 0))
    yield term(
        "matrix unpacked", "elements * element", unit="bytes", source=recipe.source,
        elements=rows * columns, element=recipe.unpacked,
    )  # fmt: skip
    if recipe.scratch:
        yield term(
            "room for a product", "rows * bytes_per_row", unit="bytes", source=recipe.source,
            rows=rows, bytes_per_row=recipe.scratch,
        )  # fmt: skip


def _compiled(question: Serving) -> Iterator[Term]:
    """What an engine holds that quantizes on the device and compiles: gaps and graphs."""
    engine, recipe = question.engine, question.recipe
    if recipe and recipe.quantizing:
        sizes = (
            (elements, elements * question.format.block_bytes) for elements in _joined(question)
        )
        yield fact(
            "left by quantizing", gaps_of_quantizing(sizes, recipe.quantizing), unit="bytes",
            source="PyTorch's caching allocator, simulated", grade="formula",
        )  # fmt: skip
    yield fitted(engine, "CUDA graphs", engine.graphs)


def _joined(question: Serving) -> Iterable[int]:
    """Elements of every quantized matrix, with those as one that the engine joins."""
    sizes: dict[tuple[object, ...], int] = {}
    each = [one for weight in _quantized(question) for one in unfolded(weight)]
    for weight in sorted(each, key=lambda w: (w.layer < 0, w.layer)):
        matrix = (weight.layer, *matrix_of(question.engine, weight))
        sizes[matrix] = sizes.get(matrix, 0) + weight.elements
    return sizes.values()


def _matrices(question: Serving) -> list[tuple[int, int]]:
    """Rows and columns of every quantized matrix, one expert at a time."""
    return [(prod(w.shape[-2:-1]), w.shape[-1]) for w in _quantized(question)]


def _quantized(question: Serving) -> list[Weight]:
    return [weight for weight, format in question.weights if format != question.format]


def _computed(format: Format) -> Format:
    if format.block_elements > 1 or format.block_bytes not in (2, 4):
        raise LLMSizeError(
            f"nothing is computed in `{format.name}`", hint="give bf16, fp16 or fp32 as `--dtype`"
        )
    return format
