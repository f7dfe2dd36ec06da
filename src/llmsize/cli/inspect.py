"""`llmsize inspect`: what a model is made of, from any source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

from llmsize import presets
from llmsize.anatomy.parameters import by_component, count
from llmsize.anatomy.towers import Part, towers
from llmsize.answer import Cell, Estimate, Row, Scalar, Table
from llmsize.architecture import Architecture
from llmsize.checkpoint import (
    Checkpoint,
    StoredTensor,
    bytes_by_format,
    parameters,
    total_bytes,
)
from llmsize.cli import options
from llmsize.cli.declare import Option
from llmsize.errors import LLMSizeError
from llmsize.formats import FP16, Format, stored_bytes
from llmsize.memory.kv_cache import token_bytes
from llmsize.quick_dataclasses import replace
from llmsize.sources.resolve import resolve
from llmsize.term import Grade, Term, fact, term, total
from llmsize.units import format_bytes, format_count

if TYPE_CHECKING:
    from llmsize.anatomy import Trace
    from llmsize.anatomy.cache import LayerCache
    from llmsize.anatomy.parameters import Parameters
    from llmsize.sources.local import Source

EXAMPLES = (
    "llmsize inspect llama-3.1-8b",
    "llmsize inspect deepseek-v3 --explain",
    "llmsize inspect ./my-model --tensors",
    "cat config.json | llmsize inspect -",
)

FORWARD = "the model's forward pass"

Tensors = Annotated[
    bool, Option("--tensors", help="List every tensor with shape, format and bytes.")
]


def inspect(
    model: options.Model, tensors: Tensors = False, assume_family: options.AssumeFamily = ""
) -> Estimate:
    """What a model is made of: parameters by component, layer pattern, cache, stored formats."""
    source = resolve(model)
    question: dict[str, Scalar] = {
        "model": model,
        "tensors": tensors,
        "assume_family": assume_family,
    }
    if source.architecture is None:
        return _stored_only(question, source, tensors)
    architecture = options.assuming(source.architecture, assume_family)
    from llmsize.anatomy import traced

    trace = traced(architecture)
    counted = count(trace.weights.values())
    made, unmade = (None, "") if source.checkpoint else _by_recipe(architecture, trace)
    parts = _beside(architecture, trace)
    tables = _tables(source, architecture, trace, counted, parts)
    if made is not None:
        tables.append(_formats(made))
    if tensors:
        tables.append(_tensors(source.checkpoint or made, trace, architecture))
    return Estimate(
        "inspect",
        question,
        _headline(architecture, counted),
        tuple(table for table in tables if table.rows),
        options.taken_for(architecture),
        tuple(_notes(source, architecture, counted, parts, unmade)),
    )


def _beside(a: Architecture, trace: Trace) -> tuple[Part, ...]:
    """What the checkpoint holds and the language model does not use."""
    from llmsize.anatomy.prediction import prediction_layers

    return (*towers(a.config, a.name), *prediction_layers(a.config, a.family, trace))


def _tables(
    source: Source, a: Architecture, trace: Trace, counted: Parameters, parts: tuple[Part, ...]
) -> list[Table]:
    """The model by component, by meaning, by layer, by what it caches and how it is stored."""
    caches = source.caches or tuple(trace.layer_caches())
    tables = [
        _components(_graded(by_component(trace.weights.values()), a.grade)),
        _meanings(counted, parts, a),
        _layers(caches),
        _cache(caches),
    ]
    return tables + ([_formats(source.checkpoint)] if source.checkpoint is not None else [])


def _tensors(checkpoint: Checkpoint | None, trace: Trace, a: Architecture) -> Table:
    """Every tensor: those that are stored, or else those of the forward pass."""
    if checkpoint is not None:
        return _stored_tensors(checkpoint)
    return _traced_tensors(trace, _own_format(a))


def _headline(a: Architecture, counted: Parameters) -> str:
    size = f"{format_count(counted.total)} parameters ({counted.total:,})"
    active = f", {format_count(counted.active)} of them for one token" if counted.experts else ""
    return f"{a.name}, {a.family}: {size}{active}"


def _notes(
    source: Source, a: Architecture, counted: Parameters, parts: tuple[Part, ...], unmade: str
) -> Iterator[str]:
    """What differs from other counts, and what is not counted."""
    for part in parts:
        if part.parameters is None:
            yield f"not counted: {part.name}"
    beside = sum(part.parameters or 0 for part in parts)
    held = parameters(source.checkpoint) if source.checkpoint is not None else None
    described = counted.total + beside
    if held is not None and held != described:
        yield (
            f"the checkpoint holds {held:,} parameters, {abs(held - described):,} "
            f"{'more' if held > described else 'fewer'} than its configuration describes "
            f"({described:,}{', with what is beside the language model' if beside else ''})"
        )
    published = a.published_parameters
    if published not in (None, counted.total):
        yield f"published: {published:,} parameters, here {counted.total:,}"
    yield from filter(None, (a.note, source.note, unmade, f"source: {a.source}"))


def _graded(term: Term, grade: Grade) -> Term:
    """A count with the grade of the shape that it was taken from."""
    return replace(term, grade=grade, parts=tuple(_graded(part, grade) for part in term.parts))


def _components(whole: Term) -> Table:
    """Parameters by component, each with its share and its tensors' products."""
    rows = [
        Row(part.name, {"parameters": part, "share": _share(part, whole)})
        for part in (*whole.parts, replace(whole, name="total"))
    ]
    return Table("", ("parameters", "share"), tuple(rows), heading="component", total=True)


