"""Kimi Linear: delta attention with a decay for every channel, latent attention among it.

transformers v5.23, models/kimi_linear/modeling_kimi_linear.py.
"""

from __future__ import annotations

from collections.abc import Callable

from llmsize.anatomy import blocks, decoder, kimi_delta, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes
from llmsize.anatomy.families.deepseek import Latent, read_latent
from llmsize.anatomy.kimi_delta import KimiDelta
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.scan_operations import written
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    latent = read_latent(c)
    apart = c.changed(head_dim=latent.rotary, tie_word_embeddings=False)  # it never is
    s = decoder.read(apart, rotary=0.0)
    m = mixture.read_corrected(c)
    delta = KimiDelta(
        hidden=s.hidden,
        heads=Dim(c.size("linear_num_heads", default=s.heads), "linear_heads"),
        head_dim=Dim(c.size("linear_head_dim", default=128), "linear_head_dim"),
        kernel=c.size("linear_conv_kernel_dim", default=4),
    )

    def attend(x: Tensor, around: Around) -> Tensor:
        return latent_attention(t, s, latent, x, around)

    sparse = mixture.sparse_layers(c, s.layers, 1)
    kinds = list(zip(attention_layers(c, s.layers), sparse, strict=True))
    return decoder.run(t, s, hybrid(t, s, m, delta, attend), kinds)


Block = Callable[[Tensor, tuple[bool, bool], Around], Tensor]
"""Of a kind: whether it attends, and whether it has experts."""


def hybrid(
    t: Trace, s: Sizes, m: Mixture, delta: KimiDelta, attend: Callable[[Tensor, Around], Tensor]
) -> Block:
    """Llama's block around attention or delta attention, with experts or without."""

    def block(x: Tensor, kind: tuple[bool, bool], around: Around) -> Tensor:
        attends, sparse = kind
        return decoder.pre_norm(
            t,
            x,
            lambda x: (
                attend(x, around) if attends else kimi_delta.attention(t, delta, x, "self_attn")
            ),
            lambda x: mixture.feed(t, s, m, x) if sparse else decoder.gated(t, s, x),
        )

    return block


def attention_layers(c: Config, layers: int) -> list[bool]:
    """Which layers attend to all tokens: as listed."""
    return [kind == "full_attention" for kind in c.every_layer(layers, "layer_types")]


def latent_attention(t: Trace, s: Sizes, d: Latent, x: Tensor, around: Around) -> Tensor:
    """Latent attention in which nothing is rotated."""
    q = t.linear(x, "self_attn.q_proj", s.heads * d.query, role="q")
    q = ops.split_heads(t, q, s.heads)
    latent = t.linear(x, "self_attn.kv_a_proj_with_mqa", d.kv_rank + d.rotary, role="kv_a")
    kv, k_shared = ops.split(t, latent, d.kv_rank, d.rotary)
    kv = blocks.rms_norm(t, kv, "self_attn.kv_a_layernorm")
    cached = d.kv_rank + d.rotary
    t.remember(LayerCache("latent", 1, cached, expanded=cached))
    kv = kv.view(t.batch, 1, t.sequence, d.kv_rank)
    kv, k_shared = blocks.store(t, kv, k_shared.view(t.batch, 1, t.sequence, d.rotary))
    tokens = kv.shape[2]
    kv = kv.view(t.batch, tokens, d.kv_rank)
    kv = t.linear(kv, "self_attn.kv_b_proj", s.heads * (d.plain + d.value), role="kv_b")
    k_plain, v = ops.split(t, ops.split_heads(t, kv, s.heads), d.plain, d.value)
    k_shared = ops.expand(t, k_shared, t.batch, s.heads, tokens, d.rotary)
    k = t.new("new_empty", (t.batch, s.heads, tokens, d.query), q.format)
    k = written(t, written(t, k, k_plain), k_shared)
    out = blocks.attend(t, q, k, v, around.mask, dropout=s.attention_dropout)
    return t.linear(out, "self_attn.o_proj", s.hidden, role="o")
