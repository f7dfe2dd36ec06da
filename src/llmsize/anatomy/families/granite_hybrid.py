"""Granite 4: Mamba-2 or attention in each layer, an MLP for every token, experts beside it.

transformers v5.23, models/granitemoehybrid and models/granitemoeshared (attention only).
"""

from __future__ import annotations

from llmsize.anatomy import decoder, mamba2, mixture
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes
from llmsize.anatomy.families.granite import scaled_residuals
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.mamba2 import Mamba2
from llmsize.anatomy.mixture import Mixture
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    hybrid = c.text("model_type") == "granitemoehybrid"
    rotated = not hybrid or c.text("position_embedding_type") == "rope"
    s = decoder.read(c, rotary=1.0 if rotated else 0.0)
    m = (
        mixture.read(c, scores="chosen", width="intermediate_size", balanced=True)
        if c.count("num_local_experts")
        else None
    )
    shared = Dim(c.count("shared_intermediate_size", default=1024 if hybrid else 0), "shared_width")
    mixer = read_mamba2(c, s.hidden)
    h = Heads(bias=c.flag("attention_bias"))

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        return scaled_residuals(
            t,
            x,
            lambda x: (
                mamba2.mixer(t, mixer, x, "mamba")
                if kind == "mamba"
                else decoder.attention(t, s, h, x, around, position=rotated)
            ),
            lambda x: feed(t, s, m, x, shared),
        )

    kinds = layer_kinds(c, s.layers, hybrid)
    frame = Frame(begin=ops.scale, handed_positions=not hybrid, head=Head(end=(ops.scale,)))
    return decoder.run(t, s, block, kinds, frame)


def layer_kinds(c: Config, layers: int, hybrid: bool) -> list[str]:
    """`mamba` or `attention` for every layer: as listed, or all alike."""
    listed = c.each_layer(layers, "layer_types", "layers_block_type")
    if listed is None:
        return ["mamba" if hybrid else "attention"] * layers
    return ["mamba" if kind in ("mamba", "linear_attention") else "attention" for kind in listed]


def read_mamba2(c: Config, hidden: int) -> Mamba2:
    """The mixer from a `config.json`."""
    heads = c.size("mamba_n_heads", default=128)
    inner = c.size("mamba_expand", default=2) * hidden
    head_dim = c.value("mamba_d_head")
    return Mamba2(
        hidden=hidden,
        heads=Dim(heads, "mamba_heads"),
        head_dim=Dim(
            max(inner // heads, 1) if head_dim in (None, "auto") else c.size("mamba_d_head"),
            "mamba_head_dim",
        ),
        groups=c.size("mamba_n_groups", default=1),
        state=Dim(c.size("mamba_d_state", default=256), "state"),
        kernel=c.size("mamba_d_conv", default=4),
        bias=c.flag("mamba_proj_bias"),
        conv_bias=c.flag("mamba_conv_bias", default=True),
        chunk=c.size("mamba_chunk_size", default=256),
    )


def feed(t: Trace, s: Sizes, m: Mixture | None, x: Tensor, shared: int) -> Tensor:
    """The experts and the MLP for every token, where there are any."""
    if m is None:
        return fused(t, s, x, shared)
    routed = mixture.feed(
        t, s, m, x, router="block_sparse_moe.router", experts="block_sparse_moe.experts"
    )
    return ops.add(t, routed, fused(t, s, x, shared)) if shared else routed


def fused(t: Trace, s: Sizes, x: Tensor, width: int) -> Tensor:
    """The gated MLP with gate and up in one projection."""
    both = t.linear(x, "shared_mlp.input_linear", 2 * width, role="shared_gate_up")
    gate, up = ops.split(t, both, width, width)
    product = ops.mul(t, s.activation(t, gate), up)
    return t.linear(product, "shared_mlp.output_linear", s.hidden, role="shared_down")
