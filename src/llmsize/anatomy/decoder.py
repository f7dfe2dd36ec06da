"""The frame that most decoders share, and the parts that fill it.

A family reads its `Sizes`, says in a `Frame` and in `Heads` where it is not Llama, writes one
`block`, and hands them to `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from llmsize.anatomy import attention as kernels
from llmsize.anatomy import blocks, lm_head, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.blocks import Masking, Step, as_it_is
from llmsize.anatomy.config import Config
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.rotary import Rotation, Turn, rotated
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32

Norm = Callable[[Trace, Tensor, str], Tensor]
"""Normalises the last dimension with the weights of that name."""

Part = Callable[[Tensor], Tensor]
"""Half a block: attention or feed-forward, from its input to what it adds."""

Kind = TypeVar("Kind", bound=Hashable)


class Sizes(NamedTuple):
    """The dimensions that almost every decoder has."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    """Channels of each head that are rotated."""
    local_rotary: int
    """The same in layers with a window."""
    intermediate: int
    """Width of a dense feed-forward layer; 0 if no layer is dense."""
    vocabulary: int
    tied: bool
    activation: blocks.Activation
    attention_dropout: float
    window: int
    """Tokens that layers with a window see; 0 if there are none."""


Shared = TypeVar("Shared")


class ByWindow(dict[int, Shared]):
    """What layers of one window share; a checkpoint keeps what its own layer is given."""

    def __init__(self, t: Trace, shared: Mapping[int, Shared]) -> None:
        """Of layers that `t` traces."""
        super().__init__(shared)
        self.trace = t

    def __getitem__(self, window: int) -> Shared:
        checkpoint = self.trace.checkpoint
        if checkpoint is None:
            return super().__getitem__(window)
        if not self.trace.replaying:
            checkpoint.given[id(self)] = super().__getitem__(window)
        given: Shared = checkpoint.given[id(self)]
        return given


class Around(NamedTuple):
    """What is made once and given to every layer."""

    tables: Mapping[int, Rotation | None]
    """Cosines and sines of the rotated channels for each window in use; `None` where positions are
    not told by rotation."""
    masks: Mapping[int, Tensor | None]
    """The mask for each window in use; 0 for attention to all tokens."""
    carried: list[Tensor]
    """What a layer hands to the next beside its output."""
    scales: Mapping[int, Tensor | None] = MappingProxyType({})
    """What queries are multiplied by for each window in use, where a family has such."""

    def leave_to_checkpoints(self) -> None:
        """Let go of it all, which every layer has been given; a checkpoint has what is its own."""
        self.carried.clear()
        for shared in (self.tables, self.masks, self.scales):
            if isinstance(shared, ByWindow):
                shared.clear()

    @property
    def rotation(self) -> Rotation | None:
        """Cosines and sines for attention to all tokens."""
        return self.tables[0]

    @property
    def mask(self) -> Tensor | None:
        """The mask of attention to all tokens."""
        return self.masks[0]


Block = Callable[[Tensor, Kind, Around], Tensor]
"""A layer of that kind."""


ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")


WINDOW = ("sliding_window", "attention_chunk_size")

HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
"""What configurations call the number of query heads."""


ROUNDED_DOWN = frozenset({
    "apertus", "bamba", "cohere", "cohere2", "cohere_compass_text", "doge", "dots1",
    "ernie4_5_moe", "exaone4", "exaone_moe", "falcon_h1", "flex_olmo", "glm4_moe",
    "glm4v_moe_text", "granite", "granite_swa", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "jamba", "lfm2", "lfm2_moe", "minimax", "mistral",
    "mixtral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmo_hybrid", "phi3", "phimoe",
    "qwen2", "qwen2_moe", "qwen3_moe", "smollm3", "starcoder2",
})  # fmt: skip
"""Types whose heads need not divide the hidden size: each has as many channels as are whole, and
the output projection leads back from fewer (transformers v5.23, where other types refuse)."""


def read(
    c: Config,
    *,
    tied: bool = False,
    activation: str = "silu",
    rotary: float = 1.0,
    local_rotary: float | None = None,
    attention_dropout: float = 0.0,
) -> Sizes:
    """The dimensions from a `config.json`; the keywords are the family's defaults.

    `rotary` is the share of each head's channels that is rotated; 0 if positions are told
    otherwise. Layers with a window may have a `local_rotary`.
    """
    if local_rotary is None:
        local_rotary = rotary
    hidden = c.size("hidden_size", "n_embd", "d_model")
    heads = c.few(*HEADS)
    head_dim = c.size("head_dim", default=max(hidden // heads, 1))
    kv_heads = c.size("num_key_value_heads", default=heads)
    turned = rotated(c, head_dim, rotary, "full_attention")
    uneven = c.value("head_dim") is None and hidden % heads
    if uneven and not _rounds_down(c, head_dim, turned):
        raise c.error(f"has {heads} heads that do not divide {hidden}", "give `head_dim`")
    if heads % kv_heads:
        raise c.error(f"has {heads} heads for {kv_heads} KV heads", "correct one of them")
    return Sizes(
        layers=c.few("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        hidden=Dim(hidden, "hidden"),
        heads=Dim(heads, "heads"),
        kv_heads=Dim(kv_heads, "kv_heads"),
        head_dim=Dim(head_dim, "head_dim"),
        rotary=Dim(turned, "rotary"),
        local_rotary=Dim(rotated(c, head_dim, local_rotary, "sliding_attention"), "rotary"),
        intermediate=Dim(c.count("intermediate_size", "n_inner", "ffn_dim"), "intermediate"),
        vocabulary=Dim(c.size("vocab_size"), "vocabulary"),
        tied=c.flag("tie_word_embeddings", default=tied),
        activation=blocks.activation(c, *ACTIVATION_FIELDS, default=activation),
        attention_dropout=c.number("attention_dropout", "attn_pdrop", default=attention_dropout),
        window=c.count(*WINDOW),
    )


def _rounds_down(c: Config, head_dim: int, turned: int) -> bool:
    """Whether heads of `head_dim` channels may leave some over; an odd number is not all turned."""
    return c.text("model_type") in ROUNDED_DOWN and (turned < head_dim or head_dim % 2 == 0)


def windows(c: Config, layers: int, default: Callable[[int], bool]) -> list[int]:
    """How far each layer's attention reaches back in tokens; 0 for all the way.

    `layer_types` says which layers have a window; without it `default` does, asked by index.
    """
    window = c.count(*WINDOW)
    kinds = c.each_layer(layers, "layer_types")
    if kinds is None:
        return [window if default(layer) else 0 for layer in range(layers)]
    return [0 if kind == "full_attention" else window for kind in kinds]


class Names(NamedTuple):
    """What a checkpoint calls the parts outside of the layers, and the list of layers."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"


