"""A forward pass at work: the weights it names, the layers it stacks, the setting it runs in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from math import prod
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from llmsize.anatomy.adapters import Adapter
from llmsize.anatomy.autograd import Leaf
from llmsize.anatomy.cache import LayerCache
from llmsize.anatomy.course import Turn, course, one_of_each, shown_by
from llmsize.anatomy.linear import Linear, bias_format
from llmsize.anatomy.setting import Setting
from llmsize.anatomy.tape import Parameter, Tape
from llmsize.anatomy.tensor import HIDDEN_STATES, OUTSIDE, Dim, Label, Shape, Tensor
from llmsize.formats import FP32, INT8, Format
from llmsize.quick_dataclasses import dataclass, field

if TYPE_CHECKING:
    from llmsize.anatomy.balancing import Routed
    from llmsize.anatomy.prompts import Prefixes

Kind = TypeVar("Kind", bound=Hashable)


class Place(NamedTuple):
    """A traced part of a layer: what its weights are called, and which layers it stands for."""

    prefix: str
    """Of its weights' names; `{}` stands for the layer's index."""
    indices: list[int]
    """Indices of the layers it stands for; empty outside of the layers."""


class Module(NamedTuple):
    """A module that several layers call, whose weights are there once."""

    prefix: str
    """Of its weights' names."""
    calls: int
    """How many layers call it."""


CLASSIFIERS = frozenset(("classifier", "score"))
"""Modules that peft trains beside adapters wherever there are some (peft v0.21, peft_model.py,
`PeftModelForSequenceClassification`)."""


MATRICES = frozenset(
    (*("q", "k", "v", "qkv", "o", "q_a", "q_b", "kv_a", "kv_b", "gate", "up", "down", "gate_up"),
     *("shared_gate", "shared_up", "shared_down", "shared_gate_up"),
     *("gate_attention", "indexer", "ssm"))
)  # fmt: skip
"""Roles of the matrices of attention and feed-forward layers."""

EXPERTS = frozenset(("expert_gate_up", "expert_up", "expert_down"))
"""Roles of routed experts' weights, which transformers 5 keeps in one parameter for all."""


class Half(NamedTuple):
    """Attention or feed-forward with its residual connection, traced for all that are alike."""

    what: tuple[object, ...]
    """What it does with what."""
    part: int
    """Its number among the parts of layers."""
    keeps: bool
    """Whether it keeps what it is handed."""


