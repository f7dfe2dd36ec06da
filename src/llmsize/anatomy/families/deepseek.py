"""DeepSeek: latent attention (V2, V3, R1, Kimi K2, GLM-4.7-Flash, A.X-K1), DeepSeekMoE's experts.

transformers v5.23, models/deepseek_v2, deepseek_v3, deepseek_v32 (and the types that build on
them); deepseek-ai/deepseek-moe-16b-base, modeling_deepseek.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from llmsize.anatomy import blocks, decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.rotary import Rotation, Turn
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32, INT32, INT64
from llmsize.quick_dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Latent:
    """The dimensions of latent attention."""

    q_rank: int
    """Channels that queries pass through; 0 if they are projected at once."""
    kv_rank: int
    """Channels of the latent that keys and values are made of."""
    rotary: int
    """Rotated channels of each query, and of the one key that all heads share."""
    plain: int
    """Channels of each query and key that are not rotated."""
    value: int
    """Channels of each head's value."""
    bias: bool
    turn: Turn
    """Rotary embedding of q and k."""
    tempered: bool
    """Whether queries grow with their position."""

    @property
    def query(self) -> int:
        """Channels of each head's query and key."""
        return self.plain + self.rotary


@dataclass(frozen=True, slots=True)
class Indexer:
    """What picks the tokens that attention looks at (DeepSeek V3.2)."""

    heads: int
    head_dim: int
    chosen: int = 0
    """Tokens that attention looks at."""
    turn: Turn = rotary.turn
    """Rotary embedding of its q and k."""
    shared: bool = False
    """Whether layers without one use the last choice."""
    scales_weights: bool = False
    """Whether heads' weights are scaled once more, not scores (Hunyuan 4)."""


@dataclass(frozen=True, slots=True)
class Type:
    """What one `model_type` does differently from DeepSeek V3."""

    first_sparse: int = 0
    """The first layer with experts, where the configuration does not say."""
    tied: bool = False
    correction: mixture.Correction = "alike"
    """Of the scores of experts before they are chosen."""
    normed_experts: bool = False
    """Whether a norm is behind the experts."""
    once_linear: bool = False
    """Whether adapters take the routed experts for the linear layers that they were."""
    scores: Literal["corrected", "softmax", "fp32 softmax", "native softmax"] = "corrected"
    """How experts are chosen: by scores that are corrected before, or by a softmax."""
    complex_turn: bool = False
    """Whether pairs of channels are rotated as complex numbers."""
    tempered: bool = False
    """Whether queries grow with their position."""
    shared_indexer: bool = False
    """Whether layers without an indexer use an earlier one's choice."""


TYPES = {
    "deepseek": Type(scores="softmax"),
    "deepseek_v2": Type(once_linear=True, scores="fp32 softmax", complex_turn=True),
    "deepseek_ocr2_text": Type(once_linear=True, scores="fp32 softmax"),
    "deepseek_v3": Type(first_sparse=3, once_linear=True),
    "deepseek_v32": Type(first_sparse=3, correction="fp32", once_linear=True),
    "kimi_k2": Type(),
    "kimi_k25": Type(),
    "glm_moe_dsa": Type(first_sparse=3, correction="fp32", once_linear=True, shared_indexer=True),
    "glm4_moe_lite": Type(first_sparse=1, correction="fp32", once_linear=True),
    "axk1": Type(first_sparse=1, normed_experts=True),
    "youtu": Type(tied=True),
    "mistral4": Type(scores="native softmax", tempered=True),
}


