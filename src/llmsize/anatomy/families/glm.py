"""GLM-4: half of each head rotated, gate and up in one projection; the 0414 models add norms.

transformers v5.23, models/glm/modeling_glm.py, models/glm4/modeling_glm4.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, rotary
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Part
from llmsize.anatomy.rotary import Rotation
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

LAID_OUT = ("glm4v_text", "glm_ocr_text")
"""Types whose tables of cosines and sines are laid out for neighbouring channels once for all."""

UNBIASED = ("glm_ocr_text",)
"""Types whose q, k and v have no biases."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, rotary=0.5)
    family = c.text("model_type")
    join = decoder.pre_norm if family == "glm" else sandwich
    turn = rotary.turn if family in LAID_OUT else turn_laid_out
    h = Heads(
        bias=c.flag("attention_bias", default=family not in UNBIASED), output_bias=False, turn=turn
    )

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return join(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around),
            lambda x: decoder.gated_fused(t, s, x),
        )

    return decoder.run(t, s, block, ["full"] * s.layers, Frame(rope=rotary.read(c)))


def sandwich(t: Trace, x: Tensor, attend: Part, feed: Part) -> Tensor:
    """A norm before and a norm after each half, under GLM's names."""
    norm, around = blocks.rms_norm, decoder.normed_around
    x = t.half(around, x, attend, norm, "input_layernorm", "post_self_attn_layernorm")
    return t.half(around, x, feed, norm, "post_attention_layernorm", "post_mlp_layernorm")


def turn_laid_out(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Rotary embedding of neighbouring channels, whose angles every layer lays out anew."""
    return rotary.rotate_part(t, q, k, *rotary.for_pairs(t, rotation))
