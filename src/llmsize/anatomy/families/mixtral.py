"""Mixtral, Qwen-MoE, Phi-MoE, OLMoE, MiniMax-M2, Mellum: experts in an attention-first block.

transformers v5.23, the modeling file of each type under models/.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Norm, Sizes
from llmsize.anatomy.families import phi3
from llmsize.anatomy.families.llama import windows
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, INT64
from llmsize.quick_dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Type:
    """What one `model_type` does differently from Mixtral."""

    norm: Norm = blocks.rms_norm
    heads: Heads = Heads()
    biased: bool = False
    """Whether q, k and v have biases where the configuration does not say."""
    output_biased: bool = True
    """Whether the output projection has one if q, k and v have."""
    scores: mixture.Scores = "softmax"
    wide: bool = False
    """Whether the experts' weights stay in fp32."""
    correction: mixture.Correction = ""
    normed: bool = False
    """Whether they sum to one where the configuration does not say."""
    router: str = "mlp.gate"
    once_linear: bool = False
    """Whether adapters take the routed experts for the linear layers that they were."""
    sampled: bool = False
    """Whether training draws the experts instead of taking the best (Phi's SparseMixer)."""
    masks_windows: bool = False
    """Whether a mask for windows is made though no layer has one."""


NORMED = Heads(norm=blocks.rms_norm, normed_at_once=True)

TYPES = {
    "mixtral": Type(wide=True, normed=True, once_linear=True),
    "qwen2_moe": Type(biased=True, output_biased=False, masks_windows=True),
    "qwen3_moe": Type(heads=NORMED, once_linear=True),
    "qwen3_vl_moe_text": Type(heads=NORMED, normed=True),
    "qwen3_omni_moe_text": Type(heads=NORMED, normed=True),
    "olmoe": Type(heads=Heads(wide_norm=blocks.rms_norm), once_linear=True),
    "phimoe": Type(norm=blocks.layer_norm, router="mlp.router", sampled=True),
    "minimax_m2": Type(
        heads=Heads(wide_norm=blocks.rms_norm, turn=phi3.turn),
        scores="sigmoid",
        wide=True,
        normed=True,
        correction="alike",
        once_linear=True,
    ),
    "mellum": Type(heads=NORMED, normed=True, once_linear=True),
}


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    family = TYPES[c.text("model_type")]
    t.once_linear = family.once_linear
    s = decoder.read(c)
    m = mixture.read(
        c, scores=family.scores, wide=family.wide, normed=family.normed,
        correction=family.correction, balanced=True,
        jitter="input_jitter_noise" if family.sampled else "router_jitter_noise",
    )  # fmt: skip
    bias = c.flag("attention_bias", "qkv_bias", default=family.biased)
    h = family.heads._replace(
        bias=bias,
        output_bias=bias and family.output_biased,
        clipped=c.value("clip_qkv") is not None,
    )

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, sparse = kind
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around, window),
            lambda x: feed(t, s, m, x, family) if sparse else decoder.gated(t, s, x),
            norm=family.norm,
        )

    reach, beyond = windows(c, s.layers), t.sequence + t.setting.past  # all tokens
    kinds = list(zip(reach, mixture.sparse_layers(c, s.layers), strict=True))
    frame = Frame(
        norm=family.norm,
        windows=reach,
        rope=rotary.read(c),
        masks=(beyond,) if family.masks_windows and not any(reach) else (),
        head=Head(bias=c.flag("lm_head_bias")),
    )
    return decoder.run(t, s, block, kinds, frame)


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor, family: Type) -> Tensor:
    """Routed experts, and a shared one behind a gate of its own (Qwen2-MoE)."""
    if family.sampled:
        x = mixture.jittered(t, m, x)
        tokens = mixture.jittered(t, m, x.view(t.batch * t.sequence, s.hidden))
        logits = mixture.router_logits(t, m, tokens, family.router, bias=False)
        routing = sparse_mixer(t, logits)
        return mixture.run_experts(t, s, m, tokens, routing).view(*x.shape)
    if not m.shared:
        return mixture.feed(t, s, m, x, router=family.router)
    return feed_beside_gated_expert(t, s, m, x)


def feed_beside_gated_expert(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts, and one for every token whose output a sigmoid scales."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    shared = decoder.gated(t, s, tokens, name="mlp.shared_expert", width=m.shared, role="shared_")
    routing = mixture.route(t, m, tokens, "mlp.gate")
    routed = mixture.run_experts(t, s, m, tokens, routing)
    gate = partial(t.linear, tokens, "mlp.shared_expert_gate", 1, role="router")
    shared = ops.mul(t, ops.sigmoid(t, gate()), shared)
    return ops.add(t, routed, shared).view(*x.shape)


def sparse_mixer(t: Trace, scores: Tensor) -> mixture.Routing:
    """Two experts, the second drawn among the rest (Liu et al. 2023, arXiv:2310.00811)."""
    first, best = draw(t, scores, scores)
    second, next_best = draw(t, scores, ops.scattered(t, scores, best))
    weights = ops.cat(t, (first, second))
    del first, second
    return mixture.Routing(weights, ops.cat(t, (best, next_best)), scores)


def draw(t: Trace, scores: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the index of one expert of each token, among those not far from the best."""
    far = t.new("gt", scores.shape, BOOL)
    gates = ops.masked_fill(t, candidates, far)
    chosen = t.new("max", (scores.shape[0], 1), INT64)
    gates = ops.softmax(t, gates)
    weight = ops.gather(t, gates, chosen)
    if not t.setting.training:
        return weight, chosen
    node = t.record(_drawn_backward, (scores, weight), (weight, chosen, gates))
    return t.new("mul", weight.shape, weight.format, node), chosen


def _drawn_backward(t: Tape, node: Node, grads: ops.GradList) -> Grads:
    """The gradient of the scores alone: the gates' derivative, written out."""
    grad, gates = ops.first(grads), node.saved[2]
    assert gates is not None
    scaled = t.new("mul", grad.shape, grad.format)
    negated = t.new("mul", grad.shape, grad.format)
    to_scores = t.new("mul", gates.shape, gates.format)
    del scaled, negated
    return to_scores, None
