"""The loss that keeps experts equally busy, of the logits by which all routers chose.

transformers v5.23, utils/output_capturing.py and models/mixtral/modeling_mixtral.py,
`load_balancing_loss_func`: asked for by `output_router_logits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.operations import GradList
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, INT32, INT64


class Routed(NamedTuple):
    """What the router of a layer gave, where the model hands it out."""

    layer: int
    """Number of the traced layer."""
    logits: Tensor
    chosen: int
    """Experts that a token is sent to."""
    balanced: bool
    """Whether the model adds the loss to its own; others only hand the logits out."""


def record(t: Trace, logits: Tensor, chosen: int, *, balanced: bool) -> None:
    """Hold what a router gave of each expert, of which a token is sent to the best `chosen`."""
    if not t.replaying:
        t.routed.append(Routed(t.layer, logits, chosen, balanced))


def add_balance(t: Trace, loss: Tensor) -> Tensor:
    """The loss with that of all layers' routers, which pass once more, one after the other.

    The caller holds the routers' logits, and that loss, as long as the model's own.
    """
    routed, t.routed = t.routed, []
    balance = _balance(t, routed) if any(each.balanced for each in routed) else None
    given = [each.logits for each in routed]
    if balance is not None:
        given.append(balance)
        if t.setting.training:
            loss = ops.add_in_place(t, loss, ops.scale(t, balance))
    if t.outputs is None:
        t.held += given
    else:
        t.outputs = (*t.outputs, *given)
    return loss


def _balance(t: Trace, routed: Sequence[Routed]) -> Tensor:
    """How often each expert is chosen, times how likely it is."""
    experts = routed[0].logits.shape[-1]
    counts, likely = [_handed_on(t.new("zeros", (experts,), FP32)) for _ in range(2)]
    if t.grad:  # the gradient that layers pass on ends outside of them
        likely.node = Node(_ends, (), t.layer, None)
        t.nodes.append(likely.node)
    mask = t.new("to", (t.batch * t.sequence, 1), FP32) if t.setting.padded else None
    for layer, logits, chosen, _ in routed:
        t.enter(layer)
        probabilities = ops.softmax(t, logits)
        counts = _handed_on(_counted(t, counts, probabilities, chosen))
        weighted = ops.to(t, probabilities, FP32)
        if mask is not None:
            weighted = ops.mul(t, weighted, mask)
        likely = _handed_on(ops.add(t, likely, ops.sum_first(t, weighted)))
        del probabilities, weighted
    t.enter(-1)
    share = t.new("div", counts.shape, counts.format)
    rows = t.new("sum", (), FP32) if mask is not None else None  # a plain number without a mask
    mean = ops.scale(t, likely) if rows is None else ops.divide(t, likely, rows)
    product = ops.mul(t, share, mean)
    return ops.scale(t, ops.total(t, product).view())


def _ends(t: Tape, node: Node, grads: GradList) -> Grads:
    return ()


def _handed_on(x: Tensor) -> Tensor:
    """The same sum, as one layer hands it to the next."""
    assert x.storage is not None
    x.storage.hand_on("sum", x.shape)
    return x


def _counted(t: Trace, counts: Tensor, probabilities: Tensor, chosen: int) -> Tensor:
    """How many tokens each expert has been sent, with those of one more layer."""
    tokens = probabilities.shape[0]
    best = t.new("topk", (tokens, chosen), probabilities.format)
    indices = t.new("topk", (tokens, chosen), INT64)
    if t.setting.padded:
        counted = t.new("repeat_interleave", (tokens * chosen,), FP32)
    else:
        counted = t.new("to", (tokens * chosen,), INT32)
    added = t.new("histc", counts.shape, FP32)
    del best, indices, counted, added
    return t.new("add", counts.shape, FP32)
