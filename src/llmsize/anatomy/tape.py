"""One pass of a model over symbolic tensors: what is made, kept, used and released, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from sys import getrefcount
from typing import Any, NamedTuple
from weakref import ref

from llmsize.anatomy.autograd import Edge, Leaf, Mark, Node, Rule
from llmsize.anatomy.layout import elementwise
from llmsize.anatomy.tensor import Event, Label, Role, Shape, Storage, Tensor, blank
from llmsize.formats import Format
from llmsize.quick_dataclasses import dataclass, field


class Parameter(Tensor):
    """A parameter of the model. It lives outside the step; its gradient lives in it."""

    __slots__ = (
        "beside", "calls", "chosen", "copied", "experts", "indices", "name", "quantized", "role",
        "viewed",
    )  # fmt: skip

    def __init__(
        self, name: str, shape: Shape, format: Format, role: str, indices: Sequence[int]
    ) -> None:
        """A weight that the layers of those `indices` have alike; outside of them it has none."""
        super().__init__(shape, format, None)
        self.name = name
        self.role = role
        self.indices = indices
        self.calls = 1
        """Layers that call each of the weights that it stands for."""
        self.experts = 0
        """Routed experts whose weights these are, first dimension; 0 for what every token uses."""
        self.chosen = 0
        """Experts that one token is sent to."""
        self.copied = False
        """Whether it is a trained copy of a frozen weight that is there, too."""
        self.quantized = False
        """Whether it is stored packed, and dequantized as its layer is called."""
        self.viewed = False
        """Whether products take a view of it, of which autocast makes a copy for every use."""
        self.beside = 0
        """Numbers that its gradient, a view of a larger one, holds beside its own."""

    @property
    def copies(self) -> int:
        """How many weights of the model it stands for."""
        return len(self.indices) or 1

    def train(self) -> None:
        """From now on it wants a gradient."""
        self.node = Leaf()


class Segment(NamedTuple):
    """A stretch of events in one traced part of a layer, or outside of the layers."""

    phase: str
    layer: int
    """Number of the traced part; -1 outside of the layers."""
    start: int
    """Index of its first event."""


UNUSED = 2
"""References to a node that only the record has: the record's, and that of the question."""


class EndOfRecomputation(Exception):
    """Everything that the backward pass asked for has been recomputed."""


class Checkpoint:
    """A block whose tensors are not kept: its inputs are, and it runs again when they are wanted.

    torch.utils.checkpoint, non-reentrant: the second run ends as soon as the last kept tensor is
    there again.
    """

    __slots__ = (
        "again",
        "block",
        "by_name",
        "given",
        "in_graph",
        "inputs",
        "made",
        "nodes",
        "offloaded",
        "recorded",
        "results",
        "wanted",
    )

    def __init__(
        self, block: Callable[..., Tensor], inputs: tuple[Any, ...], *, offloaded: bool
    ) -> None:
        """Remember how to run the block again; `offloaded`, the hidden states wait in host memory.

        What else the block is told stays (unsloth-zoo, unsloth_zoo/gradient_checkpointing.py,
        `Unsloth_Offloaded_Gradient_Checkpointer`).
        """
        self.block = block
        self.inputs = (_in_host_memory(inputs[0]), *inputs[1:]) if offloaded else inputs
        self.offloaded = offloaded
        self.nodes: list[Node] = []
        self.again: list[int] = []
        """Places of those of the second run that keep something: the first one has other nodes
        where it casts no weight that an earlier block had cast."""
        self.in_graph: list[Tensor | None] = []
        self.recorded = 0
        self.wanted = 0
        self.made: dict[str, int] = {}
        self.given: dict[int, Any] = {}
        """What the block takes of what is shared, by the identity of that."""
        self.results: list[Storage] = []
        self.by_name: Tensor | None = None
        """What a block within this one, which runs again by itself, is handed by name."""

    def saves(self, operation: str, every: int) -> bool:
        """Whether this result of `operation` is one that is kept."""
        count = self.made[operation] = self.made.get(operation, 0) + 1
        return count % every == 1 or every == 1

    def leave_out(self, node: Node, tensors: Sequence[Tensor | None]) -> None:
        """Want those that are there of `tensors` once more when the backward pass is at `node`."""
        if not node.saved:
            node.place = self.recorded
            self.recorded += 1
        present = len(tensors) - tensors.count(None)
        if present:
            self.wanted += present
            node.checkpoint = self
        node.saved = (*node.saved, *[None] * len(tensors))

    def has_again(self, tensors: Sequence[Tensor | None]) -> None:
        """Note what the second run has kept. Raises `EndOfRecomputation` with the last of it."""
        present = len(tensors) - tensors.count(None)
        self.wanted -= present
        if present and not self.wanted:
            raise EndOfRecomputation

    def forget_by_name(self, tape: Tape) -> None:
        """Let go of what a block within this one was handed: its backward pass is over."""
        self.by_name = None

    def forget(self, place: int) -> None:
        """Let go of what the node at `place` kept, if it has been recomputed."""
        if self.nodes:
            self.nodes[self.again[place]].saved = ()

    def recomputed(self, tape: Tape, place: int) -> Sequence[Tensor | None]:
        """What the node at `place` kept, from running the block a second time."""
        if not self.nodes:
            tape.replay(self)
        node = self.nodes[self.again[place]]
        saved, node.saved = node.saved, ()
        return saved


