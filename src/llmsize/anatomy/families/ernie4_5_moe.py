"""ERNIE 4.5 with experts: a dense layer first, experts and a shared one in the others.

transformers v5.23, models/ernie4_5_moe/modeling_ernie4_5_moe.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder, mixture
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, tied=True)
    shared = c.count("moe_num_shared_experts", default=2)
    t.once_linear = True
    m = mixture.read(Config({"n_shared_experts": shared, **c.fields}, c.model))
    bias = c.flag("use_bias")

    def block(x: Tensor, sparse: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, x, around, bias=bias),
            lambda x: feed(t, s, m, x) if sparse == "sparse" else decoder.gated(t, s, x, bias=bias),
        )

    return decoder.run(t, s, block, layer_kinds(c, s.layers))


def layer_kinds(c: Config, layers: int) -> list[str]:
    """`dense` or `sparse` for every layer."""
    first = c.count("moe_layer_start_index", default=1)
    every = c.size("moe_layer_interval", default=1)
    last = c.value("moe_layer_end_index")
    last = layers - 1 if last in (None, -1) else c.count("moe_layer_end_index")
    return [
        "sparse" if (i + 1) % every == 0 and first <= i <= last else "dense" for i in range(layers)
    ]


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Experts, and the correction of their scores, which is stored with the weights."""
    t.weight("mlp.gate.moe_statics.e_score_correction_bias", (1, m.count), "router")
    return mixture.feed(t, s, m, x)
