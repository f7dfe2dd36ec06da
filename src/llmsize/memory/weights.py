"""Weights as they are stored: a recipe names the format of every tensor of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from math import prod
from typing import Any, Literal, NamedTuple

from llmsize.anatomy.config import Config
from llmsize.anatomy.trace import Trace
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError, did_you_mean
from llmsize.formats import Format, matrix_tensors
from llmsize.quick_dataclasses import dataclass, field, replace
from llmsize.term import Term, fact, total

FormatOf = Callable[[str], Format]
"""Looks a format up by its name."""


class Weight(NamedTuple):
    """One stored tensor, or those of several layers that have one alike."""

    name: str
    shape: tuple[int, ...]
    """Outermost first, as PyTorch prints it: (outputs, inputs), with experts before them."""
    role: str
    """As the anatomy has it: `embedding`, `head`, `q`, `k`, `v`, `qkv`, `o`, `gate`, `up`, `down`,
    the same with `expert_` or `shared_` for experts, `router`, `norm`, `bias`, …"""
    layer: int = -1
    """Index of its layer; -1 outside of the layers."""
    layers: tuple[int, ...] = ()
    """Layers whose tensors it stands for, with `{}` for the index in its name; empty for one."""

    @property
    def elements(self) -> int:
        """How many numbers each holds."""
        return prod(self.shape)

    @property
    def copies(self) -> int:
        """How many tensors it stands for."""
        return len(self.layers) or 1


Stored = tuple[tuple[Weight, Format], ...]
"""Tensors, each with the format it is stored in."""


def unfolded(weight: Weight) -> Iterator[Weight]:
    """The tensors that it stands for, one by one."""
    if not weight.layers:
        yield weight
    for layer in weight.layers:
        yield Weight(weight.name.replace("{}", str(layer)), weight.shape, weight.role, layer)


def one_by_one(stored: Stored) -> Stored:
    """The same tensors with a weight for each."""
    return tuple((each, format) for weight, format in stored for each in unfolded(weight))


class Checkpoint(NamedTuple):
    """The tensors of one model, and what a recipe asks about the model."""

    family: str
    layers: int
    heads: int
    kv_heads: int
    experts: int
    """Routed experts of a layer; 0 for a dense model."""
    experts_used: int
    """Experts that one token is sent to."""
    weights: tuple[Weight, ...]

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def grouped(self) -> bool:
        """Whether query heads share key and value heads."""
        return self.kv_heads < self.heads

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output matrix, too."""
        return all(weight.role != "head" for weight in self.weights)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which tensor takes which format: the first rule that applies, or else `base`."""

    name: str
    base: str
    """The format of a quantized tensor that no rule names."""
    quantizes: tuple[str, ...]
    """Roles of the matrices that are quantized; all others are `kept`."""
    source: str
    kept: str = ""
    """The format of what is not quantized; empty for the checkpoint's own."""
    rules: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    """Each has `roles`, `format` and the conditions of `CONDITIONS`, all of which must hold. The
    roles of a dense layer stand for those of experts, too."""
    container: Literal["", "gguf"] = ""
    """Whose tensors it is about: the checkpoint's own, or those of a GGUF file made of it."""
    needs_imatrix: bool = False
    """Whether it cannot be made without an importance matrix."""
    quantizing: str = ""
    """What the library allocates and frees while it quantizes one matrix on the device, in order:
    `+name:bytes per element`, `-name`."""
    linear_layers: bool = False
    """Whether it replaces linear layers as a model is loaded, and nothing but those."""
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """Layers that have to stay as they are, by `model_type`, since the model multiplies with their
    weights without calling them."""
    unpacked: int = 0
    """Bytes per element of the copies that a product makes of a matrix, where its kernels unpack
    one into a buffer, or it is not compiled and has no kernel for the format."""
    scratch: int = 0
    """Bytes per output row of a matrix that its kernels keep for products of the longest input."""
    repacked: int = 0
    """Peak of loading, in bytes per element of a matrix: its copies while it is put in the order
    that its kernels want."""
    title: str = ""
    aliases: tuple[str, ...] = ()
    note: str = ""


def tells_layers_apart(recipe: Recipe) -> bool:
    """Whether it may store the same tensor of two layers in two formats."""
    return bool(recipe.rules or recipe.container)


def without_experts(recipe: Recipe) -> Recipe:
    """The recipe where the experts of a layer are one tensor, which is no linear layer."""
    if not recipe.linear_layers:
        return recipe
    roles = tuple(role for role in recipe.quantizes if not role.startswith("expert_"))
    return replace(recipe, quantizes=roles)


class Candidate(NamedTuple):
    """A tensor that is about to be quantized, where it stands, and what is known."""

    weight: Weight
    role: str
    checkpoint: Checkpoint
    position: tuple[int, int]
    """Which of how many layers, as llama.cpp's quantizer counts them for this role."""
    tensor: tuple[int, int]
    """Which of how many tensors of this kind."""
    imatrix: bool


