"""The question: one engine serving one model, and how its weights are stored."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from llmsize.anatomy import Trace
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.architecture import Architecture
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError
from llmsize.formats import FP16, Format, stored_bytes
from llmsize.memory.kv_cache import CachePolicy
from llmsize.memory.llamacpp.cache import Server
from llmsize.memory.weights import (
    FormatOf,
    Recipe,
    Stored,
    checkpoint,
    folded_checkpoint,
    formats_of,
    tells_layers_apart,
    without_experts,
)
from llmsize.quick_dataclasses import dataclass, field, replace
from llmsize.term import Term

if TYPE_CHECKING:
    from llmsize.memory.llamacpp.buffers import Model

PLAIN_SERVER = Server(context=1)
"""llama.cpp's own defaults."""


@dataclass(frozen=True, slots=True)
class Serving:
    """One engine serving one model: all that decides its memory."""

    architecture: Architecture
    trace: Trace
    engine: Engine
    weights: Stored
    """Every tensor with the format it is stored in; those that layers have alike may be one."""
    format: Format
    """What is computed in."""
    keys: Format
    values: Format
    recipe: Recipe | None = None
    """How they were quantized, if they are."""
    file: Model | None = field(default=None, hash=False)
    """The GGUF file, for llama.cpp."""
    index_keys: Format | None = None
    """The format of the keys of indexers, where it is not that of the others."""
    context: int = 4096
    """Tokens of each sequence, prompt and answer together; where an encoder reads the prompt, those
    of the decoder alone."""
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
    host_bytes: int = 0
    """Bytes of parameters that each device leaves in host memory, at least: whole matrices."""
    host_experts: int = 0
    """Layers whose experts are in host memory, from the first."""
    beside: tuple[Term, ...] = field(default=(), hash=False)
    """What the first device, or with tensor parallelism every one, has besides: adapters."""
    drafting: Serving | None = None
    """A smaller model that drafts for it, beside it and with the same sequences."""
    predicting: bool = False
    """Whether its own layer for the token after the next one drafts for it."""
    server: Server = PLAIN_SERVER
    """Options of llama.cpp that have no name here: its batch, its flash attention, and so on."""

    @property
    def layers(self) -> tuple[LayerCache, ...]:
        """What every layer caches."""
        if self.engine.allocation == "buffers":
            from llmsize.memory.llamacpp.families import layer_caches  # large

            return layer_caches(self.architecture, self.trace)
        return tuple([cache for _, cache in _numbered_caches(self.trace)])

    def caches(self, first: int, end: int) -> tuple[LayerCache, ...]:
        """What the layers from `first` up to `end` cache."""
        found = _numbered_caches(self.trace)
        return tuple([cache for index, cache in found if first <= index < end])

    @property
    def policy(self) -> CachePolicy:
        """How the engine keeps the cache."""
        engine = self.engine
        return CachePolicy(
            engine.token_block, engine.windows, engine.latent, self.index_keys,
            self._packed_latent(),
        )  # fmt: skip

    def _packed_latent(self) -> int:
        """Bytes of a latent of fp8 as FlashMLA reads it: 656 of DeepSeek-V3.2's.

        The channels in blocks with a scale each, and the rotary key in 16 bit: vLLM v0.19.0,
        v1/attention/backends/mla/flashmla_sparse.py; SGLang v0.5.7, model_executor/model_runner.py.
        """
        if not (self.engine.packs_latents and self.index_keys and self.keys.name.startswith("fp8")):
            return 0
        kinds = {cache.kind: cache for _, cache in _numbered_caches(self.trace)}
        if not {"latent", "index"} <= kinds.keys():
            return 0
        rotary = Config(self.architecture.config, self.architecture.name).count("qk_rope_head_dim")
        channels = kinds["latent"].key_dim - rotary
        return stored_bytes(self.index_keys, channels) + stored_bytes(FP16, rotary)


def has_encoder(trace: Trace) -> bool:
    """Whether an encoder reads the prompt, which is then no part of the decoder's tokens."""
    return any(cache.kind == "cross" for cache in trace.layer_caches())


