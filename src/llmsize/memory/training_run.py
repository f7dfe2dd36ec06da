"""The run that choices make: kernels of a stack, formats of a recipe, what a method trains."""

from __future__ import annotations

from llmsize.anatomy import Setting
from llmsize.errors import LLMSizeError
from llmsize.formats import TRAINED, Format, native
from llmsize.memory.methods import Choices, Method, method_named
from llmsize.memory.objectives import Objective, Reference, Rollout, objective_named
from llmsize.memory.training import TrainingRun
from llmsize.optimizers import Optimizer, Precision, check_recipe, kept_format, projected
from llmsize.stack import WEIGHT, Stack

BIASES = frozenset(("bias",))
"""What is trained of the model itself beside adapters, where all biases are."""

KERNELS = tuple(field for field in Setting._fields if field in Stack.__slots__)
"""What a stack says of the pass, under the same names: kernels, the loss, what is quantized."""

COMPILED = ("fused_norm", "fused_rotary", "fused_gate", "fused_activation", "compiled_loss")
"""What `torch.compile` makes one kernel of whatever the stack has."""

SELECTIVE = (("mm", 2), ("flash_attention", 1), ("efficient_attention", 1))
"""Operations whose results selective recomputation saves, each time or every second time; a linear
layer with a bias is another (`addmm`): pytorch/torchtitan b5bcd76,
torchtitan/distributed/activation_checkpoint.py."""


def training_run(
    choices: Choices, stack: Stack, precision: Precision, optimizer: Optimizer
) -> TrainingRun:
    """The choices as a setting of the pass and a run.

    Raises `LLMSizeError` for choices that do not go together.
    """
    method = method_named(choices.method)
    objective = objective_named(choices.objective)
    _check_formats(choices, method, precision)
    _check_recomputation(choices, method)
    _check_steps(choices, method, optimizer)
    _check_places(choices, method, optimizer)
    _check_completion(choices, objective, stack)
    fused_backward = choices.fused_backward or method.fused_backward
    return TrainingRun(
        precision=precision,
        optimizer=projected(optimizer, choices.rank) if method.projected else optimizer,
        setting=_aimed(_setting(choices, method, stack, precision), choices, objective),
        accumulation=choices.accumulation,
        keeps_gradients=stack.keeps_gradients,
        fused_backward=fused_backward,
        objective=objective,
        reference=_reference(choices, method, objective),
        rollout=_rollout(choices) if objective.rollouts else None,
        offload=choices.offload,
        replicas=choices.replicas,
        bucket_views=choices.bucket_views,
    )


def _reference(choices: Choices, method: Method, objective: Objective) -> Reference:
    """The kind of reference. Raises `LLMSizeError` for one that the objective or method has not."""
    chosen = choices.reference or objective.reference
    if chosen != "none" and not (objective.rollouts or objective.reference != "none"):
        raise LLMSizeError(f"`{objective.name}` has no reference", hint="leave out `--reference`")
    if choices.reference is None and chosen == "model" and method.adapter is not None:
        return "adapter"
    if chosen == "adapter" and method.adapter is None:
        raise LLMSizeError(
            f"`{method.name}` has no adapters to switch off for a reference",
            hint="choose `--method lora`, or `--reference model`",
        )
    return chosen


def written(choices: Choices) -> int:
    """The least tokens of a sequence that are not its prompt; 0 where there is no prompt."""
    return choices.completion or int(objective_named(choices.objective).rollouts)


