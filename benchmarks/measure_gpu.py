#!/usr/bin/env python3
"""Measure the memory of training steps on a real CUDA device, with randomly initialised weights.

The counterpart of `measure_trace.py` with the real allocator: what it allocated, what it reserved
from the driver, and what the device had in use. The cases are rows of a table with the columns of
`training_memory.csv`; what comes out has the same columns, so that the two can be laid side by
side, and the reserved and device bytes and the versions. Each case runs in a process of its own:
none inherits another's cache, and one that does not fit becomes a row of status `oom`.

Needs a CUDA build of torch, transformers, and peft for LoRA. Nothing is downloaded.

    python benchmarks/measure_gpu.py tests/reference/training_memory.csv -o rows.csv
    python benchmarks/measure_gpu.py tests/reference/training_memory.csv --case NAME
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

try:
    import torch
except ModuleNotFoundError:
    sys.exit("error: torch is not installed\n\nhint: install its build for CUDA and '.[trace]'")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tracing.adapters import add_adapter
from benchmarks.tracing.kernels import AttentionKernels
from benchmarks.tracing.models import DTYPES, Settings, make_config, set_layers
from benchmarks.tracing.recomputing import CHECKPOINTING
from benchmarks.tracing.runs import (
    Run,
    forward,
    make_optimizer,
    optimizer_step,
    optimizer_tensors,
)
from benchmarks.tracing.tracker import Tracker

DEVICE = "cuda"
STEPS = 3
"""The first step makes what stays (library workspaces); the last is the one that counts."""
TIME_LIMIT = 900
"""Seconds for one case."""

Row = dict[str, Any]


def device_bytes() -> int:
    """What the driver has given out on this device, to this process or to any other."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def allocated() -> int:
    """Bytes of the live tensors, each rounded up to the allocator's 512 bytes."""
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())


def nbytes(tensors: Any) -> int:
    """Bytes of tensors without rounding, those that share a storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def settings_of(row: Row, folder: Path) -> Settings:
    """A row of the table as the settings of a run."""
    config = json.loads((folder / row["config_file"]).read_text())
    set_layers(config, int(row["num_layers"]))
    return Settings(
        config=config,
        mode=row["mode"],
        batch=int(row["batch"]),
        seq=int(row["seq"]),
        dtype=row["weight_dtype"],
        autocast=row["autocast"],
        attn=row["attn"],
        checkpoint=row["grad_ckpt"] == "full",
        padded=row["padded"] == "True",
        grad_accum=int(row["grad_accum"]),
        keep_outputs=row["keep_outputs"] == "True",
        lora_r=int(row["lora_r"] or 0),
        lora_targets=row["lora_targets"],
        lora_dropout=float(row["lora_dropout"] or 0),
        optimizer=row["optimizer"],
        master=row["master_weights"] == "fp32_copy",
    )


def build(settings: Settings) -> Run:
    """The model on the device with weights as its code initialises them, and its optimizer."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = make_config(settings.config)
    factory = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    dtype = DTYPES[settings.dtype]
    with torch.device(DEVICE):
        model = factory.from_config(config, dtype=dtype, attn_implementation=settings.attn)
        total = sum(p.numel() for p in model.parameters())
        if settings.mode == "lora":
            model = add_adapter(model, settings)
    if settings.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
    run = Run(settings, model.train(), Tracker(model), AttentionKernels(), total_parameters=total)
    run.optimizer = make_optimizer(run)
    return run


