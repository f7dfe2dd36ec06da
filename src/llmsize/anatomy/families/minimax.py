"""MiniMax-Text-01: lightning attention by blocks of tokens, some layers of softmax, experts.

transformers v5.23, models/minimax/modeling_minimax.py; Qin et al. 2024, arXiv:2401.04658.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, mixture, recurrent
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, Sizes
from llmsize.anatomy.loops import turns
from llmsize.anatomy.scan_operations import exp
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    s = decoder.read(c)
    t.once_linear = True
    m = mixture.read(c, width="intermediate_size", wide=True, balanced=True)
    window, size = c.count("sliding_window"), c.size("block_size", default=256)

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        residual = x = blocks.rms_norm(t, x, "input_layernorm")
        if kind == "linear_attention":
            x = lightning_attention(t, s, x, size)
        else:
            x = decoder.attention(t, s, Heads(), x, around, window)
        x = ops.add(t, ops.scale(t, residual), ops.scale(t, x))
        residual = x = blocks.rms_norm(t, x, "post_attention_layernorm")
        x = mixture.feed(t, s, m, x)
        return ops.add(t, ops.scale(t, residual), ops.scale(t, x))

    return decoder.run(t, s, block, layer_kinds(c, s.layers), Frame(windows=(window,)))


def layer_kinds(c: Config, layers: int) -> list[str]:
    """The attention of each layer: as listed, or every second one linear."""
    kinds = c.each_layer(layers, "layer_types")
    if kinds is None:
        return ["linear_attention" if i % 2 else "full_attention" for i in range(layers)]
    return [str(kind) for kind in kinds]


def lightning_attention(t: Trace, s: Sizes, x: Tensor, size: int) -> Tensor:
    """Linear attention with decays, normalised and behind a gate; every head has its own key."""
    width = s.heads * s.head_dim
    qkv = s.activation(t, t.linear(x, "self_attn.qkv_proj", 3 * width, role="qkv"))
    qkv = recurrent.without_padding(t, qkv)
    qkv = ops.reshape(t, qkv, t.batch, t.sequence, s.heads, 3 * s.head_dim)
    q, k, v = (ops.transpose(t, part, 1, 2) for part in ops.split(t, qkv, *[s.head_dim] * 3, dim=3))
    t.add_buffer(s.heads * (1 + 2 * size + size * size) * t.setting.format.block_bytes)
    recurrent.remember(t, s.heads * s.head_dim * s.head_dim, 0, 1)
    out, state = update(t, q, k, v) if recurrent.continues(t) else scan(t, q, k, v, size)
    out = ops.reshape(t, ops.transpose(t, out, 1, 2), t.batch, t.sequence, width)
    out = blocks.rms_norm(t, out, "self_attn.norm")
    gate = t.linear(x, "self_attn.output_gate", width, role="gate_attention")
    out = ops.mul(t, ops.sigmoid(t, gate), out)
    del gate
    out = t.linear(out, "self_attn.out_proj", s.hidden, role="o")
    if t.setting.cache:
        t.hold_in_cache(state, s.head_dim if recurrent.continues(t) else 0)
    return out


def decayed(t: Trace, x: Tensor, *shape: int) -> Tensor:
    """`x` times a buffer of that shape."""
    return ops.mul(t, x, Tensor(shape, t.setting.format, None))


def scan(t: Trace, q: Tensor, k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Blocks of tokens one after the other: within each of them, and from those before."""
    batch, heads, tokens, channels = q.shape
    state = t.new("zeros", (batch, heads, channels, channels), v.format)
    outputs = []
    for turn in turns(t, -(-tokens // size)):
        length = min(size, tokens - turn * size)
        q_now, k_now, v_now = (ops.narrow(t, part, 2, length) for part in (q, k, v))
        faded = exp(t, ops.scale(t, Tensor((heads, 1, 1), t.setting.format, None)))
        scores = ops.matmul(t, q_now, ops.transpose(t, k_now, -1, -2))
        within = ops.matmul(t, decayed(t, scores, 1, heads, length, length), v_now)
        across = ops.matmul(t, decayed(t, q_now, heads, length, 1), state)
        out = ops.add(t, across, within)
        outputs.append(out)
        if (turn + 1) * size >= tokens and not t.setting.cache:
            break  # nobody needs the last state, nor what it is made of
        keys = ops.transpose(t, decayed(t, k_now, heads, length, 1), -1, -2)
        added = ops.matmul(t, keys, v_now)
        del keys
        state = ops.add(t, ops.mul(t, state, faded), added)
    return ops.cat(t, outputs, 2), state


def update(t: Trace, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """One token."""
    batch, heads, _, channels = q.shape
    kept = Tensor((batch, heads, channels, channels), v.format, None)
    faded = exp(t, ops.scale(t, Tensor((heads, 1, 1), t.setting.format, None)))
    added = ops.matmul(t, ops.transpose(t, k, -1, -2), v)
    state = ops.add(t, ops.mul(t, faded, kept), added)
    return ops.matmul(t, q, state), state
