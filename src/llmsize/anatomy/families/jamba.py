"""Jamba: Mamba layers with an attention layer among every eight, experts in every other layer.

transformers v5.23, models/jamba/modeling_jamba.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mamba, mixture
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Names
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace

NAMES = Names(norm="model.final_layernorm")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, rotary=0.0)
    m = mixture.read(c, normed=False, width="intermediate_size", balanced=True)
    mixer = read_mamba(c, s.hidden)

    def block(x: Tensor, kind: tuple[bool, bool], around: Around) -> Tensor:
        attends, sparse = kind
        return decoder.pre_norm(
            t,
            x,
            lambda x: (
                decoder.attention(t, s, Heads(), x, around)
                if attends
                else mamba.mixer(t, mixer, x, "mamba")
            ),
            lambda x: (
                mixture.feed(
                    t, s, m, x, router="feed_forward.router", experts="feed_forward.experts"
                )
                if sparse
                else decoder.gated(t, s, x, name="feed_forward")
            ),
            names=("input_layernorm", "pre_ff_layernorm"),
        )

    period = (c.size("attn_layer_period", default=8), c.count("attn_layer_offset", default=4))
    spread = (c.size("expert_layer_period", default=2), c.count("expert_layer_offset", default=1))
    kinds = [
        (i % period[0] == period[1], m.count > 1 and i % spread[0] == spread[1])
        for i in range(s.layers)
    ]
    return decoder.run(t, s, block, kinds, Frame(names=NAMES))


def read_mamba(c: Config, hidden: int) -> mamba.Mamba:
    """The mixer from a `config.json`."""
    rank = c.value("mamba_dt_rank")
    return mamba.Mamba(
        hidden=hidden,
        inner=Dim(c.size("mamba_expand", default=2) * hidden, "inner"),
        state=Dim(c.size("mamba_d_state", default=16), "state"),
        rank=Dim(-(-hidden // 16) if rank in (None, "auto") else c.size("mamba_dt_rank"), "rank"),
        kernel=c.size("mamba_d_conv", default=4),
        bias=c.flag("mamba_proj_bias"),
        conv_bias=c.flag("mamba_conv_bias", default=True),
        norm=blocks.rms_norm,
        fused_in_training=False,
    )
