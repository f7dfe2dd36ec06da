"""GPT-J and CodeGen: both halves side by side behind one norm, part of each head rotated.

transformers v5.23, models/gptj/modeling_gptj.py, models/codegen/modeling_codegen.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, INT64, Format

EMBEDDING = "transformer.wte"

CODEGEN_GROUPS = 4
"""Groups of heads (once one for each device) that have their q, v and k side by side."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    hidden, heads = c.size("n_embd", "hidden_size"), c.few("n_head", "num_attention_heads")
    channels = max(hidden // heads, 1)
    inner = c.size("n_inner", default=4 * hidden)
    share = c.size("rotary_dim", default=channels) / channels
    s = decoder.read(c.changed(n_inner=inner), activation="gelu_new", rotary=share)
    grouped = c.text("model_type") == "codegen"
    if grouped and heads % CODEGEN_GROUPS:
        raise c.error(f"has {heads} heads, not a multiple of 4", "correct `n_head`")
    x = model(t, s, c, grouped)
    return lm_head.causal_lm(t, x, s.vocabulary, Head(EMBEDDING, bias=True), tied=s.tied)


def model(t: Trace, s: Sizes, c: Config, grouped: bool) -> Tensor:
    """Embeddings, blocks, final norm."""
    longest = c.size("n_positions", "max_position_embeddings", default=2048)
    dropout = c.number("resid_pdrop")
    t.buffers += s.layers * longest * s.rotary * FP32.block_bytes  # sines and cosines
    embeddings = blocks.embed(t, EMBEDDING, s.vocabulary, s.hidden)
    position_ids = blocks.positions(t)
    mask = blocks.mask(t, masking="eager")
    assert mask is not None
    returned: list[Tensor] = []

    def block(x: Tensor, kind: str) -> Tensor:
        residual = x
        x = blocks.layer_norm(t, x, "ln_1")
        attended, weights = attention(t, s, x, mask, longest, grouped)
        attended = ops.dropout(t, attended, dropout)
        fed = decoder.plain(t, s, x, up="mlp.fc_in", down="mlp.fc_out", bias=True)
        fed = ops.dropout(t, fed, dropout)
        x = ops.add(t, ops.add(t, attended, fed), residual)
        blocks.hand_back(t, returned, weights)
        return x

    x = t.layers(
        "transformer.h",
        block,
        ops.dropout(t, embeddings, c.number("embd_pdrop")),
        ["full"] * s.layers,
        position_ids,
        mask,
    )
    x = blocks.layer_norm(t, x, "transformer.ln_f")
    returned.clear()
    return x


def attention(
    t: Trace, s: Sizes, x: Tensor, mask: Tensor, longest: int, grouped: bool
) -> tuple[Tensor, Tensor]:
    """Attention, and its weights beside; sines and cosines are picked in every layer."""
    if grouped:
        q, k, v, *alive = codegen_projections(t, s, x)
        waves = t.new("index", (1, t.sequence, s.rotary), FP32)
    else:
        q, k, v = gptj_projections(t, s, x)
        waves, *alive = picked_waves(t, s, longest, k.format)
    rest = s.head_dim - s.rotary
    k_turned, k_rest = ops.slice_last(t, k, s.rotary), ops.slice_last(t, k, rest)
    q_turned, q_rest = ops.slice_last(t, q, s.rotary), ops.slice_last(t, q, rest)
    k_turned, q_turned = turned(t, k_turned, waves), turned(t, q_turned, waves)
    k, q = ops.cat(t, (k_turned, k_rest)), ops.cat(t, (q_turned, q_rest))
    k, q = ops.transpose(t, k, 1, 2), ops.transpose(t, q, 1, 2)
    k, v = blocks.remember(t, ops.to(t, k, v.format) if t.setting.cache else k, v)
    out, weights = weighted(t, s, q, k, v, mask, scaled_first=not grouped)
    out = ops.merge_heads(t, out)
    out = t.linear(out, "attn.out_proj", s.hidden, role="o")
    del alive
    return out, weights


def gptj_projections(t: Trace, s: Sizes, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k by tokens, v by heads."""
    q, k, v = (t.linear(x, f"attn.{p}_proj", s.hidden, role=p) for p in ("q", "k", "v"))
    by_head = (*x.shape[:2], s.heads, s.head_dim)
    q, k = ops.reshape(t, q, *by_head), ops.reshape(t, k, *by_head)
    return q, k, ops.split_heads(t, v, s.heads)


def picked_waves(t: Trace, s: Sizes, longest: int, format: Format) -> tuple[Tensor, ...]:
    """Sines and cosines side by side, and what picking them from those of all places leaves."""
    table = t.new("repeat", (1, longest, s.rotary), FP32)
    places = t.new("repeat", (1, t.sequence, s.rotary), INT64)
    return ops.to(t, t.new("gather", places.shape, FP32), format), table, places


def codegen_projections(t: Trace, s: Sizes, x: Tensor) -> tuple[Tensor, ...]:
    """q and k by tokens, v by heads, and the one projection that they are parts of."""
    fused = t.linear(x, "attn.qkv_proj", 3 * s.hidden, role="qkv")
    part = s.hidden // CODEGEN_GROUPS
    grouped = ops.reshape(t, fused, *x.shape[:2], CODEGEN_GROUPS, 3 * part)
    q, v, k = ops.split(t, grouped, part, part, part)
    by_head = (*x.shape[:2], s.heads, s.head_dim)
    q, k, v = (ops.reshape(t, projected, *by_head) for projected in (q, k, v))
    return q, k, ops.transpose(t, v, 1, 2), fused


def turned(t: Trace, x: Tensor, waves: Tensor) -> Tensor:
    """Neighbouring channels rotated: every sine and cosine is there twice."""
    shape = (1, t.sequence, 1, x.shape[-1])
    sines = t.new("repeat_interleave", shape, waves.format)
    cosines = t.new("repeat_interleave", shape, waves.format)
    return ops.add(t, ops.mul(t, x, cosines), ops.mul(t, rotate_every_two(t, x), sines))


def rotate_every_two(t: Trace, x: Tensor) -> Tensor:
    """Each second channel, negated, before its neighbour."""
    half = x.shape[-1] // 2
    even, odd = ops.slice_last(t, x, half), ops.slice_last(t, x, half)
    return ops.cat(t, (ops.neg(t, odd), even))


def weighted(
    t: Trace, s: Sizes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaled_first: bool
) -> tuple[Tensor, Tensor]:
    """The values by the weights of q and k, which are made in fp32."""
    q, k = ops.to(t, q, FP32), ops.to(t, k, FP32)
    weights = ops.matmul(t, q, ops.transpose(t, k, -1, -2))
    if scaled_first:
        weights = ops.scale(t, weights)
        weights = ops.add(t, weights, mask)
    else:
        weights = ops.add(t, weights, mask)
        weights = ops.scale(t, weights)
    weights = ops.softmax(t, weights)
    weights = ops.to(t, weights, v.format)
    weights = ops.dropout(t, weights, s.attention_dropout)
    return ops.matmul(t, weights, v), weights
