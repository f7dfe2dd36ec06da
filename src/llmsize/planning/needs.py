"""What a model needs on the fullest of several equal devices, in every way of using it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from llmsize.anatomy import LoRA, Setting, run_forward
from llmsize.anatomy.parameters import count
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.formats import BF16, Format
from llmsize.memory.kv_cache import kv_cache
from llmsize.memory.overview import RUNTIME, Storage, Subject, stored
from llmsize.memory.timeline import peak, stretches
from llmsize.memory.training import TrainingRun, training_step
from llmsize.memory.weights import Recipe
from llmsize.optimizers import Optimizer, Precision
from llmsize.planning.catalogue import Need
from llmsize.term import Term, fact, term, total

Way = Literal["serve", "lora", "qlora", "full"]
Tuning = Literal["lora", "qlora", "full"]

ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054, section 5"
HOPELESS = 1.5
"""Weights alone above so many budgets fit under no error band."""


@dataclass(frozen=True, slots=True)
class Serving:
    """What a served model has to hold."""

    format: Format = BF16
    """Of activations and cache, and of weights that no recipe stores otherwise."""
    context: int = 8192
    """Tokens of each sequence; the whole prompt is read at once."""
    users: int = 1
    devices: int = 1


@dataclass(frozen=True, slots=True)
class Tuned:
    """How a model is trained, whichever it is: one sequence a step, recomputing every layer."""

    precisions: Mapping[Tuning, Precision]
    optimizer: Optimizer
    base: Format
    """Of a quantized base (QLoRA)."""
    format: Format = BF16
    sequence: int = 2048
    lora: LoRA = field(default_factory=lambda: LoRA(16, ("all-linear",)))
    devices: int = 1


def serving(
    model: Architecture, how: Serving, recipe: Recipe | None, format_of: Callable[[str], Format]
) -> Term:
    """Bytes on each device to answer `users` at once: weights, caches, one prompt's work, runtime.

    Weights and caches are split evenly over the devices; the rest is on each.
    """
    prompt = Setting(sequence=how.context, format=how.format, last_logits=True)
    trace, _ = run_forward(model, prompt)
    parameters = count(trace.weights.values()).total
    subject = Subject(model, trace, parameters, parameters)
    weights = stored(subject, Storage("", how.format, recipe), format_of)
    cache = kv_cache(
        trace.layer_caches(), context=how.context, keys=how.format, values=how.format,
        sequences=how.users,
    )  # fmt: skip
    work = _counted("prompt", peak(list(stretches(trace))).bytes)
    share = partial(_share, devices=how.devices)
    return total("memory", share(weights), share(cache), work, RUNTIME)


def tuning(model: Architecture, how: Tuned, method: Tuning) -> Term:
    """Bytes on each device at the peak of a training step, the runtime included.

    Several devices divide what lives through the step, the gradients and what the optimizer
    allocates, as ZeRO-3 does; activations are on each.
    """
    step = training_step(model, _run(how, method))
    share = partial(_share, devices=how.devices)
    gradients = share(_counted("gradients", step.gradients))
    passes = max(step.peaks["forward"], step.peaks["backward"])
    activations = max(passes - int(step.static.value) - step.gradients, 0)
    moments = (
        _counted("activations", activations), share(_counted("optimizer", step.step_scratch))
    )  # fmt: skip
    work = max(moments, key=lambda moment: moment.value)
    return total("memory", share(step.static), gradients, work, RUNTIME)


def _counted(name: str, size: int) -> Term:
    return fact(name, size, unit="bytes", source="the anatomy of the model")


def _run(how: Tuned, method: Tuning) -> TrainingRun:
    adapted = method != "full"
    setting = Setting(
        sequence=how.sequence, format=how.format, training=True, checkpoint_every=1,
        trained=frozenset() if adapted else None, lora=how.lora if adapted else None,
        quantized=how.base if method == "qlora" else None, input_gradients=adapted,
    )  # fmt: skip
    return TrainingRun(how.precisions[method], how.optimizer, setting)


def _share(part: Term, devices: int) -> Term:
    if devices == 1:
        return part
    return term(
        part.name, "ceil(bytes / devices)", unit="bytes", source=ZERO, grade=part.grade,
        bytes=part.value, devices=devices,
    )  # fmt: skip


def asker(ask: Callable[[Architecture, str], Term], least: Mapping[str, Format],
          *, devices: int, budget: int) -> Need:  # fmt: skip
    """The question of a catalogue search, from one that answers with a Term.

    `least` has, by storage, the smallest format in which any weight is stored. A model that is
    hopeless for `budget` is not traced: its answer is a bound below its need. A model that cannot
    be asked (an unknown family, no such layer) has no answer.
    """

    def asked(model: Architecture, storage: str) -> int | None:
        format = least[storage]
        bound = (model.published_parameters or 0) * format.block_bytes // format.block_elements
        if bound > HOPELESS * budget * devices:
            return bound // devices
        try:
            return int(ask(model, storage).value)
        except LLMSizeError:
            return None

    return asked