@dataclass(slots=True, eq=False, repr=False)
class Trace(Tape):
    """A tape that knows the model's weights and the setting."""

    family: str = ""
    """The `model_type`."""
    once_linear: bool = False
    """Whether the routed experts were linear layers once, which adapters take them for."""
    setting: Setting = field(default_factory=Setting)
    weights: dict[tuple[int, str], Parameter] = field(default_factory=dict)
    places: dict[int, Place] = field(default_factory=lambda: {OUTSIDE: Place("", [])})
    """The traced parts of layers, by their number, and what is `OUTSIDE` of them."""
    common: Module | None = None
    """The module at work, where it is one that layers have in common."""
    course: list[Turn] = field(default_factory=list)
    """All layers of the model from first to last."""
    parts: list[int] = field(default_factory=list)
    """Numbers of the parts of the layer at work: itself, its halves, what goes as it is left."""
    limits: tuple[bool, ...] = ()
    """Whether the layer at work is frozen, and whether it has no adapters."""
    halves: list[Half] | None = None
    """Halves of layers that may stand for others, where there are unlike layers to take apart."""
    outline: bool = False
    """Whether one layer of each kind is enough: for weights and caches, not for lifetimes."""
    unrolled: bool = False
    """Whether every layer is traced, and stands for itself alone."""
    caches: list[tuple[int, LayerCache]] = field(default_factory=list)
    """What the traced layers keep of their tokens, by the layers' numbers."""
    stored: list[Tensor] = field(default_factory=list)
    """The tensors of the cache."""
    outputs: tuple[Tensor, ...] | None = None
    """The logits, and what comes beside them, where the caller holds them."""
    previous: tuple[int, Tensor] | None = None
    """Those of the micro-batch before, where a loop holds them, and the place of their event."""
    held: list[Tensor | None] = field(default_factory=list)
    """What the caller of the model holds until it has run."""
    routed: list[Routed] = field(default_factory=list)
    """What each traced layer's router gave, where the model hands it out."""
    prefixes: Prefixes | None = None
    """Trained keys and values in front of every layer's own."""
    classifies: bool = False
    """Whether there is one label for each sequence in place of one for each token."""
    buffers: int = 0
    """Bytes of constants beside the weights, without those that layers have of their own."""
    own_buffers: dict[int, int] = field(default_factory=dict)
    """Bytes of constants that each traced layer has, and every one that it stands for."""
    handing_back: bool = False
    """Whether the last layer left something beside its result, which the next lets go of."""
    rotated: list[int] = field(default_factory=list)
    """Channels that are rotated, for each kind of layer whose angles are made apart; first those
    of layers that see every token."""
    shared: dict[str, Shape] = field(default_factory=dict)
    """Shapes of constants that many layers share, by their names."""
    batch: Dim = field(default_factory=lambda: Dim(1, "batch"))
    sequence: Dim = field(default_factory=lambda: Dim(1, "sequence"))

    def weight(
        self,
        name: str,
        shape: Shape,
        role: str,
        *,
        experts: int = 0,
        chosen: int = 0,
        format: Format | None = None,
        fixed: bool = False,
        linear: bool = False,
        kept: bool = False,
    ) -> Parameter:
        """The parameter `name` (relative to its layer), made when it is first asked for.

        `experts` says that its first dimension is routed experts, of which a token uses `chosen`.
        It has a `format` of its own if the model says so; a `fixed` one is never trained. The
        weight of a `linear` layer is used by calling that; one that is `kept` is never quantized.
        """
        layer, name = self._home(name)
        weight = self.weights.get((layer, name))
        if weight is None:
            quantized = not kept and self._quantizes(role, linear=linear)
            own = FP32 if self.setting.upcast and not quantized else self.setting.format
            weight = self._weight(layer, name, shape, format or own, role)
            weight.quantized = quantized and len(shape) > 1
            weight.experts, weight.chosen = experts, chosen
            weight.copied = self.saves(name)
            if (self._trains(name, role) or weight.copied) and not fixed:
                weight.train()
        return weight

    def _home(self, name: str) -> tuple[int, str]:
        """The layer that a parameter belongs to, and its name there."""
        if self.common is None:
            return self.layer, name
        return OUTSIDE, self.common.prefix + name

    def saves(self, name: str) -> bool:
        """Whether a trained copy is beside a frozen module: where asked for, or of a classifier."""
        saved, head = self.setting.modules_to_save, self.setting.adapter and self.layer < 0
        if not (saved or head):
            return False
        *modules, _ = ("", *name.split("."))
        return modules[-1] in saved or bool(head and not CLASSIFIERS.isdisjoint(modules))

    def _trains(self, name: str, role: str) -> bool:
        end = "bias" if self.setting.adapter is None else ".bias"  # peft trains none of experts
        setting, roles = self.setting, {role, "bias"} if name.endswith(end) else {role} - {"bias"}
        if not setting.training or (
            setting.trained is not None and roles.isdisjoint(setting.trained)
        ):
            return False
        if not setting.frozen_layers:
            return True
        indices = self.places[self.layer].indices
        below = indices[0] < setting.frozen_layers if indices else role in ("embedding", "position")
        return not below

    def remember(self, cache: LayerCache) -> None:
        """Note what the layer at work keeps of the tokens that it has seen."""
        if not self.replaying:
            self.caches.append((self.layer, cache))

    def add_buffer(self, size: int) -> None:
        """Count a constant of that many bytes in every layer like the one at work, if in one."""
        if not self.replaying:
            self.own_buffers[self.layer] = self.own_buffers.get(self.layer, 0) + size

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the model's buffers: constants beside the weights."""
        own = self.own_buffers.items()
        return self.buffers + sum(size * (len(self.places[at].indices) or 1) for at, size in own)

    def share_buffer(self, name: str, *shape: int) -> None:
        """Count an fp32 constant that layers share: as large as the largest of them needs."""
        before = self.shared.get(name, (0,) * len(shape))
        after = self.shared[name] = tuple(map(max, before, shape))
        self.buffers += FP32.block_bytes * (prod(after) - prod(before))

    def table(self, weight: Parameter) -> Tensor:
        """An embedding as tokens, or a tied head, see it: with its adapter, if it has one."""
        adapter = self.setting.adapter
        return weight if adapter is None else adapter.table(self, weight)

    def replace_cache(self, whole: Tensor, past: int) -> None:
        """Hold `whole` for the next token, and let go of the `past` tokens copied into it."""
        self.stored.append(whole)
        if past:
            batch, heads, _, channels = whole.shape
            label: Label = "cache", "cat", self.layer, (batch, heads, past, channels), whole.format
            self.events.append((-batch * heads * past * channels * whole.format.block_bytes, label))

    def hold_in_cache(self, made: Tensor, past: int) -> None:
        """The same, where `made` itself is held, and not a copy of it."""
        assert made.storage is not None
        made.storage.becomes("cache")
        self.replace_cache(made, past)

    def layer_caches(self) -> list[LayerCache]:
        """What every layer of the model keeps, first layer first."""
        return [cache for _, cache in self.numbered_caches()]

    def numbered_caches(self) -> list[tuple[int, LayerCache]]:
        """The same with the layers' indices: a layer may keep several things, or nothing."""
        numbered = [
            (index, cache) for layer, cache in self.caches for index in self.places[layer].indices
        ]
        return sorted(numbered, key=lambda pair: pair[0])

    @property
    def depth(self) -> int:
        """How many layers the model has."""
        indices = (index for place in self.places.values() for index in place.indices)
        return 1 + max(indices, default=-1)

    @property
    def attending(self) -> Adapter | None:
        """The adapter, where it changes the attention of the layer at work."""
        adapter = self.setting.adapter
        if adapter is None or not adapter.first:
            return adapter
        indices = self.places[self.layer].indices
        return None if indices and indices[0] < adapter.first else adapter

    def adapter(self, name: str, shape: Shape, *, trained: bool = True) -> Parameter:
        """A parameter beside the model's own, which is `trained` unless it is said to be fixed."""
        layer, name = self._home(name)
        weight = self.weights.get((layer, name))
        if weight is None:
            assert self.setting.adapter is not None
            weight = self._weight(layer, name, shape, self.setting.adapter.format, "adapter")
            if trained:
                weight.train()
        return weight

    def hold_previous(self) -> None:
        """The loop still has the outputs of the micro-batch before: as much as this one leaves."""
        made = self.new("micro-batch before", (0,), INT8, role="kept")
        self.previous = len(self.events) - 1, made

    def replace_outputs(self, made: tuple[Tensor, ...]) -> None:
        """The loop's name for the outputs gets these, and lets go of those before and their graph.

        Only now is known how much that was.
        """
        self.outputs = made
        if self.previous is None:
            return
        (at, before), self.previous = self.previous, None
        assert before.storage is not None
        before.storage.bytes = self._held_with(made)
        self.events[at] = (before.storage.bytes, before.storage.label)

    def _held_with(self, outputs: tuple[Tensor, ...]) -> int:
        """Bytes of the outputs and of what their graph's nodes hold themselves, in all layers."""
        storages = {
            id(tensor.storage): tensor.storage
            for tensor in (*outputs, *self.in_graph) if tensor and tensor.storage
        }  # fmt: skip
        return sum(
            storage.bytes * (len(self.places[storage.what.layer].indices) or 1)
            for storage in storages.values()
        )

    def let_go_of_outputs(self) -> None:
        """The caller holds the outputs no longer."""
        outputs: list[Tensor | None] = list(self.outputs or ())
        self.outputs = None
        self.let_go(outputs)

    def let_go(self, tensors: list[Tensor | None]) -> None:
        """Empty the list; what goes with it goes for every layer that a traced one stands for."""
        while tensors:
            storage = tensors[-1].storage if tensors[-1] is not None else None
            alike = len(self.places[storage.what.layer].indices) if storage is not None else 1
            before, storage = len(self.events), None
            tensors.pop()
            if len(self.events) > before and alike > 1:
                change, label = self.events[-1]
                self.events[-1] = (alike * change, label)

    def _weight(self, layer: int, name: str, shape: Shape, format: Format, role: str) -> Parameter:
        prefix, indices = self.places[layer]
        made = Parameter(prefix + name, shape, format, role, indices)
        made.calls = self.common.calls if self.common is not None else 1
        self.weights[layer, name] = made
        return made

    def with_gradient(self, x: Tensor) -> Tensor:
        """`x` as a leaf that wants a gradient, which stays with it, unless it wants one anyway."""
        if x.node is not None:
            return x
        return Tensor(x.shape, x.format, x.storage, Leaf(x.storage, passing=True))

    def linear(
        self,
        x: Tensor,
        name: str,
        out: int,
        *,
        bias: bool = False,
        role: str,
        transposed: bool = False,
        format: Format | None = None,
        kept: bool = False,
    ) -> Tensor:
        """A linear layer from the last dimension of `x` to `out`, with an adapter if it has one.

        `transposed` weights are stored as (in, out), as GPT-2's are, unless they are quantized.
        What is `kept` never is (transformers' `_keep_in_fp32_modules`).
        """
        return self.through(x, self._linear(x, name, out, bias, role, format, transposed, kept))

    def through(self, x: Tensor, layer: Linear) -> Tensor:
        """What a linear layer gives for `x`, with an adapter if it has one.

        One that is trained as a copy has none.
        """
        adapter = self.setting.adapter
        if adapter is None or not adapter.adapts(
            layer.name,
            layer.role,
            self.family,
            once_linear=self.once_linear and not self.setting.quantizes_experts,
        ):
            return layer.run(self, x)
        if self.saves(f"{layer.name}.weight"):
            return layer.run(self, x)
        if self.setting.adapted_biases and layer.bias is not None and layer.bias.node is None:
            layer.bias.train()
        return adapter.around(self, x, layer)

    def linear_in_parts(
        self, x: Tensor, name: str, parts: Mapping[str, int], *, bias: bool = False, role: str
    ) -> Tensor:
        """Several linear layers as one, their outputs side by side.

        `parts` are the names by which an adapter may target them, and their widths.
        """
        out = sum(parts.values())
        layer = self._linear(x, name, out, bias, role)
        adapter = self.setting.adapter
        if adapter is None:
            return layer.run(self, x)
        adapted = [width for part, width in parts.items() if adapter.adapts(part, role)]
        return adapter.around_parts(self, x, layer, adapted) if adapted else layer.run(self, x)

    def _linear(
        self,
        x: Tensor,
        name: str,
        out: int,
        bias: bool,
        role: str,
        format: Format | None = None,
        transposed: bool = False,
        kept: bool = False,
    ) -> Linear:
        transposed &= kept or not self._quantizes(role, linear=True)
        shape = (x.shape[-1], out) if transposed else (out, x.shape[-1])
        weight = self.weight(f"{name}.weight", shape, role, format=format, linear=True, kept=kept)
        own = bias_format(self, x) if weight.quantized else None
        offset = self.weight(f"{name}.bias", (out,), "bias", format=own) if bias else None
        return Linear(name, role, weight, offset, out, transposed)

    def bare_weight(self, name: str, out: int, width: int, role: str) -> Parameter:
        """The weight of a linear layer that is used without the layer, and without its adapter."""
        adapter = self.setting.adapter
        if adapter is not None and adapter.adapts(name, role, self.family):
            adapter.parts(self, name, width, out)
        return self.weight(f"{name}.weight", (out, width), role)

    def _quantizes(self, role: str, *, linear: bool) -> bool:
        """Whether bitsandbytes replaces the layer of a weight.

        Recurrent layers have weights without one, and matrices that are used without theirs: a
        packed one would fail there, so that it has to be among `llm_int8_skip_modules`.
        """
        if self.setting.quantized is None or role == "score":
            return False
        if role == "head":
            return linear and self.setting.quantizes_head
        if role in EXPERTS:
            return self.setting.quantizes_experts
        return linear or (role in MATRICES and role != "ssm")

    def adapted_matrix(self, weight: Tensor, name: str, role: str, *, fused: int = 1) -> Tensor:
        """A parameter that is no linear layer, with its adapter added into a copy of it.

        `fused` says how many layers are in it.
        """
        return self.merger(weight, name, fused=fused)()

    def merger(self, weight: Tensor, name: str, *, fused: int = 1) -> Callable[[], Tensor]:
        """What gives such a parameter for each of its uses."""
        adapter = self.setting.adapter
        return (lambda: weight) if adapter is None else adapter.merger(self, weight, name, fused)

    def layers(
        self,
        prefix: str,
        block: Callable[[Tensor, Kind], Tensor],
        x: Tensor,
        kinds: Sequence[Kind],
        *held: Tensor | None,
        carried: list[Tensor] | None = None,
        told: Callable[[Kind], Hashable] | None = None,
    ) -> Tensor:
        """`x` through one block a layer; of layers that repeat few are traced.

        `prefix` is the name of the list of layers, `kinds` one hashable kind a layer. `held` is
        what every block is handed without using it; a checkpoint keeps it alive, and what is in
        `carried`, by which blocks hand something to the next beside `x`. If there is no such list
        or the first leaves it empty, layers cannot tell of what kinds their neighbours are; else
        they can, and where something is `told` of the kinds, as gradients of several layers flow to
        the same, that alone.
        """
        handed = [] if carried is None else carried
        marked = self._marked(kinds, x)
        turns = self._turns(marked)
        shown: Sequence[int] = range(len(turns))
        parts: list[Sequence[int]] = []
        settled, entered = self.outline or self.unrolled, None
        x, self.handing_back = _lent(x), False
        alone = carried is None and told is None
        unlike = any(turn.kind != turns[0].kind for turn in turns)
        self.halves = [] if alone and unlike and not settled else None
        for number, turn in enumerate(turns):
            before, entered = entered, _look(x)
            alike = before == entered
            if number and not settled and self._is_settled(x, carried, alike=alike):
                settled = True
                apart = number - 1 if alone and alike and not self.handing_back else number
                seen = None if carried and told is None else _seen(turns, told)
                shown = shown_by(turns, apart, seen)
            if shown[number] == number:
                self.parts, self.limits = [], turn.kind[2:4]
                self._begin_part(Place(f"{prefix}.{{}}.", [*turn.indices]))
                x = self._pass_layer(block, x, turn.kind, held, handed)
                parts.append(self.parts)
            else:
                parts.append(parts[shown[number]])
        self.enter(OUTSIDE)
        self.halves = None
        self._follow(turns, parts)
        return x

    def _turns(self, kinds: tuple[Hashable, ...]) -> Sequence[Turn]:
        """The layers of those kinds, as finely as they are wanted."""
        if self.unrolled:
            return [Turn(kind, range(index, index + 1), index) for index, kind in enumerate(kinds)]
        return one_of_each(kinds) if self.outline else course(kinds)

    def _pass_layer(
        self,
        block: Callable[[Tensor, Kind], Tensor],
        x: Tensor,
        marked: tuple[Kind, bool, bool, bool, bool],
        held: Sequence[Tensor | None],
        carried: list[Tensor],
    ) -> Tensor:
        """`x` through one layer, whose last part is what goes as it is left."""
        kind, checkpointed, *_ = marked
        if checkpointed and self.grad:
            again = partial(_block_of_kind, self, block, kind, carried, len(held))
            inputs = (x, *held, *carried)
            made = self.run(again, inputs, offloaded=self.setting.offload_checkpoints)
        else:
            made = block(x, kind)
        if len(self.parts) > 1:
            self._begin_part(self.places[self.parts[0]])
        self.attention_weights = None
        if made.storage is not None:
            made.storage.hand_on(HIDDEN_STATES, made.shape, self.layer)
        return made

    def _marked(
        self, kinds: Sequence[Kind], x: Tensor
    ) -> tuple[tuple[Kind, bool, bool, bool, bool], ...]:
        """The kind of every layer, and whether it runs again, is frozen, and has no adapters.

        Where `x` wants no gradient, the first is one of its own: it may keep nothing of what it
        hands back to the loop, which lets go of that when the next has run.
        """
        lone = self.grad and x.node is None
        every, frozen = self.setting.checkpoint_every, self.setting.frozen_layers
        plain = self.setting.adapter.first if self.setting.adapter else 0
        before = sum(len(turn.indices) for turn in self.course)  # of an encoder's layers
        return tuple(
            (
                kind,
                every > 0 and (before + index) % every == 0,
                index < frozen,
                index < plain,
                index < lone,
            )
            for index, kind in enumerate(kinds)
        )

    def _is_settled(self, x: Tensor, carried: Sequence[Tensor] | None, *, alike: bool) -> bool:
        """Whether layers from this turn on are alike if they are of one kind and their neighbours
        look alike.

        Not before something is trained, nor where some layers run again and what is carried comes
        from further away, nor where the last one left something and was not entered `alike`.
        """
        trained = x.node is not None or not self.grad
        some = self.setting.checkpoint_every > 1
        return trained and not (some and carried) and (alike or not self.handing_back)

    def _begin_part(self, place: Place) -> None:
        """Enter one more part of the layer at work, which is at that place."""
        number = len(self.places) - 1
        self.places[number] = Place(place.prefix, [*place.indices])
        self.parts.append(number)
        self.enter(number)

    def half(self, join: Join, x: Tensor, part: Callable[[Tensor], Tensor], *how: object) -> Tensor:
        """One half of a layer: `x` with what `part` makes of it, joined as `how` says.

        Of halves that are alike one is traced: where layers hand on nothing but `x`, the same code
        does the same with an `x` that looks the same.
        """
        if self.halves is None or self.handing_back or self.checkpoint or self.common:
            return join(self, x, part, *how)
        place, limits = self.places[self.parts[0]], self.limits
        what = join, how, *_code(part), limits, _look(x), _reason(x)
        found = next((half for half in self.halves if half.what == what), None)
        if found is not None and (x.node is not None or not self.grad):
            self.parts.append(found.part)
            return x if len(self.parts) > 2 else self._made_elsewhere(x, found)
        self._begin_part(place)
        number, left = self.layer, self.attention_weights
        made = join(self, x, part, *how)
        if self.attention_weights is left:  # or else it has left something to its own layer
            self.halves.append(Half(what, number, keeps=_reason(x) != what[-1]))
        if made.storage is not None:
            made.storage.hand_on(HIDDEN_STATES, made.shape, number)
        return made

    def _made_elsewhere(self, x: Tensor, half: Half) -> Tensor:
        """What a layer's first half makes of `x`, where it is shown by another one.

        That one brings it to life, and lets go of `x` where it keeps it.
        """
        made = self.new(HIDDEN_STATES, x.shape, x.format, x.node)
        made.slot, made.strides = x.slot, x.strides
        self.events.pop()
        if half.keeps and x.storage is not None:
            x.storage.bytes = 0
        return made

    def _follow(self, turns: Sequence[Turn], parts: Sequence[Sequence[int]]) -> None:
        """Take up a list of layers that has been passed: of each turn the parts."""
        first = len(self.course)
        stands_for: dict[int, list[int]] = {}
        for turn, numbers in zip(turns, parts, strict=True):
            self.course.append(Turn(turn.kind, turn.indices, first + turn.pattern, numbers))
            for number in numbers:
                stands_for.setdefault(number, []).extend(turn.indices)
        for number, indices in stands_for.items():
            self.places[number].indices[:] = sorted(indices)  # which their weights know


