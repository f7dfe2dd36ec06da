"""BLOOM: ALiBi for positions, a norm behind the embedding, q, k and v in one projection.

transformers v5.23, models/bloom/modeling_bloom.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Names, Sizes
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

NAMES = Names("transformer.word_embeddings", "transformer.h", "transformer.ln_f")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    fields = {"hidden_size": c.value("n_embed", "hidden_size"), **c.fields}
    fields["intermediate_size"] = 4 * c.size("hidden_size", "n_embed")
    s = decoder.read(Config(fields, c.model), tied=True, activation="gelu_new", rotary=0.0)
    dropout = c.number("hidden_dropout")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        normed = blocks.layer_norm(t, x, "input_layernorm")
        attended = ops.dropout(t, attention(t, s, normed, around), dropout)
        attended = ops.add(t, x, attended)
        normed = blocks.layer_norm(t, attended, "post_attention_layernorm")
        fed = decoder.plain(
            t, s, normed, up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", bias=True
        )
        return ops.add(t, attended, ops.dropout(t, fed, dropout))

    return decoder.run(
        t, s, block, ["full"] * s.layers, norm=blocks.layer_norm, names=NAMES, masking="eager",
        begin=lambda x: blocks.layer_norm(t, x, "transformer.word_embeddings_layernorm"),
    )  # fmt: skip


def attention(t: Trace, s: Sizes, x: Tensor, around: Around) -> Tensor:
    """Attention over one fused projection, which q, k and v are slices of."""
    fused = t.linear(x, "self_attention.query_key_value", 3 * s.hidden, bias=True, role="qkv")
    q, k, v = (ops.split_heads(t, ops.slice_last(t, fused, s.hidden), s.heads) for _ in range(3))
    out = decoder.attend_eager(t, q, k, v, around.mask)
    return t.linear(out, "self_attention.dense", s.hidden, bias=True, role="o")