def _rollout(choices: Choices) -> Rollout:
    completion = choices.completion or max(choices.sequence // 2, 1)
    sequences = choices.rollouts or choices.batch * choices.accumulation
    return Rollout(sequences, completion, choices.batch, choices.engine, choices.engine_sleeps)


def _setting(choices: Choices, method: Method, stack: Stack, precision: Precision) -> Setting:
    whole = kept_format(precision, precision.weights, choices.format)
    format = whole if method.like_weights else _format(choices, stack)
    adapter = method.adapter(choices, choices.adapter_format or format) if method.adapter else None
    checkpointed = choices.recompute != "none"
    kernels = {field: getattr(stack, field) for field in KERNELS}
    return Setting(
        **kernels | (dict.fromkeys(COMPILED, True) if choices.compiled else {}),
        batch=choices.batch,
        sequence=choices.sequence,
        format=whole if adapter is None else choices.format,
        autocast=choices.format if precision.autocast else None,
        attention=choices.attention,
        padded=choices.padded,
        training=True,
        trained=BIASES if choices.bias == "all" else method.trained,
        adapted_biases=choices.bias == "adapted",
        modules_to_save=choices.modules_to_save,
        frozen_layers=choices.frozen_layers,
        adapter=adapter,
        quantized=choices.base if "base" in method.takes else None,
        upcast=choices.upcast,
        checkpoint_every=choices.recompute_every if checkpointed else 0,
        checkpoint_saves=SELECTIVE if choices.recompute == "selective" else (),
        offload_checkpoints=choices.offload_checkpoints,
        input_gradients=checkpointed,
    )


def _aimed(setting: Setting, choices: Choices, objective: Objective) -> Setting:
    """The setting for an objective: what the head gives, and of how many tokens and sequences."""
    scored = _rollout(choices).completion if objective.rollouts else choices.completion
    batch = setting.batch * (1 + objective.pairs)
    return setting._replace(objective=objective.head, scored=scored, batch=batch)


def _format(choices: Choices, stack: Stack) -> Format:
    """The format that the stack gives adapters."""
    usual = (stack.quantized_adapters if choices.base else "") or stack.adapters
    return choices.format if usual == WEIGHT else native(usual, "stack", stack.name)


def _check_formats(choices: Choices, method: Method, precision: Precision) -> None:
    """Raise `LLMSizeError` for formats that the method or what is trained cannot have."""
    if method.plain and choices.base is None:
        raise LLMSizeError(
            f"{method.name} needs a quantized base", hint="give one, such as `--base nf4`"
        )
    if method.plain and choices.base in TRAINED:
        raise LLMSizeError(
            f"`{choices.base.name}` is no quantized base of {method.name}",
            hint=f"choose `--base nf4`, or `--method {method.plain}` beside plain weights",
        )
    if choices.adapter_format not in (None, *TRAINED):
        raise LLMSizeError(
            f"adapters are not trained in `{choices.adapter_format.name}`",
            hint="`--adapter-dtype` is fp32, bf16 or fp16",
        )
    if choices.upcast and choices.base is None:
        raise LLMSizeError("only beside a quantized base is the rest upcast", hint="add `--base`")
    check_recipe(precision, choices.format)


def _check_recomputation(choices: Choices, method: Method) -> None:
    """Raise `LLMSizeError` for what goes without recomputation, or for a method that does."""
    if choices.recompute == "none" and choices.recompute_every > 1:
        raise LLMSizeError("no block is recomputed", hint="add `--recompute full` to `--every`")
    if choices.recompute == "none" and choices.offload_checkpoints:
        raise LLMSizeError("there are no checkpoints to offload", hint="add `--recompute full`")
    if choices.recompute != "none" and not method.recomputable:
        raise LLMSizeError(
            f"`{method.name}` does not work with recomputation: its cache would be filled twice",
            hint="leave out `--recompute`, or choose `prompt-tuning`",
        )


def _check_completion(choices: Choices, objective: Objective, stack: Stack) -> None:
    """Raise `LLMSizeError` for a completion without a prompt, or where it changes nothing."""
    completion = written(choices)
    if completion >= choices.sequence:
        raise LLMSizeError(
            f"{completion:,} written tokens leave nothing of {choices.sequence:,} for the prompt",
            hint="`--seq-len` counts prompt and completion",
        )
    if completion and objective.head == "score":
        raise LLMSizeError(
            f"`{objective.name}` gives each sequence one number, whatever was written of it",
            hint="leave out `--completion`",
        )
    if completion and objective.head == "tokens" and stack.loss != "tiled":
        raise LLMSizeError(
            f"the loss of {stack.title or stack.name} takes all tokens, with a label or without",
            hint="leave out `--completion`, or choose `--stack trl`, which leaves the prompt out",
        )


def _check_steps(choices: Choices, method: Method, optimizer: Optimizer) -> None:
    """Raise `LLMSizeError` where there is nothing to step on, or no way to step as asked."""
    if method.freezes and not choices.frozen_layers:
        raise LLMSizeError(
            "no layers are frozen", hint="say how many: `--freeze 8` freezes the first eight"
        )
    if method.optimizer and optimizer.name != method.optimizer:
        raise LLMSizeError(
            f"`{method.name}` does not step with {optimizer.title or optimizer.name}",
            hint=f"leave out `--optimizer`, or say `{method.optimizer}`",
        )
    if choices.fused_backward and choices.accumulation > 1:
        raise LLMSizeError(
            "a fused backward pass keeps no gradients to accumulate",
            hint="leave out `--fused-backward` or `--accumulate`",
        )


def _check_places(choices: Choices, method: Method, optimizer: Optimizer) -> None:
    """Raise `LLMSizeError` for places of states that do not go together."""
    at_once = choices.fused_backward or method.fused_backward
    if choices.offload != "none" and at_once:
        raise LLMSizeError(
            "a fused backward pass steps on the device, where offloaded states are not",
            hint="leave out `--fused-backward`, or `--offload`",
        )
    if choices.offload != "none" and optimizer.pageable:
        raise LLMSizeError(
            f"{optimizer.title or optimizer.name} moves its states to the host itself",
            hint="leave out `--offload`, or choose an optimizer that is not paged",
        )
    if choices.replicas > 1 and choices.offload != "none":
        raise LLMSizeError(
            "replicas that offload divide their states among them, which is not counted here",
            hint="estimate one device, or leave out `--offload`",
        )
    if choices.replicas > 1 and at_once:
        raise LLMSizeError(
            "replicas sum their gradients after a fused backward pass has used them",
            hint="leave out `--gpus`, or the fused backward pass",
        )
    if choices.bucket_views and choices.replicas < 2:
        raise LLMSizeError("one device has no buckets", hint="add `--gpus 2` or more")
