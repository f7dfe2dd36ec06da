"""Ling 3.0 (bailing_hybrid): Kimi's delta attention, gated latent attention in every sixth layer.

transformers v5.23, models/bailing_hybrid/modeling_bailing_hybrid.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes
from llmsize.anatomy.families import deepseek, kimi_linear
from llmsize.anatomy.families.deepseek import Latent
from llmsize.anatomy.kimi_delta import KimiDelta
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    d = deepseek.read_latent(c.changed(q_lora_rank=None, rope_interleave=True))
    s = decoder.read(c.changed(head_dim=d.rotary, tie_word_embeddings=False))  # it never is
    m = mixture.read_corrected(c.changed(norm_topk_prob=c.flag(*RENORMALIZED, default=True)))
    delta = KimiDelta(
        hidden=s.hidden,
        heads=s.heads,
        head_dim=Dim(c.size("linear_head_dim", "head_dim"), "linear_head_dim"),
        kernel=c.size("short_conv_kernel_size", default=4),
        whole_gates=True,
        bounded=c.flag("kda_safe_gate", default=True),
    )

    def attend(x: Tensor, around: Around) -> Tensor:
        return attention(t, s, d, x, around)

    sparse = mixture.sparse_layers(c, s.layers, first_sparse=2)
    kinds = list(zip(attention_layers(c, s.layers), sparse, strict=True))
    return decoder.run(t, s, kimi_linear.hybrid(t, s, m, delta, attend), kinds)


RENORMALIZED = ("norm_topk_prob", "moe_renormalize")
"""What configurations call whether the weights of the chosen experts sum to one."""


def attention_layers(c: Config, layers: int) -> list[bool]:
    """Which layers attend to all tokens: as listed, or the last one of every group."""
    listed = c.each_layer(layers, "layer_types")
    if listed is not None:
        return [kind == "full_attention" for kind in listed]
    group = c.size("layer_group_size", default=6)
    return [(layer + 1) % group == 0 for layer in range(layers)]


def attention(t: Trace, s: Sizes, d: Latent, x: Tensor, around: Around) -> Tensor:
    """Latent attention, each head's output behind a gate."""
    q = ops.split_heads(t, t.linear(x, "self_attn.q_proj", s.heads * d.query, role="q"), s.heads)
    heads = deepseek.expanded(t, s, d, x, q, around.rotation)
    out = blocks.attend(t, heads.q, heads.k, heads.v, around.mask, dropout=s.attention_dropout)
    gate = t.linear(x, "self_attn.g_proj", s.heads, role="gate_attention")
    gate = ops.to(t, ops.sigmoid(t, ops.to(t, gate, FP32)), x.format)
    by_head = ops.reshape(t, out, t.batch, t.sequence, s.heads, d.value)
    out = ops.mul(t, by_head, gate.view(t.batch, t.sequence, s.heads, 1))
    out = ops.reshape(t, out, t.batch, t.sequence, s.heads * d.value)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=d.bias, role="o")
