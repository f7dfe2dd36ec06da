"""ERNIE 4.5 with experts: a dense layer first, experts and a shared one in the others.

transformers v5.23, models/ernie4_5_moe/modeling_ernie4_5_moe.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c, tied=True)
    shared = c.count("moe_num_shared_experts", default=2)
    t.once_linear = True
    m = mixture.read(
        Config({"n_shared_experts": shared, **c.fields}, c.model),
        correction="weight",
        balanced=True,
    )
    bias = c.flag("use_bias")
    h = Heads(bias=bias, turn=rotary.turn_neighbours_in_fp32)

    def block(x: Tensor, sparse: str, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around),
            lambda x: (
                feed(t, s, m, x, bias) if sparse == "sparse" else decoder.gated(t, s, x, bias=bias)
            ),
        )

    frame = Frame(rope=rotary.Rope(format=FP32), head=Head(bias=bias))
    return decoder.run(t, s, block, layer_kinds(c, s.layers), frame)


def layer_kinds(c: Config, layers: int) -> list[str]:
    """`dense` or `sparse` for every layer."""
    first = c.count("moe_layer_start_index", default=1)
    every = c.size("moe_layer_interval", default=1)
    last = c.value("moe_layer_end_index")
    last = layers - 1 if last in (None, -1) else c.count("moe_layer_end_index")
    return [
        "sparse" if (i + 1) % every == 0 and first <= i <= last else "dense" for i in range(layers)
    ]


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor, bias: bool) -> Tensor:
    """Routed experts and those that every token passes."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    shared = None
    if m.shared:
        shared = decoder.gated(
            t, s, tokens, name="mlp.shared_experts", width=m.shared, bias=bias, role="shared_"
        )
    out = mixture.run_experts(t, s, m, tokens, route(t, m, tokens), "mlp.experts")
    out = out if shared is None else ops.add(t, out, shared)
    return out.view(*x.shape)


def route(t: Trace, m: Mixture, tokens: Tensor) -> mixture.Routing:
    """A softmax in fp32, whatever autocast says, corrected for the choice."""
    autocast, t.autocast = t.autocast, None
    name = "mlp.gate.moe_statics.e_score_correction_bias"
    t.weight(name, (1, m.count), "router", format=FP32, fixed=True)
    weight: Tensor = t.weight("mlp.gate.weight", (m.count, tokens.shape[-1]), "router", format=FP32)
    weight = t.adapted_matrix(weight, "mlp.gate.weight", "router")
    logits = ops.linear(t, ops.to(t, tokens, FP32), weight)
    weights, indices = mixture.chosen(t, m, logits, bounded=True)
    t.autocast = autocast
    return mixture.Routing(ops.to(t, weights, tokens.format), indices, logits)