class Frame(NamedTuple):
    """What a family has around its layers: embedding, what they share, final norm and head."""

    names: Names = Names()
    rows: int = 0
    """Of the embedding's table, if not as many as tokens that are predicted."""
    embed: Step = as_it_is
    """What the embedding itself does to the rows that it looks up."""
    begin: Step = as_it_is
    """Makes the first layer's input of them."""
    holds_tokens: bool = False
    """Whether the model holds them beside that input."""
    rope: rotary.Rope = rotary.Rope()
    handed_positions: bool = True
    """Whether recomputed layers keep positions that they are handed."""
    windows: Iterable[int] = ()
    """Those that attention uses, in tokens, 0 for none; kinds that are numbers are windows, too."""
    masking: Masking = "as needed"
    masks: Iterable[int] = ()
    """Windows whose masks are made whether or not a layer has them."""
    alike: bool = False
    """Whether layers differ by nothing but their windows, and so in nothing but mask and angles."""
    carrying: bool = False
    """Whether layers hand each other more than the residual stream."""
    scale: Callable[[Trace, int], Tensor | None] = lambda t, window: None
    """Makes what queries of layers with that window are multiplied by, if they are."""
    norm: Norm = blocks.rms_norm
    head: Head = Head()
    """Whether it shares the embedding is one of the sizes."""


FRAME = Frame()
"""Llama's."""


def run(
    t: Trace,
    s: Sizes,
    block: Block[Kind],
    kinds: Sequence[Kind],
    frame: Frame = FRAME,
) -> Tensor:
    """Tokens to loss or logits: layers of those `kinds` within their frame."""
    x = _hidden_states(t, s, block, kinds, frame)
    head = frame.head._replace(embedding=frame.names.embedding)
    return lm_head.causal_lm(t, x, s.vocabulary, head, tied=s.tied)