@dataclass(slots=True, eq=False, repr=False)
class Tape:
    """The record of one pass, and the circumstances under which operations record."""

    grad: bool = True
    """Whether operations keep anything for a backward pass."""
    autocast: Format | None = None
    """The 16-bit format of autocast, where it is on."""
    checkpoint_saves: tuple[tuple[str, int], ...] = ()
    """Operations whose results checkpoints keep, and every how manieth of each."""
    softmax_keeps_input: bool = False
    """Whether softmax keeps its input beside its output."""
    accumulating: bool = False
    """Whether every gradient exists already, from an earlier micro-batch."""
    stepping: dict[int, int] = field(default_factory=dict)
    """What a step on each weight as its gradient comes allocates, by the identity of its leaf."""
    offloaded: dict[int, int] = field(default_factory=dict)
    """Bytes of checkpoints in host memory, by the turn of the layers that run again from them."""
    events: list[Event] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    within: list[tuple[int, int]] = field(default_factory=list)
    """What kernels take and give back within themselves: after how many events, and its bytes."""
    nodes: list[Node] = field(default_factory=list)
    in_graph: list[Tensor | None] = field(default_factory=list)
    """What nodes hold themselves beside what they keep: it goes with the last of them."""
    phase: str = "forward"
    layer: int = -1
    casts: dict[int, Tensor] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    replaying: bool = False
    attention_weights: Tensor | None = None
    """What attention that is written out returns beside its result: its layer holds it to the
    end."""
    touched: dict[int, ref[Storage]] | None = None
    """What has been made or kept in the turn of a loop that stands for many, by identity."""
    turn_start: int = 0
    """Number of events before that turn, on the way back."""

    def new(
        self,
        operation: str,
        shape: Shape,
        format: Format,
        node: Node | None = None,
        *,
        role: Role = "temporary",
    ) -> Tensor:
        """A tensor that an operation makes, the output of `node` where that is recorded.

        In a plain `format`, of one element a block: nothing is computed in another.
        """
        label = role, operation, self.layer, shape, format
        if self.checkpoint_saves and self.checkpoint is not None:
            return Tensor(shape, format, self._saved_result(label, self.checkpoint), node)
        events, size = self.events, prod(shape) * format.block_bytes
        storage, made = blank(Storage), blank(Tensor)
        storage.events, storage.bytes, storage.label, storage.others = events, size, label, None
        events.append((size, label))
        made.shape, made.format, made.storage, made.node = shape, format, storage, node
        made.slot, made.strides, made.own = 0, None, True
        if self.touched is not None:
            self.touched[id(storage)] = ref(storage)
        return made

    def like(
        self, operation: str, x: Tensor, node: Node | None = None, *, format: Format | None = None
    ) -> Tensor:
        """What an elementwise operation makes of `x`: of its shape and layout, in a `format`."""
        made = self.new(operation, x.shape, format or x.format, node)
        if x.strides is not None:
            made.strides = elementwise(x.shape, (x.shape, x.strides))
        return made

    def _saved_result(self, label: Label, checkpoint: Checkpoint) -> Storage:
        """A new storage, kept if its operation's results are, or the kept one on a second run."""
        _, operation, _, shape, format = label
        every = dict(self.checkpoint_saves).get(operation)
        saved = every is not None and checkpoint.saves(operation, every)
        if saved and self.replaying:
            return checkpoint.results.pop(0)
        made = Storage(self.events, label, prod(shape) * format.block_bytes)
        if saved:
            made.becomes("kept")
            checkpoint.results.append(made)
        return made

    def enter(self, layer: int, phase: str | None = None) -> None:
        """Events that follow belong to `layer`."""
        if phase is not None or layer != self.layer:
            self.phase = phase or self.phase
            self.layer = layer
            self.segments.append(Segment(self.phase, layer, len(self.events)))

    def record(
        self,
        rule: Rule,
        inputs: Sequence[Tensor],
        saved: Sequence[Tensor | None] = (),
        context: Any = None,
    ) -> Node | None:
        """A node for an operation on `inputs` that keeps `saved`; `None` if nobody trains."""
        if not self.grad:
            return None
        edges: list[Edge | None] = []
        wanted = False
        for tensor in inputs:
            before = tensor.node
            if before is None:
                edges.append(None)
                continue
            edges.append((before, tensor.slot, tensor.shape, tensor.format))
            wanted = True
            if type(before) is Leaf and not self.replaying:
                before.uses += 1
        if not wanted:
            return None
        node = Node(rule, edges, self.layer, context)
        if self.checkpoint is None:
            self.nodes.append(node)
        else:
            self._record_in(self.checkpoint, node)
        if saved:
            self.keep(node, saved)
        return node

    def _record_in(self, checkpoint: Checkpoint, node: Node) -> None:
        """Record a node of a block; on the second run only the block has it."""
        if self.replaying:
            node.place = len(checkpoint.nodes)
            checkpoint.nodes.append(node)
            return
        self.nodes.append(node)

    def keep(self, node: Node, tensors: Sequence[Tensor | None]) -> None:
        """Keep `tensors` for the backward pass of `node`, or leave them to a second run."""
        checkpoint = self.checkpoint
        if checkpoint is not None and not self.replaying:
            checkpoint.leave_out(node, tensors)
            return
        if checkpoint is not None and not node.saved:
            checkpoint.again.append(node.place)
        node.saved = (*node.saved, *tensors) if node.saved else tensors
        for tensor in tensors:
            if tensor is not None and tensor.storage is not None:
                tensor.storage.keep()
                if self.touched is not None:
                    self.touched[id(tensor.storage)] = ref(tensor.storage)
        if checkpoint is not None:
            checkpoint.has_again(tensors)

    def hold_in_graph(self, tensor: Tensor) -> None:
        """Let a node hold a tensor as an attribute of its own, until the whole graph goes.

        A second run has a graph of its own.
        """
        if tensor.storage is not None:
            tensor.storage.keep()
        checkpoint = self.checkpoint if self.replaying else None
        (self.in_graph if checkpoint is None else checkpoint.in_graph).append(tensor)

    @property
    def recent(self) -> list[Node]:
        """The nodes as they are recorded: of the block that runs again, or of the whole pass."""
        checkpoint = self.checkpoint
        return checkpoint.nodes if self.replaying and checkpoint is not None else self.nodes

    def forget_unused(self, since: int) -> None:
        """Let go of nodes whose results nobody has, from place `since` on: PyTorch does at once."""
        nodes = self.recent
        for place in reversed(range(since, len(nodes))):
            if type(nodes[place]) is not Node or getrefcount(nodes[place]) > UNUSED:
                continue
            for edge in nodes[place].edges:
                if edge is not None and type(edge[0]) is Leaf:
                    edge[0].uses -= 1
            edge = None
            nodes[place].edges = nodes[place].saved = ()
            if not self.replaying:
                del nodes[place]

    def run(
        self, block: Callable[..., Tensor], inputs: tuple[Any, ...], *, offloaded: bool = False
    ) -> Tensor:
        """Run `block` as a checkpoint: keep its inputs only."""
        checkpoint = self.checkpoint = Checkpoint(block, inputs, offloaded=offloaded)
        if offloaded:
            self.offloaded[self.layer] = inputs[0].bytes
        for tensor in checkpoint.inputs:
            storage = getattr(tensor, "storage", None)
            if storage is not None:
                storage.keep()
        try:
            return block(*inputs)
        finally:
            self.checkpoint = None
            if not checkpoint.wanted:
                checkpoint.inputs = ()
                checkpoint.by_name = None

    def handed_by_name(self, x: Tensor) -> Tensor:
        """`x` as a block takes it by name that is a checkpoint within the one at work.

        What it takes by position the checkpoint around it makes again. What it takes by name stays
        as it is from the first run on, and is what the second run of the inner block works with
        (torch.utils.checkpoint, `_CheckpointFrame.save_inputs`).
        """
        checkpoint = self.checkpoint
        if checkpoint is None:
            return x
        if not self.replaying and x.storage is not None:
            x.storage.keep()
            checkpoint.by_name = Tensor(x.shape, x.format, x.storage, None, 0, x.strides)
        kept = checkpoint.by_name
        if kept is None:
            return x
        return Tensor(x.shape, x.format, kept.storage, x.node, x.slot, x.strides)

    def begin_inner(self) -> None:
        """The first node of such a block that keeps something is next: the last on the way back."""
        if self.checkpoint is not None and not self.replaying:
            self.nodes.append(Mark(self.checkpoint.forget_by_name, self.layer))

    def replay(self, checkpoint: Checkpoint) -> None:
        """Run a checkpointed block again, up to the last tensor that it kept."""
        casts, self.casts = self.casts, {}
        self.checkpoint, self.replaying = None, True
        inputs = [self._detached(value) for value in checkpoint.inputs]
        self.checkpoint, checkpoint.made = checkpoint, {}
        try:
            checkpoint.block(*inputs)
        except EndOfRecomputation:
            pass
        finally:
            self.checkpoint, self.replaying, self.casts = None, False, casts
        for node in checkpoint.nodes:
            node.edges = ()
        checkpoint.in_graph.clear()

    def _detached(self, value: Any) -> Any:
        """A tensor of the same storage that starts a graph of its own."""
        if not isinstance(value, Tensor):
            return value
        node = Node(_ends_here, [], -1, None) if value.node is not None else None
        storage = value.storage or self.new("from_host", value.shape, value.format).storage
        return Tensor(value.shape, value.format, storage, node, 0, value.strides)

    def leave_autocast(self) -> None:
        """Let go of the 16-bit copies of weights that nothing else keeps."""
        copies = sorted(self.casts.values(), key=lambda copy: _layer_of(copy))
        self.casts.clear()
        while copies:
            self.enter(_layer_of(copies[-1]))
            copies.pop()
        self.enter(-1)


def _layer_of(copy: Tensor) -> int:
    assert copy.storage is not None
    return copy.storage.what.layer


def _in_host_memory(value: Any) -> Any:
    """The same tensor without a storage on the device."""
    if not isinstance(value, Tensor) or value.storage is None:
        return value
    return Tensor(value.shape, value.format, None, value.node, value.slot, value.strides)


def _ends_here(tape: Tape, node: Node, grads: list[Tensor | None]) -> Sequence[Tensor | None]:
    return ()
