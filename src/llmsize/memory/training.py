"""The memory of one training step on one device, as a timeline of everything that lives in it.

Weights, optimizer states and inputs live through the step. On top of them the anatomy is run once
under the kernels that the run uses: what autograd keeps, the gradients that appear as activations
go, and the temporaries of every operation. The peak is the largest moment, and it has a name.
Sizes are bytes of tensors, as `torch.cuda.max_memory_allocated` counts them; the allocator's
rounding and the device's context are not in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from math import ceil, prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from llmsize.anatomy import Setting, Trace, run_forward
from llmsize.anatomy.autograd import backward
from llmsize.anatomy.tape import Parameter
from llmsize.anatomy.tensor import Shape
from llmsize.anatomy.trace import QUANTIZED
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError, printable
from llmsize.formats import INT64, Format, matrix_bytes, stored_bytes
from llmsize.memory.objectives import SFT, Companions, Objective, Reference, Rollout
from llmsize.memory.timeline import Moment, Stretch, counted, crest, level, peak, stretches
from llmsize.optimizers import (
    DTYPE,
    Optimizer,
    Precision,
    kept_format,
    projection_bytes,
    state_bytes,
)
from llmsize.term import Term, fact, term, total

if TYPE_CHECKING:
    from llmsize.stack import Stack


Offload = Literal["none", "optimizer", "parameters"]
"""What lives in host memory: nothing; what the optimizer steps on and with; the weights, too."""


class TrainingRun(NamedTuple):
    """The knobs of one step of training on one device."""

    precision: Precision
    optimizer: Optimizer
    setting: Setting = Setting(training=True)
    """Batch, sequence, kernels, adapters, what is frozen; `format` is the 16-bit format."""
    fused_optimizer: bool = True
    """Whether the optimizer steps without a scratch copy of the parameters (not `foreach`)."""
    accumulation: int = 1
    """Micro-batches whose gradients are added up before a step."""
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
    casts: int
    """Autocast's 16-bit copies of weights, part of `kept`."""
    kept_per_layer: int
    """What one layer in the middle keeps, without those copies."""
    kept_in_layers: int
    kept_outside: int
    """Embedding, final norm, head, loss."""
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

    @property
    def phase(self) -> str:
        """The phase that has the peak."""
        return max(self.peaks, key=lambda name: self.peaks[name])

    @property
    def total(self) -> int:
        """The peak of the step: allocated bytes."""
        return self.peaks[self.phase]


def training_step(architecture: Architecture, run: TrainingRun) -> TrainingStep:
    """Run one step of training and fold it.

    Raises `LLMSizeError` where nothing is trained or an adapter matches no layer.
    """
    trace, loss = run_forward(architecture, run.setting)
    weights = list(trace.weights.values())
    check_trained(weights, run.setting)
    if loss.node is None:
        raise LLMSizeError(
            "nothing in the model reads what is trained",
            hint="such a model has no place for it: use `lora`, or train some of its weights",
        )
    trace.leave_autocast()
    trace.accumulating = run.fused_backward or _leave(run) or _stay(run)
    trace.enter(-1, "backward")
    backward(trace, loss)
    trace.outputs = None
    parts = list(stretches(trace))
    forward = [part for part in parts if part.phase == "forward"]
    static = static_memory(trace, run)
    base, scratch = int(static.value), step_scratch(weights, run)
    moment = peak(parts)
    kept, casts, in_layers = level(forward), _labelled(forward, casts=True), _labelled(forward)
    step = TrainingStep(
        static=static,
        gradients=gradient_bytes(weights, run),
        kept=kept,
        casts=casts,
        kept_per_layer=_middle_layer(trace),
        kept_in_layers=in_layers,
        kept_outside=kept - casts - in_layers,
        peaks={
            "forward": base + crest(parts, "forward").bytes,
            "backward": base + crest(parts, "backward").bytes,
            "step": base + level(parts) + scratch,
        },
        moment=moment,
        place=_place(trace, moment.layer),
        timeline=tuple(_timeline(trace, parts, base, scratch)),
        step_scratch=scratch,
        trained=sum(prod(w.shape) * w.copies for w in weights if w.node is not None),
    )
    return step if run.objective is SFT else _accompanied(step, architecture, run)


