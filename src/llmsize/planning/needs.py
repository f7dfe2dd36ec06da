"""What a model needs on the fullest of several equal devices, in every way of using it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.memory.methods import training_run
from llmsize.memory.overview import Subject, Workload, need, on_each
from llmsize.memory.training import device_memory, on_device, training_step
from llmsize.planning.catalogue import Need
from llmsize.planning.training import Question
from llmsize.term import Term, fact, term, total

Way = Literal["serve", "lora", "qlora", "full"]

ZERO = "Rajbhandari et al. 2020, arXiv:1910.02054, section 5"


def serving(model: Subject, work: Workload, devices: int = 1) -> Term:
    """Memory of each of `devices` that serve a model together."""
    needed = on_each(need(model, work, "inference"), devices)
    if isinstance(needed, str):
        raise LLMSizeError(needed, hint="name another format of the weights")
    return needed


def tuning(question: Question, devices: int = 1) -> Term:
    """Device memory of a training step on each of `devices`.

    They divide what lives through the step, the gradients and what the optimizer allocates, as
    ZeRO-3 does; activations are on each.
    """
    run = training_run(question.choices, question.stack, question.precision, question.optimizer)
    step = training_step(question.architecture, run)
    if devices == 1:
        return device_memory(step, question.stack)
    share = partial(_share, devices=devices)
    passes = max(step.peaks["forward"], step.peaks["backward"])
    activations = max(passes - int(step.static.value) - step.gradients, 0)
    moments = (
        _counted("activations", activations), share(_counted("optimizer", step.step_scratch))
    )  # fmt: skip
    work = max(moments, key=lambda moment: moment.value)
    gradients = share(_counted("gradients", step.gradients))
    return on_device(total("allocated", share(step.static), gradients, work), question.stack)


def _counted(name: str, size: int) -> Term:
    return fact(name, size, unit="bytes", source="the anatomy of the model")


def _share(part: Term, devices: int) -> Term:
    if devices == 1:
        return part
    return term(
        part.name, "ceil(bytes / devices)", unit="bytes", source=ZERO, grade=part.grade,
        bytes=part.value, devices=devices,
    )  # fmt: skip


def asker(
    ask: Callable[[Architecture, str], Term], least: Mapping[str, float], *, hopeless: float
) -> Need:
    """The question of a catalogue search, from one that answers with a Term.

    `least` has, by storage, bytes of a device that no parameter does without. A model that takes
    more than `hopeless` bytes that way is not traced: the bound is its answer. A model that cannot
    be asked (an unknown family, no such layer) has none.
    """

    def asked(model: Architecture, storage: str) -> int | None:
        bound = (model.published_parameters or 0) * least[storage]
        if bound > hopeless:
            return int(bound)
        try:
            return int(ask(model, storage).value)
        except LLMSizeError:
            return None

    return asked
