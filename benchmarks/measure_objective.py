#!/usr/bin/env python3
"""Measure the memory of one step of a preference or policy objective, byte by byte, without a GPU.

`measure_trace.py` with what TRL 1.16 does around the model: the head fused with log-probabilities
(its own code, with the Triton kernels left out, which allocate nothing), chosen and rejected
sequences in one batch, and the reference read after the policy and before the backward pass.

Needs what `measure_trace.py` needs, and trl (without its dependencies, for `trl/kernels`).

    python measure_objective.py config.json --objective dpo --batch 4 --seq 256 --mode lora
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure_trace import parser, settings_of, write
from benchmarks.tracing.fake_cuda import faked, install_fake_cuda
from benchmarks.tracing.models import DTYPES, Settings, instantiate, layer_count, make_config
from benchmarks.tracing.recomputing import CHECKPOINTING
from benchmarks.tracing.runs import (
    Run,
    build,
    make_batch,
    make_optimizer,
    optimizer_step,
    saving,
)
from benchmarks.tracing.tracker import Tracker
from benchmarks.tracing.training import forward_figures, register_static

OBJECTIVES = ("dpo", "reward", "grpo")
VOCABULARY_CHUNK = 32768  # trl/trainer/utils.py, `_CHUNKED_LOGPROB_CHUNK_SIZE`


class Kernel:
    """A Triton kernel that is launched and allocates nothing."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """The kernel on a grid."""
        return lambda *_, **__: None


def fused_head() -> Any:
    """TRL's autograd function of head and log-probabilities, as it runs on CUDA."""
    kernels: Any = importlib.import_module("trl.kernels.chunked_logprob")
    kernels._use_triton = lambda _: True
    kernels._forward_kernel = kernels._backward_kernel = Kernel()
    kernels._addmm_fp32 = lambda *_: None  # written into the sum, by cuBLAS
    kernels.triton = types.SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    utils: Any = types.ModuleType("trl.trainer.utils")
    utils.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()
    sys.modules.setdefault("trl.trainer", types.ModuleType("trl.trainer"))
    sys.modules.setdefault("trl.trainer.utils", utils)
    return kernels.ChunkedLogProbFunction


def chosen(x: torch.Tensor, mask: torch.Tensor, scored: int) -> torch.Tensor:
    """`x[mask]` where the mask lets `scored` places through, which fake tensors cannot tell."""
    places = torch.zeros((scored, 2), dtype=torch.int64)
    return x[places[:, 0], places[:, 1]]


def log_probabilities(model: Any, ids: torch.Tensor, scored: int, outputs: tuple[str, ...]) -> Any:
    """`add_fused_lm_head` of trl/trainer/utils.py: one number for each token, and the entropy."""
    completion_mask = torch.ones_like(ids)
    labels = ids.masked_fill(completion_mask == 0, -100)
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = core.base_model(ids, use_cache=False)
    hidden, labels = backbone.last_hidden_state[:, :-1], labels[:, 1:]
    head = core.get_output_embeddings()
    mask = labels != -100
    count = ids.shape[0] * scored
    per_token = model.fused.apply(
        chosen(hidden, mask, count), head.weight, head.bias, chosen(labels, mask, count),
        1.0, VOCABULARY_CHUNK, None, 1.0, outputs,
    )  # fmt: skip
    spread = [
        None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in per_token
    ]
    loss = -spread[0].sum() / mask.sum().clamp(min=1)  # type: ignore[union-attr]
    return types.SimpleNamespace(loss=loss, log_probs=spread[0], entropy=spread[1], mask=mask)


def without_adapters(model: Any, reference: Any) -> contextlib.AbstractContextManager[Any]:
    """The trained model as its own reference, where there is no other."""
    adapted = reference is model and hasattr(model, "disable_adapter")
    return model.disable_adapter() if adapted else contextlib.nullcontext()


