"""AFM and Jais 2: Llama's block with an ungated MLP of squared ReLU.

transformers v5.23, models/arcee/modeling_arcee.py and models/jais2/modeling_jais2.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, activation="relu2")
    jais = c.text("model_type") == "jais2"
    norm = blocks.layer_norm if jais else blocks.rms_norm
    bias, mlp_bias = (c.flag(f"{part}_bias", default=jais) for part in ("attention", "mlp"))
    h = Heads(bias=bias)

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around),
            lambda x: decoder.plain(t, s, x, bias=mlp_bias),
            norm=norm,
        )

    return decoder.run(t, s, block, ["full"] * s.layers, Frame(norm=norm))
