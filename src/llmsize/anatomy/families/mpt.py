"""MPT: ALiBi for positions, no biases, GELU.

transformers v5.23, models/mpt/modeling_mpt.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Names, Sizes, layer_norm_without_bias
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

NAMES = Names("transformer.wte", "transformer.blocks", "transformer.norm_f")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    inner = c.size("expansion_ratio", default=4) * c.size("d_model")
    fields = {**c.fields, "intermediate_size": inner}
    s = decoder.read(Config(fields, c.model), tied=True, activation="gelu", rotary=0.0)

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around),
            lambda x: decoder.plain(t, s, x, up="ffn.up_proj", down="ffn.down_proj"),
            norm=layer_norm_without_bias,
            names=("norm_1", "norm_2"),
        )

    return decoder.run(
        t, s, block, ["full"] * s.layers, norm=layer_norm_without_bias, names=NAMES, masking="eager"
    )


def attention(t: Trace, s: Sizes, x: Tensor, around: Around) -> Tensor:
    """Attention over one fused projection, which q, k and v are views of."""
    fused = t.linear(x, "attn.Wqkv", 3 * s.hidden, role="qkv")
    q, k, v = (ops.split_heads(t, p, s.heads) for p in ops.split(t, fused, *[s.hidden] * 3))
    del fused
    out = decoder.attend_eager(t, q, k, v, around.mask)
    return t.linear(out, "attn.out_proj", s.hidden, role="o")
