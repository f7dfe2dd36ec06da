"""DeepSeek V4: several residual streams, one shared key and value, compressed distant tokens.

transformers v5.23, models/deepseek_v4/modeling_deepseek_v4.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes
from llmsize.anatomy.families.deepseek import Indexer
from llmsize.anatomy.families.llama4 import norm_without_weights
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32

SPARSE = 4
"""The ratio of compression at which an indexer picks among the compressed tokens."""


@dataclass(frozen=True, slots=True)
class Extra:
    """What no other family has."""

    streams: int
    """Residual streams beside each other (hyper-connections)."""
    q_rank: int
    groups: int
    """Groups of heads whose outputs are projected apart."""
    output_rank: int
    window: int
    indexer: Indexer


def read(c: Config) -> Extra:
    """The extra dimensions from a `config.json`."""
    return Extra(
        streams=Dim(c.few("hc_mult", default=4), "streams"),
        q_rank=Dim(c.size("q_lora_rank"), "q_rank"),
        groups=Dim(c.size("o_groups"), "output_groups"),
        output_rank=Dim(c.size("o_lora_rank"), "output_rank"),
        window=c.size("sliding_window", default=128),
        indexer=Indexer(
            Dim(c.size("index_n_heads"), "index_heads"),
            Dim(c.size("index_head_dim"), "index_head_dim"),
        ),
    )


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    e = read(c)
    s = decoder.read(c, rotary=c.size("qk_rope_head_dim") / c.size("head_dim"))
    m = mixture.read(c, scores="sigmoid")

    def block(x: Tensor, ratio: int, around: Around) -> Tensor:
        post, mix, one = gather(t, s, e, x, "attn_hc")
        one = blocks.rms_norm(t, one, "input_layernorm")
        one = attention(t, s, e, one, around, ratio)
        x = spread(t, s, e, post, mix, one, x)
        post, mix, one = gather(t, s, e, x, "ffn_hc")
        one = blocks.rms_norm(t, one, "post_attention_layernorm")
        one = mixture.feed(t, s, m, one)
        return spread(t, s, e, post, mix, one, x)

    def begin(x: Tensor) -> Tensor:
        return mixture.take(t, x, (t.batch, t.sequence, e.streams, s.hidden), "expand")

    def end(t: Trace, x: Tensor, name: str) -> Tensor:
        return blocks.rms_norm(t, join(t, s, e, x), name)

    # Pairs, because a kind that is a number would be a window
    kinds = [("ratio", ratio) for ratio in ratios(c, s.layers)]
    return decoder.run(
        t, s, lambda x, kind, around: block(x, kind[1], around), kinds, norm=end,
        windows=(e.window,), begin=begin, masking="eager",
    )  # fmt: skip


def ratios(c: Config, layers: int) -> list[int]:
    """How many tokens each layer compresses into one; 0 for none."""
    listed = c.sequence("compress_ratios")
    if listed is None or len(listed) < layers or not all(isinstance(n, int) for n in listed):
        raise c.error("has no `compress_ratios` for every layer", "give one number a layer")
    return list(listed[:layers])


def gather(t: Trace, s: Sizes, e: Extra, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The streams joined to one, with the weights to spread its result over them again."""
    n = e.streams
    flat = ops.to(t, x.view(t.batch, t.sequence, n * s.hidden), FP32)
    flat = norm_without_weights(t, flat)
    matrix = t.weight(f"{name}.fn", ((2 + n) * n, n * s.hidden), "hyper_connection")
    offset = t.weight(f"{name}.base", ((2 + n) * n,), "hyper_connection")
    factors = t.weight(f"{name}.scale", (3,), "hyper_connection")
    weights = ops.linear(t, flat, ops.to(t, matrix, FP32))
    weights = ops.add(t, weights, ops.to(t, offset, FP32))
    pre, post, mix = ops.split(t, weights, n, n, n * n)
    del factors
    pre, post = ops.sigmoid(t, pre), ops.scale(t, ops.sigmoid(t, post))
    mix = ops.softmax(t, mix.view(t.batch, t.sequence, n, n))
    weighted = ops.mul(t, pre.view(t.batch, t.sequence, n, 1), x)
    one = mixture.take(t, weighted, (t.batch, t.sequence, s.hidden), "sum")
    return post, mix, ops.to(t, one, x.format)


def spread(
    t: Trace, s: Sizes, e: Extra, post: Tensor, mix: Tensor, one: Tensor, x: Tensor
) -> Tensor:
    """One result added to every stream, and the streams mixed."""
    n = e.streams
    post = ops.to(t, post, x.format).view(t.batch, t.sequence, n, 1)
    added = ops.mul(t, post, one.view(t.batch, t.sequence, 1, s.hidden))
    return ops.add(t, added, ops.matmul(t, ops.to(t, mix, x.format), x))


