"""Kimi Linear: delta attention with a decay for every channel, latent attention among it.

transformers v5.23, models/kimi_linear/modeling_kimi_linear.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmsize.anatomy import blocks, decoder, mixture, recurrent
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Sizes
from llmsize.anatomy.families.deepseek import Latent, read_latent
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


@dataclass(frozen=True, slots=True)
class Delta:
    """The dimensions of Kimi Delta Attention."""

    heads: int
    head_dim: int
    kernel: int

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    latent = read_latent(c)
    s = decoder.read(Config({**c.fields, "head_dim": latent.rotary}, c.model), rotary=0.0)
    m = mixture.read_corrected(c)
    delta = Delta(
        heads=Dim(c.size("linear_num_heads", default=s.heads), "linear_heads"),
        head_dim=Dim(c.size("linear_head_dim", default=128), "linear_head_dim"),
        kernel=c.size("linear_conv_kernel_dim", default=4),
    )

    def block(x: Tensor, kind: tuple[bool, bool], around: Around) -> Tensor:
        attends, sparse = kind
        return decoder.pre_norm(
            t,
            x,
            lambda x: (
                latent_attention(t, s, latent, x, around)
                if attends
                else delta_attention(t, s, delta, x)
            ),
            lambda x: mixture.feed(t, s, m, x) if sparse else decoder.gated(t, s, x),
        )

    sparse = mixture.sparse_layers(c, s.layers, 1)
    kinds = list(zip(attention_layers(c, s.layers), sparse, strict=True))
    return decoder.run(t, s, block, kinds)


def attention_layers(c: Config, layers: int) -> list[bool]:
    """Which layers attend to all tokens: as listed."""
    kinds = c.sequence("layer_types")
    if kinds is None or len(kinds) < layers:
        raise c.error("has no `layer_types` for every layer", "give one a layer")
    return [kinds[i] == "full_attention" for i in range(layers)]


def latent_attention(t: Trace, s: Sizes, d: Latent, x: Tensor, around: Around) -> Tensor:
    """Latent attention in which nothing is rotated."""
    q = t.linear(x, "self_attn.q_proj", s.heads * d.query, role="q")
    q = ops.split_heads(t, q, s.heads)
    latent = t.linear(x, "self_attn.kv_a_proj_with_mqa", d.kv_rank + d.rotary, role="kv_a")
    kv, k_shared = ops.split(t, latent, d.kv_rank, d.rotary)
    kv = blocks.rms_norm(t, kv, "self_attn.kv_a_layernorm")
    expanded = s.heads * (d.query + d.value)
    t.remember(LayerCache("latent", 1, d.kv_rank + d.rotary, expanded=expanded))
    kv = t.linear(kv, "self_attn.kv_b_proj", s.heads * (d.plain + d.value), role="kv_b")
    k_plain, v = ops.split(t, ops.split_heads(t, kv, s.heads), d.plain, d.value)
    k_shared = k_shared.view(t.batch, 1, t.sequence, d.rotary)
    k = ops.cat(t, (k_plain, ops.repeat(t, k_shared, s.heads)))
    out = blocks.attend(t, q, k, v, around.mask)
    return t.linear(out, "self_attn.o_proj", s.hidden, role="o")


def delta_attention(t: Trace, s: Sizes, d: Delta, x: Tensor) -> Tensor:
    """The delta rule with a decay for every channel of every head."""
    parts = [t.linear(x, f"self_attn.{p}_proj", d.width, role=p) for p in ("q", "k", "v")]
    mixed = recurrent.convolve(t, ops.cat(t, parts), "self_attn.conv1d", d.kernel)
    q, k, v = ops.split(t, mixed, *[d.width] * 3)
    decay = forget(t, d, x)
    beta = ops.sigmoid(t, t.linear(x, "self_attn.b_proj", d.heads, role="ssm"))
    out = recurrent.fused(t, "delta_rule", (v, q, k, decay, beta), v.shape)
    recurrent.remember(t, d.heads * d.head_dim**2, 3 * d.width, d.kernel)
    gate = t.linear(x, "self_attn.g_a_proj", d.head_dim, role="gate_attention")
    gate = t.linear(gate, "self_attn.g_b_proj", d.width, role="gate_attention")
    heads = (t.batch, t.sequence, d.heads, d.head_dim)
    normed = blocks.rms_norm(t, out.view(*heads), "self_attn.o_norm")
    out = ops.mul(t, normed, ops.sigmoid(t, gate).view(*heads)).view(*out.shape)
    return t.linear(out, "self_attn.o_proj", s.hidden, role="o")


def forget(t: Trace, d: Delta, x: Tensor) -> Tensor:
    """How much each channel forgets at each token."""
    name = "self_attn.forget_gate"
    low = t.linear(x, f"{name}.f_a_proj", d.head_dim, role="ssm")
    gate = ops.to(t, t.linear(low, f"{name}.f_b_proj", d.width, role="ssm"), FP32)
    gate = ops.add(t, gate, t.weight(f"{name}.dt_bias", (d.width,), "ssm"))
    gate = ops.unary(t, "softplus", gate, keeps="input")
    rates = t.weight(f"{name}.A_log", (1, 1, d.heads, 1), "ssm")
    heads = gate.view(t.batch, t.sequence, d.heads, d.head_dim)
    return ops.mul(t, heads, rates).view(*gate.shape)
