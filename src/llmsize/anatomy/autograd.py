"""What an operation keeps for the backward pass, and the backward pass itself.

The rules are PyTorch's: a node keeps what its derivative needs and lets go when it has run; nodes
run in the reverse of their creation; a second gradient of one tensor is added to the first
(torch/csrc/autograd/{engine,input_buffer}.cpp, v2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from sys import getrefcount
from typing import TYPE_CHECKING, Any

from llmsize.anatomy.tensor import HIDDEN_STATES_GRADIENT, Shape, Storage, Tensor, laid_out
from llmsize.formats import UINT8, Format

if TYPE_CHECKING:
    from llmsize.anatomy.tape import Checkpoint, Tape

Grads = Sequence[Tensor | None]
Rule = Callable[["Tape", "Node", list[Tensor | None]], Grads]
"""From the gradients of a node's outputs to those of its inputs."""

Edge = tuple["Node", int, Shape, Format]
"""Where an input's gradient goes: the node and its output, with the input's shape and format."""


class Node:
    """One recorded operation of the forward pass."""

    __slots__ = ("checkpoint", "context", "edges", "grads", "layer", "place", "rule", "saved")

    def __init__(
        self,
        rule: Rule,
        edges: Sequence[Edge | None],
        layer: int,
        context: Any,
    ) -> None:
        """`edges` lead to the nodes of the inputs, or to `None` where no gradient is needed."""
        self.rule = rule
        self.edges = edges
        self.saved: Sequence[Tensor | None] = ()
        self.layer = layer
        self.context = context
        self.grads: list[Tensor | None] = []
        self.checkpoint: Checkpoint | None = None
        self.place = 0

    def needs(self, index: int) -> bool:
        """Whether the input of that index wants a gradient."""
        return self.edges[index] is not None

    def send(self, tape: Tape, index: int, grad: Tensor) -> None:
        """Hand an input its gradient before the rule is through."""
        edge = self.edges[index]
        if edge is not None:
            edge[0].receive(tape, edge[1], grad)

    def receive(self, tape: Tape, slot: int, grad: Tensor) -> None:
        """Take a gradient of output `slot`, adding it to one that is there."""
        grads = self.grads
        if slot == len(grads):
            grads.append(grad)
            return
        grads += [None] * (slot + 1 - len(grads))
        present, grads[slot] = grads[slot], None
        grads[slot] = grad if present is None else accumulated(tape, present, grad)


class Leaf(Node):
    """The end of a path: a trained weight, whose gradient it stores when all have come."""

    __slots__ = ("arrived", "gradient", "passing", "storage", "uses")

    def __init__(self, storage: Storage | None = None, *, passing: bool = False) -> None:
        """A leaf that is used by nobody yet, and holds the `storage` of what it is for.

        A `passing` one is made in every forward pass, so no earlier one has left it a gradient.
        It does not know the weight, which knows it: what refers to itself outlives its pass.
        """
        super().__init__(_no_rule, (), -1, None)
        self.storage = storage
        self.passing = passing
        self.gradient: Tensor | None = None
        self.uses = 0
        self.arrived = 0

    def receive(self, tape: Tape, slot: int, grad: Tensor) -> None:
        """Store the gradient once every use of the weight has sent its share."""
        Node.receive(self, tape, slot, grad)
        del grad
        self.arrived += 1
        if self.arrived == self.uses:
            self.arrived = 0
            self._store(tape, self.grads.pop())

    def _store(self, tape: Tape, grad: Tensor | None) -> None:
        """Keep the gradient that has come; one that is there already takes it in.

        One that is not laid out as its tensor is kept as a copy that is
        (torch/csrc/autograd/functions/accumulate_grad.h, the layout contract).
        """
        if tape.accumulating and not self.passing:
            if scratch := tape.stepping.get(id(self)):
                tape.new("optimizer_step", (scratch,), UINT8)
            return
        if grad is not None and grad.strides is not None:
            grad = tape.new("clone", grad.shape, grad.format)
        if self.passing:
            if self.storage is not None:  # the first layer sends it what others send each other
                hand_on([grad])
        elif grad is not None and grad.storage is not None:
            grad.storage.becomes("gradient")
        self.gradient = grad