def _hidden_states(
    t: Trace,
    s: Sizes,
    block: Block[Kind],
    kinds: Sequence[Kind],
    frame: Frame,
) -> Tensor:
    """What the head reads; all that the model has made beside goes before the head begins."""
    used = ({*frame.windows} | {kind for kind in kinds if isinstance(kind, int)}) or {0}
    names, rows = frame.names, frame.rows or s.vocabulary
    tokens = blocks.embed(t, names.embedding, rows, s.hidden, frame.embed)
    inputs = [frame.begin(t, tokens)]  # of the first layer, and of nobody else if tokens are held
    tokens = tokens if frame.holds_tokens else inputs[0]
    position_ids = blocks.positions(t)
    around = _around(t, s, frame, inputs[0], used)
    x = t.layers(
        names.layers, partial(_within, block, around), inputs.pop(),
        _alike(t, kinds, frame, around) if frame.alike else kinds,
        position_ids if frame.handed_positions else None,
        carried=around.carried if frame.carrying else None,
    )  # fmt: skip
    assert frame.carrying or not around.carried, "the frame does not say that blocks carry more"
    x = frame.norm(t, x, names.norm)
    around.leave_to_checkpoints()
    return x


def _around(t: Trace, s: Sizes, frame: Frame, x: Tensor, used: set[int]) -> Around:
    """Tables and masks for the windows in use, and masks that are always made; layers read `x`."""
    masks = {window: blocks.mask(t, window, frame.masking) for window in used | {*frame.masks}}
    apart = frame.rope.apart
    tables = rotary.tables(t, frame.rope, x, s.rotary, s.local_rotary, used)
    if t.setting.checkpoint_every and not apart:
        _keep(tables[0])  # in every checkpoint, whether its layer rotates or not
    scales = ByWindow(t, {window: frame.scale(t, window) for window in used})
    return Around(ByWindow(t, tables) if apart else tables, ByWindow(t, masks), [], scales)


def _alike(t: Trace, windows: Sequence[Any], frame: Frame, around: Around) -> Sequence[Any]:
    """For each layer the first window that is the same as its own to a pass that keeps no mask.

    Attention that is written out adds it, and a fused kernel makes its own of one of yes and no;
    a checkpoint keeps the one that it is given.
    """
    if not t.grad or t.setting.checkpoint_every:
        return windows
    added = frame.masking == "eager" or t.setting.attention == "eager"
    first: dict[Hashable, int] = {}
    same: list[int] = []
    for window in windows:
        mask = around.masks[window]
        kept = mask is not None and not added and mask.format is not BOOL
        look = window if kept else mask and (mask.shape, mask.format)
        same.append(first.setdefault((look, around.tables[window]), window))
    return same


def _keep(rotation: Rotation | None) -> None:
    for table in rotation or ():
        if table.storage is not None:
            table.storage.keep()


def _within(block: Block[Kind], around: Around, x: Tensor, kind: Kind) -> Tensor:
    return block(x, kind, around)


# --- blocks: how attention and feed-forward are joined --------------------------------------------


def pre_norm(
    t: Trace,
    x: Tensor,
    attend: Part,
    feed: Part,
    *,
    norm: Norm = blocks.rms_norm,
    names: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
) -> Tensor:
    """Llama's block: each half reads a normalised copy and adds to the residual stream."""
    x = t.half(normed_before, x, attend, norm, names[0])
    return t.half(normed_before, x, feed, norm, names[1])


def normed_before(t: Trace, x: Tensor, part: Part, norm: Norm, name: str) -> Tensor:
    """`x + part(norm(x))`."""
    residual = x
    x = norm(t, x, name)
    x = part(x)
    return ops.add(t, residual, x)


def post_norm(
    t: Trace, x: Tensor, attend: Part, feed: Part, *, norm: Norm = blocks.rms_norm
) -> Tensor:
    """OLMo 2's block: what each half adds is normalised instead of what it reads."""
    x = t.half(normed_after, x, attend, norm, "post_attention_layernorm")
    return t.half(normed_after, x, feed, norm, "post_feedforward_layernorm")


def normed_after(t: Trace, x: Tensor, part: Part, norm: Norm, name: str) -> Tensor:
    """`x + norm(part(x))`."""
    residual = x
    x = part(x)
    x = norm(t, x, name)
    return ops.add(t, residual, x)


