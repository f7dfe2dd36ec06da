"""The memory of one training step on one device, as a timeline of everything that lives in it.

Weights, optimizer states and inputs live through the step. On top of them the anatomy is run once
under the kernels that the run uses: what autograd keeps, the gradients that appear as activations
go, and the temporaries of every operation. The peak is the largest moment, and it has a name.
Sizes are bytes of tensors, as `torch.cuda.max_memory_allocated` counts them; the allocator's
rounding and the device's context are not in them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest
from math import prod
from typing import Literal, NamedTuple

from llmsize.anatomy import Setting, Trace, run_forward
from llmsize.anatomy.autograd import Leaf, backward
from llmsize.anatomy.course import Turn
from llmsize.anatomy.tape import Parameter
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import MATRICES
from llmsize.architecture import Architecture
from llmsize.collector import collector_paused
from llmsize.errors import LLMSizeError, printable
from llmsize.memory.objectives import SFT, Companions, Objective, Reference, Rollout
from llmsize.memory.states import (
    gradient_bytes,
    gradients_leave,
    gradients_stay,
    reached,
    scratch_alone,
    static_memory,
    step_scratch,
    trained_weights,
)
from llmsize.memory.timeline import (
    Moment,
    Stretch,
    counted,
    crest,
    level,
    outside,
    peak,
    stretches,
    traced,
)
from llmsize.optimizers import Optimizer, Precision
from llmsize.term import Term, total

Offload = Literal["none", "optimizer", "parameters"]
"""What lives in host memory: nothing; what the optimizer steps on and with; the weights, too."""


FOLLOWS = {"reference": "forward", "value model's backward": "backward"}
"""The phase that a stage of other models comes after; all other stages come before the step."""

VALUE_MODEL = "value model"
"""What the trained model that a policy has beside it is called."""


class TrainingRun(NamedTuple):
    """The knobs of one step of training on one device."""

    precision: Precision
    optimizer: Optimizer
    setting: Setting = Setting(training=True)
    """Batch, sequence, kernels, adapters, what is frozen; `format` is the 16-bit format."""
    accumulation: int = 1
    """Micro-batches whose gradients are added up before a step."""
    keeps_gradients: bool = False
    """Whether gradients are there all the time even so."""
    fused_backward: bool = False
    """Whether each weight is stepped as soon as its gradient is there, which then goes (LOMO)."""
    objective: Objective = SFT
    reference: Reference = "none"
    rollout: Rollout | None = None
    offload: Offload = "none"
    replicas: int = 1
    """Devices that each hold everything and sum their gradients (data parallel)."""
    bucket_views: bool = False
    """Whether gradients are views of the buckets in which replicas sum them."""


class Point(NamedTuple):
    """One stretch of the timeline."""

    phase: str
    place: str
    """The layers at work; `embedding`, `head and loss`, … outside of them."""
    after: int
    """Bytes alive when it is over, what lives through the step included."""
    highest: int
    """The most bytes alive within it."""
    layers: int = 1
    """How many layers it passes; outside of them it counts as one."""


class TrainingStep(NamedTuple):
    """The timeline of one steady-state step, folded."""

    static: Term
    """What lives through the step: weights, master copies, buffers, optimizer states, inputs."""
    gradients: int
    """Bytes of all gradients after the backward pass."""
    kept: int
    """Alive at the end of the forward pass beside what is static."""
    peaks: dict[str, int]
    """Highest total of the phases `forward`, `backward` and `step`."""
    moment: Moment
    """The highest moment of forward and backward."""
    place: str
    """The layers at work at that moment; empty outside of the layers."""
    timeline: tuple[Point, ...]
    """The step from start to end."""
    step_scratch: int
    """What the optimizer allocates while it steps."""
    trained: int
    """Parameters that are trained."""
    stages: Mapping[str, Term] = {}
    """What is alive above `static` at the highest moments of other phases than those three."""
    beside: Mapping[str, Term] = {}
    """What another trained model has alive in each of those three phases."""
    passes: Sequence[Stretch] = ()
    """The two passes in stretches, and what goes with the loss."""
    weights: Sequence[Parameter] = ()
    """What is trained, and what is not."""

    @property
    def phase(self) -> str:
        """The phase that has the peak."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    @property
    def total(self) -> int:
        """The peak of the step: allocated bytes."""
        return self.peaks[self.phase]

    @property
    def as_run(self) -> Sequence[Stretch]:
        """The two passes with kernels' own temporaries."""
        return [part.as_run() for part in self.passes]

    @property
    def within(self) -> int:
        """By how much those raise the peak of forward and backward."""
        return crest(self.as_run).bytes - self.moment.bytes

    @property
    def within_kernels(self) -> int:
        """By how much kernels' own temporaries raise the peak of the step."""
        passed = max(self.peaks["forward"], self.peaks["backward"])
        return max(0, passed + within - self.total) if (within := self.within) else 0

    @property
    def left(self) -> int:
        """What the backward pass leaves: the trained model's gradients."""
        above = self.peaks["step"] - int(self.static.value) - bytes_of(self.beside, "step")
        return above - self.step_scratch


