"""Step 3.5 and 3.7 Flash: heads counted by layer type, each behind a gate; bounded experts.

transformers v5.23, models/step3p7/modeling_step3p7.py; the text model. The class calls its experts
one by one for as many tokens as each happens to get; here they are one grouped product, as others'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llmsize.anatomy import blocks, decoder, mixture, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes, gemma_norm
from llmsize.anatomy.families import minimax_m3
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    shared = c.size("share_expert_dim", "share_expert_dims", default=1280)
    groups = c.size("num_key_value_heads", "num_attention_groups", default=8)
    local, wide = shares(c)
    s = decoder.read(
        c.changed(num_key_value_heads=groups, partial_rotary_factor=None),
        rotary=wide,
        local_rotary=local,
    )
    m = mixture.read(
        c.changed(shared_expert_intermediate_size=shared), scores="sigmoid", wide=True,
        correction="alike",
    )  # fmt: skip
    bias, heads = c.flag("attention_bias"), local_heads(c, s.heads)

    def block(x: Tensor, kind: tuple[int, bool], around: Around) -> Tensor:
        window, sparse = kind
        here = s._replace(heads=Dim(heads, "heads")) if window else s
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, here, x, around, window, bias),
            lambda x: (
                minimax_m3.feed(t, s, m, x, bounded, bounded_halves)
                if sparse
                else bounded(t, s, x, "mlp", s.intermediate, "")
            ),
            norm=gemma_norm,
        )

    reach = decoder.windows(c, s.layers, lambda layer: False)
    kinds = list(zip(reach, sparse_layers(c, s.layers), strict=True))
    frame = Frame(norm=gemma_norm, windows=reach, rope=rotary.Rope(apart=True), masks=(0, s.window))
    return decoder.run(t, s, block, kinds, frame)


def shares(c: Config) -> tuple[float, float]:
    """The share of channels that layers with a window rotate, and that the others do.

    Older configurations list it for each layer.
    """
    kinds, listed = c.sequence("layer_types"), c.sequence("partial_rotary_factors")
    if not kinds or not listed:
        return 1.0, 1.0
    by_kind = {str(kind): share for kind, share in zip(kinds, listed, strict=False)}
    told = Config(by_kind, c.model)
    return told.number("sliding_attention", default=1.0), told.number("full_attention", default=1.0)


def local_heads(c: Config, heads: int) -> int:
    """Query heads of layers with a window."""
    other = c.value("attention_other_setting")
    fields = other if isinstance(other, Mapping) else {}
    older = Config(fields, c.model).size("num_attention_heads", default=heads)
    return c.size("num_sliding_attention_heads", default=older)


def sparse_layers(c: Config, layers: int) -> Sequence[bool]:
    """Which layers have experts: as listed, by number in older configurations, or all but three."""
    if c.value("mlp_layer_types") is not None:
        return mixture.sparse_layers(c, layers)
    listed = c.value("moe_layers_enum")
    if listed is None:
        return [layer >= 3 for layer in range(layers)]
    numbers = listed.split(",") if isinstance(listed, str) else c.sequence("moe_layers_enum") or ()
    sparse = {str(number).strip() for number in numbers}
    return [str(layer) in sparse for layer in range(layers)]


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, window: int, bias: bool) -> Tensor:
    """Grouped-query attention, the output of each head behind a gate."""
    q, k, v = decoder.projections(t, s, Heads(bias=bias, norm=gemma_norm, normed_at_once=True), x)
    gate = t.linear(x, "self_attn.g_proj", s.heads, role="gate_attention")
    rotation = around.tables[window]
    assert rotation is not None
    q, k = rotary.rotate_part(t, q, k, *rotation)  # joined to no rest where all are rotated
    k, v = blocks.remember(t, k, v, window)
    out = blocks.attend(t, q, k, v, around.masks[window], dropout=s.attention_dropout)
    by_head = ops.reshape(t, out, t.batch, t.sequence, s.heads, s.head_dim)
    share = ops.sigmoid(t, ops.reshape(t, gate, t.batch, t.sequence, s.heads, 1))
    gated = ops.mul(t, by_head, share)
    del by_head, share
    out = ops.reshape(t, gated, *out.shape)
    return t.linear(out, "self_attn.o_proj", s.hidden, bias=bias, role="o")


def bounded(t: Trace, s: Sizes, x: Tensor, name: str, width: int, role: str) -> Tensor:
    """The gated MLP whose gate and product are kept within bounds."""
    gate = s.activation(t, t.linear(x, f"{name}.gate_proj", width, role=f"{role}gate"))
    gate = ops.clamp(t, gate)
    up = ops.clamp(t, t.linear(x, f"{name}.up_proj", width, role=f"{role}up"), bounds=2)
    return t.linear(ops.mul(t, gate, up), f"{name}.down_proj", s.hidden, role=f"{role}down")


def bounded_halves(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """The first half activated and within bounds gates the second, which is kept so, too."""
    half = x.shape[-1] // 2
    gate, up = ops.split(t, x, half, half)
    gate = ops.clamp(t, s.activation(t, gate))
    up = ops.clamp(t, up, bounds=2)
    return ops.mul(t, gate, up)
