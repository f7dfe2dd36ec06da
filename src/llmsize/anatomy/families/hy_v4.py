"""Hunyuan 4 (hy_v4): several residual streams, gated latent attention to chosen tokens with sinks.

transformers v5.23, models/hy_v4/modeling_hy_v4.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Sizes
from llmsize.anatomy.families import deepseek
from llmsize.anatomy.families.deepseek import Indexer, Latent
from llmsize.anatomy.families.gpt_oss import attend_with_sinks
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    d = deepseek.read_latent(c.changed(rope_interleave=False))
    s = decoder.read(c.changed(head_dim=d.rotary, num_key_value_heads=None))
    m = mixture.read_corrected(c, correction="fp32")
    streams = Dim(c.few("hc_mult", default=4), "streams")
    indexer = Indexer(
        Dim(c.size("index_n_heads"), "index_heads"),
        Dim(c.size("index_head_dim"), "index_head_dim"),
        c.size("index_topk", default=2048),
        shared=True,
        scales_weights=True,
    )

    def block(x: Tensor, kind: tuple[bool, bool], around: Around) -> Tensor:
        sparse, indexed = kind
        residual = x
        post, one = gather(t, s, streams, x, "attn_hc")
        one = blocks.rms_norm(t, one, "input_layernorm")
        one = attention(t, s, d, indexer, one, around, indexed)
        x = spread(t, post, one, residual)
        residual = x
        post, one = gather(t, s, streams, x, "ffn_hc")
        one = blocks.rms_norm(t, one, "post_attention_layernorm")
        one = feed(t, s, m, one) if sparse else decoder.gated(t, s, one)
        return spread(t, post, one, residual)

    def begin(t: Trace, x: Tensor) -> Tensor:
        return mixture.take(t, x, (t.batch, t.sequence, streams, s.hidden), "expand")

    def end(t: Trace, x: Tensor, name: str) -> Tensor:
        return blocks.rms_norm(t, join(t, s, streams, x), name)

    sparse = mixture.sparse_layers(c, s.layers, first_sparse=1)
    kinds = list(zip(sparse, indexed_layers(c, s.layers), strict=True))
    frame = Frame(norm=end, begin=begin, holds_tokens=True, masking="eager", carrying=True)
    return decoder.run(t, s, block, kinds, frame)


def indexed_layers(c: Config, layers: int) -> list[bool]:
    """Which layers choose tokens; the others use the choice of an earlier one."""
    kinds = c.each_layer(layers, "indexer_types")
    if kinds is None:
        return [layer == 0 or (layer - 1) % 4 == 0 for layer in range(layers)]
    return [kind == "full" for kind in kinds]


# --- residual streams -----------------------------------------------------------------------------


@contextmanager
def without_autocast(t: Trace) -> Iterator[None]:
    """What is computed as it is, whatever autocast says."""
    autocast, t.autocast = t.autocast, None
    try:
        yield
    finally:
        t.autocast = autocast


def mixed(t: Trace, x: Tensor, name: str, rows: int) -> tuple[Tensor, Tensor]:
    """Numbers for every token, made of all its streams and divided by their size; and those."""
    matrix = t.weight(name, (rows, x.shape[2] * x.shape[3]), "hyper_connection")
    flat = ops.to(t, ops.reshape(t, x, t.batch, t.sequence, x.shape[2] * x.shape[3]), FP32)
    product = ops.linear(t, flat, ops.to(t, matrix, FP32))
    factor = ops.rsqrt(t, ops.shift(t, ops.mean(t, ops.power(t, flat))))
    return ops.mul(t, product, factor), flat


def gather(t: Trace, s: Sizes, streams: int, x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The streams joined to one, with the weights to spread its result over them again."""
    with without_autocast(t):
        mixes, flat = mixed(t, x, f"{name}.fn", 2 * streams)
        offset = t.weight(f"{name}.base", (2 * streams,), "hyper_connection")
        factor = t.weight(f"{name}.scale", (2,), "hyper_connection")
        offsets = ops.split(t, offset, streams, streams)
        factors = ops.split(t, factor, 1, 1)
        pre, post = ops.split(t, mixes, streams, streams)
        pre, post = (
            ops.sigmoid(t, ops.add(t, ops.mul(t, part, ops.reshape(t, by)), more))
            for part, by, more in zip((pre, post), factors, offsets, strict=True)
        )
        pre = ops.shift(t, pre)
        post = ops.shift(t, ops.scale(t, post))
        one = joined(t, pre, x)
        del flat, mixes
    return post, ops.to(t, one, x.format)


def joined(t: Trace, weights: Tensor, x: Tensor) -> Tensor:
    """The sum of the streams by their weights."""
    return ops.sum_over(t, ops.mul(t, ops.reshape(t, weights, *weights.shape, 1), x), 2)


def spread(t: Trace, post: Tensor, one: Tensor, residual: Tensor) -> Tensor:
    """One result added to every stream, by its weight and in fp32."""
    wide = ops.to(t, one, FP32)
    added = ops.mul(
        t,
        ops.reshape(t, post, *post.shape, 1),
        ops.reshape(t, wide, *wide.shape[:2], 1, wide.shape[2]),
    )
    del wide
    return ops.to(t, ops.add(t, added, ops.to(t, residual, FP32)), residual.format)


def join(t: Trace, s: Sizes, streams: int, x: Tensor) -> Tensor:
    """The streams joined for the head."""
    with without_autocast(t):
        mixes, flat = mixed(t, x, "model.hc_head.hc_fn", streams)
        offset = t.weight("model.hc_head.hc_base", (streams,), "hyper_connection")
        factor = t.weight("model.hc_head.hc_scale", (1,), "hyper_connection")
        weights = ops.mul(t, mixes, ops.to(t, factor, FP32))
        weights = ops.sigmoid(t, ops.add(t, weights, ops.to(t, offset, FP32)))
        one = joined(t, ops.shift(t, weights), x)
        del flat, mixes
    return ops.to(t, one, x.format)


# --- attention and experts ------------------------------------------------------------------------


def attention(
    t: Trace, s: Sizes, d: Latent, indexer: Indexer, x: Tensor, around: Around, indexed: bool
) -> Tensor:
    """Latent attention to chosen tokens, with a sink for each head and a gate for each channel."""
    gate = t.linear(x, "self_attn.gate_proj", s.heads * d.value, role="gate_attention")
    q, compressed = deepseek.queries(t, s, d, x)
    heads = deepseek.expanded(t, s, d, x, q, around.rotation)
    mask = around.mask
    assert mask is not None
    chosen = deepseek.choice(t, indexer, x, compressed, around, indexed)
    left_out = deepseek.outside(t, chosen, heads.k.shape[2])
    mask = deepseek.without(t, mask, left_out)
    out = attend_with_sinks(t, heads.q, heads.k, heads.v, mask, dropout=s.attention_dropout)
    out = ops.mul(t, out, ops.sigmoid(t, gate))
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=d.bias, role="o")


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts, whose gates and values are within bounds, and a shared one."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    routing = mixture.route(t, m, tokens, "mlp.gate")
    routed = mixture.run_experts(t, s, m, tokens, routing, gate=clamped)
    shared = decoder.gated(t, s, x, name="mlp.shared_experts", width=m.shared, role="shared_")
    return ops.add(t, routed.view(*x.shape), shared)


def clamped(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """SiLU of the first half times the second, both within bounds."""
    half = x.shape[-1] // 2
    gate, up = ops.split(t, x, half, half)
    gate = ops.clamp(t, gate)
    up = ops.clamp(t, up, bounds=2)
    return ops.mul(t, ops.silu(t, gate), up)