def _more_bits(i: int, n: int) -> bool:
    """The first and the last eighth of the layers, and every third one between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


PLACES: Mapping[str, Callable[[int, int], bool]] = {
    "more_bits": _more_bits,
    "first_two": lambda i, n: i < 2,
    "first_four": lambda i, n: i < 4,
    "first_eighth": lambda i, n: i < n // 8,
    "first_sixteenth": lambda i, n: i < n // 16,
    "middle": lambda i, n: n // 8 <= i < 7 * n // 8,
}
"""Where in the model a rule applies (llama.cpp 0c1e57098, src/llama-quant.cpp)."""

MODELS: Mapping[str, Callable[[Checkpoint], bool]] = {
    "70b": lambda c: (
        c.layers == 80
        and (c.family in ("qwen2", "olmo") or (c.family, c.grouped) == ("llama", True))
    ),
}
"""Models that llama.cpp tells by their shape (`LLM_TYPE_70B` in src/models/*.cpp)."""


class Condition(NamedTuple):
    """What a rule can ask of a tensor, its place and its model."""

    holds: Callable[[Candidate, Any], bool]
    takes: Callable[[Any], bool]
    """Whether what the rule asks for means something."""


def _is_one_of(known: Mapping[str, object]) -> Callable[[Any], bool]:
    return lambda given: isinstance(given, str) and given in known


def _is_text(given: Any) -> bool:
    return isinstance(given, str)


def _is_count(given: Any) -> bool:
    return isinstance(given, int) and given > 0


CONDITIONS: Mapping[str, Condition] = {
    "family": Condition(lambda c, wanted: c.checkpoint.family == wanted, _is_text),
    "not_family": Condition(lambda c, other: c.checkpoint.family != other, _is_text),
    "model": Condition(lambda c, size: MODELS[size](c.checkpoint), _is_one_of(MODELS)),
    "experts": Condition(lambda c, wanted: c.checkpoint.experts == wanted, _is_count),
    "min_experts": Condition(lambda c, least: c.checkpoint.experts >= least, _is_count),
    "min_queries_per_kv_head": Condition(
        lambda c, least: c.checkpoint.queries_per_kv_head >= least, _is_count
    ),
    "imatrix": Condition(
        lambda c, wanted: c.imatrix is wanted, lambda given: isinstance(given, bool)
    ),
    "layers": Condition(lambda c, place: PLACES[place](*c.position), _is_one_of(PLACES)),
    "tensors": Condition(lambda c, place: PLACES[place](*c.tensor), _is_one_of(PLACES)),
    "row_not_multiple_of": Condition(lambda c, block: c.weight.shape[-1] % block != 0, _is_count),
}

MOST_TENSORS = 1_000_000
"""More than any checkpoint has; what claims more is a mistake."""

VALUE_ROLES = ("v", "qkv", "kv_b")
"""Roles that llama.cpp counts as one kind: the values' projection is the most sensitive."""


def query_heads(config: Config) -> int:
    """Heads of every layer's queries, 0 without attention."""
    return config.count("num_attention_heads", "n_head", "n_heads", "num_heads")


def checkpoint(architecture: Architecture, trace: Trace) -> Checkpoint:
    """The tensors of a model as its library stores them, one by one, from a trace of it.

    Raises `LLMSizeError` for a configuration with more tensors than any model has.
    """
    whole = folded_checkpoint(architecture, trace)
    return whole._replace(weights=tuple(each for w in whole.weights for each in unfolded(w)))


@lru_cache(maxsize=64)  # which a sweep over formats and tokens asks for again and again
def folded_checkpoint(architecture: Architecture, trace: Trace) -> Checkpoint:
    """The same, tensors that layers have alike as one.

    Raises `LLMSizeError` for a configuration with more tensors than any model has.
    """
    config = Config(architecture.config, architecture.name)
    parameters = trace.weights.values()
    tensors = sum(p.copies for p in parameters)
    if tensors > MOST_TENSORS:
        raise config.error(f"describes {tensors:,} tensors", "check its number of layers")
    caches = trace.layer_caches()
    return Checkpoint(
        family=architecture.family,
        layers=1 + max((max(p.indices) for p in parameters if p.indices), default=-1),
        heads=query_heads(config),
        kv_heads=max((cache.kv_heads for cache in caches), default=0),
        experts=max((p.experts for p in parameters), default=0),
        experts_used=max((p.chosen for p in parameters), default=0),
        weights=tuple(
            Weight(p.name, tuple(map(int, p.shape)), p.role, layers[0] if layers else -1, layers)
            for p in parameters
            for layers in [tuple(p.indices)]
        ),
    )


def formats_of(
    checkpoint: Checkpoint,
    recipe: Recipe,
    format_of: FormatOf,
    *,
    own: Format,
    imatrix: bool = False,
) -> list[tuple[Weight, Format]]:
    """Every weight with the format that `recipe` gives it; `own` is the checkpoint's.

    `imatrix` says whether an importance matrix is used, which changes some llama.cpp mixes.
    Raises `LLMSizeError` where the recipe cannot store a shape or is not well formed.
    """
    _check(recipe)
    kept = format_of(recipe.kept) if recipe.kept else own
    chosen = {
        candidate.weight: _fitting(format_of(_choose(recipe, candidate)), candidate, format_of)
        for candidate in _candidates(checkpoint, recipe, imatrix)
    }
    return [(weight, chosen.get(weight, kept)) for weight in checkpoint.weights]


def stored_weights(
    checkpoint: Checkpoint,
    recipe: Recipe,
    format_of: FormatOf,
    *,
    own: Format,
    imatrix: bool = False,
) -> Term:
    """Bytes of all tensors of `checkpoint` stored by `recipe`, as a sum over formats."""
    sizes: dict[str, int] = {}
    tensors: dict[str, int] = {}
    for weight, format in formats_of(checkpoint, recipe, format_of, own=own, imatrix=imatrix):
        size = weight.copies * weight_bytes(weight, format)
        sizes[format.name] = sizes.get(format.name, 0) + size
        tensors[format.name] = tensors.get(format.name, 0) + weight.copies
    parts = (
        fact(f"{tensors[name]} tensors in {name}", size, unit="bytes", source=recipe.source)
        for name, size in sorted(sizes.items(), key=lambda pair: -pair[1])
    )
    return total("weights", *parts, unit="bytes")


def weight_bytes(weight: Weight, format: Format) -> int:
    """Bytes of `weight` in `format`; stacked experts are quantized one by one."""
    return sum(stored_tensors(weight.shape, format))


@lru_cache(maxsize=4096)  # layers repeat their shapes
def stored_tensors(shape: tuple[int, ...], format: Format) -> tuple[int, ...]:
    """Bytes of each tensor that a weight is held as; those of stacked experts are stacked, too."""
    *stack, columns = shape
    *experts, rows = stack or (1,)
    return tuple(prod(experts) * size for size in matrix_tensors(format, rows, columns))


def _candidates(checkpoint: Checkpoint, recipe: Recipe, imatrix: bool) -> Iterator[Candidate]:
    """What is quantized, layer by layer in order of names: the quantizer counts as it goes."""
    order = sorted(checkpoint.weights, key=lambda weight: (weight.layer, weight.name))
    values = sum(weight.role in VALUE_ROLES for weight in order)
    seen: dict[str, int] = {}
    for weight in order:
        if weight.role not in recipe.quantizes or not _is_matrix(weight):
            continue
        if ("", *weight.name.split("."))[-2] in recipe.skipped.get(checkpoint.family, ()):
            continue
        kind = "v" if weight.role in VALUE_ROLES else _plain(weight.role)
        count = seen.get(kind, 0)
        seen[kind] = count + 1
        yield Candidate(
            weight,
            "tied" if weight.role == "embedding" and checkpoint.tied else weight.role,
            checkpoint,
            (weight.layer if checkpoint.experts > 1 else count, checkpoint.layers),
            (count, values if kind == "v" else checkpoint.layers),
            imatrix,
        )


def _is_matrix(weight: Weight) -> bool:
    """Whether it is a linear layer's or experts', not a parameter of another kind."""
    stacked = weight.role.startswith(("expert_", "shared_"))
    return len(weight.shape) > 1 and (stacked or weight.name.endswith(".weight"))


def _plain(role: str) -> str:
    """The role in a dense layer of what is an expert's."""
    return role.removeprefix("expert_").removeprefix("shared_")


def _check(recipe: Recipe) -> None:
    for rule in recipe.rules:
        unknown = sorted(rule.keys() - CONDITIONS.keys() - {"roles", "format"})
        if unknown or not {"roles", "format"} <= rule.keys():
            known = f"conditions: {', '.join(CONDITIONS)}"
            raise LLMSizeError(
                f"recipe `{recipe.name}`: a rule has {unknown or 'no roles or no format'}",
                hint=did_you_mean(unknown[0], CONDITIONS, otherwise=known) if unknown else known,
            )
        wrong = [name for name, given in rule.items() if not _means(name, given)]
        if wrong:
            raise LLMSizeError(
                f"recipe `{recipe.name}`: a rule asks for no known `{wrong[0]}`",
                hint="compare with a shipped one: `llmsize show recipes q4_k_m`",
            )


def _means(name: str, given: Any) -> bool:
    """Whether a part of a rule has a value that it can have."""
    if name == "roles":
        return isinstance(given, tuple)
    return _is_text(given) if name == "format" else CONDITIONS[name].takes(given)


def _choose(recipe: Recipe, candidate: Candidate) -> str:
    """The format of the first rule that applies."""
    role, plain = candidate.role, _plain(candidate.role)
    for rule in recipe.rules:
        if (role in rule["roles"] or plain in rule["roles"]) and all(
            CONDITIONS[name].holds(candidate, wanted)
            for name, wanted in rule.items()
            if name in CONDITIONS
        ):
            return str(rule["format"])
    return recipe.base


def _fitting(format: Format, candidate: Candidate, format_of: FormatOf) -> Format:
    """`format`, or what its library falls back to where a row is not a whole number of blocks."""
    while format.fallback and candidate.weight.shape[-1] % format.block_elements:
        format = format_of(format.fallback)
    return format
