"""Llama 3.2 Vision's language model: layers that look at the picture among Llama's.

Without a picture these are left out, as in the reference, though their weights are there.

transformers v5.23, models/mllama/modeling_mllama.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace

ADDED_TOKENS = 8
"""Rows of the embedding for tokens that are never predicted, such as that of a picture."""

LOOKING = (3, 8, 13, 18, 23, 28, 33, 38)
"""Layers that look at the picture where the configuration does not say."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    dropout = c.number("dropout")
    s = s._replace(attention_dropout=dropout)
    looking = c.sequence("cross_attention_layers") or LOOKING

    def block(x: Tensor, looks: str, around: Around) -> Tensor:
        if looks:
            name_looking_weights(t, s)
            return x
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, Heads(), x, around),
            lambda x: decoder.gated(t, s, x),
        )

    kinds = ["looks" if i in looking else "" for i in range(s.layers)]
    return decoder.run(t, s, block, kinds, Frame(rows=Dim(s.vocabulary + ADDED_TOKENS, "rows")))


def name_looking_weights(t: Trace, s: Sizes) -> None:
    """The weights of a layer that looks at the picture."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    t.weight("input_layernorm.weight", (s.hidden,), "norm")
    t.weight("cross_attn.q_proj.weight", (queries, s.hidden), "q")
    t.weight("cross_attn.k_proj.weight", (keys, s.hidden), "k")
    t.weight("cross_attn.v_proj.weight", (keys, s.hidden), "v")
    t.weight("cross_attn.o_proj.weight", (s.hidden, queries), "o")
    for letter in "qk":
        t.weight(f"cross_attn.{letter}_norm.weight", (s.head_dim,), "norm")
    t.weight("post_attention_layernorm.weight", (s.hidden,), "norm")
    t.weight("mlp.gate_proj.weight", (s.intermediate, s.hidden), "gate")
    t.weight("mlp.up_proj.weight", (s.intermediate, s.hidden), "up")
    t.weight("mlp.down_proj.weight", (s.hidden, s.intermediate), "down")
    for part in ("attn", "mlp"):
        t.weight(f"cross_attn_{part}_gate", (1,), "gate_attention")
