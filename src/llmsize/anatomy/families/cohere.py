"""Command R, R7B, A and A+, Aya, North: both halves side by side behind one norm, tied embeddings.

transformers v5.23, models/cohere/modeling_cohere.py, models/cohere2/modeling_cohere2.py,
models/cohere2_moe/modeling_cohere2_moe.py, models/cohere_compass/modeling_cohere_compass.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from llmsize.anatomy import decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Part, Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    compass = c.text("model_type") == COMPASS
    shares = [rotates(c, kind) for kind in ("full_attention", "sliding_attention")]
    s = decoder.read(c, tied=True, rotary=shares[0], local_rotary=shares[1])
    h = Heads(
        bias=c.flag("attention_bias"),
        norm=norm_by_head if c.flag("use_qk_norm") else None,
        turn=rotary.turn if compass else rotary.turn_in_fp32,
    )
    always_rotates = c.text("model_type") == "cohere"
    experts = c.text("model_type") == "cohere2_moe"
    t.once_linear = experts
    feeds = feed_forward(t, s, c, experts=experts)
    dense_rotates = experts and c.size("prefix_dense_sliding_window_pattern", default=1) == 1

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, sparse = kind
        position = compass or always_rotates or window > 0 or (dense_rotates and not sparse)
        return decoder.parallel(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around, window, position=position),
            feeds[sparse],
            norm=norm,
        )

    reach = windows(c, s.layers)
    kinds = list(zip(reach, mixture.sparse_layers(c, s.layers), strict=True))
    rope = rotary.Rope(rotary.table_in_sections, apart=True) if compass else rotary.Rope()
    frame = Frame(
        norm=norm,
        windows=reach,
        rope=rope,
        handed_positions=not compass,
        masks=() if always_rotates else (0, s.window),
        head=Head(end=(ops.scale,)),
    )
    return decoder.run(t, s, block, kinds, frame)


COMPASS = "cohere_compass_text"
"""The type that says for each kind of layer how it rotates, by positions in three sections."""


def rotates(c: Config, kind: str) -> float:
    """The share of channels that layers of that kind rotate: all, or none if they are told so."""
    told = c.value("rope_parameters")
    if c.text("model_type") != COMPASS or not isinstance(told, Mapping) or kind not in told:
        return 1.0
    return 1.0 if told[kind] is not None else 0.0


class Router(NamedTuple):
    """How the logits of the chosen experts become weights, and the outputs one."""

    sigmoid: bool
    averages: bool
    """Whether the mean of routed and shared experts is taken, not their sum."""


def read_router(c: Config) -> Router:
    """The router from a `config.json`."""
    return Router(
        sigmoid=c.text("expert_selection_fn", default="softmax") == "sigmoid",
        averages=c.text("shared_expert_combination_strategy", default="average") == "average",
    )


def feed_forward(t: Trace, s: Sizes, c: Config, *, experts: bool) -> tuple[Part, Part]:
    """A gated MLP, and what the layers have that are not dense."""
    dense = partial(decoder.gated, t, s, width=c.count("prefix_dense_intermediate_size"))
    if not experts:
        return dense, dense
    m, router = mixture.read(c, width="intermediate_size"), read_router(c)
    return dense, lambda x: feed(t, s, m, x, router)


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor, router: Router) -> Tensor:
    """Routed experts, and one that every token passes if there is one."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    logits = mixture.router_logits(t, m, tokens, "mlp.gate", bias=False)
    weights, indices = ops.topk(t, logits, m.chosen)
    if not router.sigmoid:
        weights = ops.softmax(t, weights, FP32)
    else:
        weights = ops.sigmoid(t, weights)
        weights = ops.divide(t, weights, ops.total(t, weights)) if m.normed else weights
    routing = mixture.Routing(ops.to(t, weights, tokens.format), indices, logits)
    del weights, indices, logits
    out = mixture.run_experts(t, s, m, tokens, routing)
    if m.shared:
        shared = decoder.gated(
            t, s, tokens, name="mlp.shared_experts", width=m.shared, role="shared_"
        )
        out = ops.add(t, out, shared)
        out = ops.scale(t, out) if router.averages else out
    return out.view(*x.shape)


def windows(c: Config, layers: int) -> list[int]:
    """Command R7B and A: three local layers to a global one, which does not rotate."""
    period = c.size("sliding_window_pattern", default=4)
    local = c.text("model_type") not in ("cohere", COMPASS)
    return decoder.windows(c, layers, lambda layer: local and (layer + 1) % period > 0)


def norm(t: Trace, x: Tensor, name: str, heads: int = 0) -> Tensor:
    """LayerNorm without a bias, written out in fp32; `heads` have weights each."""
    shape = (heads, x.shape[-1]) if heads else (x.shape[-1],)
    weight = t.weight(f"{name}.weight", shape, "norm")
    scaling = weight.view(heads, 1, x.shape[-1]) if heads else weight
    format = x.format
    x = ops.to(t, x, FP32)
    mean = ops.mean(t, x)
    variance = ops.mean(t, ops.power(t, ops.sub(t, x, mean)))
    x = ops.mul(t, ops.sub(t, x, mean), ops.rsqrt(t, ops.shift(t, variance)))
    return ops.to(t, ops.mul(t, ops.to(t, scaling, FP32), x), format)


def norm_by_head(t: Trace, x: Tensor, name: str) -> Tensor:
    """The same for heads, each with weights of its own."""
    return norm(t, x, name, x.shape[1])
