"""DeepSeek V4: several residual streams, one shared key and value, compressed distant tokens.

transformers v5.23, models/deepseek_v4/modeling_deepseek_v4.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Sizes, fp32_norm
from llmsize.anatomy.families.deepseek import Indexer
from llmsize.anatomy.families.gpt_oss import attend_with_sinks
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.rotary import Rotation
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, INT64, Format
from llmsize.quick_dataclasses import dataclass

SPARSE = 4
"""The ratio of compression at which an indexer picks among the compressed tokens."""


@dataclass(frozen=True, slots=True)
class Extra:
    """What no other family has."""

    streams: int
    """Residual streams beside each other (hyper-connections)."""
    rounds: int
    """How often the streams' mixing matrix is normalised by columns, and by rows between."""
    q_rank: int
    groups: int
    """Groups of heads whose outputs are projected apart."""
    output_rank: int
    window: int
    indexer: Indexer
    hashed: int
    """Layers, the first ones, whose experts a table of the vocabulary chooses."""


def read(c: Config) -> Extra:
    """The extra dimensions from a `config.json`."""
    return Extra(
        streams=Dim(c.few("hc_mult", default=4), "streams"),
        rounds=c.few("hc_sinkhorn_iters", default=20),
        q_rank=Dim(c.size("q_lora_rank"), "q_rank"),
        groups=Dim(c.size("o_groups"), "output_groups"),
        output_rank=Dim(c.size("o_lora_rank"), "output_rank"),
        window=c.size("sliding_window", default=128),
        indexer=Indexer(
            Dim(c.size("index_n_heads"), "index_heads"),
            Dim(c.size("index_head_dim"), "index_head_dim"),
            c.size("index_topk", default=512),
        ),
        hashed=hash_layers(c),
    )


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    e = read(c)
    s = decoder.read(c, rotary=c.size("qk_rope_head_dim") / c.size("head_dim"))
    m = mixture.read(c, scores="sigmoid", correction="alike", balanced=True)
    others: list[Tensor] = []

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        ratio, hashed = kind
        around.carried.extend(others)
        others.clear()
        post, mix, one = gather(t, s, e, x, "attn_hc")
        attended = attention(t, s, e, fp32_norm(t, one, "input_layernorm"), around, ratio)
        x = spread(t, s, e, post, mix, attended, x)
        post, mix, one = gather(t, s, e, x, "ffn_hc")
        fed = feed(t, s, m, fp32_norm(t, one, "post_attention_layernorm"), hashed)
        return spread(t, s, e, post, mix, fed, x)

    def begin(t: Trace, x: Tensor) -> Tensor:
        return mixture.take(t, x, (t.batch, t.sequence, e.streams, s.hidden), "expand")

    def tables(t: Trace, x: Tensor, channels: int, format: Format | None) -> Rotation:
        """One table for layers that compress; that of the others is carried along."""
        others.extend(rotary.half_table(t, x, channels, format))
        return rotary.half_table(t, x, channels, format)

    def end(t: Trace, x: Tensor, name: str) -> Tensor:
        return fp32_norm(t, join(t, s, e, x), name)

    kinds = [(ratio, i < e.hashed) for i, ratio in enumerate(ratios(c, s.layers))]
    frame = Frame(
        norm=end,
        windows=(e.window,),
        begin=begin,
        masking="eager",
        rope=rotary.Rope(tables),
        carrying=True,
        holds_tokens=True,
    )
    return decoder.run(t, s, block, kinds, frame)


def hash_layers(c: Config) -> int:
    """How many layers are named as such, which are the first ones, or told or three."""
    named = c.sequence("mlp_layer_types")
    return c.count("num_hash_layers", default=3) if named is None else [*named].count("hash_moe")


def ratios(c: Config, layers: int) -> list[int]:
    """How many tokens each layer compresses into one; 0 for none."""
    listed = named_ratios(c) or c.sequence("compress_ratios") or usual_ratios(layers)
    if len(listed) < layers or not all(isinstance(n, int) for n in listed):
        raise c.error("has no `compress_ratios` for every layer", "give one number a layer")
    return list(listed[:layers])


def usual_ratios(layers: int) -> list[int]:
    """What transformers takes where nothing is told: two at the larger ratio, then both in turn."""
    return [SPARSE if layer > 1 and layer % 2 else 128 for layer in range(layers)]


RATES = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
"""How many tokens each kind of layer compresses where `compress_rates` does not say."""


