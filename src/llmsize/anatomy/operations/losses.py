"""The loss of next-token prediction, in one kernel or several."""

from __future__ import annotations

from math import prod

from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.operations.elementwise import to
from llmsize.anatomy.operations.rules import (
    GradList,
    keep_output,
    softmax_input,
    unary_backward,
)
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Tensor
from llmsize.formats import FP32


def cross_entropy(t: Tape, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of `logits`: keeps the log-probabilities.

    Those have the format of the logits also under autocast, which takes them to fp32 for the mean.
    """
    node = t.record(unary_backward, (logits,), softmax_input(t, logits), "log_softmax")
    log_probabilities = t.new("log_softmax", logits.shape, logits.format, node)
    keep_output(t, node, log_probabilities)
    if t.autocast:
        log_probabilities = to(t, log_probabilities, FP32)
    return nll_loss(t, log_probabilities, targets)


def nll_loss(t: Tape, log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """The mean of the targets' negative log-probabilities; keeps both and the total weight."""
    shape, format = log_probabilities.shape, log_probabilities.format
    saved = (log_probabilities, targets)
    node = t.record(_nll_backward, (log_probabilities,), saved, (shape, format))
    loss = t.new("nll_loss", (), format, node)
    keep_output(t, node, t.new("nll_loss", (), format))
    return loss


def _nll_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("nll_loss_backward", *node.context),)


def compiled_cross_entropy(t: Tape, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss as one compiled kernel: keeps the 16-bit logits and one number a token."""
    node = t.record(_logits_backward, (logits,), (logits, targets), (logits.shape, logits.format))
    loss = t.new("cross_entropy", (), FP32, node)
    keep_output(t, node, t.new("cross_entropy", (*logits.shape[:-1], 1), FP32))
    return loss


def _logits_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return (t.new("cross_entropy_backward", *node.context),)


def softmax_cross_entropy(t: Tape, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss by probabilities in fp32, which become the gradient in place.

    Megatron-LM 00611e6, core/tensor_parallel/cross_entropy.py; autograd casts the gradient.
    """
    node = t.record(_logits_backward, (logits,), (), (logits.shape, logits.format))
    probabilities = t.new("softmax", logits.shape, FP32)
    if node is not None:
        t.keep(node, (probabilities, targets))
    return t.new("cross_entropy", (), FP32, node)


def fused_linear_cross_entropy(
    t: Tape, x: Tensor, weight: Tensor, targets: Tensor, vocabulary: int
) -> Tensor:
    """Head and loss together, some tokens at a time, with their gradients made in the forward.

    Liger-Kernel v0.6.0 and v0.8.5, ops/fused_linear_cross_entropy.py: as many chunks as the
    vocabulary is wide in units of the hidden size, of a power of two tokens. Each is added to the
    weight's gradient in place; v0.6.2 to v0.8.4 made a product and its fp32 copy first.
    """
    tokens, hidden = prod(x.shape[:-1]), x.shape[-1]
    chunk = 1 << (-(-tokens // -(-vocabulary // hidden)) - 1).bit_length()
    node = t.record(_precomputed_backward, (x, weight))
    to_x = t.new("fused_linear_cross_entropy", x.shape, x.format)
    wants = weight.node is not None
    to_weight = t.new("fused_linear_cross_entropy", weight.shape, weight.format) if wants else None
    losses = t.new("fused_linear_cross_entropy", (tokens,), FP32)
    logits = t.new("mm", (min(chunk, tokens), vocabulary), x.format)
    del logits
    if node is not None:
        t.keep(node, (to_x, to_weight))
    del losses
    return t.new("sum", (), FP32, node)


def _precomputed_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    return list(node.saved)
