"""Steps under drawn settings, followed tensor by tensor: `benchmarks/measure_trace.py`.

Models, methods, formats, kernels, recomputation and optimizers were drawn at random, and nothing
was left out but what the libraries themselves refuse.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.answers import Answer
from llmsize import presets
from llmsize.errors import LLMSizeError
from llmsize.formats import BF16, FP16, FP32, Format
from llmsize.memory.methods import Choices, Recompute, method_named
from llmsize.memory.training import TrainingRun, TrainingStep, training_step
from llmsize.memory.training_run import training_run
from llmsize.optimizers import Optimizer, Precision
from llmsize.sources.config import architecture
from llmsize.stack import Stack

Row = Mapping[str, str]

FORMATS = {"fp32": FP32, "amp-fp16": FP16, "pure-fp16": FP16}
"""What the precisions of the table compute in, if not in bf16."""
RECIPES = {
    "fp32": "fp32", "mixed": "mixed", "megatron": "megatron", "pure-bf16": "pure-16bit",
    "pure-fp16": "pure-16bit", "amp-16bit": "amp-16bit",
}  # fmt: skip
"""Their recipes, if not autocast over fp32 weights."""
OPTIMIZERS = {
    "adamw_fused": "adamw", "adamw_foreach": "adamw-foreach", "amsgrad_foreach": "adamw-amsgrad",
    "adamw_for-loop": "adamw-for-loop",
}  # fmt: skip
"""Optimizers that llmsize calls otherwise than by what is before the kind."""
RECOMPUTED: dict[str, Recompute] = {
    "none": "none", "full": "full", "selective": "selective", "offloaded": "full",
}  # fmt: skip
BIASES = {"none": "none", "all": "all", "lora_only": "adapted"}
PHASES = {"forward": "fwd", "backward": "bwd", "step": "step"}


def settings_traces(rows: list[Row]) -> Iterator[Answer]:
    """What is trained, static and kept, and the peaks; an unknown setting has no answers."""
    for row in rows:
        step = _step(row)
        for quantity, value in _found(step).items() if step else dict.fromkeys(QUANTITIES).items():
            if expected := int(row[quantity]):
                yield Answer(row["case_id"], quantity, expected, value)
        right = None if step is None else float(PHASES[step.phase] == row["peak_phase"])
        yield Answer(row["case_id"], "peak_phase", 1.0, right)


model_traces = settings_traces
"""Drawn models under a few settings: a table of the same columns."""


QUANTITIES = ("params_trainable", "param_bytes", "master_bytes", "grad_bytes", "optim_bytes",
              "act_end_fwd_bytes", "peak_fwd_bytes", "peak_bwd_bytes", "peak_fwd_bwd_bytes",
              "peak_step_bytes", "peak_total_bytes")  # fmt: skip


def _found(step: TrainingStep) -> dict[str, int]:
    static = {part.name: int(part.value) for part in step.static.parts}
    forward, backward = step.peaks["forward"], step.peaks["backward"]
    values = (
        step.trained, static["weights"], static.get("master weights", 0), step.gradients,
        static.get("optimizer states", 0), step.kept, forward, backward, max(forward, backward),
        step.peaks["step"], step.total,
    )  # fmt: skip
    return dict(zip(QUANTITIES, values, strict=True))


def _step(row: Row) -> TrainingStep | None:
    try:
        return training_step(_model(row), _run(row))
    except LLMSizeError:
        return None


def _model(row: Row) -> Any:
    return architecture(json.loads(row["config"]), row["case_id"], row["case_id"])


def _run(row: Row) -> TrainingRun:
    """The settings of a row in llmsize's words."""
    name = row["optimizer"]
    optimizer = OPTIMIZERS.get(name, name.removesuffix("_foreach"))
    stack = replace(presets.get(Stack, "transformers"), keep_outputs=row["keep_outputs"] == "True")
    return training_run(
        _choices(row),
        stack,
        presets.get(Precision, RECIPES.get(row["precision"], "amp")),
        presets.get(Optimizer, optimizer),
    )


def _choices(row: Row) -> Choices:
    takes = method_named(row["method"]).takes
    format = FORMATS.get(row["precision"], BF16)
    every, targets = int(row["recompute_every"]), row["lora_targets"]
    drawn: dict[str, Any] = {
        "rank": int(row["lora_r"]), "adapter_dropout": float(row["lora_dropout"]),
        "targets": () if targets == "all-linear" else tuple(targets.split(",")),
        "tokens": int(row["virtual_tokens"]), "frozen_layers": int(row["frozen_layers"]),
        "bias": BIASES[row["lora_bias"]],
        "adapter_format": format if row["adapter_dtype"] else None,
        "modules_to_save": tuple(filter(None, row["modules_to_save"].split(","))),
        "base": presets.get(Format, row["base"]) if row["base"] else None,
        "upcast": row["upcast"] == "True",
    }  # fmt: skip
    if row["method"] in ("houlsby", "pfeiffer", "ia3"):
        drawn.pop("targets")  # which the tracer leaves to them
    return Choices(
        row["method"], format=format, batch=int(row["batch"]), sequence=int(row["seq"]),
        attention="eager" if row["attn"] == "eager" else "sdpa", padded=row["padded"] == "True",
        accumulation=int(row["grad_accum"]), recompute=RECOMPUTED[row["recompute"]],
        recompute_every=every or 1, offload_checkpoints=row["recompute"] == "offloaded",
        **{choice: value for choice, value in drawn.items() if choice in takes},
    )  # fmt: skip