class Mark(Node):
    """A place in the record: when the backward pass comes by, something is done."""

    __slots__ = ("action",)

    def __init__(self, action: Callable[[Tape], None], layer: int) -> None:
        """Do `action` at this place."""
        super().__init__(_no_rule, (), layer, None)
        self.action = action


def _no_rule(tape: Tape, node: Node, grads: list[Tensor | None]) -> Grads:
    return ()


ALONE = 2
"""References to the storage of a tensor that alone has it: its own, and that of the question."""


def accumulated(tape: Tape, present: Tensor, grad: Tensor) -> Tensor:
    """The sum of two gradients of one tensor, made beside both unless nobody else has the first.

    A view is never written over: the gradients that matrix products give are views.
    """
    if present.own and present.shape == grad.shape and getrefcount(present.storage) == ALONE:
        return present
    return laid_out(tape.new("add_gradients", present.shape, present.format), present, grad)


def backward(tape: Tape, output: Tensor) -> None:
    """Walk the recorded nodes in reverse, from `output`; the nodes are spent afterwards."""
    node = output.node
    assert node is not None, "the output does not depend on a trained weight"
    seed = tape.new("ones_like", output.shape, output.format)
    node.receive(tape, output.slot, seed)
    del output, node
    nodes = tape.nodes
    while nodes:
        current = nodes.pop()
        if current.layer != tape.layer:
            if current.layer >= 0 or len(current.grads) == 1:  # prefixes have one for each layer
                hand_on(current.grads)
            tape.enter(current.layer)
        if current.grads:
            run(tape, current)
        elif type(current) is Mark:
            current.action(tape)
        else:
            release(current)
        del current
    tape.enter(-1)
    del seed


def hand_on(grads: Sequence[Tensor | None]) -> None:
    """Call what one layer sends the next the same as what comes from the head."""
    for grad in grads:
        if grad is not None and grad.storage is not None:
            grad.storage.hand_on(HIDDEN_STATES_GRADIENT, grad.shape)


def run(tape: Tape, node: Node) -> None:
    """Send a node's gradients on to its inputs, and let go of what it kept."""
    checkpoint, edges = node.checkpoint, node.edges
    if checkpoint is not None:
        node.checkpoint = None
        node.saved = checkpoint.recomputed(tape, node.place)
    sent: list[Any] = [*node.rule(tape, node, node.grads)]
    if checkpoint is not None:
        node.saved = ()  # nobody else holds what was recomputed
        checkpoint = None
    for index, edge in enumerate(edges):
        grad = sent[index]
        if grad is None:
            continue
        if edge is None:
            sent[index] = None
        elif grad.format is not edge[3] or grad.shape != edge[2]:
            grad = None
            _fit(tape, edge, sent, index)
    grad, node.saved = None, ()
    node.grads.clear()
    for edge in edges:
        if edge is None or sent[0] is None:
            del sent[0]
        else:
            edge[0].receive(tape, edge[1], sent.pop(0))  # who alone has it then


def release(node: Node) -> None:
    """Let go of what a node kept that no gradient has reached."""
    checkpoint, node.checkpoint = node.checkpoint, None
    node.saved = ()
    if checkpoint is not None:
        checkpoint.forget(node.place)


def _fit(tape: Tape, edge: Edge, sent: list[Tensor | None], index: int) -> None:
    """Bring a gradient to its input's size, then to its format; each step lets go of the last."""
    grad, sent[index] = sent[index], None
    assert grad is not None
    node, _, shape, format = edge
    row = type(node) is Leaf and len(grad.shape) > len(shape)  # of a weight: summed also if alone
    if grad.shape != shape and (row or prod(grad.shape) != prod(shape)):
        grad = tape.new("sum", shape, grad.format)
    if grad.format is not format:
        grad = tape.like("to", grad, format=format)
    sent[index] = grad
