"""How an inference engine behaves: what it keeps, what it allocates ahead, what it needs beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from llmsize.quick_dataclasses import dataclass, field, replace
from llmsize.units import GIB, MIB

Allocation = Literal["grown", "pool", "buffers"]
"""The cache grows with the tokens; a pool takes what a share of the card leaves; or every buffer is
allocated before the first token (llama.cpp)."""

OF_CARDS = ("prefill", "warm_sequences", "graphs_sequences", "graphs_sequences_of_four")
"""Facts that may be others on some cards."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine in one range of versions, in its default configuration.

    Sizes are in bytes on each device. Numbers that stand for a behaviour are fitted to `fitted_to`
    published measurements; 0 says that the engine is known by its rules alone.
    """

    name: str
    source: str
    title: str = ""
    versions: str = ""
    """The range that it speaks of."""
    vendors: tuple[str, ...] = ()
    """Makers of the accelerators that it runs on; empty for any."""
    capability: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Least compute capability of an NVIDIA card: `any` to run at all, and for a format that
    weights are computed or stored in, by the beginning of its name."""
    allocation: Allocation = "grown"
    windows: Literal["capped", "reserved"] = "capped"
    latent: Literal["latent", "expanded"] = "latent"
    token_block: int = 1
    """Tokens of cache that are allocated together."""
    draft_gap: int | None = 0
    """By how many entries the vocabulary of a draft model may differ from the model's; nothing for
    any, where drafted tokens are translated."""
    index_keys: str = ""
    """The format of what indexers keep of a token; empty for that of the cache."""
    packs_latents: bool = False
    """Whether latents of fp8, where an indexer chooses among them, are in the format of its keys,
    and the rotary key that they have in common in 16 bit: FlashMLA's `fp8_ds_mla`."""
    absorbed: Literal["", "views", "copies"] = ""
    """How it holds the matrix that makes keys and values of a latent for decoding, which multiplies
    by its halves: as `views` of it in 16 bit, so a second one where it is quantized; or as `copies`
    of it as it is stored."""
    kv_formats: tuple[str, ...] = ()
    """Formats that the cache can have; the first stands for the format of the weights."""
    recipe: str = ""
    """How weights are stored unless told otherwise; empty for the checkpoint's own way."""
    published: tuple[str, ...] = ()
    """Recipes that checkpoints for it are commonly published in, from the best."""
    quantizes: tuple[str, ...] = ()
    """Roles that it quantizes beside those of a recipe. Given only where a model is loaded in
    16 bit and quantized on the device."""
    joined: tuple[tuple[str, ...], ...] = ()
    """Roles whose matrices it holds as one."""
    caching_allocator: bool = False
    """Whether tensors are in blocks of PyTorch's allocator, which cuts off no remainder of 1 MiB or
    less."""
    rotary_tables: Literal["", "model", "fp32", "layer"] = ""
    """Cosines and sines of every position: made when they are needed, or held in a table, one of
    the model or of every layer, in the format that is computed in or in fp32."""
    rotary_families: tuple[str, ...] = ()
    """Families whose layers hold one each; all unless given."""
    stacks_experts: bool = False
    """Whether the experts of a layer are one tensor, which recipes of linear layers leave alone."""
    padded: tuple[Mapping[str, str | int], ...] = field(default=(), hash=False)
    """How kernels want experts of a `format`, on cards of the `major` compute capability or on all:
    multiples of the `hidden` size and of the `width` of their MLP on one device, or of the `inputs`
    of each product. The first entry about a card counts."""
    whole_towers: tuple[str, ...] = ()
    """Families whose towers every device has whole; the others are divided as the model is."""
    split: Literal["layers", "tensor", "none"] = "none"
    """How several devices share a model."""
    longer_stages: Literal["first", "last", "inner", "final"] = "first"
    """Which stages of a pipeline have a layer more, where layers are not divided evenly: the
    `first`, the `last`, the `inner` from the last but one back; or the `final` one has all."""
    state_pages: int = 0
    """Pages of the pool that the state of one sequence takes in every group of recurrent layers; a
    page holds as many tokens as a state has room for. 0 where states are outside of the pool."""
    to_host: tuple[Literal["layers", "parameters", "experts"], ...] = ()
    """What it can leave in host memory: whole layers; parameters one by one, up to a number of
    bytes; or the experts of the first layers."""
    utilization: float = 0.0
    """Share of a device that weights, activations and the pool may take together."""
    share_of: Literal["card", "free"] = "card"
    """What that is a share of: the card; or what is free of it before the model is loaded, and then
    activations are outside of the share."""
    graphs_in_share: bool = False
    """Whether CUDA graphs are inside of that share: estimated before the pool is made."""
    reserve: Mapping[str, float] = field(default_factory=dict, hash=False)
    """What an engine without a share of its own leaves of a card, in MiB: a `base`, so many for
    each `token` computed at once, each `sequence` of the largest CUDA graph and each `device`, and
    no less than `least` on cards of more than `large` GiB."""
    prefill: int = 0
    """Tokens that are computed at once; 0 for a whole prompt."""
    whole_prompts: int = 0
    """The longest context with which prompts are not cut: the warm-up computes one of that length.
    0 where they are always cut."""
    all_logits: bool = False
    """Whether a prompt's pass makes the logits of every token, and a copy of them in fp32."""
    cache_copies: int = 1
    """How many caches there are at the end of a pass: the old one and its continuation."""
    unties: tuple[str, ...] = ()
    """Recipes with which an output matrix that is tied to the embedding was measured to be there
    twice."""
    ties_late: tuple[str, ...] = ()
    """Recipes (`any` for all weights) with which it was measured to be there twice until the
    checkpoint is loaded."""
    warm_sequences: int = 0
    """Sequences that the sampler is warmed up with."""
    sampler_bytes: float = 0.0
    """Peak of that warm-up for each sequence and entry of the vocabulary."""
    workspace: int = 0
    """Of activations, whatever the model: of matrix products, and what a warm-up leaves."""
    graphs: int = 0
    """Of CUDA graphs: a constant, and for each layer, for each channel of the MLP on one device,
    and for a mixture of experts (divided by the devices)."""
    graphs_layer: int = 0
    graphs_channel: int = 0
    graphs_experts: int = 0
    graphs_splits: int = 0
    """Into how many parts attention may cut the keys inside a CUDA graph; it keeps a result in fp32
    of each part, for every head channel and token of the largest graph."""
    graphs_splits_on: int = 0
    """The major compute capability of the only cards with such parts; 0 for all."""
    graphs_tokens: int = 0
    """Tokens of the largest graph."""
    graphs_sequences: int = 0
    """Sequences of the largest graph, and what it has with four devices and more; known where the
    share depends on them."""
    graphs_sequences_of_four: int = 0
    unsplit: tuple[str, ...] = ()
    """Families that attend both ways within an image: with a vision tower, attention of theirs has
    no such parts."""
    context: int = 0
    """Used before anything is loaded: the device context and libraries."""
    context_parallel: int = 0
    """The same with several devices; 0 for no difference."""
    libraries: int = 0
    """Allocated beside the framework's allocator while running."""
    libraries_parallel: int = 0
    display: int = 0
    """What a screen was seen to take of a card beside the engine; only a whole device's meter sees
    it, and `--reserve` sets it aside."""
    cards: tuple[Mapping[str, str | int], ...] = field(default=(), hash=False)
    """Cards on which facts are others: those `below` so many GiB, or whose name has `named` in it.
    The first entry that is about a card gives it those of `OF_CARDS` that are in it."""
    fitted_to: int = 0
    measured: tuple[str, ...] = ()
    """Which numbers were compared with measurements; the others follow from rules."""
    aliases: tuple[str, ...] = ()
    note: str = ""