def named_ratios(c: Config) -> list[int] | None:
    """The same from the names of the layers' attention, as transformers saves them."""
    kinds, rates = c.sequence("layer_types"), c.value("compress_rates")
    if kinds is None:
        return None
    told = Config({**RATES, **(rates if isinstance(rates, dict) else {})}, c.model)
    return [0 if kind == "sliding_attention" else told.size(str(kind)) for kind in kinds]


# --- residual streams -----------------------------------------------------------------------------


def unweighted_norm(t: Trace, x: Tensor) -> Tensor:
    """RMSNorm that does not scale, its factor in the input's format."""
    wide = ops.to(t, x, FP32)
    factor = ops.rsqrt(t, ops.shift(t, ops.mean(t, ops.power(t, wide))))
    del wide
    return ops.mul(t, x, ops.to(t, factor, x.format))


def gather(t: Trace, s: Sizes, e: Extra, x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The streams joined to one, with the weights to spread its result over them again."""
    n = e.streams
    matrix = t.weight(f"{name}.fn", ((2 + n) * n, n * s.hidden), "hyper_connection")
    offset = t.weight(f"{name}.base", ((2 + n) * n,), "hyper_connection")
    factor = t.weight(f"{name}.scale", (3,), "hyper_connection")
    flat = ops.to(t, ops.reshape(t, x, t.batch, t.sequence, n * s.hidden), FP32)
    flat = unweighted_norm(t, flat)
    flat = ops.linear(t, flat, ops.to(t, matrix, FP32))
    pre, post, mix = ops.split(t, flat, n, n, n * n)
    offsets = ops.split(t, offset, n, n, n * n)
    factors = ops.split(t, factor, 1, 1, 1)
    mix = ops.reshape(t, mix, t.batch, t.sequence, n, n)
    square = ops.reshape(t, offsets[2], n, n)
    pre = ops.shift(t, ops.sigmoid(t, scaled(t, pre, factors[0], offsets[0])))
    post = ops.scale(t, ops.sigmoid(t, scaled(t, post, factors[1], offsets[1])))
    mix = ops.shift(t, ops.softmax(t, scaled(t, mix, factors[2], square)))
    mix = balanced(t, mix, e.rounds)
    weights = ops.reshape(t, pre, t.batch, t.sequence, n, 1)
    one = ops.sum_over(t, ops.mul(t, weights, x), 2)
    return post, mix, ops.to(t, one, x.format)


def scaled(t: Trace, x: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """`x` times a number that is trained, and an offset added."""
    return ops.add(t, ops.mul(t, x, ops.reshape(t, factor)), offset)


def balanced(t: Trace, mix: Tensor, rounds: int) -> Tensor:
    """The mixing matrix with columns, and rows in turn, that sum to one (Sinkhorn)."""
    turns = 2 * rounds - 1
    for turn in range(turns if t.grad else min(turns, 3)):  # all take the same and keep nothing
        sums = ops.sum_over(t, mix, 3 if turn % 2 else 2, keep=True)
        sums = ops.shift(t, sums)
        mix = ops.divide(t, mix, sums)
    return mix


def spread(
    t: Trace, s: Sizes, e: Extra, post: Tensor, mix: Tensor, one: Tensor, x: Tensor
) -> Tensor:
    """One result added to every stream, and the streams mixed."""
    shape = (t.batch, t.sequence)
    post = ops.reshape(t, ops.to(t, post, x.format), *shape, e.streams, 1)
    added = ops.mul(t, post, ops.reshape(t, one, *shape, 1, s.hidden))
    mixed = ops.matmul(t, ops.transpose(t, ops.to(t, mix, x.format), -1, -2), x)
    return ops.add(t, added, mixed)


def join(t: Trace, s: Sizes, e: Extra, x: Tensor) -> Tensor:
    """The streams joined for the head."""
    n = e.streams
    matrix = t.weight("model.hc_head.hc_fn", (n, n * s.hidden), "hyper_connection")
    offset = t.weight("model.hc_head.hc_base", (n,), "hyper_connection")
    factor = t.weight("model.hc_head.hc_scale", (1,), "hyper_connection")
    flat = ops.to(t, ops.reshape(t, x, t.batch, t.sequence, n * s.hidden), FP32)
    flat = unweighted_norm(t, flat)
    weights = ops.linear(t, flat, ops.to(t, matrix, FP32))
    weights = ops.mul(t, weights, ops.to(t, factor, FP32))
    weights = ops.shift(t, ops.sigmoid(t, ops.add(t, weights, ops.to(t, offset, FP32))))
    weights = ops.reshape(t, weights, t.batch, t.sequence, n, 1)
    return ops.to(t, ops.sum_over(t, ops.mul(t, weights, x), 2), x.format)


# --- attention ------------------------------------------------------------------------------------


def turn_last(t: Trace, x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding of neighbours among the last channels, in fp32, cast back."""
    cosines, sines = (t.new("repeat", (*a.shape[:-1], 2 * a.shape[-1]), a.format) for a in rotation)
    channels = cosines.shape[-1]
    plain = ops.slice_last(t, x, x.shape[-1] - channels)
    turned = ops.slice_last(t, x, channels)
    turned = ops.to(
        t,
        ops.add(
            t,
            ops.mul(t, ops.to(t, turned, FP32), cosines),
            ops.mul(t, ops.to(t, rotary.rotate_half(t, turned), FP32), sines),
        ),
        x.format,
    )
    return ops.cat(t, (plain, turned))


def attention(t: Trace, s: Sizes, e: Extra, x: Tensor, around: Around, ratio: int) -> Tensor:
    """One key for all heads, which is the value too; near tokens whole, distant ones compressed."""
    rotation = around.tables[e.window]
    mask = around.masks[e.window]
    assert rotation is not None
    assert mask is not None
    queries = fp32_norm(
        t, t.linear(x, "self_attn.q_a_proj", e.q_rank, role="q_a"), "self_attn.q_a_norm"
    )
    q = t.linear(queries, "self_attn.q_b_proj", s.heads * s.head_dim, role="q_b")
    q = unweighted_norm(t, ops.split_heads(t, q, s.heads))
    q = turn_last(t, q, rotation)
    kv = fp32_norm(t, t.linear(x, "self_attn.kv_proj", s.head_dim, role="kv"), "self_attn.kv_norm")
    kv = turn_last(t, ops.split_heads(t, kv, 1), rotation)
    listed = s.head_dim if t.setting.cache else 0  # transformers lists the key as the value too
    t.remember(LayerCache("window", 1, s.head_dim, listed, e.window))
    kv = blocks.store_window(t, e.window, *[kv] * (1 if ratio else 2))[0]
    if ratio:
        distant, bias = compress(t, s, e, x, queries, ratio)
        kv = ops.cat(t, (kv, distant), 2)
        mask = with_distant(t, mask, bias, distant.shape[2])
    out = attend_with_sinks(t, q, kv, kv, mask, dropout=s.attention_dropout)
    out = ops.reshape(t, out, t.batch, t.sequence, s.heads, s.head_dim)
    back = Rotation(rotation.cosines, t.new("neg", rotation.sines.shape, rotation.sines.format))
    out = ops.transpose(t, turn_last(t, ops.transpose(t, out, 1, 2), back), 1, 2)
    del back
    return project(t, s, e, out)


def with_distant(t: Trace, mask: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """The mask with columns for the compressed tokens: their bias, or zeros."""
    if not count:
        return mask
    return ops.pad_last(t, mask, count) if bias is None else ops.cat(t, (mask, bias))


def compress(
    t: Trace, s: Sizes, e: Extra, x: Tensor, queries: Tensor, ratio: int
) -> tuple[Tensor, Tensor | None]:
    """Groups of tokens made into one key each, and what is added to their scores.

    At the smaller ratio an indexer picks among them, through which no gradient passes; at the
    larger one a single token sees all of them. Of too few tokens for one there is no key, and no
    gradient for what would make it.
    """
    name, begin = "self_attn.compressor", len(t.recent)
    kv, held = compressor(t, x, name, s.head_dim, ratio, "kv", s.rotary)
    count = kv.shape[2]
    if ratio != SPARSE:
        held.clear()
        t.forget_unused(begin)
        if t.sequence == 1 or not count:
            return kv, None
        zeros = t.new("new_zeros", (t.batch, 1, t.sequence, count), x.format)
        bias = t.new("masked_fill", zeros.shape, x.format)
        del zeros
        return kv, bias
    grad, t.grad = t.grad, False
    index(t, s, e, x, queries, ratio)
    t.grad = grad
    del held
    t.forget_unused(begin)
    whole = t.new("new_full", (t.batch, 1, t.sequence, count + 1), x.format)
    return kv, ops.slice_last(t, whole, count)


def index(t: Trace, s: Sizes, e: Extra, x: Tensor, queries: Tensor, ratio: int) -> Tensor:
    """The compressed tokens with the best scores."""
    i, name = e.indexer, "self_attn.compressor.indexer"
    keys, held = compressor(t, x, name, i.head_dim, ratio, "indexer", s.rotary)
    rotation = own_tables(t, x, 1, t.sequence, s.rotary)
    q = t.linear(queries, f"{name}.q_b_proj", i.heads * i.head_dim, role="indexer")
    q = ops.transpose(t, turn_last(t, ops.split_heads(t, q, i.heads), rotation), 1, 2)
    wide = ops.to(t, ops.transpose(t, keys, -1, -2), FP32)
    scores = ops.relu(t, ops.matmul(t, ops.to(t, q, FP32), wide))
    scores = ops.scale(t, scores)
    weights = t.linear(x, f"{name}.scorer.weights_proj", i.heads, role="indexer", kept=True)
    weights = ops.scale(t, ops.to(t, weights, FP32))
    weights = ops.reshape(t, weights, t.batch, t.sequence, i.heads, 1)
    scores = ops.sum_over(t, ops.mul(t, scores, weights), 2)
    _, indices = ops.topk(t, scores, min(i.chosen, scores.shape[-1]))
    del held
    return indices


def compressor(
    t: Trace, x: Tensor, name: str, channels: int, ratio: int, role: str, rotated: int
) -> tuple[Tensor, list[Tensor]]:
    """Keys that are also values, one for `ratio` tokens, weighted by a gate and their place.

    Of all tokens so far: those that were compressed before are in the cache. What comes beside is
    what the module holds of its own while an indexer is at work in it.
    """
    series = 2 if ratio == SPARSE else 1
    width = series * channels
    projected = [
        t.linear(x, f"{name}.{part}_proj", width, role=role, kept=True) for part in ("kv", "gate")
    ]
    place = t.weight(f"{name}.position_bias", (ratio, width), role)
    t.weight(f"{name}.kv_norm.weight", (channels,), "norm")
    t.add_buffer(2 * FP32.block_bytes * rotated)  # inverse frequencies, as those of the model
    t.remember(LayerCache("full", 1, channels, 0, every=ratio, waiting=2 * width))
    waiting = with_waiting(t, projected, ratio)
    count = waiting[0].shape[1] // ratio
    held = [*projected, *waiting]
    if not count:
        none = t.new("new_zeros", (t.batch, 1, 0, channels), x.format)
        return with_compressed(t, none, ratio), held
    groups = (t.batch, count, ratio, width)
    kv, gate = (ops.reshape(t, ops.narrow(t, x, 1, count * ratio), *groups) for x in waiting)
    gate = ops.add(t, gate, place)
    held.append(gate)
    if series == 2:
        keep_last_group(t, kv, gate)
        kv, gate = overlapped(t, kv), overlapped(t, gate)
    weights = ops.to(t, ops.softmax(t, gate, FP32), kv.format)
    joined = ops.sum_over(t, ops.mul(t, kv, weights), 2)
    del weights
    joined = fp32_norm(t, joined, f"{name}.kv_norm")
    tables = own_tables(t, joined, t.batch, count, rotated)
    held += (kv, gate, *tables, t.new("add", (count,), INT64))
    made = turn_last(t, ops.reshape(t, joined, t.batch, 1, count, channels), tables)
    return with_compressed(t, made, ratio), held


def with_waiting(t: Trace, projected: list[Tensor], ratio: int) -> list[Tensor]:
    """The new tokens' projections after those that wait for enough of them to be compressed.

    The cache holds a view of what is left over, and with it all that was projected.
    """
    if not t.setting.cache:
        return projected
    before, whole = t.setting.past % ratio, projected
    if before:
        batch, tokens, width = projected[0].shape
        whole = [t.new("cat", (batch, before + tokens, width), x.format) for x in projected]
    for x in whole:
        t.hold_in_cache(ops.reshape(t, x, t.batch, 1, *x.shape[1:]), t.setting.past)
    return whole


def keep_last_group(t: Trace, *grouped: Tensor) -> None:
    """Copy half of the last group into the cache, for the group after it."""
    for x in grouped if t.setting.cache else ():
        batch, _, ratio, width = x.shape
        t.stored.append(t.new("state", (batch, ratio, width // 2), x.format, role="cache"))


def with_compressed(t: Trace, made: Tensor, ratio: int) -> Tensor:
    """All compressed tokens: those in the cache, and those just made."""
    before = t.setting.past // ratio
    batch, heads, count, channels = made.shape
    if not t.setting.cache:
        return made
    if before and not count:
        return Tensor((batch, heads, before, channels), made.format, None)
    if before:
        made = t.new("cat", (batch, heads, before + count, channels), made.format)
    t.hold_in_cache(made, before)
    return made


def overlapped(t: Trace, x: Tensor) -> Tensor:
    """Each group beside the one before it: half of the channels of either."""
    batch, count, ratio, width = x.shape
    shape = (batch, count, 2 * ratio, width // 2)
    parts = [ops.slice_last(t, x, width // 2)]
    if count > 1:
        parts.append(ops.slice_last(t, ops.narrow(t, x, 1, count - 1), width // 2))
    return ops.assemble(t, shape, parts)


def own_tables(t: Trace, x: Tensor, batch: int, tokens: int, channels: int) -> Rotation:
    """Cosines and sines that a layer makes itself, of compressed tokens or of all."""
    grad, t.grad = t.grad, False
    angles = t.new("mul", (batch, 1, tokens, channels // 2), FP32)
    made = rotary.cosines_and_sines(t, angles, x.format)
    t.grad = grad
    return made


def project(t: Trace, s: Sizes, e: Extra, x: Tensor) -> Tensor:
    """The output projection: groups of heads apart, then all together."""
    group, tokens = s.heads * s.head_dim // e.groups, t.batch * t.sequence
    x = ops.reshape(t, x, t.batch, t.sequence, e.groups, group)
    weight = t.weight("self_attn.o_a_proj.weight", (e.groups * e.output_rank, group), "o")
    by_group = ops.transpose(t, ops.reshape(t, weight, e.groups, e.output_rank, group), 1, 2)
    rows = ops.transpose(t, ops.reshape(t, x, tokens, e.groups, group), 0, 1)
    apart = ops.transpose(t, ops.matmul(t, rows, by_group), 0, 1)
    apart = ops.reshape(t, apart, t.batch, t.sequence, e.groups, e.output_rank)
    x = ops.reshape(t, apart, t.batch, t.sequence, e.groups * e.output_rank)
    del rows, apart
    return t.linear(x, "self_attn.o_b_proj", s.hidden, role="o")


# --- experts --------------------------------------------------------------------------------------


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor, hashed: bool) -> Tensor:
    """Routed experts and one that every token passes."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    routing = route(t, s, m, tokens, hashed)
    routed = mixture.run_experts(t, s, m, tokens, routing, gate=limited_halves)
    shared = shared_expert(t, s, m, x)
    return ops.add(t, routed.view(*x.shape), shared)


def route(t: Trace, s: Sizes, m: Mixture, tokens: Tensor, hashed: bool) -> mixture.Routing:
    """Roots of softplus, of the experts that a table says or the best corrected ones."""
    logits = mixture.router_logits(t, m, tokens, "mlp.gate", bias=False)
    scores = ops.unary(t, "sqrt", ops.unary(t, "softplus", logits, keeps="input"), keeps="output")
    if hashed:
        t.add_buffer(s.vocabulary * m.chosen * INT64.block_bytes)
        indices = t.new("index", (tokens.shape[0], m.chosen), INT64)
    else:
        indices = mixture.corrected_choice(t, m, scores)
    weights = ops.gather(t, scores, indices)
    weights = ops.divide(t, weights, ops.shift(t, ops.total(t, weights)))
    return mixture.Routing(ops.scale(t, weights), indices, logits)


def limited_halves(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """The first half within bounds gates the second."""
    half = x.shape[-1] // 2
    gate, up = ops.split(t, x, half, half)
    gate, up = ops.clamp(t, gate), ops.clamp(t, up, bounds=2)
    return ops.mul(t, s.activation(t, gate), up)


def shared_expert(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """The shared expert, its gate and values within bounds."""
    name = "mlp.shared_experts"
    gate = ops.clamp(t, t.linear(x, f"{name}.gate_proj", m.shared, role="shared_gate"))
    up = ops.clamp(t, t.linear(x, f"{name}.up_proj", m.shared, role="shared_up"), bounds=2)
    product = ops.mul(t, s.activation(t, gate), up)
    return t.linear(product, f"{name}.down_proj", s.hidden, role="shared_down")
