"""Parts that several families share, each as its reference implementation has it.

transformers v5.23: src/transformers/models/llama/modeling_llama.py and its kin. Local variables
live as long as there, since a tensor lives as long as its last name.
"""

from __future__ import annotations

from collections.abc import Callable

from llmsize.anatomy import attention
from llmsize.anatomy import operations as ops
from llmsize.anatomy.cache import Kind, LayerCache
from llmsize.anatomy.config import Config
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.errors import printable
from llmsize.formats import FP32, INT64


def embed(t: Trace, name: str, rows: int, width: int, role: str = "embedding") -> Tensor:
    """Token embeddings: batch, sequence, width."""
    table = t.weight(f"{name}.weight", (rows, width), role)
    return ops.embedding(t, table, t.batch, t.sequence)


def positions(t: Trace) -> Tensor:
    """The position of each token of one sequence."""
    return t.new("arange", (t.sequence,), INT64)


def rms_norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """LlamaRMSNorm: normalised in fp32, scaled in the input's format."""
    weight = t.weight(f"{name}.weight", (x.shape[-1],), "norm")
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


def rotary(t: Trace, x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The cosines and sines of every position, made once for all layers, in the format of `x`."""
    grad, t.grad = t.grad, False
    position = t.new("to", (1, t.sequence, 1), FP32)
    angles = t.new("mul", (1, t.sequence, channels // 2), FP32)
    del position
    angles = t.new("cat", (1, t.sequence, channels), FP32)
    cosines = ops.scale(t, ops.unary(t, "cos", angles))
    sines = ops.scale(t, ops.unary(t, "sin", angles))
    result = ops.to(t, cosines, x.format), ops.to(t, sines, x.format)
    t.grad = grad
    return result


def rotate_half(t: Trace, x: Tensor) -> Tensor:
    """The second half of the channels, negated, before the first."""
    half = x.shape[-1] // 2
    lower = ops.slice_last(t, x, half)
    upper = ops.slice_last(t, x, half)
    return ops.cat(t, (ops.neg(t, upper), lower))


def rotate(t: Trace, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding of `x`: batch, heads, sequence, channels."""
    return ops.add(t, ops.mul(t, x, cosines), ops.mul(t, rotate_half(t, x), sines))


def rotate_part(t: Trace, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of the first channels of each head; the rest passes."""
    size = cosines.shape[-1]
    turned = ops.slice_last(t, x, size)
    rest = ops.slice_last(t, x, x.shape[-1] - size)
    return ops.cat(t, (rotate(t, turned, cosines, sines), rest))


def attend(
    t: Trace,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    window: int = 0,
    copied: bool = False,
) -> Tensor:
    """Attention of q, k, v by heads; the result is batch, sequence, all channels of all heads.

    `window` is how many tokens it reaches back if not to the first. `copied` says that q was
    assembled by heads, so that a fused kernel's result is too and has to be laid out anew.
    """
    remember(t, k, v, window)
    return attend_only(t, q, k, v, mask, copied=copied)


def remember(t: Trace, k: Tensor, v: Tensor, window: int = 0) -> None:
    """Keys and values by heads, of all tokens or the last `window`, stay for the next one."""
    kind: Kind = "window" if window else "full"
    t.remember(LayerCache(kind, k.shape[1], k.shape[-1], v.shape[-1], window))


def attend_only(
    t: Trace, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, copied: bool = False
) -> Tensor:
    """`attend` without a cache, or with one that is not of k and v themselves."""
    width = q.shape[1] * v.shape[-1]
    if t.setting.attention == "eager":
        assert mask is not None
        return attention.eager(t, q, k, v, mask).view(t.batch, t.sequence, width)
    out = attention.attend(t, q, k, v, mask)
    if copied:
        return ops.copy(t, out, t.batch, t.sequence, width)
    return out.view(t.batch, t.sequence, width)


Activation = Callable[[Tape, Tensor], Tensor]


def relu_squared(t: Tape, x: Tensor) -> Tensor:
    """The square of ReLU (Nemotron)."""
    return ops.power(t, ops.relu(t, x))


ACTIVATIONS: dict[str, Activation] = {
    "silu": ops.silu, "swish": ops.silu, "gelu": ops.gelu, "gelu_pytorch_tanh": ops.gelu,
    "relu": ops.relu, "gelu_new": ops.gelu_new, 
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
) -> Tensor:
    """The language-model head, and the loss if labels are given; returns the loss or the logits.

    `tied` names the embedding whose weight the head shares, if it has none of its own.
    """
    if t.setting.last_logits:
        hidden = Tensor((t.batch, 1, hidden.shape[-1]), hidden.format, hidden.storage, hidden.node)
    if tied:
        logits = ops.linear(t, hidden, t.weights[-1, f"{tied}.weight"])
    else:
        logits = t.linear(hidden, head, vocabulary, bias=bias, role="head")
    return causal_lm_loss(t, logits) if t.setting.training else logits


def causal_lm_loss(t: Trace, logits: Tensor) -> Tensor:
    """transformers' ForCausalLMLoss: fp32 logits, labels shifted by one token."""
    scores = ops.to(t, logits, FP32)
    labels = t.new("pad", (t.batch, t.sequence + 1), INT64)
    targets = t.new("copy", (t.batch, t.sequence), INT64)
    loss = ops.cross_entropy(t, scores, targets)
    del labels
    return loss


def mask(t: Trace) -> Tensor | None:
    """The attention mask made once for all layers, where the kernel needs one."""
    total = t.sequence + t.setting.past
    if t.setting.attention == "eager":
        return t.new("mask", (t.batch, 1, t.sequence, total), t.setting.format)
    if t.setting.padded:
        return attention.causal_mask(t, t.batch, t.sequence, total)
    return None