def sandwich(
    t: Trace,
    x: Tensor,
    attend: Part,
    feed: Part,
    *,
    norm: Norm = blocks.rms_norm,
    names: tuple[str, str] = ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
) -> Tensor:
    """Gemma 2's block: a norm before and a norm after each half."""
    x = t.half(normed_around, x, attend, norm, "input_layernorm", "post_attention_layernorm")
    return t.half(normed_around, x, feed, norm, *names)


def normed_around(t: Trace, x: Tensor, part: Part, norm: Norm, before: str, after: str) -> Tensor:
    """`x + norm(part(norm(x)))`."""
    residual = x
    x = norm(t, x, before)
    x = part(x)
    x = norm(t, x, after)
    return ops.add(t, residual, x)


def parallel(t: Trace, x: Tensor, attend: Part, feed: Part, *, norm: Norm) -> Tensor:
    """Command R's block: both halves read the same normalised input."""
    residual = x
    x = norm(t, x, "input_layernorm")
    attended = attend(x)
    fed = feed(x)
    return ops.add(t, ops.add(t, residual, attended), fed)


# --- attention ------------------------------------------------------------------------------------


class Heads(NamedTuple):
    """What a family does to the heads of grouped-query attention."""

    bias: bool = False
    """Of q, k and v."""
    output_bias: bool | None = None
    """Of the output, if not as that of q, k and v."""
    norm: Norm | None = None
    """Normalises each head of q and k, when all are there."""
    normed_at_once: bool = False
    """Whether it does so before the next projection instead."""
    wide_norm: Norm | None = None
    """Normalises all heads of q, and all of k, together."""
    clipped: bool = False
    """Whether q, k and v are kept in bounds."""
    turn: Turn = rotary.turn
    softcap: bool = False
    """Whether scores are."""
    name: str = "self_attn"
    output: str = "o_proj"


def attention(
    t: Trace,
    s: Sizes,
    h: Heads,
    x: Tensor,
    around: Around,
    window: int = 0,
    *,
    position: bool = True,
) -> Tensor:
    """Grouped-query attention of a layer with that `window`; without `position` nothing turns."""
    q, k, v = projections(t, s, h, x)
    if h.norm is not None and not h.normed_at_once:
        q = h.norm(t, q, f"{h.name}.q_norm")
        k = h.norm(t, k, f"{h.name}.k_norm")
    rotation = around.tables[window]
    if position and rotation is not None:
        q, k = h.turn(t, q, k, rotation)
    k, v = blocks.remember(t, k, v, window)
    mask, dropout = around.masks[window], s.attention_dropout
    out = blocks.attend(t, q, k, v, mask, dropout=dropout, softcap=h.softcap)
    bias = h.bias if h.output_bias is None else h.output_bias
    project = partial(t.linear, name=f"{h.name}.{h.output}", out=s.hidden, role="o", bias=bias)
    if t.attending is None:
        return project(out)
    del q, k, v, mask
    queries = partial(_queries_again, t, s, h, x, rotation)
    return t.attending.beside(t, x, project(out), queries)


def _queries_again(t: Trace, s: Sizes, h: Heads, x: Tensor, rotation: Rotation | None) -> Tensor:
    """The queries once more, as peft computes them beside attention; values, too, for no use."""
    queries = t.linear(x, f"{h.name}.q_proj", s.heads * s.head_dim, bias=h.bias, role="q")
    by_head = ops.split_heads(t, queries, s.heads)
    grad, t.grad = t.grad, False
    values = t.linear(x, f"{h.name}.v_proj", s.kv_heads * s.head_dim, bias=h.bias, role="v")
    t.grad = grad
    turned = by_head if rotation is None else rotary.rotate(t, by_head, *rotation)
    del values
    return turned