def on_card(
    engine: Engine, name: str, memory: int, capability: float | None = None, devices: int = 1
) -> Engine:
    """The engine as it is by default on a card of that name with `memory` bytes, one of `devices`.

    `capability` is the card's compute capability, if it has one.
    """
    if capability is not None:
        own = (e for e in engine.padded if int(e.get("major", capability)) == int(capability))
        splits = engine.graphs_splits if engine.graphs_splits_on in (0, int(capability)) else 0
        engine = replace(engine, padded=tuple(own), graphs_splits=splits)
    for entry in engine.cards:
        small = memory < int(entry.get("below", 0)) * GIB
        if small or str(entry.get("named", "no name")) in name:
            facts = {fact: int(entry[fact]) for fact in OF_CARDS if fact in entry}
            engine = replace(engine, **facts)  # type: ignore[arg-type]
            break
    return replace(engine, utilization=_share_left(engine, memory, devices))


def scheduled(
    engine: Engine, sequences: int | None = None, tokens: int | None = None, *, eager: bool = False
) -> Engine:
    """The engine told how many sequences and tokens it may compute at once, or to make no graphs.

    The largest graph has twice the sequences: vLLM v0.19.0, config/vllm.py,
    `_set_cudagraph_sizes`.
    """
    if tokens is not None:
        engine = replace(engine, prefill=tokens, whole_prompts=0)
    most = min(sequences or engine.warm_sequences, engine.prefill)
    return replace(
        engine, warm_sequences=most, graphs_tokens=min(engine.graphs_tokens, 2 * most),
        graphs=0 if eager else engine.graphs,
    )  # fmt: skip


def _share_left(engine: Engine, memory: int, devices: int) -> float:
    """What the engine's rule leaves of a card of `memory` bytes; its own share without a rule.

    SGLang v0.5.7, server_args.py, `_handle_gpu_memory_settings`: a rule about cards, not models.
    """
    rule = engine.reserve
    if not rule:
        return engine.utilization
    many = engine.graphs_sequences_of_four if devices >= 4 else 0
    reserved = (
        rule.get("base", 0)
        + rule.get("token", 0) * engine.prefill
        + rule.get("sequence", 0) * (many or engine.graphs_sequences)
        + rule.get("device", 0) * devices
    )
    if memory > rule.get("large", 0) * GIB:
        reserved = max(reserved, rule.get("least", 0))
    return round(max(0.0, 1 - reserved * MIB / memory), 3)
