"""Ways to run layers again in the backward pass instead of keeping what they make."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from benchmarks.tracing.models import Settings

aten = torch.ops.aten
CHECKPOINTING = {"use_reentrant": False, "preserve_rng_state": False}
SAVED = (
    aten.mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
)
"""Results that selective recomputation keeps, of products every second: pytorch/torchtitan b5bcd76,
torchtitan/distributed/activation_checkpoint.py."""


def recompute(model: Any, settings: Settings) -> None:
    """Checkpoint every layer, or every so manieth."""
    options: dict[str, Any] = dict(CHECKPOINTING)
    if settings.selective:
        options["context_fn"] = selective
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs=options, every_n_layers=settings.every
    )
    if settings.offloaded:
        again = functools.partial(in_host_memory, **options)
        for module in model.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = again


def in_host_memory(block: Any, *inputs: Any, **options: Any) -> Any:
    """A checkpoint whose inputs wait in host memory."""
    with torch.autograd.graph.save_on_cpu():
        return checkpoint(block, *inputs, **options)


def selective() -> Any:
    """Contexts of a checkpoint that keeps some results."""
    counts: Counter[tuple[bool, Any]] = Counter()

    def policy(context: Any, function: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        counts[context.is_recompute, function] += 1
        second = counts[context.is_recompute, function] % 2 == 0
        saved = function in SAVED and not (function is aten.mm.default and second)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
