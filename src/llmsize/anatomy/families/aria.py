"""Aria's language model: Llama's block with experts, of which some are for every token.

transformers v5.23, models/aria/modeling_aria.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Heads, Sizes
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    shared = c.count("moe_num_shared_experts", default=2)
    m = mixture.read(c.changed(n_shared_experts=shared), width="intermediate_size")
    bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")
    h = Heads(bias=bias)

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around),
            lambda x: feed(t, s, m, x, mlp_bias),
        )

    return decoder.run(t, s, block, ["full"] * s.layers)


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor, bias: bool) -> Tensor:
    """Routed experts, weighted by a softmax over those that are chosen, and the shared ones."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    logits = mixture.router_logits(t, m, tokens, "mlp.router", bias=False)
    best, indices = ops.topk(t, logits, m.chosen)
    routing = mixture.Routing(ops.softmax(t, best), indices)
    del best  # the logits stay, which the layer names `_`
    routed = mixture.run_experts(t, s, m, tokens, routing, transposed=True)
    shared = decoder.gated(
        t, s, x, name="mlp.shared_experts", width=m.shared, bias=bias, role="shared_"
    )
    return ops.add(t, routed.view(*x.shape), shared)
