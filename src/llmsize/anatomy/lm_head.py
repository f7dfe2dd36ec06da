"""The head of a language model and its loss: from the last hidden states to logits or a number.

transformers v5.23: src/transformers/models/llama/modeling_llama.py, loss/loss_utils.py, and the
losses of trainers that do not make all logits at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

from llmsize.anatomy import balancing, objectives
from llmsize.anatomy import operations as ops
from llmsize.anatomy.blocks import Step, as_it_is
from llmsize.anatomy.linear import Linear
from llmsize.anatomy.tape import Parameter, Tape
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, INT64


class Head(NamedTuple):
    """What a model does with the hidden states to make logits of them."""

    embedding: str = "model.embed_tokens"
    """Whose weight it shares where it is tied; empty where it cannot be."""
    name: str = "lm_head"
    bias: bool = False
    transform: Step = as_it_is
    """What it makes of the hidden states before it multiplies."""
    end: Sequence[Step] = ()
    """What happens to the logits before anybody sees them."""
    casts: bool = True
    """Whether the model hands out fp32 logits where the stack's models do."""


def causal_lm(
    t: Trace,
    hidden: Tensor,
    vocabulary: int,
    head: Head,
    *,
    tied: bool,
    loss: Callable[[Trace, Tensor], Tensor] | None = None,
) -> Tensor:
    """The language-model head, and the loss if labels are given; returns the loss or the logits.

    `tied` says that it has no weight of its own. `loss` makes the loss of the logits if it is not
    that of the next token.
    """
    if t.setting.separate_head or not tied:
        head = head._replace(embedding="")
    if not _takes_logits(t):
        hidden, head = head.transform(t, hidden), head._replace(transform=as_it_is)
    made = _without_logits(t, hidden, vocabulary, head)
    if made is not None:
        return made
    hidden = asked_for(t, hidden)
    project = partial(_logits, t, vocabulary, head)
    if t.setting.objective == "policy":
        return objectives.policy_logits(t, project(hidden))
    if t.setting.training and t.setting.loss in IN_CHUNKS:
        return IN_CHUNKS[t.setting.loss](t, hidden, project)
    logits = project(hidden)
    if t.setting.training and t.setting.fp32_logits and head.casts:
        logits = in_fp32(t, logits)
    if t.setting.keep_outputs or not t.setting.training:
        t.outputs = (logits,)
    result = (loss or causal_lm_loss)(t, logits) if t.setting.training else logits
    return balancing.add_balance(t, result)


def _without_logits(t: Trace, hidden: Tensor, vocabulary: int, head: Head) -> Tensor | None:
    """What a head makes that never has the logits of all tokens; nothing where there is none."""
    setting = t.setting
    if setting.objective == "score":
        return objectives.score(t, hidden)
    tiled = setting.training and setting.loss == "tiled"
    if setting.objective == "log-probabilities" or (tiled and setting.objective == "tokens"):
        return objectives.log_probabilities(t, hidden, _weight(t, hidden, vocabulary, head))
    if setting.training and setting.loss == "fused_linear":
        weight = _weight(t, hidden, vocabulary, head)
        return ops.fused_linear_cross_entropy(t, hidden, weight, shifted_labels(t), vocabulary)
    return None


def _takes_logits(t: Trace) -> bool:
    """Whether logits are made of the hidden states before anything else is."""
    tiled = t.setting.training and t.setting.loss in ("tiled", "fused_linear")
    return t.setting.objective in ("tokens", "policy") and not tiled


def _logits(t: Trace, vocabulary: int, head: Head, hidden: Tensor) -> Tensor:
    name, embedding = head.name, head.embedding
    hidden = head.transform(t, hidden)
    if embedding:
        offset = t.weight(f"{name}.bias", (vocabulary,), "bias") if head.bias else None
        table = shared_table(t, f"{name}.weight", f"{embedding}.weight")
        if isinstance(table, Parameter):
            logits = t.through(hidden, Linear(name, "head", table, offset, vocabulary))
        else:
            logits = ops.linear(t, hidden, table, offset)
    else:
        logits = t.linear(hidden, name, vocabulary, bias=head.bias, role="head")
    for step in head.end:
        logits = step(t, logits)
    return logits