def read_latent(c: Config, family: Type = TYPES["deepseek_v3"]) -> Latent:
    """Latent attention from a `config.json`."""
    turn: Turn = rotary.turn_pairs if c.flag("rope_interleave", default=True) else rotary.turn
    if family.complex_turn:
        turn = rotary.turn_complex
    return Latent(
        q_rank=Dim(c.count("q_lora_rank"), "q_rank"),
        kv_rank=Dim(c.size("kv_lora_rank"), "kv_rank"),
        rotary=Dim(c.size("qk_rope_head_dim"), "rotary"),
        plain=Dim(c.size("qk_nope_head_dim"), "plain"),
        value=Dim(c.size("v_head_dim"), "value_dim"),
        bias=c.flag("attention_bias"),
        turn=turn,
        tempered=family.tempered,
    )


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    family = TYPES[c.text("model_type")]
    t.once_linear = family.once_linear
    latent = read_latent(c, family) if c.value("kv_lora_rank") is not None else None
    s = decoder.read(c.changed(head_dim=latent.rotary) if latent else c, tied=family.tied)
    m = read_mixture(c, family) if c.value("n_routed_experts") is not None else None
    indexer = read_indexer(c, family)
    h = Heads(bias=c.flag("attention_bias"))
    mlp_bias = family.scores == "fp32 softmax" and c.flag("mlp_bias")  # other versions have none

    def block(x: Tensor, kind: tuple[bool, bool], around: Around) -> Tensor:
        sparse, indexed = kind
        return decoder.pre_norm(
            t,
            x,
            lambda x: (
                latent_attention(t, s, latent, x, around, indexer, indexed)
                if latent
                else decoder.attention(t, s, h, x, around)
            ),
            lambda x: feed(t, s, m if sparse else None, x, family.normed_experts, mlp_bias),
        )

    sparse = mixture.sparse_layers(c, s.layers, family.first_sparse)
    kinds = list(zip(sparse, indexed_layers(c, s.layers), strict=True))
    rope = rotary.Rope(rotary.complex_table if family.complex_turn else rotary.table)
    masking: blocks.Masking = "always" if indexer else "as needed"
    frame = Frame(rope=rope, masking=masking, carrying=indexer is not None and indexer.shared)
    return decoder.run(t, s, block, kinds, frame)


def read_mixture(c: Config, family: Type) -> Mixture:
    """DeepSeekMoE's experts; until V3 the scores were a softmax, in V2 in fp32.

    The weights of V2's experts never sum to one, whatever the configuration says.
    """
    if family.scores == "corrected":
        return mixture.read_corrected(c, correction=family.correction)
    if family.scores == "native softmax":
        return mixture.read(c, scores="native softmax", correction="groups", scaled=True)
    precise = family.scores == "fp32 softmax"
    return mixture.read(
        c.changed(norm_topk_prob=False) if precise else c, precise=precise, wide=True,
        normed=False, scaled=True, grouped=c.text("topk_method") == "group_limited_greedy",
    )  # fmt: skip


def feed(t: Trace, s: Sizes, m: Mixture | None, x: Tensor, normed: bool, bias: bool) -> Tensor:
    """A dense MLP or experts, in A.X-K1 with a norm behind them."""
    if m is None:
        return decoder.gated(t, s, x, bias=bias)
    x = mixture.feed(t, s, m, x, bias=bias)
    return blocks.rms_norm(t, x, "mlp.post_mlp_layernorm") if normed else x


def read_indexer(c: Config, family: Type) -> Indexer | None:
    """The indexer, if the configuration has one."""
    if c.value("index_n_heads") is None:
        return None
    return Indexer(
        heads=Dim(c.size("index_n_heads"), "index_heads"),
        head_dim=Dim(c.size("index_head_dim"), "index_head_dim"),
        chosen=c.size("index_topk", default=2048),
        turn=rotary.turn_pairs if family.shared_indexer else rotary.turn,
        shared=family.shared_indexer,
    )


def indexed_layers(c: Config, layers: int) -> list[bool]:
    """Which layers have an indexer of their own; the others use an earlier layer's choice."""
    kinds = c.each_layer(layers, "indexer_types")
    if kinds is None:
        every = c.size("index_topk_freq", default=1)
        first = c.count("index_skip_topk_offset", default=2)
        return [max(i - first + 1, 0) % every == 0 for i in range(layers)]
    return [kind == "full" for kind in kinds]


