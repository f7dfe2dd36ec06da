"""What an engine or a framework runs: on which chips, in which formats, with which draft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from llmsize.anatomy.parameters import count, vocabulary
from llmsize.anatomy.prediction import prediction_layers
from llmsize.anatomy.trace import Trace
from llmsize.architecture import Architecture
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError
from llmsize.formats import FP16, Format
from llmsize.hardware import RATES, Accelerator, supports
from llmsize.optimizers import Optimizer
from llmsize.units import format_count

BELOW_BF16 = (
    "ask for `--dtype fp16`, which takes the same memory; PyTorch alone would emulate bf16 there, "
    "many times slower"
)
OTHERWISE = "name another recipe or format, or another card"


class Runtime(Protocol):
    """An `Engine` or a `Stack`: software with facts on what it runs on."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def vendors(self) -> tuple[str, ...]: ...
    @property
    def capability(self) -> Mapping[str, float]: ...


def obstacle(runtime: Runtime, accelerator: Accelerator) -> str:
    """Why `runtime` does not run on an accelerator at all; empty if it does or nothing is known."""
    title, card = runtime.title or runtime.name, accelerator.title
    if runtime.vendors and accelerator.vendor not in runtime.vendors:
        makers = ", ".join(runtime.vendors)
        return f"{title} is for accelerators of {makers}; {card} is of {accelerator.vendor}"
    return _below(runtime, accelerator, "any", title)


def obstacle_to(format: Format, runtime: Runtime, accelerator: Accelerator) -> str:
    """Why weights are not computed or stored in `format` there; empty if they are.

    A chip that is not NVIDIA's has no compute capability: of it the published rates are asked.
    """
    if reason := lack_of_kernels(format, accelerator):
        return reason
    begin = next((begin for begin in runtime.capability if format.name.startswith(begin)), None)
    if begin is None:
        return ""
    title = runtime.title or runtime.name
    if accelerator.compute_capability is not None:
        return _below(runtime, accelerator, begin, f"{format.name} in {title}")
    rate = RATES.get(begin, begin)
    if rate not in ("fp8", "fp4") or not accelerator.peak_tflops:
        return ""  # nothing is known, or the library has kernels for other units
    return "" if supports(accelerator, rate) else f"{accelerator.title} has no {rate} units"


def lack_of_kernels(asked: Format | Optimizer, accelerator: Accelerator) -> str:
    """Why a library has no kernels for a format or an optimizer there; empty if it has."""
    if not asked.vendors or accelerator.vendor in asked.vendors:
        return ""
    makers = ", ".join(asked.vendors)
    return (f"{asked.title or asked.name} has kernels for accelerators of {makers}; "
            f"{accelerator.title} is of {accelerator.vendor}")  # fmt: skip


def _below(runtime: Runtime, accelerator: Accelerator, what: str, subject: str) -> str:
    has, needed = accelerator.compute_capability, runtime.capability.get(what, 0.0)
    if has is None or has >= needed:
        return ""
    return f"{subject} needs compute capability {needed}, and {accelerator.title} has {has}"


def check_support(runtime: Runtime, accelerator: Accelerator | None, *formats: Format) -> None:
    """Raise `LLMSizeError` for software that does not run on an accelerator or in a format."""
    if accelerator is None:
        return
    if reason := obstacle(runtime, accelerator):
        other = (
            "llama.cpp runs on most: `llmsize show engines`"
            if isinstance(runtime, Engine)
            else "name another card, or another framework: `llmsize show stacks`"
        )
        raise LLMSizeError(reason, hint=other)
    for format in formats:
        if reason := obstacle_to(format, runtime, accelerator):
            raise LLMSizeError(reason, hint=BELOW_BF16 if format.name == "bf16" else OTHERWISE)


def computed_in(
    own: Format, runtime: Runtime, accelerator: Accelerator | None
) -> tuple[Format, str]:
    """The model's own format; fp16 where the accelerator does not compute in that, and why."""
    reason = accelerator and obstacle_to(own, runtime, accelerator)
    return (FP16, f"computed in fp16: {reason}") if reason else (own, "")


def check_draft(engine: Engine, model: Trace, draft: Trace) -> str:
    """What a user has to do for `draft` to draft for `model`; mostly nothing.

    Raises `LLMSizeError` for a draft that is larger than the model, and for a vocabulary that the
    engine does not take. Tokenizers are not compared, only how many entries they have.
    """
    sizes = [count(trace.weights.values()).total for trace in (model, draft)]
    if sizes[1] > sizes[0]:
        raise LLMSizeError(
            f"a draft of {format_count(sizes[1])} parameters for a model of "
            f"{format_count(sizes[0])}",
            hint="the smaller model drafts for the larger one",
        )
    own, other = vocabulary(model), vocabulary(draft)
    if engine.draft_gap is not None and abs(own - other) > engine.draft_gap:
        raise LLMSizeError(
            f"{engine.title} takes no draft with another vocabulary: {other:,} entries, "
            f"the model has {own:,}",
            hint="take a smaller model of the same family; transformers translates drafted tokens",
        )
    if own != other and engine.draft_gap is None:
        return (f"the draft has another vocabulary ({other:,} entries for {own:,}): "
                "`generate` needs both tokenizers")  # fmt: skip
    return ""


def check_prediction(engine: Engine, architecture: Architecture, trace: Trace) -> None:
    """Raise `LLMSizeError` where no prediction layer of the model's own drafts for it."""
    if engine.allocation != "pool":
        raise LLMSizeError(
            f"{engine.title} does not load the prediction layers of a checkpoint",
            hint="`--engine vllm` and `sglang` draft with them",
        )
    layers = prediction_layers(architecture.config, architecture.family, trace)
    if not any(part.parameters for part in layers):
        raise LLMSizeError(
            f"no prediction layer of `{architecture.name}` is known",
            hint="name a smaller model of the same family",
        )
