"""Layers with a recurrent state as llama.cpp builds their graph.

llama.cpp 0c1e57098, src/models/{mamba-base,delta-net-base,qwen35,lfm2}.cpp. Every sequence has one
cell: what the convolution needs of the last tokens, and the state. Sizes follow from the tensors.
The kernels of the gated delta rule are the fused ones, as on CUDA.
"""

from __future__ import annotations

from math import prod

from llmsize.formats import FP32
from llmsize.memory.llamacpp import tensors as ops
from llmsize.memory.llamacpp.builder import Builder
from llmsize.memory.llamacpp.tensors import Tensor, view


def recurrent(b: Builder, x: Tensor) -> Tensor:
    """The output of the layer's mixer, whichever it is by its tensors."""
    if b.has("shortconv.conv"):
        return _short_convolution(b, x)
    if b.has("ssm_f_a"):
        return _kimi_delta(b, x)
    if b.has("ssm_beta") or b.has("ssm_ba"):
        return _delta_net(b, x)
    return _mamba(b, x) if b.has("ssm_x") else _mamba2(b, x)


def _mamba(b: Builder, x: Tensor) -> Tensor:
    tokens, sequences = b.by_sequence
    inner, size = b.needed("ssm_out").shape[0], b.named("ssm_a").shape[0]
    rank = b.needed("ssm_dt").shape[0]
    old = _old_columns(b)
    both = ops.matmul(b.needed("ssm_in"), ops.reshape(x, x.shape[0], tokens, sequences))
    part = _part(both, inner, tokens, sequences)
    z = _part(both, inner, tokens, sequences)
    mixed = _convolved(b, old, part)
    found = ops.matmul(b.needed("ssm_x"), mixed)
    dt = _part(found, rank, tokens, sequences)
    keys = _part(found, size, 1, tokens, sequences)
    queries = _part(found, size, 1, tokens, sequences)
    if b.has("ssm_dt_norm"):
        dt, keys, queries = (
            b.norm(part, f"ssm_{name}_norm")
            for part, name in ((dt, "dt"), (keys, "b"), (queries, "c"))
        )
    else:
        dt = ops.contiguous(dt)
    dt = b.linear(dt, "ssm_dt")
    scanned = _scan(b, mixed, (dt, b.named("ssm_a"), keys, queries), inner * size)
    y = view(scanned, inner, tokens, sequences, span=4 * inner * b.tokens)
    y = ops.apply("add", y, ops.apply("mul", mixed, b.named("ssm_d")))
    y = ops.gated(ops.contiguous(z), y)
    return _flat(ops.matmul(b.needed("ssm_out"), y), b)


