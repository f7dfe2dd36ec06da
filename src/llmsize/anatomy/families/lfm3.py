"""LFM2 and LFM3: gated short convolutions with attention layers among them.

transformers v5.23, models/lfm2/modeling_lfm2.py, models/lfm2_moe/modeling_lfm2_moe.py,
models/lfm3/modeling_lfm3.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmsize.anatomy import blocks, decoder, mixture, recurrent, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Names, Norm, Sizes
from llmsize.anatomy.mixture import Mixture, Routing
from llmsize.anatomy.rotary import Rope, Turn
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32
from llmsize.quick_dataclasses import dataclass, replace

NAMES = Names(norm="model.embedding_norm")


@dataclass(frozen=True, slots=True)
class Version:
    """What LFM3 does differently from LFM2."""

    kernel: int
    gated: bool
    sandwich: bool
    """Whether what each half adds is normalised."""
    norm: Norm
    """Of each head of q and k."""
    output: str
    turn: Turn
    rope: Rope


def head_norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """RMSNorm under LFM2's name for it."""
    return blocks.rms_norm(t, x, name.replace("_norm", "_layernorm"))


LFM2 = Version(3, False, False, head_norm, "out_proj", rotary.turn, Rope())

VERSIONS = {
    "lfm2": LFM2,
    "lfm2_moe": LFM2,
    "lfm3": Version(
        7,
        True,
        True,
        blocks.rms_norm,
        "o_proj",
        rotary.turn_and_cast,
        Rope(format=FP32, apart=True),
    ),
}


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(adjusted(c), tied=True)
    version = VERSIONS[c.text("model_type")]
    kernel = c.size("conv_L_cache", default=version.kernel)
    conv_bias, bias = c.flag("conv_bias"), c.flag("attention_bias")
    gated = c.flag("use_attention_gate", default=version.gated)
    sandwich = c.flag("use_sandwich_norm", default=version.sandwich)
    version = replace(version, gated=gated)
    listed = layer_kinds(c, s.layers)
    window = c.count("sliding_window")
    m = read_mixture(c)
    dense = c.count("num_dense_layers", default=2) if m else s.layers

    def block(x: Tensor, each: tuple[str, bool], around: Around) -> Tensor:
        kind, sparse = each
        reach = window if kind == "sliding_attention" else 0
        residual = x
        x = blocks.rms_norm(t, x, "operator_norm")
        if kind == "conv":
            x = convolution(t, s, x, kernel, conv_bias)
        else:
            x = attention(t, s, x, around, reach, bias, version)
        x = blocks.rms_norm(t, x, "post_operator_norm") if sandwich else x
        x = ops.add(t, residual, x)
        residual = x
        x = blocks.rms_norm(t, x, "ffn_norm")
        if m and sparse:
            x = feed(t, s, m, x)
        else:
            x = decoder.gated(t, s, x, name="feed_forward", names=("w1", "w3", "w2"))
        x = blocks.rms_norm(t, x, "post_ffn_norm") if sandwich else x
        return ops.add(t, residual, x)

    kinds = [(str(kind), i >= dense) for i, kind in enumerate(listed)]
    reach = {window if kind == "sliding_attention" else 0 for kind, _ in kinds}
    return decoder.run(t, s, block, kinds, Frame(names=NAMES, windows=reach, rope=version.rope))


def adjusted(c: Config) -> Config:
    """LFM2 shrinks the width of its MLP to that of a gated one of as many parameters."""
    if c.text("model_type") != "lfm2":
        return c
    width = c.size("block_ff_dim", "intermediate_size", default=12288)
    if c.flag("block_auto_adjust_ff_dim", default=True):
        multiple = c.size("block_multiple_of", default=256)
        scaled = int(int(2 * width / 3) * c.number("block_ffn_dim_multiplier", default=1.0))
        width = -(-scaled // multiple) * multiple
    return c.changed(intermediate_size=width)


def layer_kinds(c: Config, layers: int) -> Sequence[str]:
    """The operator of each layer: as listed, or by the indices of those with attention (LFM2), or
    convolutions with local and full attention between them in turn (LFM3)."""
    listed = c.each_layer(layers, "layer_types")
    if listed is not None:
        return listed
    if c.text("model_type") == "lfm3":
        turns = ("conv", "conv", "full_attention", "conv")
        return ["sliding_attention" if i and i % 4 == 0 else turns[i % 4] for i in range(layers)]
    attends = c.sequence("full_attn_idxs") or range(layers)
    return ["full_attention" if i in attends else "conv" for i in range(layers)]


def read_mixture(c: Config) -> Mixture | None:
    """The experts of LFM2-MoE, whose choice a buffer corrects if asked to."""
    if c.text("model_type") != "lfm2_moe":
        return None
    corrected = c.flag("use_expert_bias", default=True)
    return mixture.read(c, scores="sigmoid", correction="fp32" if corrected else "", scaled=True)


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor) -> Tensor:
    """Routed experts."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    routing = route(t, m, tokens)
    routed = mixture.run_experts(t, s, m, tokens, routing, "feed_forward.experts")
    return routed.view(*x.shape)


def route(t: Trace, m: Mixture, tokens: Tensor) -> Routing:
    """The weights of the chosen experts of each token, all in the format of the tokens."""
    logits = mixture.router_logits(t, m, tokens, "feed_forward.gate", bias=False)
    scores = ops.sigmoid(t, logits)
    if m.correction:
        indices = mixture.corrected_choice(t, m, scores)
        weights = ops.gather(t, scores, indices)
    else:
        weights, indices = ops.topk(t, scores, m.chosen)
    if m.normed:
        weights = ops.divide(t, weights, ops.shift(t, ops.total(t, weights)))
    return Routing(ops.scale(t, weights), indices, logits)


def convolution(t: Trace, s: Sizes, x: Tensor, kernel: int, bias: bool) -> Tensor:
    """A short convolution between two gates."""
    both = t.linear(x, "conv.in_proj", 3 * s.hidden, bias=bias, role="conv")
    into, out_of, x = ops.split(t, both, *[s.hidden] * 3)
    x = ops.mul(t, into, x)
    x = ops.transpose(t, x, 1, 2)
    x = recurrent.convolve(t, x, "conv.conv", kernel, bias=bias, activated=False)
    x = ops.transpose(t, x, 1, 2)
    recurrent.remember(t, 0, s.hidden, kernel)
    return t.linear(ops.mul(t, out_of, x), "conv.out_proj", s.hidden, bias=bias, role="conv")


def attention(
    t: Trace, s: Sizes, x: Tensor, around: Around, window: int, bias: bool, version: Version
) -> Tensor:
    """Grouped-query attention with normalised heads, each behind a gate."""
    q, k, v = decoder.projections(t, s, Heads(bias=bias, norm=version.norm, normed_at_once=True), x)
    rotation = around.tables[window]
    assert rotation is not None
    q, k = version.turn(t, q, k, rotation)
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window], dropout=s.attention_dropout)
    if version.gated:
        gate = ops.sigmoid(t, t.linear(x, "self_attn.g_proj", s.heads, role="gate_attention"))
        heads = out.view(t.batch, t.sequence, s.heads, s.head_dim)
        out = ops.mul(t, heads, gate.view(t.batch, t.sequence, s.heads, 1)).view(*out.shape)
    return t.linear(out, f"self_attn.{version.output}", s.hidden, bias=bias, role="o")