@lru_cache(maxsize=16)  # an answer asks for a dozen again; the collector searches what is held
def training_step(architecture: Architecture, run: TrainingRun) -> TrainingStep:
    """Run one step of training and fold it.

    Raises `LLMSizeError` where nothing is trained or an adapter matches no layer.
    """
    with collector_paused():  # nothing of a step refers to itself
        return _folded(architecture, run)


def _folded(architecture: Architecture, run: TrainingRun) -> TrainingStep:
    trace, loss = followed(architecture, run)
    parts = list(stretches(trace))
    before = len(trace.events)
    del loss
    let_go = outside("backward", trace.events[before:])
    static, trained = static_memory(trace, run), trained_weights(trace)
    _let_go_of_gradients(trained)
    scratch = step_scratch(trained, run)
    moment = peak(parts)
    timeline = tuple(_timeline(trace, parts, int(static.value), scratch))
    step = TrainingStep(
        static=static,
        gradients=gradient_bytes(trained, run),
        kept=level([part for part in parts if part.phase == "forward"]),
        peaks=_peaks(timeline),
        moment=moment,
        place=_place(trace, moment.layer),
        timeline=timeline,
        step_scratch=scratch,
        trained=sum(prod(weight.shape) * weight.copies for weight in trained),
        passes=[*parts, let_go],
        weights=list(trace.weights.values()),
    )
    return step if run.objective is SFT else _accompanied(step, architecture, run)


def _let_go_of_gradients(trained: Iterable[Parameter]) -> None:
    """They know the whole tape, and weights are remembered with the step."""
    for weight in trained:
        if isinstance(weight.node, Leaf):
            weight.node.gradient = None


def followed(architecture: Architecture, run: TrainingRun) -> tuple[Trace, Tensor]:
    """The tape of a forward and a backward pass, and the loss, which lives while it is held."""
    trace, loss = run_forward(architecture, run.setting)
    check_trained(trace.weights.values(), run.setting)
    if loss.node is None:
        raise LLMSizeError(
            "nothing in the model reads what is trained",
            hint="such a model has no place for it: use `lora`, or train some of its weights",
        )
    trace.leave_autocast()
    trace.accumulating = run.fused_backward or gradients_leave(run) or gradients_stay(run)
    if run.fused_backward:
        trained = [weight for weight in trained_weights(trace) if reached(weight)]
        trace.stepping = {id(weight.node): scratch_alone(weight, run) for weight in trained}
    trace.enter(-1, "backward")
    backward(trace, loss)
    if run.setting.objective != "policy":  # whose trainer holds the logits through the step
        trace.let_go_of_outputs()
    return trace, loss


def _held_casts(architecture: Architecture, run: TrainingRun, kept: int) -> int:
    """Bytes of autocast's copies of weights that are there while the reference reads, too."""
    if run.reference == "none" or run.setting.autocast is None:
        return 0
    trace = run_forward(architecture, run.setting)[0]
    return level(list(stretches(trace))) - kept


def _accompanied(step: TrainingStep, architecture: Architecture, run: TrainingRun) -> TrainingStep:
    """The step with the models and the moments that its objective brings."""
    companions = Companions(architecture, run.setting, run.objective, run.reference, run.rollout)
    resident, beside = list(companions.resident()), {}
    held = step.kept + _held_casts(architecture, run, step.kept)
    stages = {term.name: term for term in companions.moments(held)}
    if run.objective.critic:
        value = training_step(architecture, critic(run))
        resident.append(total(VALUE_MODEL, *value.static.parts, unit="bytes"))
        beside = {
            "forward": traced("kept by the value model", value.kept),
            "backward": traced("kept by the value model", value.kept),
            "step": counted("gradients of the value model", value.left),
        }
        own = value.peaks["backward"] - int(value.static.value)
        stages["value model's backward"] = total(
            "value model's backward", counted("gradients and logits of the policy", step.left),
            traced("value model's pass", own), unit="bytes",
        )  # fmt: skip
    static = total(step.static.name, *step.static.parts, *resident, unit="bytes")
    timeline = tuple(_accompanied_timeline(step, int(static.value), stages, beside))
    return step._replace(
        static=static, stages=stages, beside=beside, peaks=_peaks(timeline), timeline=timeline
    )