def _mamba2(b: Builder, x: Tensor) -> Tensor:
    tokens, sequences = b.by_sequence
    inner, heads = b.needed("ssm_out").shape[0], b.named("ssm_a").shape[1]
    old = _old_columns(b)
    channels = old.shape[1]
    both = b.linear(x, "ssm_in")
    both = ops.reshape(both, both.shape[0], tokens, sequences)
    z = _part(both, inner // heads, heads, tokens, sequences)
    part, dt = _part(both, channels, tokens, sequences), _part(both, heads, tokens, sequences)
    mixed = _convolved(b, old, part)
    values = _part(mixed, inner // heads, heads, tokens, sequences)
    size = b.states[b.layer][1].shape[0] // inner
    keys = _part(mixed, (channels - inner) // 2, tokens, sequences)
    queries = _part(mixed, (channels - inner) // 2, tokens, sequences)
    dt = ops.apply("add", ops.contiguous(dt), b.weight("ssm_dt", "bias"))
    scanned = _scan(b, values, (dt, b.named("ssm_a"), keys, queries), inner * size)
    y = view(scanned, *values.shape, span=4 * inner * b.tokens)
    y = ops.apply("add", y, ops.apply("mul", values, b.named("ssm_d")))
    y = ops.gated(ops.contiguous(z), y)
    if (weight := b.weight("ssm_norm")) is not None:
        y = ops.reshape(y, weight.shape[0], weight.shape[1], tokens, sequences)
        y = b.norm(y, "ssm_norm")
    return b.linear(ops.reshape(y, inner, b.tokens), "ssm_out")


def _delta_net(b: Builder, x: Tensor) -> Tensor:
    """The gated delta rule of Qwen3-Next and Qwen3.5."""
    tokens, sequences = b.by_sequence
    inner, head = b.needed("ssm_out").shape[0], b.needed("ssm_norm").shape[0]
    heads = inner // head
    qkv = b.linear(x, "attn_qkv")
    qkv = ops.reshape(qkv, qkv.shape[0], tokens, sequences)
    z = b.linear(x, "attn_gate")
    beta, decay = _rates(b, x, heads)
    old = _old_columns(b)
    columns = _joined(b, old, qkv)
    state = ops.reshape(_old(b, 1), head, head, heads, sequences)
    mixed = ops.made(
        "ssm_conv", FP32, (old.shape[1], tokens, sequences), columns, b.needed("ssm_conv1d")
    )
    mixed = ops.apply("unary", mixed)
    key_heads = (old.shape[1] - inner) // 2 // head
    keys = [_repeated(b, _part(mixed, head, key_heads, tokens, sequences), heads) for _ in "qk"]
    values = _part(mixed, head, heads, tokens, sequences)
    out = _delta(b, *keys, values, decay, beta, state)
    gate = ops.apply("unary", ops.reshape(z, head, heads, tokens, sequences))
    y = ops.apply("mul", b.norm(out, "ssm_norm"), gate)
    y = ops.matmul(b.needed("ssm_out"), ops.reshape(y, inner, tokens, sequences))
    return _flat(y, b)


def _delta(b: Builder, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> Tensor:
    """The output of the delta rule's kernel for every token; the new state goes to the cache."""
    head, heads, tokens, sequences = v.shape
    inner = head * heads
    size = inner * b.tokens + head * inner * sequences
    out = ops.made("delta_net", FP32, (size,), q, k, v, *others)
    _write(b, 1, view(out, head, head, heads, sequences, span=4 * head * inner * sequences))
    return view(out, head, heads, tokens, sequences, span=4 * inner * b.tokens)


def _kimi_delta(b: Builder, x: Tensor) -> Tensor:
    """The delta rule of Kimi Linear, which forgets every channel at a rate of its own."""
    tokens, sequences = b.by_sequence
    inner, head = b.needed("attn_q").shape[1], b.needed("ssm_norm").shape[0]
    heads = inner // head
    old = _old(b, 0)
    q, k, v = (
        ops.reshape(_own_columns(b, old, x, part), head, heads, tokens, sequences) for part in "qkv"
    )
    decay = ops.matmul(b.needed("ssm_f_b"), ops.matmul(b.needed("ssm_f_a"), x))
    decay = ops.apply("unary", ops.apply("add", decay, b.weight("ssm_dt", "bias")))
    decay = ops.apply("mul", ops.reshape(decay, head, heads, b.tokens), b.named("ssm_a"))
    decay = ops.reshape(decay, head, heads, tokens, sequences)
    beta = ops.reshape(b.linear(x, "ssm_beta"), 1, heads, tokens, sequences)
    beta = ops.apply("unary", beta)
    state = ops.reshape(_old(b, 1), head, head, heads, sequences)
    q, k = _repeated(b, q, heads), _repeated(b, k, heads)
    out = ops.contiguous(_delta(b, q, k, v, decay, beta, state))
    gate = ops.matmul(b.needed("ssm_g_b"), ops.matmul(b.needed("ssm_g_a"), x))
    gate = ops.apply("unary", ops.reshape(gate, head, heads, b.tokens))
    out = b.norm(ops.reshape(out, head, heads, b.tokens), "ssm_norm")
    out = ops.contiguous(ops.apply("mul", out, gate), inner, b.tokens)
    return b.linear(out, "attn_output")


def _own_columns(b: Builder, old: Tensor, x: Tensor, part: str) -> Tensor:
    """Queries, keys or values after their own convolution."""
    tokens, sequences = b.by_sequence
    kernel = b.needed(f"ssm_conv1d_{part}")
    before, inner = kernel.shape[0] - 1, kernel.shape[2]
    x = ops.reshape(b.linear(x, f"attn_{part}"), inner, tokens, sequences)
    span = 4 * (old.shape[0] * (sequences - 1) + before * inner)
    columns = _joined(b, view(old, before, inner, sequences, span=span), x)
    kernel = ops.reshape(kernel, before + 1, inner)
    return ops.apply(
        "unary", ops.made("ssm_conv", FP32, (inner, tokens, sequences), columns, kernel)
    )


def _rates(b: Builder, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """How much of a token is written, and how much of the state stays, for every head."""
    tokens, sequences = b.by_sequence
    if b.has("ssm_ba"):
        both = b.linear(x, "ssm_ba")
        beta = ops.contiguous(_part(both, heads, tokens, sequences))
        beta = ops.apply("unary", beta)
        alpha = ops.contiguous(_part(both, heads, tokens, sequences))
    else:
        beta = ops.reshape(b.linear(x, "ssm_beta"), 1, heads, tokens, sequences)
        beta = ops.apply("unary", beta)
        alpha = ops.reshape(b.linear(x, "ssm_alpha"), heads, tokens, sequences)
    alpha = ops.apply("add", alpha, b.weight("ssm_dt", "bias"))
    decay = ops.apply("mul", ops.apply("unary", alpha), b.named("ssm_a"))
    shape = (1, heads, tokens, sequences)
    if b.has("ssm_ba"):
        beta = ops.reshape(beta, *shape)
    return beta, ops.reshape(decay, *shape)


def _repeated(b: Builder, x: Tensor, heads: int) -> Tensor:
    """Normed queries or keys; Qwen3-Next repeats each for the value heads that share it."""
    x = ops.apply("scale", ops.apply("norm", x))
    if x.shape[1] != heads and b.has("ssm_ba"):
        head, few, tokens, sequences = x.shape
        flat = ops.reshape(x, head, 1, few, tokens * sequences)
        x = ops.made("repeat", FP32, (head, heads // few, few, tokens * sequences), flat)
        x = ops.reshape(x, head, heads, tokens, sequences)
    return x


def _short_convolution(b: Builder, x: Tensor) -> Tensor:
    tokens, sequences = b.by_sequence
    hidden = x.shape[0]
    three = ops.matmul(b.needed("shortconv.in_proj"), ops.reshape(x, hidden, tokens, sequences))
    first, gate, last = (_part(three, hidden, tokens, sequences) for _ in range(3))
    product = ops.apply("mul", first, last)
    columns = _joined(b, _old_columns(b), product)
    mixed = ops.made(
        "ssm_conv", FP32, (hidden, tokens, sequences), columns, b.needed("shortconv.conv")
    )
    y = ops.apply("mul", gate, mixed)
    return _flat(ops.matmul(b.needed("shortconv.out_proj"), y), b)


def _part(x: Tensor, *shape: int) -> Tensor:
    """A part of the rows of `x`."""
    width = x.shape[0] if len(shape) < 4 else x.shape[0] * (1 if x.shape[3] == 1 else x.shape[1])
    rows = prod(x.shape) // width
    inside = prod(shape) // rows
    return view(x, *shape, span=4 * (width * (rows - 1) + inside))


def _flat(y: Tensor, b: Builder) -> Tensor:
    return ops.reshape(y, y.shape[0], b.tokens)


def _old(b: Builder, which: int) -> Tensor:
    """The cells of all sequences, from the cache; one of them is cleared there first."""
    cache = b.states[b.layer][which]
    b.graph.expand(ops.written(cache, cache))
    cells = ops.reshape(cache, *cache.shape)
    used = b.graph.expand(ops.get_rows(cells, b.cells))
    _write(b, which, ops.get_rows(cells, b.other_cells))
    return used


def _old_columns(b: Builder) -> Tensor:
    """What the convolution keeps, as (columns, channels, sequences)."""
    kernel = b.weight("ssm_conv1d") or b.needed("shortconv.conv")
    return ops.reshape(_old(b, 0), kernel.shape[0] - 1, kernel.shape[1], b.server.sequences)


def _joined(b: Builder, old: Tensor, new: Tensor) -> Tensor:
    """Old and new columns side by side; the last ones go back to the cache."""
    turned = ops.turned(new)
    columns = ops.concat(old, turned)
    length = columns.shape[0]
    span = 4 * (length * (prod(columns.shape[1:]) - 1) + old.shape[0])
    _write(b, 0, view(columns, *old.shape, span=span))
    return columns


def _write(b: Builder, which: int, x: Tensor) -> None:
    b.graph.expand(ops.written(b.states[b.layer][which], x))


def _convolved(b: Builder, old: Tensor, new: Tensor) -> Tensor:
    columns = _joined(b, old, new)
    shape = (old.shape[1], columns.shape[0] - old.shape[0], columns.shape[2])
    x = ops.made("ssm_conv", FP32, shape, columns, b.needed("ssm_conv1d"))
    x = ops.apply("add", x, b.weight("ssm_conv1d", "bias"))
    return ops.apply("unary", x)


def _scan(b: Builder, values: Tensor, others: tuple[Tensor, ...], state: int) -> Tensor:
    """Outputs of all tokens and the new states in one tensor; states go back to the cache."""
    cache = b.states[b.layer][1]
    b.graph.expand(ops.written(cache, cache))
    size = prod(values.shape) + state * b.server.sequences
    old = ops.reshape(cache, *cache.shape)
    scanned = ops.made("ssm_scan", FP32, (size,), old, values, *others, b.cells)
    b.graph.expand(scanned)
    _write(b, 1, ops.get_rows(old, b.other_cells))
    _write(b, 1, view(scanned, state * b.server.sequences, span=4 * state * b.server.sequences))
    return scanned
