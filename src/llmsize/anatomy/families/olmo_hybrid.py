"""OLMo Hybrid: gated delta rules with layers of OLMo 3's attention among them.

transformers v5.23, models/olmo_hybrid/modeling_olmo_hybrid.py.
"""

from __future__ import annotations

from llmsize.anatomy import decoder, delta_rule, recurrent, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, fp32_norm
from llmsize.anatomy.delta_rule import DeltaNet, Inputs
from llmsize.anatomy.families.qwen3_next import attention_layers
from llmsize.anatomy.scan_operations import softplus
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    rope = c.value("rope_parameters")
    base = (rope if isinstance(rope, dict) else c.fields).get("rope_theta", "the default")
    s = decoder.read(c.changed(head_dim=None), rotary=0.0 if base is None else 1.0)
    d = read_delta_net(c, s)
    bias, doubled = c.flag("attention_bias"), c.flag("linear_allow_neg_eigval", default=True)
    h = Heads(bias=bias, wide_norm=fp32_norm, turn=rotary.turn_and_cast)

    def block(x: Tensor, attends: str, around: Around) -> Tensor:
        if attends:
            return decoder.post_norm(
                t,
                x,
                lambda x: decoder.attention(t, s, h, x, around),
                lambda x: decoder.gated(t, s, x),
                norm=fp32_norm,
            )
        return decoder.pre_norm(
            t,
            x,
            lambda x: delta_net(t, d, x, doubled),
            lambda x: decoder.gated(t, s, x),
            norm=fp32_norm,
        )

    kinds = ["attends" if attends else "" for attends in attention_layers(c, s.layers)]
    return decoder.run(t, s, block, kinds, Frame(norm=fp32_norm, rope=rotary.Rope(format=FP32)))


def read_delta_net(c: Config, s: decoder.Sizes) -> DeltaNet:
    """The linear attention from a `config.json`."""
    heads = c.size("linear_num_key_heads", default=s.heads)
    key_dim = c.size("linear_key_head_dim", default=max(int(0.75 * s.hidden / heads), 1))
    return DeltaNet(
        hidden=s.hidden,
        key_heads=Dim(heads, "key_heads"),
        value_heads=Dim(c.size("linear_num_value_heads", default=s.heads), "value_heads"),
        key_dim=Dim(key_dim, "key_dim"),
        value_dim=Dim(c.size("linear_value_head_dim", default=2 * key_dim), "value_dim"),
        kernel=c.size("linear_conv_kernel_dim", default=4),
    )


def delta_net(t: Trace, d: DeltaNet, x: Tensor, doubled: bool) -> Tensor:
    """A gated delta rule with a projection of its own for each of its inputs."""
    x = recurrent.without_padding(t, x)
    name, tokens = "linear_attn", (t.batch, t.sequence)
    widths = {"q": d.keys, "k": d.keys, "v": d.values}
    mixed = ops.cat(t, [t.linear(x, f"{name}.{p}_proj", w, role=p) for p, w in widths.items()])
    mixed = recurrent.convolve(t, ops.transpose(t, mixed, 1, 2), f"{name}.conv1d", d.kernel)
    if not recurrent.continues(t):
        mixed = ops.narrow(t, mixed, 2, t.sequence)
    q, k, v = ops.split(t, ops.transpose(t, mixed, 1, 2), *widths.values())
    q = ops.reshape(t, q, *tokens, d.key_heads, d.key_dim)
    k = ops.reshape(t, k, *tokens, d.key_heads, d.key_dim)
    v = ops.reshape(t, v, *tokens, d.value_heads, d.value_dim)
    beta = ops.sigmoid(t, t.linear(x, f"{name}.b_proj", d.value_heads, role="ssm"))
    beta = ops.scale(t, beta) if doubled else beta
    decay = forgetting(t, d, x, name)
    recurrent.remember(t, d.value_heads * d.key_dim * d.value_dim, 2 * d.keys + d.values, d.kernel)
    out = delta_rule.scanned(t, d, Inputs(q, k, v, decay, beta))
    gate = t.linear(x, f"{name}.g_proj", d.values, role="gate_attention")
    by_head = (t.batch * t.sequence * d.value_heads, d.value_dim)
    out, gate = ops.reshape(t, out, *by_head), ops.reshape(t, gate, *by_head)
    out = delta_rule.gated_norm(t, out, gate, f"{name}.o_norm")
    return t.linear(ops.reshape(t, out, *tokens, d.values), f"{name}.o_proj", d.hidden, role="o")


def forgetting(t: Trace, d: DeltaNet, x: Tensor, name: str) -> Tensor:
    """How much each head forgets at each token, a logarithm in fp32."""
    rates = recurrent.decay(t, f"{name}.A_log", d.value_heads, format=FP32)
    steps = ops.to(t, t.linear(x, f"{name}.a_proj", d.value_heads, role="ssm"), FP32)
    offsets = t.weight(f"{name}.dt_bias", (d.value_heads,), "ssm")
    return ops.mul(t, rates, softplus(t, ops.add(t, steps, offsets)))
