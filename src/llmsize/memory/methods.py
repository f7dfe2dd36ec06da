"""Ways to train a model, each a setting of the pass: what is trained, and what is frozen how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from llmsize.anatomy import LoRA, Setting
from llmsize.errors import LLMSizeError, did_you_mean, printable
from llmsize.formats import BF16, FP32, NATIVE, Format
from llmsize.memory.training import TrainingRun
from llmsize.optimizers import Optimizer, Precision
from llmsize.stack import WEIGHT, Stack

Method = Literal["full", "lora", "qlora", "dora", "bitfit", "norms", "head", "frozen"]
"""All weights; adapters beside frozen weights, in 16 bit or quantized; adapters with trained
magnitudes; biases alone; norms alone; the head alone; all but the first layers."""

Recompute = Literal["none", "full", "selective"]
"""Nothing; every block; every block but attention and every second matrix product."""

SELECTIVE = (("mm", 2), ("flash_attention", 1), ("efficient_attention", 1), ("bmm", 1))
"""pytorch/torchtitan b5bcd76, torchtitan/distributed/activation_checkpoint.py"""

TRAINED = {"bitfit": frozenset({"bias"}), "norms": frozenset({"norm"}), "head": frozenset({"head"})}


@dataclass(frozen=True, slots=True)
class Choices:
    """What a user chooses for a step, in the field's words."""

    method: Method = "full"
    batch: int = 1
    """Sequences of a micro-batch."""
    sequence: int = 2048
    """Tokens of each."""
    format: Format = BF16
    """The 16-bit format, or fp32."""
    rank: int = 16
    targets: tuple[str, ...] = ("all-linear",)
    adapter_dropout: float = 0.0
    adapter_format: Format | None = None
    """Absent for what the stack does."""
    base: Format | None = None
    """Format of a quantized base, for `qlora`."""
    frozen_layers: int = 0
    recompute: Recompute = "none"
    recompute_every: int = 1
    """Every how many layers one is recomputed."""
    offload_checkpoints: bool = False
    attention: Literal["sdpa", "eager"] = "sdpa"
    padded: bool = False
    accumulation: int = 1
    fused_backward: bool = False
    compiled: bool = False
    """Whether `torch.compile` fuses norms, rotary embedding, gates and the loss."""


def method_named(name: str) -> Method:
    """The method of that name. Raises `LLMSizeError` with close names."""
    for known in get_args(Method):
        if known == name.strip().lower():
            method: Method = known
            return method
    raise LLMSizeError(
        f"unknown method `{printable(name)}`",
        hint=did_you_mean(
            name, get_args(Method), otherwise=f"known: {', '.join(get_args(Method))}"
        ),
    )


def training_run(
    choices: Choices, stack: Stack, precision: Precision, optimizer: Optimizer
) -> TrainingRun:
    """The choices as a setting of the pass and a run.

    Raises `LLMSizeError` for choices that do not go together.
    """
    _check(choices, precision)
    adapted = choices.method in ("lora", "qlora", "dora")
    checkpointed = choices.recompute != "none"
    weights = FP32 if precision.weights == "fp32" and not adapted else choices.format
    setting = Setting(
        batch=choices.batch,
        sequence=choices.sequence,
        format=weights,
        autocast=choices.format if precision.autocast else None,
        attention=choices.attention,
        fused_norm=stack.fused_norm or choices.compiled,
        fused_rotary=stack.fused_rotary or choices.compiled,
        fused_gate=stack.fused_gate or choices.compiled,
        fused_activation=stack.fused_activation or choices.compiled,
        fused_qkv=stack.fused_qkv,
        keeps_quantized_inputs=stack.keeps_quantized_inputs,
        loss=stack.loss,  # type: ignore[arg-type]
        compiled_loss=stack.compiled_loss or choices.compiled,
        padded=choices.padded,
        training=True,
        trained=frozenset() if adapted else TRAINED.get(choices.method),
        frozen_layers=choices.frozen_layers,
        checkpoint_every=choices.recompute_every if checkpointed else 0,
        checkpoint_saves=SELECTIVE if choices.recompute == "selective" else (),
        offload_checkpoints=choices.offload_checkpoints,
        input_gradients=adapted and checkpointed,
        keep_outputs=stack.keep_outputs,
    )
    if adapted:
        setting = setting._replace(adapter=_adapter(choices, stack))
    if choices.method == "qlora":
        setting = setting._replace(quantized=choices.base)
    return TrainingRun(
        precision=precision,
        optimizer=optimizer,
        setting=setting,
        fused_optimizer=stack.fused_optimizer,
        accumulation=choices.accumulation,
        fused_backward=choices.fused_backward,
    )


def _adapter(choices: Choices, stack: Stack) -> LoRA:
    default = choices.format if stack.adapters == WEIGHT else NATIVE[stack.adapters]
    return LoRA(
        rank=choices.rank,
        targets=choices.targets,
        dropout=choices.adapter_dropout,
        format=choices.adapter_format or default,
        dora=choices.method == "dora",
    )


def _check(choices: Choices, precision: Precision) -> None:
    if choices.method == "qlora" and choices.base is None:
        raise LLMSizeError("qlora needs a quantized base", hint="give one, such as `--base nf4`")
    if choices.fused_backward and choices.accumulation > 1:
        raise LLMSizeError(
            "a fused backward pass keeps no gradients to accumulate",
            hint="leave out --fused-backward or --accumulate",
        )
    if choices.offload_checkpoints and choices.recompute == "none":
        raise LLMSizeError("there are no checkpoints to offload", hint="add `--recompute full`")
    if choices.method == "frozen" and not choices.frozen_layers:
        raise LLMSizeError(
            "no layers are frozen", hint="say how many: `--freeze 24` freezes the first 24"
        )
    if precision.autocast and choices.format is FP32:
        raise LLMSizeError("autocast needs a 16-bit format", hint="`--dtype bf16` or `fp16`")
