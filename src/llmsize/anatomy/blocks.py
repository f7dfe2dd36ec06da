"""Parts that several families share, each as its reference implementation has it.

transformers v5.23: src/transformers/models/llama/modeling_llama.py and its kin. Local variables
live as long as there, since a tensor lives as long as its last name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from llmsize.anatomy import attention, objectives
from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Leaf
from llmsize.anatomy.cache import Kind, LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.errors import printable
from llmsize.formats import BOOL, FP32, INT64, Format


def embed(t: Trace, name: str, rows: int, width: int, role: str = "embedding") -> Tensor:
    """Token embeddings: batch, sequence, width."""
    table = t.weight(f"{name}.weight", (rows, width), role)
    x = ops.embedding(t, t.table(table), t.batch, Dim(t.setting.sequence, "sequence"))
    x = t.with_gradient(x) if t.setting.input_gradients else x
    return x if t.setting.adapter is None else t.setting.adapter.embedded(t, x)


def scaled_embeddings(t: Trace, x: Tensor) -> Tensor:
    """Embeddings that their own layer scales: a gradient asked for is that of the scaled ones."""
    if not (t.setting.input_gradients and type(x.node) is Leaf):
        return ops.scale(t, x)
    x.node = None  # and nobody waits for that of what they were before
    return t.with_gradient(ops.scale(t, x))


def positions(t: Trace, sequences: int = 1) -> Tensor:
    """The position of each token of one sequence, or of each."""
    counted = t.new("arange", (sequences, t.sequence), INT64)
    shifted = t.new("add", counted.shape, INT64)
    del counted
    return shifted


def rms_norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """LlamaRMSNorm: normalised in fp32, scaled in the input's format."""
    weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
    if t.setting.fused_norm:
        return ops.fused_norm(t, x, weight)
    format = x.format
    x = ops.to(t, x, FP32)
    variance = ops.mean(t, ops.power(t, x))
    x = ops.mul(t, x, ops.rsqrt(t, ops.shift(t, variance)))
    return ops.mul(t, weight, ops.to(t, x, format))


def layer_norm(t: Trace, x: Tensor, name: str, *, bias: bool = True) -> Tensor:
    """torch.nn.LayerNorm."""
    width = (x.shape[-1],)
    weight = t.weight(f"{name}.weight", width, "norm")
    return ops.layer_norm(t, x, weight, t.weight(f"{name}.bias", width, "norm") if bias else None)


class Rotation(NamedTuple):
    """What rotary embedding multiplies by: batch, sequence, channels, or heads between."""

    cosines: Tensor
    sines: Tensor


