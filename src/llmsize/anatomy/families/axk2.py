"""A.X K2: DeepSeek V3.2's attention behind gates of its own, norms with a gate of low rank.

transformers v5.23, models/axk2/modeling_axk2.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Sizes
from llmsize.anatomy.families import deepseek
from llmsize.anatomy.families.deepseek import Indexer, Latent
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    d = deepseek.read_latent(c)
    s = decoder.read(c.changed(head_dim=d.rotary))
    m = mixture.read_corrected(c, correction="fp32")
    indexer = Indexer(
        c.size("index_n_heads"), c.size("index_head_dim"), c.size("index_topk"), rotary.turn
    )
    rank = c.size("gated_norm_rank")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        residual = x
        x = gated_norm(t, x, "input_layernorm", rank)
        x = ops.add(t, residual, attention(t, s, d, indexer, x, around))
        residual = x
        if kind == "sparse":
            x = gated_norm(t, x, "post_attention_layernorm", rank)
            x = mixture.feed(t, s, m, x)
        else:
            x = blocks.rms_norm(t, x, "post_attention_layernorm")
            x = decoder.gated(t, s, x)
        return ops.add(t, residual, x)

    sparse = mixture.sparse_layers(c, s.layers, first_sparse=1)
    kinds = ["sparse" if experts else "dense" for experts in sparse]
    return decoder.run(t, s, block, kinds, Frame(masking="always"))


def gated_norm(t: Trace, x: Tensor, name: str, rank: int) -> Tensor:
    """RMSNorm, times a gate that two small layers make of what it gives."""
    normed = blocks.rms_norm(t, x, f"{name}.norm")
    gate = ops.silu(t, t.linear(normed, f"{name}.mlp.fc1", rank, role="gate_attention"))
    gate = t.linear(gate, f"{name}.mlp.fc2", x.shape[-1], role="gate_attention")
    gate = ops.sigmoid(t, ops.to(t, gate, FP32))
    return ops.to(t, ops.mul(t, normed, gate), normed.format)


def attention(t: Trace, s: Sizes, d: Latent, indexer: Indexer, x: Tensor, around: Around) -> Tensor:
    """Latent attention to the tokens that the indexer chooses, behind a gate for each channel."""
    compressed = t.linear(x, "self_attn.q_a_proj", d.q_rank, bias=d.bias, role="q_a")
    normed = blocks.rms_norm(t, compressed, "self_attn.q_a_layernorm")
    both = ops.cat(t, (normed, compressed))
    wide = t.linear(both, "self_attn.q_gate_proj", s.heads * (d.query + d.value), role="q_b")
    del both
    by_head = ops.reshape(t, wide, t.batch, t.sequence, s.heads, d.query + d.value)
    q, gate = ops.split(t, by_head, d.query, d.value)
    gate = ops.reshape(t, gate, t.batch, t.sequence, s.heads * d.value)
    heads = deepseek.expanded(t, s, d, x, ops.transpose(t, q, 1, 2), around.rotation)
    mask = around.mask
    assert mask is not None
    chosen = deepseek.choice(t, indexer, x, normed, around, indexed=True)
    left_out = deepseek.outside(t, chosen, heads.k.shape[2])
    mask = deepseek.without(t, mask, left_out)
    out = blocks.attend(t, heads.q, heads.k, heads.v, mask, dropout=s.attention_dropout)
    out = ops.to(t, ops.mul(t, out, ops.sigmoid(t, ops.to(t, gate, FP32))), out.format)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=d.bias, role="o")
