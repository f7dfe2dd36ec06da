"""Scaled dot-product attention, by the kernel that PyTorch would choose.

Shapes are batch, heads, sequence, channels. The choice is CUDA's (aten/src/ATen/native/
transformers/cuda/sdp_utils.cpp, torch v2.13): flash for 16-bit without a mask, memory-efficient for
fp32 or with a mask, the composite `math` where neither applies.
"""

from __future__ import annotations

from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.layout import moved
from llmsize.anatomy.operations import GradList, keep_output
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Tensor, laid_out
from llmsize.formats import BF16, BOOL, FP16, FP32, INT64, Format

FLASH_HEAD_DIM = 256
"""Largest head that the flash kernel takes."""

ALIGNED_BYTES = 16
"""What a head's channels must fill whole numbers of for the memory-efficient kernel: 128 bits.

aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `minimum_gemm_alignment`.
"""


def attend(
    t: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    dropout: float = 0.0,
    repeated: bool = True,
) -> Tensor:
    """`sdpa_attention_forward` of transformers: the fused kernel that fits.

    Shared keys are `repeated` for their queries where a kernel does not take them as they are.
    """
    groups = q.shape[1] // k.shape[1]
    grouped = mask is None and k.shape[-1] == v.shape[-1] <= FLASH_HEAD_DIM
    if groups > 1 and not grouped and repeated and q.shape[2] == 1:
        # one token: its heads take the place of tokens beside the keys that they share
        packed = q.view(q.shape[0], k.shape[1], groups, q.shape[-1])
        packed, k, v = (ops.cast(t, x) for x in (packed, k, v))
        return ops.reshape(t, efficient(t, packed, k, v, mask), *q.shape[:-1], v.shape[-1])
    if groups > 1 and not grouped and repeated:
        k, v = ops.repeat(t, k, groups), ops.repeat(t, v, groups)
        groups = 1
    given = q, k, v  # as they are held until the kernel has run
    q, k, v = (ops.cast(t, x) for x in given)
    mask = None if mask is None else ops.cast(t, mask)
    same = q.shape[-1] == v.shape[-1] <= FLASH_HEAD_DIM
    if q.format in (BF16, FP16) and mask is None and same:
        return flash(t, q, k, v)
    whole = all(x.shape[-1] * x.format.block_bytes % ALIGNED_BYTES == 0 for x in (q, v))
    if groups == 1 and whole:
        return efficient(t, q, k, v, mask)
    return math(t, q, k, v, mask, dropout, repeated)