def rotary(t: Trace, x: Tensor, channels: int, format: Format | None = None) -> Rotation:
    """The cosines and sines of every position, made once for all layers, in `format` or `x`'s."""
    _frequencies(t, channels)
    grad, t.grad = t.grad, False
    position = t.new("to", (1, t.sequence, 1), FP32)
    half = t.new("mul", (1, t.sequence, channels // 2), FP32)
    del position
    angles = t.new("cat", (1, t.sequence, channels), FP32)
    result = cosines_and_sines(t, angles, format or x.format)
    t.grad = grad
    del half
    return result


def _frequencies(t: Trace, channels: int) -> None:
    """Count the inverse frequencies of a table, and a copy of them as they were."""
    t.rotated.append(channels)
    t.buffers += 2 * FP32.block_bytes * (channels // 2)


def half_rotary(t: Trace, x: Tensor, channels: int, format: Format | None = None) -> Rotation:
    """The same for one half of the channels, which the other half shares (gpt-oss)."""
    _frequencies(t, channels)
    position = t.new("to", (1, t.sequence, 1), FP32)
    angles = t.new("mul", (1, t.sequence, channels // 2), FP32)
    del position
    return cosines_and_sines(t, angles, format or x.format)


def cosines_and_sines(t: Trace, angles: Tensor, format: Format) -> Rotation:
    """The scaled cosine and sine of every angle, in `format`."""
    cosines = ops.scale(t, ops.unary(t, "cos", angles))
    sines = ops.scale(t, ops.unary(t, "sin", angles))
    return Rotation(ops.to(t, cosines, format), ops.to(t, sines, format))


def complex_rotary(t: Trace, x: Tensor, channels: int, format: Format | None = None) -> Rotation:
    """The same as complex numbers, a cosine and a sine each, in one table."""
    _frequencies(t, channels)
    half = (1, t.sequence, channels // 2)
    position = t.new("to", (1, t.sequence, 1), FP32)
    angles = t.new("mul", half, FP32)
    del position
    ones = t.new("ones_like", half, FP32)
    polar = t.new("polar", (1, t.sequence, channels), FP32)
    del ones
    table = t.new("mul", polar.shape, FP32)
    del angles, polar
    return Rotation(table, table)


def rotary_in_sections(
    t: Trace, x: Tensor, channels: int, format: Format | None = None
) -> Rotation:
    """The same where each token of each sequence has three positions: time, height and width."""
    _frequencies(t, channels)
    format = format or x.format
    angles = t.new("mul", (3, t.batch, t.sequence, channels // 2), FP32)
    cosines = ops.scale(t, ops.unary(t, "cos", angles))
    sines = ops.scale(t, ops.unary(t, "sin", angles))
    sines = t.new("cat", (t.batch, 1, t.sequence, channels), FP32)
    cosines = t.new("cat", (t.batch, 1, t.sequence, channels), FP32)
    return Rotation(ops.to(t, cosines, format), ops.to(t, sines, format))


def rotate_half(t: Trace, x: Tensor) -> Tensor:
    """The second half of the channels, negated, before the first."""
    half = x.shape[-1] // 2
    lower = ops.slice_last(t, x, half)
    upper = ops.slice_last(t, x, half)
    return ops.cat(t, (ops.neg(t, upper), lower))


def rotate(t: Trace, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding of `x`: batch, heads, sequence, channels."""
    if t.setting.fused_rotary:
        return ops.rotate_in_place(t, x, cosines, sines)
    return ops.add(t, ops.mul(t, x, cosines), ops.mul(t, rotate_half(t, x), sines))


def turn(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Rotary embedding of all channels of each head of q and k, or of the first ones."""
    cosines, sines = rotation
    if cosines.shape[-1] == q.shape[-1]:
        return rotate(t, q, cosines, sines), rotate(t, k, cosines, sines)
    return rotate_part(t, q, k, cosines, sines)


def turn_pairs(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn` of neighbouring channels, which come out in two halves (DeepSeek V3)."""
    cosines, sines = (ops.slice_last(t, x, x.shape[-1] // 2) for x in rotation)
    (q_even, q_odd), (k_even, k_odd) = _even_and_odd(t, q), _even_and_odd(t, k)
    q = _rotate_pair(t, q_even, q_odd, cosines, sines)
    del q_even, q_odd
    return q, _rotate_pair(t, k_even, k_odd, cosines, sines)


def _even_and_odd(t: Trace, x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return ops.slice_last(t, x, half, 2), ops.slice_last(t, x, half, 2)


def _rotate_pair(t: Trace, even: Tensor, odd: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first = ops.sub(t, ops.mul(t, even, cosines), ops.mul(t, odd, sines))
    second = ops.add(t, ops.mul(t, odd, cosines), ops.mul(t, even, sines))
    return ops.cat(t, (first, second))


def by_token(rotation: Rotation) -> Rotation:
    """The tables for heads that lie within each token: batch, sequence, heads, channels."""
    cosines, sines = (x.view(1, x.shape[1], 1, x.shape[2]) for x in rotation)
    return Rotation(cosines, sines)


def for_pairs(t: Trace, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """The tables laid out anew for neighbouring channels, as some models do in every layer."""
    cosines, sines = (t.new("repeat", x.shape, x.format) for x in rotation)
    return cosines, sines


def turn_neighbours(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn` of neighbouring channels (Helium)."""
    cosines, sines = for_pairs(t, rotation)
    q_turned = rotate(t, q, cosines, sines)
    return q_turned, rotate(t, k, cosines, sines)


def turn_neighbours_in_fp32(
    t: Trace, q: Tensor, k: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """`turn` of neighbouring channels whose products are in fp32, cast back (ERNIE 4.5)."""
    cosines, sines = for_pairs(t, rotation)
    turned = [
        ops.add(
            t,
            ops.mul(t, ops.to(t, x, FP32), cosines),
            ops.mul(t, ops.to(t, rotate_half(t, x), FP32), sines),
        )
        for x in (q, k)
    ]
    return ops.to(t, turned[0], q.format), ops.to(t, turned[1], q.format)


def turn_and_temper(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn`, and queries that grow with their position (Ministral 3)."""
    q, k = turn(t, q, k, rotation)
    return tempered(t, q), k


def tempered(t: Trace, q: Tensor) -> Tensor:
    """Queries scaled for each token by a logarithm of its position."""
    growth = t.new("log", (1, 1, t.sequence, 1), FP32)
    return ops.mul(t, q, ops.to(t, growth, q.format))


def turn_halves(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn` by a table that both halves of the channels share (gpt-oss)."""
    turned = []
    for x in (q, k):
        half = x.shape[-1] // 2
        first, second = ops.split(t, x, half, half)
        turned.append(_rotate_pair(t, first, second, *rotation))
    return turned[0], turned[1]


def turn_complex(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn` of neighbouring channels as complex numbers in fp32, cast back (DeepSeek V2)."""
    format, table = q.format, rotation.cosines
    q, k = ops.to(t, q, FP32), ops.to(t, k, FP32)
    q_turned = ops.to(t, ops.mul_complex(t, q, table), format)
    return q_turned, ops.to(t, ops.mul_complex(t, k, table), format)


def turn_and_cast(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn` by fp32 cosines and sines, cast back (OLMo)."""
    format = q.format
    q, k = turn(t, q, k, rotation)
    return ops.to(t, q, format), ops.to(t, k, format)


def turn_in_fp32(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn` of q and k in fp32, cast back (Command R)."""
    format = q.format
    q, k = turn(t, ops.to(t, q, FP32), ops.to(t, k, FP32), rotation)
    return ops.to(t, q, format), ops.to(t, k, format)


def rotate_part(
    t: Trace, q: Tensor, k: Tensor, cosines: Tensor, sines: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of the first channels of each head of q and k; the rest passes."""
    size = cosines.shape[-1]
    q_turned, q_rest = (ops.slice_last(t, q, n) for n in (size, q.shape[-1] - size))
    k_turned, k_rest = (ops.slice_last(t, k, n) for n in (size, k.shape[-1] - size))
    q_turned = rotate(t, q_turned, cosines, sines)
    k_turned = rotate(t, k_turned, cosines, sines)
    q_turned = ops.cat(t, (q_turned, q_rest))
    k_turned = ops.cat(t, (k_turned, k_rest))
    return q_turned, k_turned


def remember(t: Trace, k: Tensor, v: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values by heads stay for the next token: of all tokens, or of the last `window`.

    What comes back are those of all tokens that attention sees.
    """
    kind: Kind = "window" if window else "full"
    t.remember(LayerCache(kind, k.shape[1], k.shape[-1], v.shape[-1], window))
    return store(t, k, v, window)


def store(t: Trace, k: Tensor, v: Tensor, window: int = 0) -> tuple[Tensor, Tensor]:
    """The dynamic cache of transformers: old and new, copied together for each new token.

    A window's cache is a view of what was copied last (transformers v5.23, cache_utils.py).
    """
    if t.setting.adapter is not None:
        k, v = t.setting.adapter.cached(t, k, v)
    if not t.setting.cache:
        return k, v
    if not window:
        k = grown(t, k)
        return k, grown(t, v)
    past = min(t.setting.past, window - 1)
    if not past:
        t.stored.append(t.new("window", (), INT64, "cache"))
    whole = [t.new("cat", (*x.shape[:2], past + x.shape[2], x.shape[3]), x.format, "cache")
             for x in (k, v)]  # fmt: skip
    for copy in whole:  # both are copied before the old ones go
        t.replace_cache(copy, t.setting.past)
    return whole[0], whole[1]


def grown(t: Trace, x: Tensor) -> Tensor:
    """What is cached of all tokens: batch, heads, tokens, channels."""
    if not t.setting.cache:
        return x
    past = t.setting.past
    whole = t.new("cat", (*x.shape[:2], past + x.shape[2], x.shape[3]), x.format, "cache")
    t.replace_cache(whole, past)
    return whole


def attend(
    t: Trace,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    softcap: bool = False,
) -> Tensor:
    """Attention of q, k, v by heads; the result is batch, sequence, all channels of all heads.

    `dropout` is the share of weights that training leaves out. No fused kernel limits scores: with
    a `softcap` attention is written out.
    """
    groups = q.shape[1] // k.shape[1]
    if t.setting.repeats_keys and groups > 1:
        k, v = ops.repeat(t, k, groups), ops.repeat(t, v, groups)
    if t.setting.attention == "eager" or softcap:
        assert mask is not None
        out = attention.eager(t, q, k, v, mask, dropout=dropout, softcap=softcap)
    else:
        out = attention.attend(t, q, k, v, mask, dropout=dropout)
    adapter = t.attending
    return ops.merge_heads(t, out if adapter is None else adapter.attended(t, q, out))


def hand_back(t: Trace, returned: list[Tensor], weights: Tensor) -> None:
    """Hold what a layer returns beside its output, in place of what the last one did.

    The loop over the layers still has it when the next layer runs.
    """
    if not t.replaying:
        returned[:] = [weights]


Activation = Callable[[Trace, Tensor], Tensor]


def gelu_by_tanh(t: Trace, x: Tensor) -> Tensor:
    """GELU by its tanh formula, which GPT-2's implementation writes out."""
    return ops.gelu(t, x) if t.setting.fused_activation else ops.gelu_new(t, x)


def relu_squared(t: Tape, x: Tensor) -> Tensor:
    """The square of ReLU (Nemotron)."""
    return ops.power(t, ops.relu(t, x))


ACTIVATIONS: dict[str, Activation] = {
    "silu": ops.silu, "swish": ops.silu, "gelu": ops.gelu, "gelu_pytorch_tanh": ops.gelu,
    "relu": ops.relu, "gelu_new": gelu_by_tanh,
    "relu2": relu_squared,
}  # fmt: skip


def activation(c: Config, *names: str, default: str) -> Activation:
    """The activation that a configuration names."""
    name = c.text(*names, default=default)
    if name not in ACTIVATIONS:
        raise c.error(
            f"has the unknown activation `{printable(name)}`",
            f"known ones: {', '.join(ACTIVATIONS)}",
        )
    return ACTIVATIONS[name]


def causal_lm(
    t: Trace,
    hidden: Tensor,
    vocabulary: int,
    *,
    head: str = "lm_head",
    tied: str = "",
    bias: bool = False,
    end: Sequence[Activation] = (),
    loss: Callable[[Trace, Tensor], Tensor] | None = None,
) -> Tensor:
    """The language-model head, and the loss if labels are given; returns the loss or the logits.

    `tied` names the embedding whose weight the head shares, if it has none of its own. `end` is
    what happens to the logits before anybody sees them, `loss` what makes the loss of them if it
    is not that of the next token.
    """
    if t.setting.objective == "score":
        return objectives.score(t, hidden)
    tiled = t.setting.training and t.setting.loss == "tiled"
    if t.setting.objective == "log-probabilities" or (tiled and t.setting.objective == "tokens"):
        return objectives.log_probabilities(t, hidden, _head(t, hidden, vocabulary, head, tied))
    if t.setting.training and t.setting.loss == "fused_linear":
        weight = _head(t, hidden, vocabulary, head, tied)
        return ops.fused_linear_cross_entropy(t, hidden, weight, shifted_labels(t), vocabulary)
    hidden = asked_for(t, hidden)
    project = partial(_logits, t, vocabulary, head, tied, bias, end)
    if t.setting.objective == "policy":
        return objectives.policy_logits(t, project(hidden))
    if t.setting.training and t.setting.loss == "chunked":
        return chunked_loss(t, hidden, project)
    logits = project(hidden)
    if t.setting.keep_outputs or not t.setting.training:
        t.outputs = (logits,)
    return (loss or causal_lm_loss)(t, logits) if t.setting.training else logits


def _logits(
    t: Trace,
    vocabulary: int,
    head: str,
    tied: str,
    bias: bool,
    end: Sequence[Activation],
    hidden: Tensor,
) -> Tensor:
    if tied:
        offset = t.weight(f"{head}.bias", (vocabulary,), "bias") if bias else None
        table = t.table(t.weights[-1, f"{tied}.weight"])
        logits = ops.linear(t, hidden, table, offset)
    else:
        logits = t.linear(hidden, head, vocabulary, bias=bias, role="head")
    for step in end:
        logits = step(t, logits)
    return logits


def _head(t: Trace, hidden: Tensor, vocabulary: int, head: str, tied: str) -> Tensor:
    """The weight of the head, or of the embedding that it shares."""
    if tied:
        return t.table(t.weights[-1, f"{tied}.weight"])
    return t.weight(f"{head}.weight", (vocabulary, hidden.shape[-1]), "head")


def asked_for(t: Trace, hidden: Tensor) -> Tensor:
    """What the head is given: all tokens, or a view of the last one."""
    if not t.setting.last_logits:
        return hidden
    return Tensor((t.batch, 1, hidden.shape[-1]), hidden.format, hidden.storage, hidden.node)


def in_fp32(t: Tape, x: Tensor) -> Tensor:
    """`x` in fp32."""
    return ops.to(t, x, FP32)


SOFTCAP: tuple[Activation, ...] = (ops.scale, ops.tanh, ops.scale)
"""Logits kept within bounds by a scaled tanh (Gemma 2)."""


def causal_lm_loss(t: Trace, logits: Tensor) -> Tensor:
    """The loss of the labels shifted by one token; transformers computes it in fp32."""
    if t.setting.compiled_loss:
        scores = ops.to(t, logits, FP32) if t.setting.fp32_logits else logits
        return ops.compiled_cross_entropy(t, scores, shifted_labels(t))
    scores = ops.to(t, logits, FP32)
    if t.setting.shifts_logits:
        kept = ops.copy(t, ops.narrow(t, scores, 1, t.sequence - 1))
        labels = t.new("copy", (t.batch, t.sequence - 1), INT64)
        return ops.cross_entropy(t, kept, labels)
    labels = t.new("pad", (t.batch, t.sequence + 1), INT64)
    targets = t.new("copy", (t.batch, t.sequence), INT64) if t.batch > 1 else labels
    loss = ops.cross_entropy(t, scores, targets)
    del labels
    return loss


def shifted_labels(t: Trace) -> Tensor:
    """What each token should be followed by."""
    return t.new("copy", (t.batch, t.sequence), INT64)


def chunked_loss(t: Trace, hidden: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """The head and the loss of some tokens at a time: torchtune's CEWithChunkedOutputLoss.

    The logits of all chunks are there before the first loss; the loss makes each of them fp32.
    """
    size = -(-t.sequence // t.setting.loss_chunks)
    sizes = [min(size, t.sequence - start) for start in range(0, t.sequence, size)]
    parts = [project(ops.contiguous(t, part)) for part in ops.split(t, hidden, *sizes, dim=1)]
    targets, total = shifted_labels(t), None
    for part in parts:
        if t.setting.compiled_loss:
            loss = ops.compiled_cross_entropy(t, part, targets)
        else:
            loss = ops.cross_entropy(t, ops.to(t, part, FP32), targets)
        total = loss if total is None else ops.add(t, total, loss)
    assert total is not None
    return total


Masking = Literal["as needed", "always", "eager", "alibi"]
"""Whether there is a mask: where the kernel asked for needs one, of yes and no whatever the kernel,
one to add since attention is written out, or one for every head, which ALiBi is part of."""


def mask(
    t: Trace, window: int = 0, masking: Masking = "as needed", heads: int = 1
) -> Tensor | None:
    """The attention mask made once for all layers.

    Without padding, a fused kernel is told that attention is causal and needs no mask, unless the
    sequence outgrows a `window` (transformers v5.23, masking_utils.py).
    """
    prefix = t.setting.adapter.remembered if t.setting.adapter else 0
    total = t.sequence + t.setting.past + prefix
    added = masking in ("eager", "alibi") or t.setting.attention == "eager"
    outgrown = window and total >= window
    if not (added or masking == "always" or t.setting.padded or outgrown or prefix):
        return None
    batch = t.batch if t.setting.padded else Dim(1, "one")
    allowed = t.new("mask", (batch, 1, t.sequence, total), BOOL)
    if not added:
        return allowed
    shape = (t.batch, heads if masking == "alibi" else 1, t.sequence, total)
    return t.new("mask", shape, t.setting.format)
