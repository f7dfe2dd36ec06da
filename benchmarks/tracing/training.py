"""One training step with everything counted."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch

from benchmarks.tracing.adapters import train_for_certain
from benchmarks.tracing.freezing import OWN_WEIGHTS
from benchmarks.tracing.models import Settings, architecture, layer_count
from benchmarks.tracing.quantized import scales
from benchmarks.tracing.runs import (
    Run,
    build,
    forward,
    kernel_name,
    make_batch,
    make_optimizer,
    optimizer_step,
    optimizer_tensors,
    place,
    saving,
)
from benchmarks.tracing.tracker import Peak, Tracker

LAYER_INDEX = re.compile(r"\.(\d+)(?:\.|$)")


def measure_training(settings: Settings) -> tuple[dict[str, Any], Tracker]:
    """One steady-state training step."""
    run = build(settings)
    run.model.train()
    if settings.mode not in OWN_WEIGHTS:
        train_for_certain(run.model)
    run.optimizer = make_optimizer(run)
    batch = make_batch(settings)
    if settings.base:
        settle_biases(run, batch)
    tracker = run.tracker
    static = register_static(run, batch)
    static_total = tracker.live
    for p in run.trainable:
        p.register_post_accumulate_grad_hook(run.receive)
    layers = layer_count(run.model.config)
    with tracker.hooks(), tracker:
        earlier_micro_batches(run, batch)
        figures = training_step(run, batch, layers)
    counts = {
        "params_total": run.total_parameters,
        "params_trainable": sum(p.numel() for p in run.trainable),
        "sdpa_kernel": kernel_name(run),
    }
    peaks = peak_figures(tracker.peaks, static_total)
    return architecture(run.model.config) | counts | static | figures | peaks, tracker


def register_static(run: Run, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Count what is there before the step."""
    add = run.tracker.add_all
    assert run.optimizer is not None
    return {
        "param_bytes": add(run.model.parameters(), "param") + add(scales(run.model), "param"),
        "master_bytes": add(run.masters, "master"),
        "buffer_bytes": add(run.model.buffers(), "buffer"),
        "main_grad_bytes": add(run.main_gradients.values(), "grad"),
        "optim_bytes": static_optimizer_bytes(run),
        "input_bytes": add(batch.values(), "input"),
    }


def static_optimizer_bytes(run: Run) -> int:
    """Count the optimizer states (foreach AdamW keeps its step counters on the CPU)."""
    assert run.optimizer is not None
    return run.tracker.add_all(optimizer_tensors(run.optimizer), "optim")


def forward_figures(tracker: Tracker, layers: int) -> dict[str, int]:
    """What is alive at the end of the forward, and which part each layer has."""
    per_layer: Counter[int] = Counter()
    total = copies = 0
    for block in tracker.blocks.values():
        if block.kind != "temp":
            continue
        total += block.nbytes
        if block.amp_copy:
            copies += block.nbytes
        elif match := LAYER_INDEX.search(block.module):
            per_layer[int(match[1])] += block.nbytes
    inside = sum(per_layer.values())
    return {
        "act_end_fwd_bytes": total,
        "amp_weight_cast_bytes": copies,
        "act_per_layer_bytes": per_layer[layers // 2],
        "act_layers_bytes": inside,
        "act_nonlayer_bytes": total - copies - inside,
    }


def training_step(run: Run, batch: dict[str, torch.Tensor], layers: int) -> dict[str, int]:
    """Forward, backward and optimizer step with everything counted."""
    tracker = run.tracker
    tracker.start("fwd")
    with saving(run):
        outputs = forward(run, batch)
    loss = outputs.loss
    if not run.settings.keep_outputs:
        del outputs
    figures = forward_figures(tracker, layers)
    tracker.start("bwd")
    loss.backward()
    figures["grad_bytes"] = sum(g.numel() * g.element_size() for g in run.gradients())
    outputs = None  # a kept output goes when the next step begins
    tracker.start("step")
    optimizer_step(run)
    return figures


def settle_biases(run: Run, batch: dict[str, torch.Tensor]) -> None:
    """Let quantized layers cast their biases in place, as they do the first time that they run."""
    with torch.no_grad():
        forward(run, batch)


def earlier_micro_batches(run: Run, batch: dict[str, torch.Tensor]) -> None:
    """Leave the gradients of all micro-batches but the last."""
    for _ in range(run.settings.grad_accum - 1):
        run.tracker.start("earlier")
        forward(run, batch).loss.backward()


def peak_figures(peaks: dict[str, Peak], static: int) -> dict[str, Any]:
    """The peaks per phase, and what the higher of forward and backward holds."""
    phase = max("fwd", "bwd", key=lambda name: peaks[name].total)
    peak = peaks[phase]
    return {
        "peak_fwd_bytes": peaks["fwd"].total,
        "peak_bwd_bytes": peaks["bwd"].total,
        "peak_fwd_bwd_bytes": peak.total,
        "peak_step_bytes": peaks["step"].total,
        "peak_total_bytes": max(peak.total, peaks["step"].total),
        "peak_phase": phase if peak.total >= peaks["step"].total else "step",
        "peak_fb_op": place(peak) if phase == "fwd" else peak.op,
        "peak_fb_module": peak.module,
        "peak_fb_grad_bytes": peak.grads,
        "peak_fb_act_temp_bytes": peak.total - static - peak.grads,
        "peak_fb_kernel_ws_bytes": peak.workspace,
    }