def random_batch(settings: Settings, vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens, which random routers spread over their experts, as both input and labels."""
    tokens = torch.randint(vocabulary, (settings.batch, settings.seq), device=DEVICE)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    if settings.padded:
        mask = torch.ones_like(tokens)
        mask[-1, settings.seq // 2 :] = 0
        batch["attention_mask"] = mask
    return batch


def static_bytes(run: Run) -> Row:
    """What is there before a step, in exact bytes."""
    assert run.optimizer is not None
    return {
        "params_total": run.total_parameters,
        "params_trainable": sum(p.numel() for p in run.trainable),
        "param_bytes": nbytes(run.model.parameters()),
        "master_bytes": nbytes(run.masters),
        "buffer_bytes": nbytes(run.model.buffers()),
        "optim_bytes": nbytes(
            t for t in optimizer_tensors(run.optimizer) if t.device.type == DEVICE
        ),
    }


def peak_of_phase() -> int:
    """The highest allocation since the last call."""
    torch.cuda.synchronize()
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak


def step(run: Run, batch: dict[str, torch.Tensor]) -> Row:
    """One training step with the peak of each phase; gradients are gone when it ends."""
    assert run.optimizer is not None
    for _ in range(run.settings.grad_accum - 1):
        forward(run, batch).loss.backward()
    before = allocated()
    peak_of_phase()
    outputs = forward(run, batch)
    loss = outputs.loss
    if not run.settings.keep_outputs:
        del outputs
    figures = {"act_end_fwd_bytes": allocated() - before, "peak_fwd_bytes": peak_of_phase()}
    loss.backward()
    figures["peak_bwd_bytes"] = peak_of_phase()
    figures["grad_bytes"] = nbytes(p.grad for p in run.trainable if p.grad is not None)
    del loss
    outputs = None  # a kept output goes when the next step begins
    optimizer_step(run)
    figures["peak_step_bytes"] = peak_of_phase()
    run.optimizer.zero_grad(set_to_none=True)
    run.model.zero_grad(set_to_none=True)
    return figures


def measure(settings: Settings) -> Row:
    """The figures of the last of a few steps. Raises `torch.OutOfMemoryError`."""
    torch.zeros(1, device=DEVICE)
    context = device_bytes() - int(torch.cuda.memory_reserved())
    run = build(settings)
    batch = random_batch(settings, run.model.config.get_text_config().vocab_size)
    static = static_bytes(run)
    torch.cuda.empty_cache()
    for _ in range(STEPS):
        figures = step(run, batch)
    return (
        static
        | figures
        | {
            "peak_total_bytes": max(
                figures[f"peak_{name}_bytes"] for name in ("fwd", "bwd", "step")
            ),
            "between_steps_bytes": allocated(),
            "peak_reserved_bytes": int(torch.cuda.memory_reserved()),
            "context_bytes": context,
            "device_bytes": device_bytes(),
        }
    )


def environment() -> Row:
    """What the case ran on and with, so that it can be run again."""
    found: Row = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for name in ("torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


KEPT = ("case_id", "model", "config_file", "num_layers", "mode", "lora_r", "lora_targets",
        "lora_dropout", "weight_dtype", "autocast", "master_weights", "optimizer", "batch", "seq",
        "grad_ckpt", "attn", "padded", "grad_accum", "keep_outputs")  # fmt: skip
"""The columns of a case that its measured row repeats."""


def measured(row: Row, folder: Path) -> Row:
    """Settings, figures and versions of one case, measured in this process."""
    asked = {name: row[name] for name in KEPT}
    try:
        return asked | {"status": "ran"} | measure(settings_of(row, folder)) | environment()
    except torch.OutOfMemoryError:
        return asked | {"status": "oom"} | environment()


def in_own_process(table: Path, case: str) -> Row:
    """The measured row of one case from a fresh interpreter."""
    command = [sys.executable, __file__, str(table), "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    if done.returncode:
        return {
            "case_id": case,
            "status": "failed: " + (done.stderr.strip() or "?").splitlines()[-1],
        }
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def write(rows: Iterable[Row], path: Path) -> None:
    """Write rows as they come, so that an interrupted run keeps what it measured."""
    columns: list[str] = []
    done: list[Row] = []
    for row in rows:
        done.append(row)
        columns += [name for name in row if name not in columns]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(done)
        print(f"{row['case_id']}: {row['status']}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Measure one case and print it as JSON, or all of them into a table."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("table", type=Path, help="a CSV with the columns of training_memory.csv")
    p.add_argument("--case", help="only this case, printed as JSON")
    p.add_argument("-o", "--output", type=Path, default=Path("measured_gpu.csv"))
    options = p.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("error: this needs a CUDA device\nhint: measure_trace.py needs none")
    with options.table.open(newline="") as file:
        cases = {row["case_id"]: row for row in csv.DictReader(file)}
    if options.case:
        print(json.dumps(measured(cases[options.case], options.table.parent)))
    else:
        write((in_own_process(options.table, case) for case in cases), options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
