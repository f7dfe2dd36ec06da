"""Arcee Trinity (AFMoE): gated attention that rotates only within windows, sigmoid routing.

transformers v5.23, models/afmoe/modeling_afmoe.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes, fp32_norm
from llmsize.anatomy.mixture import Mixture, Routing
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    m = mixture.read(c, scores="sigmoid", correction="weight", wide=True, scaled=True)
    dense = c.count("num_dense_layers", default=1)
    period = c.size("global_attn_every_n_layers", default=4)
    bias = c.flag("attention_bias")

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, sparse = kind
        return decoder.sandwich(
            t,
            x,
            lambda x: attention(t, s, x, around, window, bias),
            lambda x: feed(t, s, m, x) if sparse else decoder.gated(t, s, x),
            norm=fp32_norm,
            names=("pre_mlp_layernorm", "post_mlp_layernorm"),
        )

    begin = ops.scale if c.flag("mup_enabled") else blocks.as_it_is
    reach = decoder.windows(c, s.layers, lambda i: (i + 1) % period > 0)
    kinds = [(window, i >= dense) for i, window in enumerate(reach)]
    frame = Frame(
        norm=fp32_norm, windows=reach, masks=(0, s.window), begin=begin, holds_tokens=True
    )
    return decoder.run(t, s, block, kinds, frame)


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, window: int, bias: bool) -> Tensor:
    """Grouped-query attention with normalised heads, whose output a sigmoid gates."""
    q, k, v = decoder.projections(t, s, Heads(bias=bias), x)
    gate = t.linear(x, "self_attn.gate_proj", s.heads * s.head_dim, role="gate_attention")
    q = fp32_norm(t, q, "self_attn.q_norm")
    k = fp32_norm(t, k, "self_attn.k_norm")
    if window:
        q, k = decoder.turn(t, q, k, around, window)
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window], dropout=s.attention_dropout)
    out = ops.mul(t, out, ops.sigmoid(t, gate))
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts, and those that every token passes; a weight that is never trained corrects
    the choice."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    t.weight("mlp.expert_bias", (m.count,), "router", fixed=True)
    routing = route(t, m, tokens)
    shared = decoder.gated(t, s, tokens, name="mlp.shared_experts", width=m.shared, role="shared_")
    routed = mixture.run_experts(t, s, m, tokens, routing)
    return ops.add(t, shared, routed).view(*x.shape)


def route(t: Trace, m: Mixture, tokens: Tensor) -> Routing:
    """The sigmoids of the chosen experts' logits over their sum; the logits stay, in fp32."""
    logits = ops.to(t, t.linear(tokens, "mlp.router.gate", m.count, role="router"), FP32)
    scores = ops.sigmoid(t, logits)
    indices = mixture.corrected_choice(t, m, scores)
    weights = ops.gather(t, scores, indices)
    whole = ops.shift(t, ops.total(t, weights))
    weights = ops.scale(t, ops.divide(t, weights, whole))
    return Routing(weights, indices, logits)