def flash(t: Tape, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keeps q, k, v, the output and the log-sum-exp in fp32; takes grouped heads as they are.

    Heads are padded to a multiple of eight channels (`pad_last_dim`).
    """
    size = q.shape[-1]
    if size % 8:
        out = flash(t, *[ops.pad_last(t, x, 8 - size % 8) for x in (q, k, v)])
        return ops.slice_last(t, out, size)
    node = t.record(_flash_backward, (q, k, v), (q, k, v))
    out = laid_out(t.new("flash_attention", (*q.shape[:-1], v.shape[-1]), q.format, node), q)
    beside = [
        t.new("flash_attention", q.shape[:-1], FP32),
        t.new("flash_attention", (2,), INT64),  # random seed
        t.new("flash_attention", (), INT64),
    ]
    for output in (out, *beside):
        keep_output(t, node, output)
    return out


def _flash_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """A gradient for each of q, k, v; q's is summed in fp32, k's and v's for every query head."""
    q, k, v = node.saved[:3]
    assert q is not None and k is not None and v is not None
    batch, heads, sequence, channels = q.shape
    rows = -(-sequence // 128) * 128
    padded = -(-channels // 32) * 32
    workspace = [
        t.new("flash_attention_backward", (batch, heads, rows), FP32),
        t.new("flash_attention_backward", (batch, heads, rows, padded), FP32),
    ]
    made = [t.like("flash_attention_backward", x) for x in (q, k, v)]
    if k.shape[1] != heads:
        workspace += [
            t.new("flash_attention_backward", (batch, heads, *x.shape[2:]), x.format)
            for x in (k, v)
        ]
    return made


def efficient(t: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Keeps q, k, v, the mask, the output and the log-sum-exp in fp32; every head has its keys."""
    mask = aligned(t, additive(t, mask, q), q, k)
    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    node = t.record(_efficient_backward, inputs, (q, k, v, mask))
    out = _by_token(t.new("efficient_attention", (*q.shape[:-1], v.shape[-1]), q.format))
    out.node = node
    batch, heads, sequence, _ = q.shape
    rows = -(-sequence // 32) * 32 if node is not None else 0
    beside = [t.new("efficient_attention", (batch, heads, rows), FP32)]
    beside += [t.new("efficient_attention", (), INT64) for _ in ("seed", "offset")]
    for output in (out, *beside):
        keep_output(t, node, output)
    return out


def _efficient_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    made: list[Tensor | None] = [
        _by_token(t.new("efficient_attention_backward", x.shape, x.format))
        for x in node.saved[:3]
        if x
    ]
    mask = node.saved[3]
    if mask is not None:
        wanted = node.needs(3)
        made.append(
            t.new("efficient_attention_backward", mask.shape, mask.format) if wanted else None
        )
    return made


def _by_token(x: Tensor) -> Tensor:
    """Laid out by batch, sequence, heads, channels, as the kernel does."""
    batch, heads, sequence, channels = x.shape
    x.strides = moved((batch, sequence, heads, channels), None, (0, 2, 1, 3))
    return x


def additive(t: Tape, mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask of yes and no made into one to add, for the whole batch, in the format of `q`."""
    if mask is None or mask.format is not BOOL:
        return mask
    return t.new("where", (q.shape[0], *mask.shape[1:]), q.format)


ALIGNMENT = 8
"""Entries whose multiple a row of the memory-efficient kernel's mask takes.

aten/src/ATen/native/transformers/attention.cpp (torch v2.5), `mem_eff_alignment`; torch v2.13 pads
a mask of 17 columns to 24, and one of 24 not at all.
"""


def aligned(t: Tape, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """A mask for every head as the memory-efficient kernel takes it: its rows may be padded."""
    if mask is None:
        return None
    missing = -mask.shape[-1] % ALIGNMENT
    if missing:
        mask = ops.slice_last(t, ops.pad_last(t, mask, missing), mask.shape[-1])
    return ops.expand(t, mask, q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def causal(t: Tape, q: Tensor, k: Tensor) -> Tensor:
    """The mask that the composite makes for itself where attention is causal."""
    shape = (q.shape[2], k.shape[2])
    ones = t.new("ones", shape, BOOL)
    allowed = t.new("tril", shape, BOOL)
    del ones
    mask = t.new("where", shape, q.format)
    del allowed
    return mask


def math(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, repeated: bool
) -> Tensor:
    """The composite, in fp32 even under autocast: what products need of q, k and scores is kept.

    aten/src/ATen/native/transformers/attention.cpp, `_scaled_dot_product_attention_math`.
    """
    autocast, t.autocast = t.autocast, None
    try:
        return composite(t, q, k, v, mask, dropout, repeated)
    finally:
        t.autocast = autocast


def composite(
    t: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    repeated: bool,
) -> Tensor:
    """Scaled q and k, scores, their softmax, weighted values; one token sees all before it."""
    format = q.format
    mask = additive(t, mask, q)
    q, k, v = (ops.to(t, x, FP32) for x in (q, k, v))
    given, q = (q, k, v), ops.scale(t, q)
    if mask is None and q.shape[2] > 1:
        mask = causal(t, q, k)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and repeated:
        k, v = (ops.contiguous(t, ops.repeat(t, x, groups)) for x in (k, v))
    scores = ops.matmul(t, q, ops.scale(t, ops.transpose(t, k, -1, -2)))
    scores = scores if mask is None else ops.add(t, scores, mask)
    weights = safe_softmax(t, scores)
    del scores
    weights = ops.dropout(t, weights, dropout)
    returned = ops.to(t, weights, format)
    out = ops.to(t, ops.matmul(t, weights, v), format)
    del given, returned
    return out


def safe_softmax(t: Tape, x: Tensor) -> Tensor:
    """Softmax that gives zeros where all is masked: the plain one and a mark beside its result."""
    plain, masked = t.new("softmax", x.shape, x.format), t.new("eq", x.shape, BOOL)
    out = ops.native_softmax(t, x)
    del plain, masked
    return out


def eager(
    t: Tape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    softcap: bool = False,
    softmax_format: Format | None = FP32,
    cast_back: bool = True,
) -> Tensor:
    """`eager_attention_forward` of transformers' Llama: fp32 softmax and its 16-bit copy.

    Others leave the format of the softmax to autocast, and some do not `cast_back` what it gives.
    """
    groups = q.shape[1] // k.shape[1]
    keys, values = ops.repeat(t, k, groups), ops.repeat(t, v, groups)
    weights = ops.scale(t, ops.matmul(t, q, ops.transpose(t, keys, -1, -2)))
    if softcap:
        weights = ops.scale(t, weights)
        weights = ops.tanh(t, weights)
        weights = ops.scale(t, weights)
    weights = weights if mask is None else ops.add(t, weights, mask)
    weights = (
        ops.to(t, ops.softmax(t, weights, softmax_format), q.format)
        if cast_back
        else ops.softmax(t, weights, softmax_format)
    )
    t.attention_weights = weights = ops.dropout(t, weights, dropout)
    by_token = ops.contiguous(t, ops.transpose(t, ops.matmul(t, weights, values), 1, 2))
    return ops.transpose(t, by_token, 1, 2)