def _accompanied(step: TrainingStep, architecture: Architecture, run: TrainingRun) -> TrainingStep:
    """The step with the models and the moments that its objective brings."""
    companions = Companions(
        architecture, run.setting, run.objective, run.reference, run.rollout
    )  # fmt: skip
    resident, peaks, beside = list(companions.resident()), dict(step.peaks), {}
    stages = {term.name: term for term in companions.moments(step.kept)}
    if run.objective.critic:
        value = training_step(architecture, critic(run))
        resident.append(total("value model", *value.static.parts, unit="bytes"))
        beside = {
            "forward": counted("kept by the value model", value.kept),
            "backward": counted("kept by the value model", value.kept),
            "step": counted("gradients of the value model", _left(value)),
        }
        own = value.peaks["backward"] - int(value.static.value)
        stages["value model's backward"] = total(
            "value model's backward", counted("gradients of the policy", _left(step)),
            counted("value model's pass", own), unit="bytes",
        )  # fmt: skip
    static = total(step.static.name, *step.static.parts, *resident, unit="bytes")
    more, base = int(static.value - step.static.value), int(static.value)
    peaks = {phase: size + more + _size(beside, phase) for phase, size in peaks.items()}
    before = [Point(name, "other models", base, base + int(stages[name].value)) for name in stages]
    own_timeline = [
        p._replace(after=p.after + more, highest=p.highest + more) for p in step.timeline
    ]
    return step._replace(
        static=static, stages=stages, beside=beside,
        peaks=peaks | {name: base + int(term.value) for name, term in stages.items()},
        timeline=(*before, *own_timeline),
    )  # fmt: skip


def _size(terms: Mapping[str, Term], name: str) -> int:
    return int(terms[name].value) if name in terms else 0


def critic(run: TrainingRun) -> TrainingRun:
    """How the value model is trained: whole, beside the policy."""
    setting = run.setting._replace(
        objective="score", adapter=None, trained=None, modules_to_save=(),
        input_gradients=False,
    )  # fmt: skip
    return run._replace(objective=SFT, reference="none", rollout=None, setting=setting)


def _place(trace: Trace, turn: int) -> str:
    """The indices of the layers in a turn; nothing outside of the layers."""
    if turn < 0:
        return ""
    indices = trace.course[turn].indices
    if len(indices) < 2:
        return f"{indices[0]}"
    return f"{indices[0]} to {indices[-1]}"


def _timeline(trace: Trace, parts: Iterable[Stretch], base: int, scratch: int) -> Iterator[Point]:
    """One point a stretch; outside of the layers it is called by the side it is on."""
    live, passed = base, {"forward": False, "backward": False}
    for part in parts:
        highest = live + max(0, part.net * (part.times - 1)) + part.crest
        live += part.net * part.times
        place = _place(trace, part.turn)
        passed[part.phase] = passed[part.phase] or bool(place)
        upper = passed[part.phase] == (part.phase == "forward")
        outside = "head and loss" if upper else "embedding"
        passing = part.times * len(part.passages)
        yield Point(part.phase, f"layer {place}" if place else outside, live, highest, passing)
    yield Point("step", "optimizer", live, live + scratch)


def static_memory(trace: Trace, run: TrainingRun) -> Term:
    """What lives through the step on the device, by what it is."""
    weights = list(trace.weights.values())
    trained = [weight for weight in weights if weight.node is not None]
    parts = [_weights(weights, run), _buffers(trace)]
    if run.offload == "none":
        held = sum(states(weight, run) for weight in trained)
        parts.append(counted("optimizer states", held, run.optimizer.title))
    parts.append(counted("inputs", _inputs(run.setting), "token ids, labels and mask in int64"))
    if run.precision.master and run.offload == "none":
        copies = sum(stepped_bytes(weight, run) for weight in trained)
        parts.insert(1, counted("master weights", copies, run.precision.title))
    if _stay(run) and not (run.fused_backward or _leave(run)):
        parts.append(counted("gradients", gradient_bytes(weights, run), "kept between batches"))
    if _has_buckets(run):
        parts.append(fact("buckets of the reducer", gradient_bytes(weights, run), unit="bytes",
                          source=REDUCER))  # fmt: skip
    return total("lives through the step", *parts, unit="bytes")


