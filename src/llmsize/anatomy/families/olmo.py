"""OLMo, 2 and 3. OLMo's norms have no weights; the later ones normalise what each half adds.

FlexOLMo is OLMo 2 with experts.

transformers v5.23, models/olmo/modeling_olmo.py, models/olmo2/modeling_olmo2.py,
models/olmo3/modeling_olmo3.py, models/flex_olmo/modeling_flex_olmo.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Norm, fp32_norm
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    bias, clipped = c.flag("attention_bias"), c.value("clip_qkv") is not None
    family = c.text("model_type")
    first, flex = family == "olmo", family == "flex_olmo"
    t.once_linear = flex
    m = mixture.read(c, width="intermediate_size", normed=False, balanced=True) if flex else None
    join = decoder.pre_norm if first else decoder.post_norm
    norm: Norm = norm_without_weights if first else fp32_norm
    h = Heads(
        bias=bias,
        wide_norm=None if first else norm,
        turn=rotary.turn_and_cast,
        clipped=clipped and first,
    )

    def block(x: Tensor, window: int, around: Around) -> Tensor:
        return join(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around, window),
            lambda x: mixture.feed(t, s, m, x) if m else decoder.gated(t, s, x),
            norm=norm,
        )

    kinds = decoder.windows(c, s.layers, lambda layer: (layer + 1) % 4 > 0)
    frame = Frame(
        norm=norm,
        rope=rotary.Rope(format=FP32, apart=family == "olmo3"),
        masks=(0, s.window) if family == "olmo3" else (),
    )
    return decoder.run(t, s, block, kinds, frame)


def norm_without_weights(t: Trace, x: Tensor, name: str) -> Tensor:
    """LayerNorm in fp32 that neither scales nor shifts."""
    normed = ops.layer_norm(t, ops.to(t, x, FP32), None, None)
    return ops.to(t, normed, x.format)
