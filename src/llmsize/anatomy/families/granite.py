"""Granite: Llama's block, with embeddings, residuals and logits scaled by fixed numbers.

HyperCLOVA X normalises what each half adds, too.

transformers v5.23, models/granite/modeling_granite.py, models/hyperclovax/modeling_hyperclovax.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Part
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")
    normed = c.text("model_type") == "hyperclovax" and c.flag("use_post_norm", default=True)
    h = Heads(bias=bias)

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return scaled_residuals(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around),
            lambda x: decoder.gated(t, s, x, bias=mlp_bias),
            normed=normed,
        )

    frame = Frame(begin=ops.scale, head=Head(end=(ops.scale,)))
    return decoder.run(t, s, block, ["full"] * s.layers, frame)


def scaled_residuals(
    t: Trace, x: Tensor, attend: Part, feed: Part, *, normed: bool = False
) -> Tensor:
    """Llama's block, where what each half adds is scaled, and `normed` before that."""
    residual = x
    x = blocks.rms_norm(t, x, "input_layernorm")
    x = attend(x)
    x = blocks.rms_norm(t, x, "post_norm1") if normed else x
    x = ops.add(t, residual, ops.scale(t, x))
    residual = x
    x = blocks.rms_norm(t, x, "post_attention_layernorm")
    x = feed(x)
    x = blocks.rms_norm(t, x, "post_norm2") if normed else x
    return ops.add(t, residual, ops.scale(t, x))
