"""What comes behind the last hidden state if it is not the loss of the next token.

A score, as reward and value models have it, or the log-probabilities of chosen tokens, which
preference and policy objectives are made of.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.operations import GradList, keep_output
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Shape, Tensor
from llmsize.formats import FP32, INT64, Format

if TYPE_CHECKING:
    from llmsize.anatomy.trace import Trace

TOKEN_CHUNK, VOCABULARY_CHUNK = 4096, 32768
"""Tokens and words of a tile of logits (TRL v1.16, kernels/chunked_logprob.py)."""


def score(t: Trace, hidden: Tensor) -> Tensor:
    """One number for each sequence: transformers' `ForSequenceClassification` with one label."""
    scores = t.linear(hidden, "score", 1, role="score")
    return ops.mean(t, ops.pick(t, scores, 1))


def log_probabilities(t: Trace, hidden: Tensor, weight: Tensor) -> Tensor:
    """Those of the scored tokens, from tiles of logits that are made again in the backward pass.

    TRL v1.16, trainer/utils.py, `add_fused_lm_head`, for DPO and GRPO; every scored token counts.
    """
    batch, sequence, width = hidden.shape
    tokens = batch * (t.setting.scored or sequence - 1)
    rows = ops.reshape(t, hidden, batch * sequence, width)
    scored = ops.index(t, rows, t.new("nonzero", (tokens,), INT64))
    return ops.mean(t, _fused(t, scored, weight, t.new("index", (tokens,), INT64)))


def _fused(t: Tape, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    tokens = x.shape[0]
    like = [(y.shape, y.format) for y in (x, weight)]
    node = t.record(_fused_backward, (x, weight), (x, targets), like)
    statistics = [t.new("zeros", (tokens,), FP32) for _ in range(7)]
    tile = _tile(t, x.shape, weight.shape, x.format, copies=1)
    log_z = t.new("add", (tokens,), FP32)
    out = t.new("sub", (tokens,), FP32, node)
    entropy = t.new("sub", (tokens,), FP32)
    for kept in (log_z, entropy):
        keep_output(t, node, kept)
    del statistics, tile
    return out


def _tile(t: Tape, x: Shape, weight: Shape, format: Format, *, copies: int) -> list[Tensor]:
    """A tile of logits, as wide as any, and under autocast 16-bit copies of what it is made of.

    With two `copies` that of one part of the weight is there until the next part's has been made.
    """
    tokens, (words, width) = min(x[0], TOKEN_CHUNK), weight
    compute = t.autocast or format
    made = [t.new("mm", (tokens, VOCABULARY_CHUNK), compute)]
    if compute is not format:
        made.append(t.new("to", (tokens, x[1]), compute))
        parts = [min(max(words - n * VOCABULARY_CHUNK, 0), VOCABULARY_CHUNK) for n in range(copies)]
        made += [t.new("to", (part, width), compute) for part in parts]
    return made


def _fused_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """Gradients are summed in fp32, the head's whole, and cast at the end."""
    (x_shape, x_format), (weight_shape, _) = node.context
    wide = [
        t.new("zeros", shape, FP32) if node.needs(i) else None
        for i, (shape, _) in enumerate(node.context)
    ]
    tile = _tile(t, x_shape, weight_shape, x_format, copies=2)
    made = [
        None if summed is None else ops.to(t, summed, format)
        for summed, (_, format) in zip(wide, node.context, strict=True)
    ]
    tile.clear()
    wide.clear()
    return made


def policy_logits(t: Trace, logits: Tensor) -> Tensor:
    """Log-probabilities of the scored tokens from all logits, sequence by sequence.

    TRL v0.29, `PPOTrainer.train` and `selective_log_softmax`: the logits are divided in place and
    held through the step; the log-softmax of each sequence is kept.
    """
    batch, sequence, vocabulary = logits.shape
    shape = (batch, t.setting.scored or sequence - 1, vocabulary)
    t.outputs = (logits,)
    node = t.record(_selected_backward, (logits,), (), (logits.shape, shape, logits.format))
    chosen = t.new("gather", shape[:2], logits.format, node)
    for _ in range(batch):
        keep_output(t, node, t.new("log_softmax", shape[1:], logits.format))
    return ops.mean(t, chosen)


def _selected_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """A gradient for each sequence, stacked, then filled into those of all tokens.

    Of these a copy is made whose part is divided, as the logits were (autograd's `CopySlices`).
    """
    whole, scored, format = node.context
    rows = []
    for _ in range(scored[0]):
        filled = t.new("scatter", scored[1:], format)
        rows.append(t.new("log_softmax_backward", scored[1:], format))
        del filled
    stacked = t.new("stack", scored, format)
    rows.clear()
    filled = t.new("slice_backward", whole, format)
    del stacked
    copied = t.new("copy", whole, format)
    part, divided = (t.new(name, scored, format) for name in ("clone", "div"))
    del filled, part, divided
    return (copied,)
