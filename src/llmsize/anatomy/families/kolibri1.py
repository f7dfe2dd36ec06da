"""Kolibri: EXAONE 4's attention and experts in GLM-4's block.

transformers v5.23, models/kolibri1/modeling_kolibri1.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes
from llmsize.anatomy.families import glm
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

PERIOD = 5
"""Every so many layers one attends to all tokens and does not rotate."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    t.once_linear = True
    m = mixture.read(c, scores="sigmoid", precise=True, correction="alike", normed=False)
    h = Heads(norm=blocks.rms_norm)

    def block(x: Tensor, window: int, around: Around) -> Tensor:
        return glm.sandwich(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around, window, position=window > 0),
            lambda x: feed(t, s, m, x),
        )

    windows = decoder.windows(c, s.layers, lambda i: (i + 1) % PERIOD > 0)
    return decoder.run(t, s, block, windows, Frame(masks=(0, s.window)))


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Experts chosen by their logits and weighted by sigmoids of these, and one for every token."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    logits = mixture.router_logits(t, m, tokens, "mlp.gate", bias=False)
    indices = mixture.corrected_choice(t, m, logits)
    weights = ops.sigmoid(t, ops.gather(t, logits, indices))
    if m.normed:
        weights = ops.divide(t, weights, ops.total(t, weights))
    routing = mixture.Routing(weights, indices, logits)
    routed = mixture.run_experts(t, s, m, tokens, routing).view(*x.shape)
    shared = decoder.gated(t, s, x, name="mlp.shared_experts", width=m.shared, role="shared_")
    return ops.add(t, routed, shared)