def join(t: Trace, s: Sizes, e: Extra, x: Tensor) -> Tensor:
    """The streams joined for the head."""
    n = e.streams
    flat = norm_without_weights(t, ops.to(t, x.view(t.batch, t.sequence, n * s.hidden), FP32))
    matrix = t.weight("model.hc_head.hc_fn", (n, n * s.hidden), "hyper_connection")
    offset = t.weight("model.hc_head.hc_base", (n,), "hyper_connection")
    factor = t.weight("model.hc_head.hc_scale", (1,), "hyper_connection")
    weights = ops.mul(t, ops.linear(t, flat, ops.to(t, matrix, FP32)), ops.to(t, factor, FP32))
    weights = ops.sigmoid(t, ops.add(t, weights, ops.to(t, offset, FP32)))
    weighted = ops.mul(t, weights.view(t.batch, t.sequence, n, 1), x)
    return ops.to(t, mixture.take(t, weighted, (t.batch, t.sequence, s.hidden), "sum"), x.format)


def attention(t: Trace, s: Sizes, e: Extra, x: Tensor, around: Around, ratio: int) -> Tensor:
    """One key for all heads, which is the value too; near tokens whole, distant ones compressed."""
    compressed = t.linear(x, "self_attn.q_a_proj", e.q_rank, role="q_a")
    compressed = blocks.rms_norm(t, compressed, "self_attn.q_a_norm")
    q = t.linear(compressed, "self_attn.q_b_proj", s.heads * s.head_dim, role="q_b")
    q = norm_without_weights(t, ops.split_heads(t, q, s.heads))
    kv = t.linear(x, "self_attn.kv_proj", s.head_dim, role="kv")
    kv = ops.split_heads(t, blocks.rms_norm(t, kv, "self_attn.kv_norm"), 1)
    q, kv = decoder.turn(t, q, kv, around)
    t.remember(LayerCache("window", 1, s.head_dim, 0, e.window))
    if ratio:
        compress(t, s, e, x, compressed, ratio)
    sinks = t.weight("self_attn.sinks", (s.heads,), "sinks")
    out = blocks.attend(t, q, kv, kv, around.masks[e.window])
    del sinks
    return project(t, s, e, out)


def compress(t: Trace, s: Sizes, e: Extra, x: Tensor, queries: Tensor, ratio: int) -> None:
    """Groups of tokens made into one; at the smaller ratio an indexer picks among them."""
    series = 2 if ratio == SPARSE else 1
    compressor(t, x, "self_attn.compressor", s.head_dim, series, ratio, "kv")
    if ratio == SPARSE:
        i = e.indexer
        name = "self_attn.compressor.indexer"
        compressor(t, x, name, i.head_dim, series, ratio, "indexer")
        t.linear(queries, f"{name}.q_b_proj", i.heads * i.head_dim, role="indexer")
        t.linear(x, f"{name}.scorer.weights_proj", i.heads, role="indexer")


def compressor(
    t: Trace, x: Tensor, name: str, channels: int, series: int, ratio: int, role: str
) -> None:
    """Keys that are also values, one for `ratio` tokens, weighted by a gate and their place."""
    kv = t.linear(x, f"{name}.kv_proj", series * channels, role=role)
    gate = t.linear(x, f"{name}.gate_proj", series * channels, role=role)
    place = t.weight(f"{name}.position_bias", (ratio, series * channels), role)
    groups = (t.batch, t.sequence // ratio, ratio, series * channels)
    kv, gate = mixture.take(t, kv, groups, "slice"), mixture.take(t, gate, groups, "slice")
    weights = ops.softmax(t, ops.add(t, gate, place))
    joined = mixture.take(t, ops.mul(t, weights, kv), (*groups[:2], channels), "sum")
    blocks.rms_norm(t, joined, f"{name}.kv_norm")
    t.remember(LayerCache("full", 1, channels, 0, every=ratio))


def project(t: Trace, s: Sizes, e: Extra, x: Tensor) -> Tensor:
    """The output projection: groups of heads apart, then all together."""
    group = s.heads * s.head_dim // e.groups
    weight = t.weight("self_attn.o_a_proj.weight", (e.groups * e.output_rank, group), "o")
    apart = ops.linear(t, x.view(t.batch, t.sequence, e.groups, group), weight, None, e.output_rank)
    joined = apart.view(t.batch, t.sequence, e.groups * e.output_rank)
    return t.linear(joined, "self_attn.o_b_proj", s.hidden, role="o")
