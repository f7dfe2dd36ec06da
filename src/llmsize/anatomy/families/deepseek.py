"""DeepSeek: latent attention (V2, V3, R1, Kimi K2, GLM-4.7-Flash, A.X-K1), DeepSeekMoE's experts.

transformers v5.23, models/deepseek_v2, deepseek_v3, deepseek_v32 (and the types that build on
them); deepseek-ai/deepseek-moe-16b-base, modeling_deepseek.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes, Turn
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace


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

    @property
    def query(self) -> int:
        """Channels of each head's query and key."""
        return self.plain + self.rotary


@dataclass(frozen=True, slots=True)
class Indexer:
    """What picks the tokens that attention looks at (DeepSeek V3.2)."""

    heads: int
    head_dim: int


def read_latent(c: Config, *, q_rank: int = 0) -> Latent:
    """Latent attention from a `config.json`."""
    turn: Turn = blocks.turn_pairs if c.flag("rope_interleave", default=True) else blocks.turn
    if c.text("model_type") == "deepseek_v2":
        turn = blocks.turn_complex
    return Latent(
        q_rank=Dim(c.count("q_lora_rank", default=q_rank), "q_rank"),
        kv_rank=Dim(c.size("kv_lora_rank"), "kv_rank"),
        rotary=Dim(c.size("qk_rope_head_dim"), "rotary"),
        plain=Dim(c.size("qk_nope_head_dim"), "plain"),
        value=Dim(c.size("v_head_dim"), "value_dim"),
        bias=c.flag("attention_bias"),
        turn=turn,
    )


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


TYPES = {
    "deepseek": Type(),
    "deepseek_v2": Type(),
    "deepseek_v3": Type(first_sparse=3),
    "deepseek_v32": Type(first_sparse=3, correction="fp32"),
    "kimi_k2": Type(),
    "kimi_k25": Type(),
    "glm_moe_dsa": Type(first_sparse=3, correction="fp32"),
    "glm4_moe_lite": Type(first_sparse=1, correction="fp32"),
    "axk1": Type(first_sparse=1, normed_experts=True),
    "youtu": Type(tied=True),
    "mistral4": Type(),
}


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    family = TYPES[c.text("model_type")]
    latent = read_latent(c) if c.value("kv_lora_rank") is not None else None
    fields = {**c.fields, "head_dim": latent.rotary if latent else c.value("head_dim")}
    s = decoder.read(Config(fields, c.model), tied=family.tied)
    m = read_mixture(c, family) if c.value("n_routed_experts") is not None else None
    indexer = read_indexer(c)

    def block(x: Tensor, kind: tuple[bool, bool], around: Around) -> Tensor:
        sparse, indexed = kind
        return decoder.pre_norm(
            t,
            x,
            lambda x: (
                latent_attention(t, s, latent, x, around, indexer if indexed else None)
                if latent
                else decoder.attention(t, s, x, around, bias=c.flag("attention_bias"))
            ),
            lambda x: feed(t, s, m if sparse else None, x, family.normed_experts),
        )

    sparse = mixture.sparse_layers(c, s.layers, family.first_sparse)
    kinds = list(zip(sparse, indexed_layers(c, s.layers), strict=True))
    rotary = blocks.complex_rotary if c.text("model_type") == "deepseek_v2" else blocks.rotary
    return decoder.run(t, s, block, kinds, rotary=rotary)


def read_mixture(c: Config, family: Type) -> Mixture:
    """DeepSeekMoE's experts; until V3 the scores were a softmax, in V2 in fp32."""
    name = c.text("model_type")
    if name == "mistral4":
        return mixture.read(c, scores="native softmax", correction="groups", scaled=True)
    if name in ("deepseek", "deepseek_v2"):
        return mixture.read(
            c, precise=name == "deepseek_v2", wide=True, normed=False, scaled=True,
            grouped=c.text("topk_method") == "group_limited_greedy",
        )  # fmt: skip
    return mixture.read_corrected(c, correction=family.correction)


