"""GLM-4.5 and its kin (Solar Open, dots.llm1, K-EXAONE): sigmoid routing, a shared expert.

transformers v5.23, the modeling file of each type under models/.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture, rotary
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.quick_dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Type:
    """What one `model_type` does differently from the others."""

    rotary: float = 1.0
    normed_heads: bool = True
    """Whether each head of q and k is normalised where the configuration does not say."""
    first_sparse: int = 0
    local_of: int = 0
    """Every that many layers one is global, the others local; 0 if all are global."""
    global_rotates: bool = True
    once_linear: bool = True
    """Whether adapters take the routed experts for the linear layers that they were."""
    correction: mixture.Correction = "alike"
    normed_weights: bool = True
    """Whether the experts' weights sum to one where the configuration does not say."""
    balanced: bool = False
    """Whether the model adds the loss that keeps its experts equally busy."""
    biased: bool = False
    """Whether the output projection has the bias of q, k and v, and MLPs have one if asked to."""


TYPES = {
    "glm4_moe": Type(rotary=0.5, normed_heads=False, first_sparse=1, correction="fp32"),
    "glm4v_moe_text": Type(
        rotary=0.5, normed_heads=False, first_sparse=1, correction="fp32", balanced=True
    ),
    "hy_v3": Type(first_sparse=1, once_linear=False, biased=True),
    "solar_open": Type(normed_heads=False, correction="fp32"),
    "dots1": Type(normed_weights=False),
    "exaone_moe": Type(first_sparse=1, local_of=4, global_rotates=False),
}


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    family = TYPES[c.text("model_type")]
    t.once_linear = family.once_linear
    s = decoder.read(c, rotary=family.rotary)
    m = mixture.read_corrected(
        c, correction=family.correction, normed=family.normed_weights, balanced=family.balanced
    )
    bias, mlp_bias = c.flag("attention_bias"), family.biased and c.flag("mlp_bias")
    normed = c.flag("use_qk_norm", default=family.normed_heads)
    period = c.count("sliding_window_pattern", default=family.local_of)
    h = Heads(
        bias=bias,
        output_bias=family.biased and bias,
        norm=blocks.rms_norm if normed else None,
        normed_at_once=c.text("model_type") == "dots1",
    )

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, sparse = kind
        position = family.global_rotates or window > 0
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around, window, position=position),
            lambda x: (
                mixture.feed(t, s, m, x, bias=mlp_bias)
                if sparse
                else decoder.gated(t, s, x, bias=mlp_bias)
            ),
        )

    reach = decoder.windows(c, s.layers, lambda i: period > 0 and (i + 1) % period > 0)
    sparse = mixture.sparse_layers(c, s.layers, family.first_sparse)
    kinds = list(zip(reach, sparse, strict=True))
    return decoder.run(t, s, block, kinds, Frame(windows=reach, rope=rotary.read(c)))
