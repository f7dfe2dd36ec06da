"""Zamba: Mamba layers of several heads, some behind the one transformer block they have in common.

transformers v5.23, models/zamba/modeling_zamba.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import decoder, lm_head, recurrent
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Heads
from llmsize.anatomy.families import jamba, zamba2
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.mamba import Mamba, Selected, selective_scan, selective_update
from llmsize.anatomy.scan_operations import unsqueeze
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    zamba2.check_tied(c)
    hidden = c.size("hidden_size")
    wide = c.size("attention_hidden_size", default=2 * hidden)
    heads = c.few("num_attention_heads")
    c = c.changed(head_dim=c.size("attention_head_dim", default=wide // heads))
    s = decoder.read(c, tied=True, activation="gelu", rotary=0.0)
    m = jamba.read_mamba(c, s.hidden)
    attend = partial(decoder.attention, t, s, Heads())
    x = zamba2.model(
        t,
        s,
        zamba2.layer_kinds(layer_words(c, s.layers), 1, "shared_transf"),
        partial(mixer, t, m, Dim(c.few("n_mamba_heads", default=2), "mamba_heads")),
        partial(zamba2.transformer, t, attend, partial(decoder.gated, t, s, name="feed_forward")),
    )
    return lm_head.causal_lm(t, x, s.vocabulary, Head(), tied=True)


def layer_words(c: Config, layers: int) -> list[str]:
    """`hybrid` for layers behind the common block: as listed, or the third and every so many."""
    listed = c.each_layer(layers, "layers_block_type", "layer_types")
    if listed is not None:
        return [str(word) for word in listed]
    period = c.size("attn_layer_period", default=6)
    offset = c.count("attn_layer_offset", default=4)
    rest = [("hybrid" if i % period == offset else "mamba") for i in range(layers - 3)]
    return ["mamba", "mamba", "hybrid", *rest][:layers]


def mixer(t: Trace, m: Mamba, heads: int, x: Tensor, name: str) -> Tensor:
    """Selective state spaces, each head's with projections of its own."""
    format, size = x.format, m.inner // heads
    x = recurrent.without_padding(t, x)
    both = t.linear(x, f"{name}.in_proj", 2 * m.inner, bias=m.bias, role="ssm")
    both = ops.reshape(t, ops.transpose(t, both, 1, 2), t.batch, m.inner, 2, t.sequence)
    x, gate = ops.split(t, both, 1, 1, dim=2)
    by_head = (t.batch, heads, size, t.sequence)
    x = ops.contiguous(t, ops.reshape(t, x, t.batch, m.inner, t.sequence))
    gate = ops.transpose(t, ops.reshape(t, gate, *by_head), 0, 1)
    recurrent.remember(t, m.inner * m.state, m.inner, m.kernel)
    x = recurrent.convolve(t, x, f"{name}.conv1d", m.kernel, bias=m.conv_bias)
    x = recurrent.without_padding(t, ops.transpose(t, x, 1, 2))
    x = ops.reshape(t, ops.transpose(t, x, 1, 2), *by_head)
    x = ops.transpose(t, x, 0, 1)
    out = scanned(t, m, heads, x, gate, name)
    by_token = ops.to(t, ops.transpose(t, out, 1, 2), format)
    return t.linear(by_token, f"{name}.out_proj", m.hidden, bias=m.bias, role="ssm")


def scanned(t: Trace, m: Mamba, heads: int, x: Tensor, gate: Tensor, name: str) -> Tensor:
    """The scans of all heads, one after the other: heads come first in `x` and `gate`."""
    size = m.inner // heads
    select = t.weight(f"{name}.x_proj_weight", (heads, m.rank + 2 * m.state, size), "ssm")
    expand = t.weight(f"{name}.dt_proj_weight", (heads, size, m.rank), "ssm")
    offsets = t.weight(f"{name}.dt_proj_bias", (heads, size), "bias")
    selected = ops.matmul(t, select.view(heads, 1, *select.shape[1:]), x)
    selected = ops.transpose(t, selected, -1, -2)
    steps, into, out_of = ops.split(t, selected, m.rank, m.state, m.state)
    transposed = ops.transpose(t, steps, -1, -2)
    steps = ops.matmul(t, expand.view(heads, 1, *expand.shape[1:]), transposed)
    del transposed
    offset = ops.to(t, offsets, FP32)
    decay = recurrent.decay(t, f"{name}.A_log", heads, size, m.state, format=FP32)
    skips = t.weight(f"{name}.D", (heads, size), "ssm")
    outputs, states = [], []
    for _ in range(heads):
        parts = (ops.select(t, part, 0) for part in (steps, decay, into, out_of, gate, offset))
        out, state = scan(t, ops.select(t, x, 0), Selected(*parts), ops.select(t, skips, 0))
        outputs.append(out)
        states.append(state)
    for state in states:
        recurrent.store_state(t, state)
    return ops.cat(t, outputs, 1)


def scan(t: Trace, x: Tensor, chosen: Selected, skip: Tensor) -> tuple[Tensor, Tensor | None]:
    """One head's outputs as batch, channels, tokens, and its last state for the cache."""
    if recurrent.continues(t):
        return unsqueeze(t, selective_update(t, ops.select(t, x, 2), chosen, skip), 2), None
    return selective_scan(t, x, chosen, ops.to(t, skip, FP32))