def _accompanied_timeline(
    step: TrainingStep, base: int, stages: Mapping[str, Term], beside: Mapping[str, Term]
) -> Iterator[Point]:
    """The points of the step and, in their places, one for each stage of other models.

    A stage leaves what the next phase begins with.
    """

    def stage(name: str, after: int) -> Point:
        return Point(name, "other models", after, base + int(stages[name].value))

    more = base - int(step.static.value)
    yield from (stage(name, base) for name in stages if name not in FOLLOWS)
    for point, following in zip_longest(step.timeline, step.timeline[1:]):
        above = more + bytes_of(beside, point.phase)
        yield point._replace(after=point.after + above, highest=point.highest + above)
        if following is not None and following.phase != point.phase:
            left = point.after + more + bytes_of(beside, following.phase)
            yield from (stage(n, left) for n in stages if FOLLOWS.get(n) == point.phase)


def bytes_of(terms: Mapping[str, Term], name: str) -> int:
    """The value of the term of that name, or 0."""
    return int(terms[name].value) if name in terms else 0


def critic(run: TrainingRun) -> TrainingRun:
    """How the value model is trained: whole, beside the policy, and so in a plain format."""
    setting = run.setting._replace(
        objective="score", adapter=None, trained=None, frozen_layers=0, modules_to_save=(),
        quantized=None, upcast=False,
    )  # fmt: skip
    return run._replace(objective=SFT, reference="none", rollout=None, setting=setting)


def _place(trace: Trace, turn: int) -> str:
    """The indices of the layers in a turn; nothing outside of the layers."""
    return _from_to(trace.course[turn : turn + 1]) if turn >= 0 else ""


def _passed(course: Iterable[Turn]) -> dict[int, str]:
    """The same of all turns of a pattern that repeats, by its number."""
    alike: dict[int, list[Turn]] = {}
    for turn in course:
        alike.setdefault(turn.pattern, []).append(turn)
    return {pattern: _from_to(turns) for pattern, turns in alike.items()}


def _from_to(turns: Sequence[Turn]) -> str:
    first = min([turn.indices[0] for turn in turns])
    last = max([turn.indices[-1] for turn in turns])
    return f"{first}" if first == last else f"{first} to {last}"


def _peaks(timeline: Iterable[Point]) -> dict[str, int]:
    """The highest of each phase, in their order."""
    peaks: dict[str, int] = {}
    for point in timeline:
        peaks[point.phase] = max(point.highest, peaks.get(point.phase, 0))
    return peaks


def _timeline(trace: Trace, parts: Iterable[Stretch], base: int, scratch: int) -> Iterator[Point]:
    """One point a stretch; outside of the layers it is called by the side it is on."""
    live, passed = base, {"forward": False, "backward": False}
    places = _passed(trace.course)
    for part in parts:
        highest = live + max(0, part.net * (part.times - 1)) + part.crest
        live += part.net * part.times
        place = places[trace.course[part.turn].pattern] if part.turn >= 0 else ""
        passed[part.phase] = passed[part.phase] or bool(place)
        upper = passed[part.phase] == (part.phase == "forward")
        outside = "head and loss" if upper else "embedding"
        where = f"layer {place}" if place else outside
        yield Point(part.phase, where, live, highest, part.layers)
    yield Point("step", "optimizer", live, live + scratch)


def check_trained(weights: Collection[Parameter], setting: Setting) -> None:
    """Raise `LLMSizeError` where nothing of the model is trained, adapted, saved or frozen."""
    adapter = setting.adapter
    if frozen := setting.frozen_layers:
        layers = 1 + max((index for weight in weights for index in weight.indices), default=-1)
        if frozen > layers:
            raise LLMSizeError(f"{frozen:,} frozen layers of {layers}", hint="freeze fewer")
    if adapter is not None and not any(weight.role == "adapter" for weight in weights):
        names = _modules(weight for weight in weights if _is_linear(weight))
        if not adapter.targets:
            raise LLMSizeError(
                "the model has no part that the adapters go to",
                hint=f"use `lora`, which goes to any of {names}",
            )
        wanted = " or ".join(f"`{printable(name)}`" for name in adapter.targets)
        raise LLMSizeError(
            f"no linear layer is called {wanted}",
            hint=f"choose from {names}, or `all-linear`",
        )
    for module in setting.modules_to_save:
        if all(_module(weight) != module for weight in weights):
            raise LLMSizeError(
                f"no module is called `{printable(module)}`",
                hint=f"choose from {_modules(weights)}",
            )
    if not any(weight.node is not None for weight in weights):
        roles = f": the model has no {' or '.join(sorted(setting.trained))} of its own" if (
            setting.trained) else ""  # fmt: skip
        raise LLMSizeError(
            f"nothing is trained{roles}", hint="choose another method, such as `--method lora`"
        )


def _is_linear(weight: Parameter) -> bool:
    """Whether it is the matrix of a linear layer between embedding and head."""
    matrix = len(weight.shape) == 2 and weight.name.endswith(".weight")
    return weight.role in MATRICES and matrix


def _module(weight: Parameter) -> str:
    return weight.name.split(".")[-2:][0]


def _modules(weights: Iterable[Parameter]) -> str:
    """The names of the modules of the model's own weights."""
    return ", ".join(sorted({_module(w) for w in weights if w.role != "adapter"}))
