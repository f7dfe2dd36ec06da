"""MiniMax-M3: per-head Gemma norms, dense layers first, a shared expert; the text model.

transformers v5.23, models/minimax_m3_vl/modeling_minimax_m3_vl.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llmsize.anatomy import decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes, gemma_norm
from llmsize.anatomy.families.deepseek import Indexer
from llmsize.anatomy.families.gpt_oss import limited
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    dense = Dim(c.size("dense_intermediate_size", "intermediate_size"), "intermediate")
    s = decoder.read(c.changed(hidden_act="silu", rotary_dim=None))
    shared = {"shared_expert_intermediate_size": c.value("shared_intermediate_size")}
    m = mixture.read(
        c.changed(**shared), scores="sigmoid", wide=True, correction="alike", balanced=True
    )
    indexer, indexed = read_indexer(c, s.layers)

    def block(x: Tensor, kind: tuple[bool, bool], around: Around) -> Tensor:
        sparse, picks = kind
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, indexer if picks else None),
            lambda x: feed(t, s, m, x) if sparse else fused(t, s, x, "mlp", dense, ""),
            norm=gemma_norm,
        )

    sparse = mixture.sparse_layers(c, s.layers)
    kinds = list(zip(sparse, indexed, strict=True))
    return decoder.run(t, s, block, kinds, Frame(norm=gemma_norm))


def read_indexer(c: Config, layers: int) -> tuple[Indexer | None, list[bool]]:
    """What picks the blocks of tokens that attention looks at, and the layers that have one."""
    sparse = c.value("sparse_attention_config")
    if not isinstance(sparse, Mapping) or not sparse.get("use_sparse_attention"):
        return None, [False] * layers
    inner = Config(sparse, c.model)
    listed = inner.each_layer(layers, "sparse_attention_freq") or [1] * layers
    heads = Dim(inner.size("sparse_num_index_heads"), "index_heads")
    channels = Dim(inner.size("sparse_index_dim"), "index_head_dim")
    return Indexer(heads, channels), [bool(n) for n in listed]


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, indexer: Indexer | None) -> Tensor:
    """Grouped-query attention, to blocks of tokens that an indexer picks."""
    if indexer is not None:
        index(t, indexer, x)
    return decoder.attention(t, s, Heads(norm=gemma_norm), x, around)


def index(t: Trace, i: Indexer, x: Tensor) -> None:
    """Scores of all tokens by a small attention with one key for all heads, which is cached."""
    q = t.linear(x, "self_attn.indexer.q_proj", i.heads * i.head_dim, role="indexer")
    k = t.linear(x, "self_attn.indexer.k_proj", i.head_dim, role="indexer")
    q = gemma_norm(t, ops.split_heads(t, q, i.heads), "self_attn.indexer.q_norm")
    k = gemma_norm(t, k, "self_attn.indexer.k_norm")
    t.remember(LayerCache("index", 1, i.head_dim))
    del q, k


def fused(t: Trace, s: Sizes, x: Tensor, name: str, width: int, role: str) -> Tensor:
    """The gated MLP with gate and up in one projection."""
    both = t.linear(x, f"{name}.gate_up_proj", 2 * width, role=f"{role}gate_up")
    product = limited_halves(t, s, both)
    return t.linear(product, f"{name}.down_proj", s.hidden, role=f"{role}down")


def limited_halves(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """The first half within bounds gates the second."""
    half = x.shape[-1] // 2
    gate, up = ops.split(t, x, half, half)
    return limited(t, gate, up)


Alike = Callable[[Trace, Sizes, Tensor, str, int, str], Tensor]
"""A dense MLP, for its input by its name, its width and a prefix to its weights' roles."""


def feed(
    t: Trace,
    s: Sizes,
    m: Mixture,
    x: Tensor,
    alike: Alike = fused,
    gate: mixture.Gate = limited_halves,
) -> Tensor:
    """Routed experts, their sum scaled, and one that every token passes."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    shared = alike(t, s, tokens, "mlp.shared_experts", m.shared, "shared_")
    weights = mixture.route(t, m, tokens, "mlp.gate")
    routed = ops.scale(t, mixture.run_experts(t, s, m, tokens, weights, gate=gate))
    return ops.add(t, routed, shared).view(*x.shape)