def _share(part: Term, whole: Term) -> Cell:
    return f"{100 * part.value / whole.value:.2f} %"


def _meanings(counted: Parameters, beside: tuple[Part, ...], a: Architecture) -> Table:
    """The totals that people mean by “parameters”, and what is in none of them."""
    values = {
        "total": counted.total,
        "for one token (embedding and head included)": counted.active if counted.experts else 0,
        "without embeddings and head": counted.non_embedding,
        "routed experts": counted.experts,
        **{f"{part.name}, besides": part.parameters or 0 for part in beside},
    }
    rows = tuple(
        Row(name, {"parameters": fact(name, n, unit="parameters", source=FORWARD, grade=a.grade)})
        for name, n in values.items()
        if n
    )
    return Table("", ("parameters",), rows, heading="count")


def _layers(caches: Iterable[LayerCache]) -> Table:
    """How many layers there are of each kind, and what each keeps for one token."""
    rows = []
    for cache, layers in Counter(caches).items():
        cells: dict[str, Cell] = {
            "layers": str(layers), "heads": _heads(cache), "keeps": _keeps(cache)
        }  # fmt: skip
        rows.append(Row(_kind(cache), cells))
    return Table("", ("layers", "heads", "keeps"), tuple(rows), heading="layer pattern")


KINDS = {
    "full": "attention to all tokens",
    "window": "attention to a window",
    "latent": "latent attention",
    "index": "an indexer",
    "cross": "attention to the encoder",
    "recurrent": "recurrent",
    "none": "keys of an earlier layer",
}


def _kind(cache: LayerCache) -> str:
    window = f" of {cache.window:,} tokens" if cache.window else ""
    every = f", {cache.every} tokens in one" if cache.every > 1 else ""
    return f"{KINDS[cache.kind]}{window}{every}"


def _heads(cache: LayerCache) -> str:
    if cache.kind in ("recurrent", "none"):
        return ""
    value = f" + {cache.value_dim}" if cache.value_dim else ""
    return f"{cache.kv_heads} × ({cache.key_dim}{value})" if value else f"1 × {cache.key_dim}"


def _keeps(cache: LayerCache) -> str:
    if cache.kind == "recurrent":
        return f"{cache.state:,} elements for each sequence"
    if cache.kind == "none":
        return "nothing"
    elements = cache.kv_heads * (cache.key_dim + cache.value_dim)
    every = "each token" if cache.every == 1 else f"{cache.every} tokens"
    return f"{elements:,} elements for {every}"


def _cache(caches: tuple[LayerCache, ...]) -> Table:
    """Bytes of the cache: of one more token, and of a sequence whatever its length."""
    rows = []
    for name, kinds in (
        ("each token", ("full", "latent", "index")),
        ("and within windows", ("window",)),
    ):
        parts = [
            _per_token(cache, layers)
            for cache, layers in Counter(caches).items()
            if cache.kind in kinds
        ]
        if parts:
            rows.append(Row(name, {"bytes": total("cache per token", *parts)}))
    state = sum(cache.state for cache in caches)
    if state:
        rows.append(
            Row("each sequence, state in fp32",
                {"bytes": term("state", "elements * 4", unit="bytes", elements=state)})
        )  # fmt: skip
    return Table("cache in 16 bit", ("bytes",), tuple(rows), heading="for")


def _per_token(cache: LayerCache, layers: int) -> Term:
    """What one more token takes in all layers that keep the same."""
    return term(
        _kind(cache), "layers * bytes_per_entry / tokens_per_entry", unit="bytes",
        layers=layers, bytes_per_entry=token_bytes(cache, FP16, FP16),
        tokens_per_entry=cache.every,
    )  # fmt: skip