def latent_attention(
    t: Trace,
    s: Sizes,
    d: Latent,
    x: Tensor,
    around: Around,
    indexer: Indexer | None = None,
    indexed: bool = False,
) -> Tensor:
    """Multi-head latent attention: what is cached is the latent and one rotated key.

    Where there is an `indexer` it looks at some tokens only, which a layer picks if it is
    `indexed`.
    """
    q, compressed = queries(t, s, d, x)
    compressed = x if indexer is None else compressed
    heads = expanded(t, s, d, x, q, around.rotation)
    mask = around.mask
    if indexer is not None and mask is not None:
        chosen = choice(t, indexer, x, compressed, around, indexed)
        left_out = outside(t, chosen, heads.k.shape[2])
        mask = without(t, mask, left_out)
    out = blocks.attend(t, heads.q, heads.k, heads.v, mask, dropout=s.attention_dropout)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=d.bias, role="o")


def queries(t: Trace, s: Sizes, d: Latent, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each head's queries, and what they are made of: `x`, or a latent of it."""
    if not d.q_rank:
        q = t.linear(x, "self_attn.q_proj", s.heads * d.query, role="q")
        return ops.split_heads(t, q, s.heads), x
    compressed = blocks.rms_norm(
        t,
        t.linear(x, "self_attn.q_a_proj", d.q_rank, bias=d.bias, role="q_a"),
        "self_attn.q_a_layernorm",
    )
    q = t.linear(compressed, "self_attn.q_b_proj", s.heads * d.query, role="q_b")
    return ops.split_heads(t, q, s.heads), compressed


class Expanded(NamedTuple):
    """Each head's query, key and value."""

    q: Tensor
    k: Tensor
    v: Tensor
    made_of: tuple[Tensor, ...]
    """What they are made of, which attention holds to its end."""


def expanded(
    t: Trace, s: Sizes, d: Latent, x: Tensor, q: Tensor, rotation: Rotation | None
) -> Expanded:
    """Queries `q` by heads with their part rotated, keys and values from the latent of `x`.

    What is cached is the latent and one rotated key.
    """
    q_plain, q_turned = ops.split(t, q, d.plain, d.rotary)
    latent = t.linear(
        x, "self_attn.kv_a_proj_with_mqa", d.kv_rank + d.rotary, bias=d.bias, role="kv_a"
    )
    kv, k_turned = ops.split(t, latent, d.kv_rank, d.rotary)
    kv = blocks.rms_norm(t, kv, "self_attn.kv_a_layernorm")
    k_turned = ops.split_heads(t, k_turned, 1)
    assert rotation is not None
    q_turned, k_turned = d.turn(t, q_turned, k_turned, rotation)
    kv = kv.view(t.batch, 1, t.sequence, d.kv_rank)
    kv, k_turned = blocks.store(t, kv, k_turned)
    whole = s.heads * (d.query + d.value)
    t.remember(LayerCache("latent", 1, d.kv_rank + d.rotary, expanded=whole))
    q_whole = ops.cat(t, (q_plain, q_turned))
    q_whole = rotary.tempered(t, q_whole) if d.tempered else q_whole
    k, v = expand(t, s, d, kv, k_turned)
    return Expanded(q_whole, k, v, (q_plain, q_turned, latent, kv, k_turned))


def expand(t: Trace, s: Sizes, d: Latent, kv: Tensor, k_turned: Tensor) -> tuple[Tensor, Tensor]:
    """Each head's key and value made of the latent, and of the key that all heads share."""
    kv = t.linear(kv, "self_attn.kv_b_proj", s.heads * (d.plain + d.value), role="kv_b")
    kv = ops.split_heads(t, ops.reshape(t, kv, t.batch, kv.shape[2], kv.shape[3]), s.heads)
    k_plain, v = ops.split(t, kv, d.plain, d.value)
    k_turned = ops.repeat(t, k_turned, s.heads)
    shape = (*k_plain.shape[:-1], d.query)
    return ops.assemble(t, shape, (k_plain, k_turned)), v


def choice(
    t: Trace, i: Indexer, x: Tensor, compressed: Tensor, around: Around, indexed: bool
) -> Tensor:
    """The tokens that a layer looks at: as it picks them if it is `indexed`, or an earlier one."""
    chosen = around.carried.pop() if around.carried else None
    if indexed or chosen is None:
        assert around.rotation is not None and around.mask is not None
        chosen = index(t, i, x, compressed, around.rotation, around.mask)
    if i.shared:
        around.carried.append(chosen)
    return chosen


def index(
    t: Trace, i: Indexer, x: Tensor, compressed: Tensor, rotation: Rotation, mask: Tensor
) -> Tensor:
    """The tokens with the best scores by a small attention, whose one key is cached.

    No gradient passes here.
    """
    grad, t.grad = t.grad, False
    try:
        scores = index_scores(t, i, x, compressed, rotation)
        if mask.format is BOOL:
            barred = t.new("bitwise_not", scores.shape, BOOL)
            scores = ops.masked_fill(t, scores, barred)
        else:
            scores = t.new("add", scores.shape, scores.format)
        best, indices = ops.topk(t, scores, min(i.chosen, scores.shape[-1]))
        del best
        return ops.to(t, indices, INT32)
    finally:
        t.grad = grad


def index_scores(t: Trace, i: Indexer, x: Tensor, compressed: Tensor, rotation: Rotation) -> Tensor:
    """How well each token suits each query: the heads' scores above zero, weighted and summed."""
    name, turned = "self_attn.indexer", rotation.cosines.shape[-1]
    q = t.linear(compressed, f"{name}.wq_b", i.heads * i.head_dim, role="indexer")
    q = q.view(t.batch, t.sequence, i.heads, i.head_dim)
    q_turned, q_plain = ops.split(t, q, turned, i.head_dim - turned)
    k = blocks.layer_norm(
        t, t.linear(x, f"{name}.wk", i.head_dim, role="indexer"), f"{name}.k_norm"
    ).view(t.batch, t.sequence, 1, i.head_dim)
    k_turned, k_plain = ops.split(t, k, turned, i.head_dim - turned)
    q_turned, k_turned = i.turn(t, q_turned, k_turned, rotary.by_token(rotation))
    q = ops.cat(t, (q_turned, q_plain))
    k = ops.cat(t, (k_turned, k_plain)).view(t.batch, 1, t.sequence, i.head_dim)
    t.remember(LayerCache("index", 1, i.head_dim))
    k = blocks.grown(t, k)
    keys = ops.transpose(t, k, -1, -2)
    scores = ops.matmul(t, ops.to(t, q, FP32), ops.to(t, keys, FP32))
    scores = scores if i.scales_weights else ops.scale(t, scores)
    scores = ops.relu(t, scores)
    weights = t.linear(x, f"{name}.weights_proj", i.heads, role="indexer", kept=True)
    weights = ops.scale(t, ops.to(t, weights, FP32))
    weights = ops.scale(t, weights) if i.scales_weights else weights
    weights = weights.view(t.batch, t.sequence, 1, i.heads)
    return ops.matmul(t, weights, scores).view(t.batch, t.sequence, scores.shape[-1])


def outside(t: Trace, chosen: Tensor, tokens: int) -> Tensor:
    """A mark on every token but the `chosen` ones."""
    shape = (*chosen.shape[:-1], tokens)
    ones = t.new("ones", shape, BOOL)
    indices = t.new("to", chosen.shape, INT64)
    marks = t.new("scatter", shape, BOOL)
    del ones, indices
    return marks


def without(t: Trace, mask: Tensor, left_out: Tensor) -> Tensor:
    """The mask without the tokens that are left out."""
    batch, queries, tokens = left_out.shape
    shape = (batch, 1, queries, tokens)
    if mask.format is not BOOL:
        return t.new("masked_fill", shape, mask.format)
    allowed = t.new("bitwise_not", shape, BOOL)
    both = t.new("bitwise_and", shape, BOOL)
    del allowed
    return both