@lru_cache(maxsize=8)
def _numbered_caches(trace: Trace) -> tuple[tuple[int, LayerCache], ...]:
    return tuple(trace.numbered_caches())  # which the parts of one answer ask for again and again


def serving(
    architecture: Architecture, trace: Trace, engine: Engine, recipe: Recipe | None,
    format_of: FormatOf, *, format: Format, keys: Format, values: Format,
) -> Serving:  # fmt: skip
    """A model stored by `recipe`, or in `format`, ready to be asked about.

    Raises `LLMSizeError` for a model that writes no text, and for a recipe that the engine cannot
    load or that stores nothing of the model.
    """
    _check_runs(architecture, trace, engine, recipe, format)
    if recipe is not None:
        recipe = _loaded(recipe, engine)
    file = None
    if recipe is not None and engine.allocation == "buffers":
        from llmsize.memory.llamacpp.gguf import model

        file = model(architecture, trace, recipe, format_of)
        stored: Stored = file.tensors
    elif recipe is not None:
        stored = _quantized(architecture, trace, engine, recipe, format_of, format)
    else:
        stored = tuple((w, format) for w in folded_checkpoint(architecture, trace).weights)
    index_keys = format_of(engine.index_keys) if engine.index_keys else None
    return Serving(
        architecture, trace, engine, stored, format, keys, values, recipe, file, index_keys
    )


def _check_runs(
    architecture: Architecture, trace: Trace, engine: Engine, recipe: Recipe | None, format: Format
) -> None:
    """Raise `LLMSizeError` for a model that writes nothing, or weights that the engine has not."""
    if not trace.caches:
        raise LLMSizeError(
            f"`{architecture.name}` keeps nothing of its tokens: an encoder, which writes no text",
            hint="ask `llmsize train` or `llmsize inspect`",
        )
    gguf = recipe is not None and recipe.kept == "fp32"
    if gguf != (engine.allocation == "buffers"):
        raise LLMSizeError(
            f"{engine.title} does not run weights in `{recipe.name if recipe else format.name}`",
            hint="llama.cpp and Ollama run GGUF types such as `q4_k_m`; the other engines run "
            "`nf4`, `awq`, `gptq`, `fp8`, …",
        )

    if recipe is not None and recipe.scratch and engine.allocation != "grown":
        raise LLMSizeError(
            f"{engine.title} has kernels of its own, not those of `{recipe.name}`",
            hint=f"the file is that of `--quant {recipe.base}`",
        )


def _loaded(recipe: Recipe, engine: Engine) -> Recipe:
    """The recipe as the engine loads it: what it quantizes besides, and what it leaves alone."""
    if engine.quantizes:
        recipe = replace(recipe, quantizes=(*recipe.quantizes, *engine.quantizes))
    return without_experts(recipe) if engine.stacks_experts else recipe


def _quantized(
    architecture: Architecture, trace: Trace, engine: Engine, recipe: Recipe,
    format_of: FormatOf, format: Format,
) -> Stored:  # fmt: skip
    """The weights and how a checkpoint stores them; `format` is that of what is left alone."""
    tensors_of = checkpoint if tells_layers_apart(recipe) else folded_checkpoint
    stored = tuple(formats_of(tensors_of(architecture, trace), recipe, format_of, own=format))
    if all(kept == format for _, kept in stored):
        raise LLMSizeError(
            f"`{recipe.name}` is for {_said(recipe.quantizes)}, which {architecture.name} has not",
            hint="`llmsize show recipes` names others",
        )
    return _untied(stored) if recipe.name in engine.unties else stored


def _said(roles: tuple[str, ...]) -> str:
    """What a recipe quantizes, in a word."""
    experts = all(role.startswith("expert_") for role in roles)
    return "experts" if experts else ", ".join(roles)


def _untied(stored: Stored) -> Stored:
    """The tensors, with an output matrix of its own in place of a tied one."""
    if any(weight.role == "head" for weight, _ in stored):
        return stored
    return stored + tuple(
        (weight._replace(name="lm_head.weight", role="head"), format)
        for weight, format in stored
        if weight.role == "embedding"
    )