def projections(t: Trace, s: Sizes, h: Heads, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by heads: three projections, or views of what one gives."""
    norm = h.norm if h.normed_at_once else None

    def by_heads(part: Tensor, letter: str, heads: int) -> Tensor:
        if h.wide_norm is not None and letter != "v":
            part = h.wide_norm(t, part, f"{h.name}.{letter}_norm")
        part = ops.clamp(t, part, bounds=2) if h.clipped else part
        part = ops.split_heads(t, part, heads)
        if norm is None or letter == "v":
            return part
        return norm(t, part, f"{h.name}.{letter}_norm")

    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    if t.setting.fused_qkv:
        fused = blocks.queries_keys_values(t, x, f"{h.name}.qkv_proj", queries, keys, bias=h.bias)
        views = ops.split(t, fused, queries, keys, keys)
        heads = (s.heads, s.kv_heads, s.kv_heads)
        q, k, v = map(by_heads, views, "qkv", heads)
        return q, k, v
    linear = partial(t.linear, x, bias=h.bias)
    q = by_heads(linear(f"{h.name}.q_proj", queries, role="q"), "q", s.heads)
    k = by_heads(linear(f"{h.name}.k_proj", keys, role="k"), "k", s.kv_heads)
    v = by_heads(linear(f"{h.name}.v_proj", keys, role="v"), "v", s.kv_heads)
    return q, k, v


def attend_eager(t: Trace, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention that the reference writes out in Python, whatever kernel is asked for."""
    assert mask is not None
    k, v = blocks.remember(t, k, v)
    return ops.merge_heads(t, kernels.eager(t, q, k, v, mask))


def turn(t: Trace, q: Tensor, k: Tensor, around: Around, window: int = 0) -> tuple[Tensor, Tensor]:
    """Rotary embedding of all channels of each head of q and k, or of the first ones."""
    rotation = around.tables[window]
    assert rotation is not None
    return rotary.turn(t, q, k, rotation)


# --- feed-forward ---------------------------------------------------------------------------------


def gated(
    t: Trace,
    s: Sizes,
    x: Tensor,
    *,
    name: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    width: int = 0,
    bias: bool = False,
    role: str = "",
) -> Tensor:
    """The gated MLP; `role` is a prefix to its weights' roles, such as `shared_`."""
    width = width or s.intermediate
    gate, up, down = (f"{name}.{last}" for last in names)
    project = partial(t.linear, x, out=width, bias=bias)
    if t.setting.fused_gate:
        gated = project(name=gate, role=f"{role}gate")
        product = ops.gated_product(t, gated, project(name=up, role=f"{role}up"))
        del gated
    else:
        product = ops.mul(
            t,
            s.activation(t, project(name=gate, role=f"{role}gate")),
            project(name=up, role=f"{role}up"),
        )
    return t.linear(product, down, s.hidden, bias=bias, role=f"{role}down")


def gated_fused(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """The gated MLP with gate and up in one projection."""
    if t.setting.separate_gate:
        return gated(t, s, x)
    both = t.linear(x, "mlp.gate_up_proj", 2 * s.intermediate, role="gate_up")
    gate, up = ops.split(t, both, s.intermediate, s.intermediate)
    if t.setting.fused_gate:
        product = ops.gated_product(t, gate, up)
    else:
        product = ops.mul(t, up, s.activation(t, gate))
    return t.linear(product, "mlp.down_proj", s.hidden, role="down")


def plain(
    t: Trace,
    s: Sizes,
    x: Tensor,
    *,
    up: str = "mlp.up_proj",
    down: str = "mlp.down_proj",
    bias: bool = False,
) -> Tensor:
    """Two linear layers around the activation."""
    x = t.linear(x, up, s.intermediate, bias=bias, role="up")
    x = s.activation(t, x)
    return t.linear(x, down, s.hidden, bias=bias, role="down")


# --- norms ----------------------------------------------------------------------------------------


layer_norm_without_bias: Norm = partial(blocks.layer_norm, bias=False)


def gemma_norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """Gemma's RMSNorm: normalised and scaled by 1 + weight in fp32."""
    weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
    format = x.format
    x = ops.to(t, x, FP32)
    normed = ops.normalized(t, x)
    del x
    normed = ops.mul(t, normed, ops.shift(t, ops.to(t, weight, FP32)))
    return ops.to(t, normed, format)


def fp32_norm(t: Trace, x: Tensor, name: str, *, cast: bool = False) -> Tensor:
    """RMSNorm that is scaled in fp32 too (OLMo 2, gpt-oss), its weight `cast` to it (Helium)."""
    weight: Tensor = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
    weight = ops.to(t, weight, FP32) if cast else weight
    format = x.format
    x = ops.to(t, x, FP32)
    x = ops.normalized(t, x)
    return ops.to(t, ops.mul(t, weight, x), format)