def _weight(t: Trace, hidden: Tensor, vocabulary: int, head: Head) -> Tensor:
    """The weight of the head, or of the embedding that it shares."""
    if head.embedding:
        return shared_table(t, f"{head.name}.weight", f"{head.embedding}.weight")
    return t.weight(f"{head.name}.weight", (vocabulary, hidden.shape[-1]), "head")


def shared_table(t: Trace, name: str, embedding: str) -> Tensor:
    """The embedding's weight, which a head shares, unless a copy of either is trained.

    A head's copy is one of the embedding; beside an embedding's copy the head keeps the frozen one
    (peft v0.21, utils/other.py, `ModulesToSaveWrapper`).
    """
    table = t.weights[-1, embedding]
    if t.saves(name):
        own = t.weight(name, table.shape, "head")
        own.copied = False  # what is frozen is there already
        return own
    if table.copied:
        return Parameter(table.name, table.shape, table.format, "head", ())
    return t.table(table)


def asked_for(t: Trace, hidden: Tensor) -> Tensor:
    """What the head is given: all tokens, or a view of the last one."""
    if not t.setting.last_logits:
        return hidden
    return Tensor((t.batch, 1, hidden.shape[-1]), hidden.format, hidden.storage, hidden.node)


def in_fp32(t: Tape, x: Tensor) -> Tensor:
    """`x` in fp32."""
    return ops.to(t, x, FP32)


SOFTCAP: tuple[Step, ...] = (ops.scale, ops.tanh, ops.scale)
"""Logits kept within bounds by a scaled tanh (Gemma 2)."""


def scaled_in_fp32(t: Tape, x: Tensor) -> Tensor:
    """`x` in fp32 times a number, in one expression."""
    return ops.scale(t, ops.to(t, x, FP32))


FP32_SOFTCAP: tuple[Step, ...] = (scaled_in_fp32, ops.tanh, ops.scale)
"""The same in fp32 (Beam)."""


def causal_lm_loss(t: Trace, logits: Tensor) -> Tensor:
    """The loss of the labels shifted by one token; transformers computes it in fp32."""
    if t.setting.compiled_loss:
        return ops.compiled_cross_entropy(t, logits, shifted_labels(t))
    if t.setting.loss == "softmax":
        return ops.softmax_cross_entropy(t, logits, shifted_labels(t))
    scores = ops.to(t, logits, FP32) if t.setting.loss_in_fp32 else logits
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


HELD_TOKENS = 128
"""Tokens of each sequence in a chunk of LitGPT's logits (litgpt/finetune/lora.py)."""


def held_chunks_loss(t: Trace, hidden: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
    """The head some tokens at a time and the loss of each chunk: LitGPT's chunked_cross_entropy.

    Lightning makes all that a module hands out fp32 (lightning/fabric/plugins/precision/half.py,
    `convert_output`), and the training loop holds it until the next micro-batch.
    """
    sizes = [min(HELD_TOKENS, t.sequence - at) for at in range(0, t.sequence, HELD_TOKENS)]
    logits = [project(part) for part in ops.split(t, hidden, *sizes, dim=1)]
    outputs = tuple(in_fp32(t, part) for part in logits)
    del logits
    t.replace_outputs(outputs)
    targets = shifted_labels(t)
    losses = [ops.cross_entropy(t, part, targets) for part in outputs]
    return reduce(partial(ops.add, t), losses)


IN_CHUNKS = {"chunked": chunked_loss, "fp32_chunks": held_chunks_loss}
"""Losses that take the hidden states and how to make logits of them, some tokens at a time."""
