"""StarCoder: GPT-2's block with one key and value head for all queries.

transformers v5.23, models/gpt_bigcode/modeling_gpt_bigcode.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Names, Sizes
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

NAMES = Names(embedding="transformer.wte", layers="transformer.h", norm="transformer.ln_f")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    heads = c.size("n_head", "num_attention_heads")
    kv_heads = 1 if c.flag("multi_query", default=True) else heads
    inner = c.size("n_inner", default=4 * c.size("n_embd", "hidden_size"))
    fields = {**c.fields, "num_key_value_heads": kv_heads, "n_inner": inner}
    s = decoder.read(Config(fields, c.model), tied=True, activation="gelu_pytorch_tanh", rotary=0.0)
    positions = c.size("n_positions", default=1024)
    dropout = c.number("resid_pdrop", default=0.1)

    def feed(x: Tensor) -> Tensor:
        x = decoder.plain(t, s, x, up="mlp.c_fc", down="mlp.c_proj", bias=True)
        return ops.dropout(t, x, dropout)

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: ops.dropout(t, attention(t, s, x, around), dropout),
            feed,
            norm=blocks.layer_norm,
            names=("ln_1", "ln_2"),
        )

    def begin(x: Tensor) -> Tensor:
        x = decoder.add_positions(t, x, "transformer.wpe", positions)
        return ops.dropout(t, x, c.number("embd_pdrop", default=0.1))

    return decoder.run(
        t, s, block, ["full"] * s.layers, norm=blocks.layer_norm, names=NAMES, begin=begin
    )


def attention(t: Trace, s: Sizes, x: Tensor, around: Around) -> Tensor:
    """Attention over one fused projection, which q, k and v are views of."""
    keys = s.kv_heads * s.head_dim
    fused = t.linear(x, "attn.c_attn", s.hidden + 2 * keys, bias=True, role="qkv")
    q, k, v = ops.split(t, fused, s.hidden, keys, keys)
    del fused
    q = ops.split_heads(t, q, s.heads)
    k, v = ops.split_heads(t, k, s.kv_heads), ops.split_heads(t, v, s.kv_heads)
    k, v = blocks.remember(t, k, v)
    out = blocks.attend(t, q, k, v, around.mask)
    return t.linear(out, "attn.c_proj", s.hidden, bias=True, role="o")
