"""What recurrent layers share: their short convolution, their cache, their gates."""

from __future__ import annotations

from llmsize.anatomy import operations as ops
from llmsize.anatomy import scan_kernels
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.scan_operations import exp, pad
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, Format


def convolve(
    t: Trace, x: Tensor, name: str, kernel: int, *, bias: bool = False, activated: bool = True
) -> Tensor:
    """A short causal convolution of every channel of batch, channels, tokens, and SiLU.

    `causal_conv1d_fn` of transformers, or `causal_conv1d_update` for a token beside a cache.
    """
    channels, tokens = x.shape[1:]
    format = x.format
    weight = t.weight(f"{name}.weight", (channels, 1, kernel), "conv")
    offset = t.weight(f"{name}.bias", (channels,), "bias") if bias else None
    kernels = weight.view(*weight.shape)  # a view, which autocast casts each time
    if continues(t):
        window = ops.to(t, ops.cat(t, (with_tokens(x, kernel), x)), weight.format)
        out = ops.convolution(t, window, kernels, offset, (*x.shape[:2], 2))
        out = ops.slice_last(t, out, tokens)
    else:
        x = store_convolved(t, x, kernel)
        if t.setting.fused_recurrence and activated:
            out = scan_kernels.convolution(t, x, kernels, offset)
            return ops.slice_last(t, out, tokens) if out.shape[2] > tokens else out
        shape = (*x.shape[:2], x.shape[2] + kernel - 1)
        out = ops.convolution(t, ops.to(t, x, weight.format), kernels, offset, shape)
        out = ops.slice_last(t, out, x.shape[2])
    out = ops.to(t, ops.silu(t, out) if activated else out, format)
    return ops.slice_last(t, out, tokens) if out.shape[2] > tokens else out


def decay(t: Trace, name: str, *shape: int, format: Format | None = None) -> Tensor:
    """`-exp(A_log)` in fp32; the weight may have a `format` of its own."""
    return ops.neg(t, exp(t, ops.to(t, t.weight(name, shape, "ssm", format=format), FP32)))


def without_padding(t: Trace, x: Tensor) -> Tensor:
    """`x` with zeros for padding, if there is any."""
    return ops.scale(t, x) if t.setting.padded else x


# --- the cache ------------------------------------------------------------------------------------


def remember(t: Trace, state: int, convolved: int, kernel: int) -> None:
    """A layer keeps its state and the last inputs of its convolution for the next token."""
    t.remember(LayerCache("recurrent", state=state + convolved * (kernel - 1)))


def continues(t: Trace) -> bool:
    """Whether the cache holds a state that one more token goes on from."""
    return t.setting.cache and t.setting.past > 0


def with_tokens(x: Tensor, tokens: int) -> Tensor:
    """What the cache holds of as many earlier `tokens` as it needs."""
    return Tensor((*x.shape[:2], tokens), x.format, None)


def store_convolved(t: Trace, x: Tensor, kernel: int) -> Tensor:
    """Keep the last tokens that go into a convolution; a short prompt is padded to as many."""
    if not t.setting.cache:
        return x
    t.stored.append(t.new("state", (*x.shape[:2], kernel), x.format, role="cache"))
    return pad(t, x, 2, kernel) if x.shape[2] < kernel else x


def store_state(t: Trace, state: Tensor | None) -> None:
    """Keep a copy of the last state, if there is a cache."""
    if state is not None and t.setting.cache:
        t.stored.append(t.new("state", state.shape, state.format, role="cache"))