def _formats(checkpoint: Checkpoint) -> Table:
    """What the headers of a checkpoint list, format by format."""
    numbers = Counter(tensor.format for tensor in checkpoint.tensors)
    rows = [
        Row(
            name or "not told by the file",
            {
                "tensors": str(numbers[name]),
                "bytes": fact(name, size, unit="bytes", source=checkpoint.source),
            },
        )
        for name, size in bytes_by_format(checkpoint).items()
    ]
    whole = fact("stored", total_bytes(checkpoint), unit="bytes", source=checkpoint.source)
    rows.append(Row("total", {"tensors": str(len(checkpoint.tensors)), "bytes": whole}))
    return Table("", ("tensors", "bytes"), tuple(rows), heading="stored format", total=True)


def _by_recipe(a: Architecture, trace: Trace) -> tuple[Checkpoint | None, str]:
    """The tensors as `quantization_config` says that they are stored, or why that is not known.

    Neither where the configuration names no quantization.
    """
    if not a.stored:
        return None, ""
    from llmsize.memory import weights
    from llmsize.sources.quantization import recipe_name

    try:
        recipe = presets.get(weights.Recipe, recipe_name(a.stored))
        named = weights.formats_of(
            weights.checkpoint(a, trace), recipe, partial(presets.get, Format), own=_own_format(a)
        )
    except LLMSizeError as failure:
        return None, f"stored formats unknown: {failure.message}"
    tensors = tuple(
        StoredTensor(weight.name, weight.shape, format.name, weights.weight_bytes(weight, format))
        for weight, format in named
    )
    return Checkpoint(tensors, f"the recipe `{recipe.name}`"), ""


def _own_format(a: Architecture) -> Format:
    """The format that the weights were published in, or bf16."""
    found = presets.find(Format, options.own_dtype(a) or options.SILENT)
    return found or presets.get(Format, options.SILENT)


def _traced_tensors(trace: Trace, format: Format) -> Table:
    """Every weight of the forward pass; layers alike are one line."""
    rows = []
    for weight in trace.weights.values():
        elements = weight.elements * weight.copies
        size = fact(weight.name, stored_bytes(format, elements), unit="bytes", source=FORWARD)
        cells: dict[str, Cell] = {
            "layers": _ranges(weight.indices), "shape": _shape(weight.shape),
            "format": format.name, "bytes": size,
        }  # fmt: skip
        rows.append(Row(weight.name, cells))
    return Table("", ("layers", "shape", "format", "bytes"), tuple(rows), heading="tensor")


def _ranges(indices: Sequence[int]) -> str:
    """Layer indices in words: `3–60`, or `3, 7, 11, …` for what is not a range."""
    if len(indices) > 1 and list(indices) == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}–{indices[-1]}"
    shown = ", ".join(str(index) for index in indices[:4])
    return f"{shown}, … ({len(indices)})" if len(indices) > 4 else shown


def _stored_tensors(checkpoint: Checkpoint) -> Table:
    """Every tensor that the headers of a checkpoint list."""
    rows = []
    for tensor in checkpoint.tensors:
        cells: dict[str, Cell] = {
            "shape": _shape(tensor.shape) if tensor.shape is not None else "",
            "format": tensor.format,
            "bytes": fact(tensor.name, tensor.bytes, unit="bytes", source=checkpoint.source),
        }
        rows.append(Row(tensor.name, cells))
    return Table("", ("shape", "format", "bytes"), tuple(rows), heading="tensor")


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(f"{int(size)}" for size in shape) or "scalar"


def _stored_only(question: dict[str, Scalar], source: Source, tensors: bool) -> Estimate:
    """A checkpoint without a configuration: bytes and counts, and nothing about the model."""
    checkpoint = source.checkpoint
    if checkpoint is None:
        raise LLMSizeError(
            f"`{source.where}` holds no model", hint="give a folder with a `config.json`"
        )
    held = parameters(checkpoint)
    told = f"{held:,} parameters" if held is not None else "parameters not told by its headers"
    tables = [_formats(checkpoint)] + ([_stored_tensors(checkpoint)] if tensors else [])
    size = format_bytes(total_bytes(checkpoint))
    kind = "a LoRA adapter" if checkpoint.adapter else "weights without a configuration"
    notes = tuple(filter(None, (source.note, checkpoint.note)))
    return Estimate("inspect", question, f"{kind}: {size}, {told}", tuple(tables), notes=notes)
