"""StarCoder: GPT-2's block with one key and value head for all queries.

transformers v5.23, models/gpt_bigcode/modeling_gpt_bigcode.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace

EMBEDDING = "transformer.wte"


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    heads = c.size("n_head", "num_attention_heads")
    kv_heads = 1 if c.flag("multi_query", default=True) else heads
    inner = c.size("n_inner", default=4 * c.size("n_embd", "hidden_size"))
    changed = c.changed(num_key_value_heads=kv_heads, n_inner=inner)
    s = decoder.read(
        changed, tied=True, activation="gelu_pytorch_tanh", rotary=0.0,
        attention_dropout=0.1,
    )  # fmt: skip
    x = model(t, s, c)
    return lm_head.causal_lm(t, x, s.vocabulary, Head(EMBEDDING, casts=False), tied=s.tied)


def model(t: Trace, s: Sizes, c: Config) -> Tensor:
    """Token and position embeddings, blocks, final norm."""
    longest = Dim(c.size("n_positions", default=1024), "positions")
    dropout = c.number("resid_pdrop", default=0.1)
    t.buffers += longest * longest  # what each token may see, as yes and no
    embeddings = blocks.embed(t, EMBEDDING, s.vocabulary, s.hidden)
    position_ids = blocks.positions(t)
    mask = blocks.mask(t)
    table = t.weight("transformer.wpe.weight", (longest, s.hidden), "position")
    places = ops.embedding(t, table, 1, t.sequence, indices=position_ids)

    def feed(x: Tensor) -> Tensor:
        x = decoder.plain(t, s, x, up="mlp.c_fc", down="mlp.c_proj", bias=True)
        return ops.dropout(t, x, dropout)

    def block(x: Tensor, kind: str) -> Tensor:
        residual = x
        x = blocks.layer_norm(t, x, "ln_1")
        attended = attention(t, s, x, mask, dropout)
        x = ops.add(t, attended, residual)
        residual = x
        x = blocks.layer_norm(t, x, "ln_2")
        fed = feed(x)
        return ops.add(t, residual, fed)

    x = t.layers(
        "transformer.h",
        block,
        ops.dropout(t, ops.add(t, embeddings, places), c.number("embd_pdrop", default=0.1)),
        ["full"] * s.layers,
        mask,
    )
    return blocks.layer_norm(t, x, "transformer.ln_f")


def attention(t: Trace, s: Sizes, x: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Attention over one fused projection, which q, k and v are views of."""
    q, k, v = projections(t, s, x)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, mask, dropout=s.attention_dropout)
    out = t.linear(out, "attn.c_proj", s.hidden, bias=True, role="o")
    return ops.dropout(t, out, dropout)


def projections(t: Trace, s: Sizes, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v by heads: all heads' q before the only k and v, or each head's side by side."""
    width = (s.heads + 2 * s.kv_heads) * s.head_dim
    fused = t.linear(x, "attn.c_attn", width, bias=True, role="qkv")
    if s.kv_heads == s.heads:
        q, k, v = ops.split(t, ops.split_heads(t, fused, s.heads), *[s.head_dim] * 3)
        return q, k, v
    keys = s.kv_heads * s.head_dim
    q, k, v = ops.split(t, fused, s.hidden, keys, keys)
    q = ops.split_heads(t, q, s.heads)
    return q, ops.split_heads(t, k, s.kv_heads), ops.split_heads(t, v, s.kv_heads)