Join = Callable[..., Tensor]
"""How a half of a layer adds to the residual stream: called with the trace, that, and the part."""


def _look(x: Tensor) -> Hashable:
    """What a layer can tell of the tensor that it is handed."""
    return x.format, x.shape, x.strides, x.node is not None


def _reason(x: Tensor) -> object:
    """Why the bytes of a tensor are alive."""
    return x.storage and x.storage.label[:2]


def _code(part: Callable[[Tensor], Tensor]) -> tuple[object, ...]:
    """What a function does: its code, and the values from around it."""
    if not isinstance(part, FunctionType):
        return (part,)
    around = [cell.cell_contents for cell in part.__closure__ or ()]
    return part.__code__, part.__defaults__, *around


def _seen(turns: Sequence[Turn], told: Callable[[Any], Hashable] | None) -> list[Hashable]:
    """What neighbours can tell of each turn, and of what is before the first and after the last.

    Not whether it is the first. Where kinds are told, those are told from layers: what layers share
    begins and ends with one.
    """
    seen: list[Hashable] = [(told and told(turn.kind[0]), *turn.kind[1:-1]) for turn in turns]
    return [None, *seen, None] if told else [seen[0], *seen, seen[-1]]


def _lent(x: Tensor) -> Tensor:
    """`x` as layers hand it to each other: no layer's own, and of no one else who holds it."""
    if x.storage is None:
        return x
    storage = x.storage.lend(HIDDEN_STATES, x.shape)
    return Tensor(x.shape, x.format, storage, x.node, x.slot, x.strides, x.own)


def _block_of_kind(
    t: Trace,
    block: Callable[[Tensor, Kind], Tensor],
    kind: Kind,
    carried: list[Tensor],
    held: int,
    x: Tensor,
    *rest: Tensor,
) -> Tensor:
    """A block with what was carried to it; a second run hands nothing on."""
    carried[:] = rest[held:]
    del rest
    try:
        return block(x, kind)
    finally:
        t.attention_weights = None
        if t.replaying:
            carried.clear()