REDUCER = "pytorch v2.6, torch/csrc/distributed/c10d/reducer.cpp (Reducer::initialize_buckets)"


def _weights(weights: Iterable[Parameter], run: TrainingRun) -> Term:
    if run.offload == "parameters":
        return counted("weights", at_work(weights, run.setting), "the block at work and the next")
    return counted("weights", sum(stored(weight, run.setting) for weight in weights))


def _buffers(trace: Trace) -> Term:
    return counted("buffers", trace.buffers, "inverse frequencies of the rotary embedding")


def at_work(weights: Iterable[Parameter], setting: Setting) -> int:
    """Bytes of two blocks in a row, at most: embedding, each layer, head with what leads to it.

    Tied weights are in the first and in the last block.
    """
    first = last = tied = 0
    layers: Counter[int] = Counter()
    headless = True
    for weight in weights:
        size = stored(weight, setting)
        headless = headless and weight.role != "head"
        if weight.indices:
            layers.update(dict.fromkeys(weight.indices, size // weight.copies))
        elif weight.role in ("embedding", "position"):
            first += size
            tied += size if weight.role == "embedding" else 0
        else:
            last += size
    blocks = [first, *(layers[index] for index in sorted(layers)), last + (tied if headless else 0)]
    return max(sum(pair) for pair in pairwise(blocks))


def stored(weight: Parameter, setting: Setting) -> int:
    """Bytes of a weight where it lives, its scales included if it is quantized."""
    if setting.quantized is not None and weight.role in QUANTIZED and len(weight.shape) > 1:
        rows, columns = prod(weight.shape[:-1]), weight.shape[-1]
        return matrix_bytes(setting.quantized, rows, columns) * weight.copies
    return weight.bytes * weight.copies * (1 + weight.copied)


def gradient_bytes(weights: Iterable[Parameter], run: TrainingRun) -> int:
    """Bytes of the gradients of all trained weights in the format that the recipe keeps."""
    name = run.precision.gradients if _main_gradients(run) else DTYPE
    return sum(
        stored_bytes(kept_format(run.precision, name, w.format), prod(w.shape)) * w.copies
        for w in weights
        if w.node is not None
    )


def step_scratch(weights: Iterable[Parameter], run: TrainingRun) -> int:
    """What the optimizer allocates on the device to step: a copy of the parameters unless it is
    fused, and the gradients in the master weights' format; or in a subspace, what one weight takes.
    """
    if run.offload != "none":
        return 0
    trained = [weight for weight in weights if weight.node is not None]
    if run.optimizer.layout == "low_rank":
        return projection(trained, run)
    stepped = sum(stepped_bytes(weight, run) for weight in trained)
    recast = bool(run.precision.master) and not _main_gradients(run)
    return stepped * (int(not run.fused_optimizer) + int(recast))


def projection(trained: Iterable[Parameter], run: TrainingRun) -> int:
    """What a step in a subspace allocates for the weight that takes most."""
    return max(
        projection_bytes(run.optimizer, weight.shape, weight.role, _stepped(weight, run))
        for weight in trained
    )


def stepped_bytes(weight: Parameter, run: TrainingRun) -> int:
    """Bytes of a weight in the format of the copy that the optimizer works on."""
    return stored_bytes(_stepped(weight, run), prod(weight.shape)) * weight.copies


def _stepped(weight: Parameter, run: TrainingRun) -> Format:
    """The format of the copy of a weight that the optimizer works on."""
    if not run.precision.master:
        return weight.format
    return kept_format(run.precision, run.precision.master, weight.format)


def states(weight: Parameter, run: TrainingRun) -> int:
    """Bytes of the optimizer's states of a weight."""
    kept = state_bytes(run.optimizer, weight.shape, role=weight.role, stepped=_stepped(weight, run))
    counters = 0 if run.fused_optimizer else run.optimizer.step_bytes
    return (kept - counters) * weight.copies


def _main_gradients(run: TrainingRun) -> bool:
    """Whether gradients are added up in a buffer of a wider format than the weights have."""
    return run.precision.gradients not in (DTYPE, run.precision.weights)


def _stay(run: TrainingRun) -> bool:
    """Whether all gradients exist through the step, wherever they are."""
    return run.accumulation > 1 or _main_gradients(run)


def _leave(run: TrainingRun) -> bool:
    """Whether each gradient goes elsewhere as it comes: to the host, or into its bucket."""
    return run.offload != "none" or (run.bucket_views and _has_buckets(run))


def _has_buckets(run: TrainingRun) -> bool:
    """Whether replicas sum gradients in buckets beside them; main gradients are buckets already
    (Megatron-LM core v0.11, megatron/core/distributed/param_and_grad_buffer.py)."""
    return run.replicas > 1 and not _main_gradients(run)


def _inputs(setting: Setting) -> int:
    tensors = 3 if setting.padded else 2
    return tensors * INT64.block_bytes * setting.batch * setting.sequence


def _labelled(parts: Iterable[Stretch], *, casts: bool = False) -> int:
    """Bytes alive after `parts` that are casts of weights, or else that the layers made."""
    return sum(
        change * part.times
        for part in parts
        for change, what in part.lasting()
        if (what.role == "cast" if casts else what.role != "cast" and what.layer >= 0)
    )


def _middle_layer(trace: Trace) -> int:
    """What the layer in the middle of the model keeps, without casts of weights.

    Its successor frees some of what it makes.
    """
    layers = 1 + max(turn.indices[-1] for turn in trace.course)
    middle = next(turn.layer for turn in trace.course if layers // 2 in turn.indices)
    return sum(
        change
        for segment, after in pairwise(trace.segments)
        if segment.phase == "forward" and segment.layer >= 0
        for change, what in trace.events[segment.start : after.start]
        if what.layer == middle and what.role != "cast"
    )


def check_trained(weights: Collection[Parameter], setting: Setting) -> None:
    """Raise `LLMSizeError` where nothing of the model is trained, adapted, saved or frozen."""
    adapter = setting.adapter
    layers = 1 + max((index for weight in weights for index in weight.indices), default=-1)
    if setting.frozen_layers > layers:
        raise LLMSizeError(
            f"{setting.frozen_layers:,} frozen layers of {layers}", hint="freeze fewer"
        )
    if adapter is not None and not any(weight.role == "adapter" for weight in weights):
        names = _modules(weight for weight in weights if _is_linear(weight))
        if not adapter.targets:
            raise LLMSizeError(
                "the model has no part that the adapters go to",
                hint=f"use `lora`, which goes to any of {names}",
            )
        raise LLMSizeError(
            f"no linear layer is called {' or '.join(adapter.targets)}",
            hint=f"choose from {names}, or `all-linear`",
        )
    known = {_module(weight) for weight in weights}
    for module in setting.modules_to_save:
        if module not in known:
            raise LLMSizeError(
                f"no module is called {printable(module)}", hint=f"choose from {_modules(weights)}"
            )
    if not any(weight.node is not None for weight in weights):
        roles = f": the model has no {' or '.join(sorted(setting.trained))} of its own" if (
            setting.trained) else ""  # fmt: skip
        raise LLMSizeError(
            f"nothing is trained{roles}", hint="choose another method, such as `--method lora`"
        )


def _is_linear(weight: Parameter) -> bool:
    """Whether it is the matrix of a linear layer between embedding and head."""
    recurrent = weight.role == "ssm" and weight.name.endswith(".weight")
    return weight.role in QUANTIZED or (recurrent and len(weight.shape) == 2)


def _module(weight: Parameter) -> str:
    return weight.name.split(".")[-2:][0]


def _modules(weights: Iterable[Parameter]) -> str:
    """The names of the modules of the model's own weights."""
    return ", ".join(sorted({_module(w) for w in weights if w.role != "adapter"}))


ROLES = {
    "gradient": "gradients",
    "kept": "activations kept for backward",
    "cast": "autocast copies of weights",
    "temporary": "temporaries",
    "cache": "cache",
}
"""What the tensors of a step are alive for, in the order in which they are shown."""

SHOWN = 8
"""Tensors that are listed one by one under each role; the rest is summed."""


def peak_memory(step: TrainingStep) -> Term:
    """Everything that is allocated at the highest moment of the step, by why it is there."""
    if step.phase in step.stages:
        moving = list(step.stages[step.phase].parts)
    elif step.phase == "step":
        moving = [
            counted("gradients", _left(step)),
            counted("optimizer scratch", step.step_scratch),
        ]
    else:
        moving = [_role_term(step.moment, role) for role in ROLES]
    if step.phase in step.beside:
        moving.append(step.beside[step.phase])
    parts = [part for part in (*step.static.parts, *moving) if part.value]
    return total("allocated at the peak", *parts, unit="bytes")


def _left(step: TrainingStep) -> int:
    """What the backward pass leaves: the trained model's gradients."""
    above = step.peaks["step"] - int(step.static.value) - _size(step.beside, "step")
    return above - step.step_scratch


def device_memory(step: TrainingStep, stack: Stack) -> Term:
    """The peak with what the allocator reserves above it and what the device holds besides.

    This is what `nvidia-smi` shows and what has to fit on a card.
    """
    return on_device(peak_memory(step), stack)


def on_device(allocated: Term, stack: Stack) -> Term:
    """Allocated bytes with the allocator's slack and the device's context."""
    slack = term(
        "allocator slack",
        "ceil(allocated * share)",
        unit="bytes",
        source=stack.source,
        grade="fitted",
        note=f"published runs lie between {stack.slack_low:.0%} and {stack.slack_high:.0%}",
        allocated=allocated.value,
        share=stack.allocator_slack,
    )
    context = fact(
        "device context", stack.context, unit="bytes", source=stack.source, grade="fitted"
    )
    return total("device memory", allocated, slack, context)


def _role_term(moment: Moment, role: str) -> Term:
    """The tensors that are alive for one reason: the largest by name, the rest together."""
    sizes: dict[tuple[str, Shape, Format], int] = {}
    for what, size in moment.live.items():
        if what.role == role:
            key = (what.operation, what.shape, what.format)
            sizes[key] = sizes.get(key, 0) + size
    ranked = sorted(sizes.items(), key=lambda item: -item[1])
    listed = [_tensor_term(*key, size) for key, size in ranked[:SHOWN] if size]
    rest = sum(size for _, size in ranked[SHOWN:])
    if rest:
        listed.append(counted(f"{len(ranked) - SHOWN} smaller kinds", rest))
    return total(ROLES[role], *listed, unit="bytes")


def _tensor_term(operation: str, shape: Shape, format: Format, size: int) -> Term:
    """Tensors of one kind: their number times the product of their dimensions."""
    each = stored_bytes(format, prod(shape))
    if not each or size % each:
        return counted(operation, size)
    inputs: dict[str, int | float] = {"tensors": size // each}
    for index, dim in enumerate(shape):
        inputs[getattr(dim, "name", "") or f"size_{index}"] = int(dim)
    inputs["bytes_each"] = each // prod(shape) if shape else each
    if prod(inputs.values()) != size:  # a dimension that occurs twice
        return counted(operation, size)
    return Term(operation, size, "bytes", " * ".join(inputs), inputs, grade="formula")


Meter = Literal["allocated", "reserved", "device"]
"""Bytes of tensors; of what the caching allocator holds; of what the driver says is in use."""


def metered(step: TrainingStep, stack: Stack, meter: Meter) -> int:
    """The peak of the step as that meter reads it."""
    if meter == "allocated":
        return step.total
    reserved = ceil(step.total * (1 + stack.allocator_slack))
    return reserved if meter == "reserved" else reserved + stack.context
