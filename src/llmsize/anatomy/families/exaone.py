"""EXAONE 3 and 3.5: Llama's block under GPT-2's names.

LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct, modeling_exaone.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Names
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

NAMES = Names(embedding="transformer.wte", layers="transformer.h", norm="transformer.ln_f")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    h = Heads(name="attn.attention", output="out_proj")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around),
            lambda x: decoder.gated(t, s, x, names=("c_fc_0", "c_fc_1", "c_proj")),
            names=("ln_1", "ln_2"),
        )

    return decoder.run(t, s, block, ["full"] * s.layers, Frame(names=NAMES))
