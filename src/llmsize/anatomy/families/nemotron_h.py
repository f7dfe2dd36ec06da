"""Nemotron-H and Nemotron 3: each layer is one of Mamba-2, attention, MLP or experts.

transformers v5.23, models/nemotron_h/modeling_nemotron_h.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder, lm_head, mamba2, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Names, Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.mamba2 import Mamba2
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32

NAMES = Names(embedding="model.embeddings", norm="model.norm_f")

LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
"""The kinds of layers in `hybrid_override_pattern`."""

KINDS = {"linear_attention": "mamba", "full_attention": "attention", "sparse": "moe"}
"""Other words for the kinds of layers in `layers_block_type`."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    kinds = layer_kinds(c)
    activation = c.text("mlp_hidden_act", default="relu2")
    told = c.changed(
        num_hidden_layers=len(kinds), hidden_act=activation,
        tie_word_embeddings=False,  # it never is
    )  # fmt: skip
    s = decoder.read(told, rotary=0.0)
    mixer = read_mamba2(c, s.hidden)
    m = mixture.read_corrected(c) if "moe" in kinds else None
    latent = Dim(c.count("moe_latent_size"), "latent")
    shared = Dim(c.count("moe_shared_expert_intermediate_size"), "shared_width")
    bias = c.flag("mlp_bias")
    h = Heads(name="mixer")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        residual = x
        x = norm(t, x, "norm")
        if kind == "mamba":
            x = mamba2.mixer(t, mixer, x, "mixer")
        elif kind == "attention":
            x = decoder.attention(t, s, h, x, around)
        elif kind == "moe" and m is not None:
            x = feed(t, s, m, x, latent, shared, bias)
        else:
            x = plain(t, s, x, "mixer", s.intermediate, "", bias)
        return ops.add(t, residual, x)

    frame = Frame(norm=norm, names=NAMES, head=Head(end=(lm_head.in_fp32,)))
    return decoder.run(t, s, block, kinds, frame)


def norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """RMSNorm with its weight in fp32."""
    weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
    format = x.format
    x = ops.to(t, x, FP32)
    x = ops.normalized(t, x)
    return ops.to(t, ops.mul(t, ops.to(t, weight, FP32), x), format)


def layer_kinds(c: Config) -> list[str]:
    """`mamba`, `attention`, `mlp` or `moe` for every layer."""
    pattern = c.text("hybrid_override_pattern")
    listed = c.sequence("layers_block_type", "layer_types")
    words = [LETTERS.get(letter, letter) for letter in pattern] if pattern else list(listed or ())
    kinds = [KINDS.get(str(word), str(word)) for word in words]
    if not kinds or not set(kinds) <= set(LETTERS.values()):
        raise c.error(
            "does not say what its layers are",
            "give `hybrid_override_pattern`, such as `M-M*-`, or `layers_block_type`",
        )
    return kinds


def read_mamba2(c: Config, hidden: int) -> Mamba2:
    """The mixer from a `config.json`."""
    return Mamba2(
        hidden=hidden,
        heads=Dim(c.size("mamba_num_heads", default=128), "mamba_heads"),
        head_dim=Dim(c.size("mamba_head_dim", default=64), "mamba_head_dim"),
        groups=c.size("n_groups", default=8),
        state=Dim(c.size("ssm_state_size", default=128), "state"),
        kernel=c.size("conv_kernel", default=4),
        bias=c.flag("use_bias"),
        conv_bias=c.flag("use_conv_bias", default=True),
        chunk=c.size("chunk_size", default=128),
    )


def feed(t: Trace, s: Sizes, m: Mixture, x: Tensor, latent: int, shared: int, bias: bool) -> Tensor:
    """Ungated experts, in a narrower space if there is a `latent`, and one for every token."""
    tokens = x.view(t.batch * t.sequence, s.hidden)
    weights = mixture.route(t, m, tokens, "mixer.gate")
    if latent:
        tokens = t.linear(tokens, "mixer.fc1_latent_proj", latent, bias=bias, role="up")
    routed = mixture.run_experts(t, s, m, tokens, weights, "mixer.experts", gate=None)
    if latent:
        routed = t.linear(routed, "mixer.fc2_latent_proj", s.hidden, bias=bias, role="down")
    beside = plain(t, s, x, "mixer.shared_experts", shared, "shared_", bias)
    return ops.add(t, routed.view(*x.shape), beside)


def plain(t: Trace, s: Sizes, x: Tensor, name: str, width: int, role: str, bias: bool) -> Tensor:
    """Two linear layers around the activation."""
    x = t.linear(x, f"{name}.up_proj", width, bias=bias, role=f"{role}up")
    x = s.activation(t, x)
    return t.linear(x, f"{name}.down_proj", s.hidden, bias=bias, role=f"{role}down")
