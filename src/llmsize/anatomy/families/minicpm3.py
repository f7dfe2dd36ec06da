"""MiniCPM 3: DeepSeek's latent attention, with embeddings, residuals and outputs scaled.

transformers v5.23, models/minicpm3/modeling_minicpm3.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame
from llmsize.anatomy.families import deepseek, gemma
from llmsize.anatomy.families.granite import scaled_residuals
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import INT64
from llmsize.quick_dataclasses import replace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c.changed(head_dim=c.size("qk_rope_head_dim", default=32)), tied=True)
    value = c.size("v_head_dim", default=s.hidden // s.heads)
    latent = replace(deepseek.read_latent(c.changed(v_head_dim=value)), turn=rotary.turn)
    mlp_bias = c.flag("mlp_bias")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return scaled_residuals(
            t,
            x,
            lambda x: deepseek.latent_attention(t, s, latent, x, around),
            lambda x: decoder.gated(t, s, x, bias=mlp_bias),
        )

    frame = Frame(
        norm=scaled_norm,
        embed=lambda t, x: scaled(t, x, whole=isinstance(c.fields.get("scale_emb", 1), int)),
    )
    return decoder.run(t, s, block, ["full"] * s.layers, frame)


def scaled(t: Trace, x: Tensor, *, whole: bool) -> Tensor:
    """Embeddings times a buffer; one of a `whole` number is cast each time."""
    if not whole:
        return gemma.scaled(t, x)
    t.buffers += INT64.block_bytes
    return ops.mul(t, x, t.new("to", (), x.format))


def scaled_norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """What the head reads is scaled by the model's width, and held unscaled beside it."""
    normed = blocks.rms_norm(t, x, name)
    t.held.append(normed)
    return ops.scale(t, normed)