def dpo_loss(model: Any, reference: Any, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """trl/trainer/dpo_trainer.py, `_compute_loss` with its defaults."""
    outputs = log_probabilities(model, ids, scored, ())
    logps = outputs.log_probs.sum(dim=1)
    chosen_logps, rejected_logps = logps.chunk(2, dim=0)
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    checkpointing = core.is_gradient_checkpointing
    with torch.no_grad():
        core.gradient_checkpointing_disable()
        with without_adapters(model, reference):
            seen = log_probabilities(reference, ids, scored, ())
        if checkpointing:
            core.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
    chosen_before, rejected_before = seen.log_probs.sum(dim=1).chunk(2, dim=0)
    delta = (chosen_logps - chosen_before) - (rejected_logps - rejected_before)
    return -F.logsigmoid(0.1 * delta).mean()


def reward_loss(model: Any, reference: Any, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """trl/trainer/reward_trainer.py, `compute_loss`."""
    outputs = model(input_ids=ids, use_cache=False)
    better, worse = torch.chunk(outputs.logits.squeeze(-1), chunks=2)
    return -F.logsigmoid(better - worse).mean()


def grpo_loss(model: Any, reference: Any, ids: torch.Tensor, scored: int) -> torch.Tensor:
    """trl/trainer/grpo_trainer.py, `_compute_loss` with its defaults: no reference."""
    outputs = log_probabilities(model, ids, scored, ("entropy",))
    logps = outputs.log_probs[:, -scored:]
    advantages = torch.zeros((ids.shape[0], 1))
    ratio = torch.exp(logps - logps.detach())
    clipped = torch.clamp(ratio, 0.8, 1.2)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


LOSSES = {"dpo": dpo_loss, "reward": reward_loss, "grpo": grpo_loss}


def prepared(settings: Settings, objective: str) -> tuple[Run, Any]:
    """The trained model with its optimizer, and the frozen reference if it is another model."""
    config = dict(settings.config)
    if objective == "reward":
        config |= {"architectures": ["ForSequenceClassification"], "num_labels": 1}
        config |= {"pad_token_id": 0}
    settings.config = config
    run = build(settings)
    run.model.train()
    run.optimizer = make_optimizer(run)
    run.model.fused = fused_head() if objective != "reward" else None
    if objective != "dpo" or settings.mode != "full":
        return run, run.model
    reference = instantiate(make_config(config), dtype=DTYPES[settings.dtype], attn=settings.attn)
    reference.eval().requires_grad_(requires_grad=False)
    reference.fused = run.model.fused
    return run, reference


def measure_objective(
    settings: Settings, objective: str, scored: int
) -> tuple[dict[str, Any], Tracker]:
    """One steady-state step; `batch` counts sequences, so that a pair is two."""
    run, reference = prepared(settings, objective)
    tracker, batch = run.tracker, make_batch(settings)
    static = register_static(run, {"input_ids": batch["input_ids"]})
    other = tracker.add_all(reference.parameters(), "param")
    tracker.add_all(reference.buffers(), "buffer")
    for parameter in run.trainable:
        parameter.register_post_accumulate_grad_hook(tracker.mark_gradient)
    enabled = settings.autocast != "none"
    with tracker.hooks(), tracker:
        tracker.start("fwd")
        with saving(run), torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
            loss = LOSSES[objective](run.model, reference, batch["input_ids"], scored)
        figures = forward_figures(tracker, layer_count(run.model.config))
        tracker.start("bwd")
        loss.backward()
        tracker.start("step")
        optimizer_step(run)
    return {
        "params_trainable": sum(p.numel() for p in run.trainable),
        "reference_bytes": other,
        **static,
        **figures,
        **{f"peak_{name}_bytes": peak.total for name, peak in tracker.peaks.items()},
    }, tracker


def main(arguments: list[str] | None = None) -> int:
    """Measure one case and print it as JSON."""
    p = parser()
    p.add_argument("--objective", choices=OBJECTIVES, required=True)
    p.add_argument("--scored", type=int, help="scored tokens of each sequence; all but one")
    options = vars(p.parse_args(arguments))
    settings = settings_of(options)
    scored = options.pop("scored") or settings.seq - 1
    install_fake_cuda()
    with faked(padded=settings.padded, adapted=settings.mode != "full"):
        figures, tracker = measure_objective(settings, options["objective"], scored)
    write(figures, options, tracker)
    return 0


if __name__ == "__main__":
    sys.exit(main())
