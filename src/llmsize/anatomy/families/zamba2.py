"""Zamba2: Mamba-2 layers, some behind one of a few transformer blocks that they have in common.

transformers v5.23, models/zamba2/modeling_zamba2.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from llmsize.anatomy import blocks, decoder, lm_head, mamba2, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Part, Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.mamba2 import Mamba2
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Module, Trace


class Kind(NamedTuple):
    """What one layer is, or whose call of a common block it is."""

    module: Module | None = None
    """The common block in front of its mixer."""
    first: bool = False
    last: bool = False
    """Whether it is the block's first or last call: there its gradients end and begin."""


class Adapters(NamedTuple):
    """The low-rank layers that each call of a common block has of its own."""

    rank: int
    attention: bool
    """Whether queries, keys and values have some, too."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    check_tied(c)
    hidden = c.size("hidden_size")
    c = c.changed(
        head_dim=2 * hidden // c.few("num_attention_heads"),
        intermediate_size=c.size("intermediate_size", default=4 * hidden),
    )
    rotated = c.flag("use_mem_rope")
    s = decoder.read(c, tied=True, activation="gelu", rotary=1.0 if rotated else 0.0)
    adapters = Adapters(
        Dim(c.size("adapter_rank", default=128), "adapter_rank"),
        c.flag("use_shared_attention_adapter"),
    )
    mixer = partial(mamba2.mixer, t, read_mamba2(c, s.hidden))
    feed_forward = partial(feed, t, s, adapters)
    attend = partial(attention, t, s, adapters)
    kinds = layer_kinds(
        c.every_layer(s.layers, "layers_block_type", "layer_types"),
        c.size("num_mem_blocks", default=1),
        "shared_transformer",
    )
    beside = partial(transformer, t, attend, feed_forward)
    x = model(t, s, kinds, mixer, beside, hands_positions=True)
    return lm_head.causal_lm(t, x, s.vocabulary, Head(), tied=True)


def check_tied(c: Config) -> None:
    """Raise `LLMSizeError` where the class ties no weights, those of its blocks neither."""
    if not c.flag("tie_word_embeddings", default=True):
        raise c.error("has `tie_word_embeddings` = false", "leave it out: its blocks are tied, too")


def read_mamba2(c: Config, hidden: int) -> Mamba2:
    """The mixer from a `config.json`."""
    heads = c.few("n_mamba_heads", default=8)
    return Mamba2(
        hidden=hidden,
        heads=Dim(heads, "mamba_heads"),
        head_dim=Dim(c.size("mamba_expand", default=2) * hidden // heads, "mamba_head_dim"),
        groups=c.size("mamba_ngroups", default=1),
        state=Dim(c.size("mamba_d_state", default=64), "state"),
        kernel=c.size("mamba_d_conv", default=4),
        bias=c.flag("add_bias_linear"),
        conv_bias=True,
        chunk=c.size("chunk_size", default=256),
    )


def layer_kinds(listed: Sequence[object], blocks: int, name: str) -> list[Kind]:
    """The common block of each layer, taken in turn, and which of its calls that is.

    `name` is what a layer calls it.
    """
    hybrid = [index for index, kind in enumerate(listed) if kind == "hybrid"]
    kinds = [Kind()] * len(listed)
    for block in range(min(blocks, len(hybrid))):
        calls = hybrid[block::blocks]
        module = Module(f"model.layers.{calls[0]}.{name}.", len(calls))
        for index in calls:
            kinds[index] = Kind(module, index == calls[0], index == calls[-1])
    return kinds


Mixer = Callable[[Tensor, str], Tensor]
"""A state space by its name, from its input to what it adds."""

Beside = Callable[[Tensor, Tensor, Around], Tensor]
"""A common block, from what the layer is given and the first embeddings to what the mixer sees."""


def model(
    t: Trace,
    s: Sizes,
    kinds: list[Kind],
    mixer: Mixer,
    beside: Beside,
    *,
    hands_positions: bool = False,
) -> Tensor:
    """Embeddings, layers that may see them once more, final norm.

    `hands_positions` says whether layers are handed the position ids.
    """
    embeddings = blocks.embed(t, "model.embed_tokens", s.vocabulary, s.hidden)
    original = ops.copy(t, embeddings)
    position_ids, mask = blocks.positions(t), blocks.mask(t)
    tables = rotary.tables(t, rotary.Rope(), embeddings, s.rotary, s.rotary, (0,))
    around = Around(tables, {0: mask}, [])

    def block(x: Tensor, kind: Kind) -> Tensor:
        if kind.module is None:
            return mixed(t, x, None, lambda x: mixer(x, "mamba"), "input_layernorm")
        t.common = kind.module
        other = beside(x, original, around)
        t.common = None
        other = t.handed_by_name(t.linear(other, "linear", s.hidden, role="projection"))
        name = "mamba_decoder"
        return mixed(t, x, other, lambda x: mixer(x, f"{name}.mamba"), f"{name}.input_layernorm")

    handed = (original, mask, position_ids) if hands_positions else (original, mask)
    x = t.layers(
        "model.layers", block, embeddings, kinds, *handed,
        told=lambda kind: kind,
    )  # fmt: skip
    del position_ids, handed
    return blocks.rms_norm(t, x, "model.final_layernorm")


def mixed(t: Trace, x: Tensor, other: Tensor | None, mixer: Part, norm: str) -> Tensor:
    """The mixer, which reads what a common block gives beside the residual stream."""
    residual = x
    if other is not None:
        x = ops.add(t, x, other)
        t.begin_inner()
    x = blocks.rms_norm(t, x, norm)
    x = mixer(x)
    return ops.add(t, residual, x)


def transformer(
    t: Trace,
    attend: Callable[[Tensor, Around], Tensor],
    feed: Part,
    x: Tensor,
    original: Tensor,
    around: Around,
) -> Tensor:
    """Attention and MLP over what the layer is given and the first embeddings, side by side."""
    x = ops.cat(t, (x, original))
    x = blocks.rms_norm(t, x, "input_layernorm")
    x = attend(x, around)
    weights, t.attention_weights = t.attention_weights, None
    x = blocks.rms_norm(t, x, "pre_ff_layernorm")
    x = feed(x)
    del weights
    return x


def attention(t: Trace, s: Sizes, adapters: Adapters, x: Tensor, around: Around) -> Tensor:
    """Attention over twice as many channels as the residual stream has."""
    heads = {"q": s.heads, "k": s.kv_heads, "v": s.kv_heads}
    project = partial(t.linear, x)
    parts = [project(f"self_attn.{p}_proj", n * s.head_dim, role=p) for p, n in heads.items()]
    if adapters.attention:
        for i, part in enumerate(heads):
            name = f"self_attn.linear_{part}_adapter_list"
            parts[i] = ops.add(t, parts[i], own(t, adapters, x, name, x.shape[-1], part))
    q, k, v = (ops.split_heads(t, parts.pop(0), n) for n in heads.values())
    if around.rotation is not None:
        q, k = decoder.turn(t, q, k, around)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, around.mask, dropout=s.attention_dropout)
    return t.linear(out, "self_attn.o_proj", s.hidden, role="o")


def own(t: Trace, adapters: Adapters, x: Tensor, name: str, out: int, role: str) -> Tensor:
    """What the layer adds to a common linear layer: two of its own, of a low rank."""
    common, t.common = t.common, None
    low = t.linear(x, f"shared_transformer.{name}.0", adapters.rank, role=role)
    result = t.linear(low, f"shared_transformer.{name}.1", out, role=role)
    t.common = common
    return result


def feed(t: Trace, s: Sizes, adapters: Adapters, x: Tensor) -> Tensor:
    """The gated MLP with gate and up in one projection."""
    both = t.linear(x, "feed_forward.gate_up_proj", 2 * s.intermediate, role="gate_up")
    name = "feed_forward.gate_up_proj_adapter_list"
    both = ops.add(t, both, own(t, adapters, x, name, 2 * s.intermediate, "gate_up"))
    gate, up = ops.split(t, both, s.intermediate, s.intermediate)
    x = ops.mul(t, s.activation(t, gate), up)
    del both, gate, up
    return t.linear(x, "feed_forward.down_proj", s.hidden, role="down")