def feed(t: Trace, s: Sizes, m: Mixture | None, x: Tensor, normed: bool) -> Tensor:
    """A dense MLP or experts, in A.X-K1 with a norm behind them."""
    if m is None:
        return decoder.gated(t, s, x)
    x = mixture.feed(t, s, m, x)
    return blocks.rms_norm(t, x, "mlp.post_mlp_layernorm") if normed else x


def read_indexer(c: Config) -> Indexer | None:
    """The indexer, if the configuration has one."""
    if c.value("index_n_heads") is None:
        return None
    return Indexer(
        heads=Dim(c.size("index_n_heads"), "index_heads"),
        head_dim=Dim(c.size("index_head_dim"), "index_head_dim"),
    )


def indexed_layers(c: Config, layers: int) -> list[bool]:
    """Which layers have an indexer of their own; the others use an earlier layer's choice."""
    kinds = c.sequence("indexer_types") or ["full"] * layers
    if len(kinds) < layers:
        raise c.error(f"has {len(kinds)} `indexer_types` for {layers} layers", "give one a layer")
    return [kinds[i] == "full" for i in range(layers)]


def latent_attention(
    t: Trace, s: Sizes, d: Latent, x: Tensor, around: Around, indexer: Indexer | None
) -> Tensor:
    """Multi-head latent attention: what is cached is the latent and one rotated key."""
    bias = d.bias
    if d.q_rank:
        q = t.linear(x, "self_attn.q_a_proj", d.q_rank, bias=bias, role="q_a")
        compressed = blocks.rms_norm(t, q, "self_attn.q_a_layernorm")
        q = t.linear(compressed, "self_attn.q_b_proj", s.heads * d.query, role="q_b")
    else:
        compressed = x
        q = t.linear(x, "self_attn.q_proj", s.heads * d.query, role="q")
    q = ops.split_heads(t, q, s.heads)
    q_plain, q_turned = ops.split(t, q, d.plain, d.rotary)
    latent = t.linear(
        x, "self_attn.kv_a_proj_with_mqa", d.kv_rank + d.rotary, bias=bias, role="kv_a"
    )
    kv, k_turned = ops.split(t, latent, d.kv_rank, d.rotary)
    kv = blocks.rms_norm(t, kv, "self_attn.kv_a_layernorm")
    k_turned = ops.split_heads(t, k_turned, 1)
    rotation = around.rotation
    assert rotation is not None
    q_turned, k_turned = d.turn(t, q_turned, k_turned, rotation)
    if indexer is not None:
        index(t, s, indexer, x, compressed)
    expanded = s.heads * (d.query + d.value)
    t.remember(LayerCache("latent", 1, d.kv_rank + d.rotary, expanded=expanded))
    q_whole = ops.cat(t, (q_plain, q_turned))
    k, v = expand(t, s, d, kv, k_turned)
    out = blocks.attend(t, q_whole, k, v, around.mask)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def expand(t: Trace, s: Sizes, d: Latent, kv: Tensor, k_turned: Tensor) -> tuple[Tensor, Tensor]:
    """Each head's key and value made of the latent, and of the key that all heads share."""
    kv = t.linear(kv, "self_attn.kv_b_proj", s.heads * (d.plain + d.value), role="kv_b")
    kv = ops.split_heads(t, kv, s.heads)
    k_plain, v = ops.split(t, kv, d.plain, d.value)
    k_turned = ops.repeat(t, k_turned, s.heads)
    shape = (*k_plain.shape[:-1], d.query)
    return ops.assemble(t, shape, (k_plain, k_turned)), v


def index(t: Trace, s: Sizes, i: Indexer, x: Tensor, compressed: Tensor) -> None:
    """Scores of all tokens by a small attention with one key for all heads, which is cached."""
    q = t.linear(compressed, "self_attn.indexer.wq_b", i.heads * i.head_dim, role="indexer")
    k = t.linear(x, "self_attn.indexer.wk", i.head_dim, role="indexer")
    k = blocks.layer_norm(t, k, "self_attn.indexer.k_norm")
    weights = t.linear(x, "self_attn.indexer.weights_proj", i.heads, role="indexer")
    t.remember(LayerCache("latent", 1, i.head_dim, expanded=i.head_dim))
    del q, k, weights
