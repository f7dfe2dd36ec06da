"""EXAONE 4 and 4.5: what each half adds is normalised, and each head of q and k.

transformers v5.23, models/exaone4/modeling_exaone4.py, models/exaone4_5 (the text model).
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Heads
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    h = Heads(norm=blocks.rms_norm)

    def block(x: Tensor, window: int, around: Around) -> Tensor:
        return decoder.post_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around, window, position=rotates(window)),
            lambda x: decoder.gated(t, s, x),
        )

    kinds = windows(c, s.layers)
    local = any(kinds)

    def rotates(window: int) -> bool:
        return bool(window) or not local

    return decoder.run(t, s, block, kinds)


def windows(c: Config, layers: int) -> list[int]:
    """Three local layers to a global one, which alone does not rotate."""
    period = c.size("sliding_window_pattern", default=4)
    return decoder.windows(c, layers, lambda i: (i + 1) % period > 0)
