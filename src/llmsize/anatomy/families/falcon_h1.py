"""Falcon-H1: attention and Mamba-2 side by side in every layer.

transformers v5.23, models/falcon_h1/modeling_falcon_h1.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder, recurrent
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Names, Sizes
from llmsize.anatomy.recurrent import Mamba2
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace

NAMES = Names(norm="model.final_layernorm")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    mixer = read_mamba2(c, s.hidden)
    bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: side_by_side(t, s, mixer, x, around, bias),
            lambda x: decoder.gated(t, s, x, name="feed_forward", bias=mlp_bias),
            names=("input_layernorm", "pre_ff_layernorm"),
        )

    return decoder.run(
        t, s, block, ["full"] * s.layers, names=NAMES, begin=lambda x: ops.scale(t, x)
    )


def side_by_side(
    t: Trace, s: Sizes, mixer: Mamba2, x: Tensor, around: Around, bias: bool
) -> Tensor:
    """Both read the same input; their outputs are scaled and added."""
    mixed = ops.scale(t, recurrent.mamba2(t, mixer, x, "mamba"))
    attended = decoder.attention(t, s, ops.scale(t, x), around, bias=bias)
    return ops.add(t, mixed, ops.scale(t, attended))


def read_mamba2(c: Config, hidden: int) -> Mamba2:
    """The mixer from a `config.json`."""
    inner = c.size("mamba_d_ssm", default=c.size("mamba_expand", default=2) * hidden)
    heads = c.size("mamba_n_heads", default=128)
    return Mamba2(
        hidden=hidden,
        heads=Dim(heads, "heads"),
        head_dim=Dim(inner // heads, "head_dim"),
        groups=c.size("mamba_n_groups", default=1),
        state=Dim(c.size("mamba_d_state", default=256), "state"),
        kernel=c.size("mamba_d_conv", default=4),
        bias=c.flag("mamba_proj_bias"),
        conv_bias=c.flag("mamba_conv_bias", default=True),
        normed=c.flag("mamba_rms_norm"),
    )
