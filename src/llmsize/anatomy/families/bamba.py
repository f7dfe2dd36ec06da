"""Bamba: Mamba-2 layers with a few attention layers among them, an MLP in each.

transformers v5.23, models/bamba/modeling_bamba.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mamba2
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Names
from llmsize.anatomy.families.granite_hybrid import read_mamba2
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

NAMES = Names(norm="model.final_layernorm")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, rotary=0.5)
    mixer = read_mamba2(c, s.hidden)
    bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")
    returned: list[Tensor] = []
    h = Heads(bias=bias)

    def block(x: Tensor, kind: tuple[str, str], around: Around) -> Tensor:
        x = decoder.pre_norm(
            t,
            x,
            lambda x: (
                decoder.attention(t, s, h, x, around)
                if kind[0] == "attention"
                else mamba2.mixer(t, mixer, x, "mamba")
            ),
            lambda x: decoder.gated(t, s, x, name="feed_forward", bias=mlp_bias),
            names=("input_layernorm", "pre_ff_layernorm"),
        )
        blocks.hand_back(t, returned, t.attention_weights)
        return x

    def end(t: Trace, x: Tensor, name: str) -> Tensor:
        x = blocks.rms_norm(t, x, name)
        returned.clear()  # the model held what its last layer returned
        return x

    listed = c.sequence("attn_layer_indices") or ()
    kinds = ["attention" if i in listed else "mamba" for i in range(s.layers)]
    after = zip(kinds, ("", *kinds), strict=False)  # each lets go of what the one before returned
    return decoder.run(t, s, block, list(after), Frame(names=NAMES, norm=end))
