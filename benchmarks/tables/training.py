"""Steps of real models, followed tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.answers import Answer
from llmsize import presets
from llmsize.anatomy import LoRA, Setting
from llmsize.architecture import Architecture
from llmsize.formats import BF16, FP32
from llmsize.memory.generation import generation
from llmsize.memory.training import TrainingRun, TrainingStep, training_step
from llmsize.optimizers import Optimizer, Precision

QUERY_AND_VALUE = ("q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")
"""What `qv` stands for in the table: these two, or the fused projection."""


def training_memory(rows: list[dict[str, str]], directory: Path) -> Iterator[Answer]:
    """Bytes of what is static, of what is kept, and of the peaks of each phase."""
    for row in rows:
        step = _step(row, directory)
        static = {part.name: int(part.value) for part in step.static.parts} if step else {}
        got = {
            "param_bytes": static.get("weights"),
            "master_bytes": static.get("master weights", 0),
            "grad_bytes": step and step.gradients,
            "optim_bytes": static.get("optimizer states"),
            "act_end_fwd_bytes": step and step.kept,
            "amp_weight_cast_bytes": step and step.casts,
            "act_per_layer_bytes": step and step.kept_per_layer,
            "act_layers_bytes": step and step.kept_in_layers,
            "act_nonlayer_bytes": step and step.kept_outside,
            "peak_fwd_bytes": step and step.peaks["forward"],
            "peak_bwd_bytes": step and step.peaks["backward"],
            "peak_fwd_bwd_bytes": step and max(step.peaks["forward"], step.peaks["backward"]),
            "peak_step_bytes": step and step.peaks["step"],
            "peak_total_bytes": step and step.total,
        }
        for quantity, value in got.items():
            if expected := int(row[quantity] or 0):
                yield Answer(row["case_id"], quantity, expected, value)
        named = {"forward": "fwd", "backward": "bwd", "step": "step"}
        right = None if step is None else float(named[step.phase] == row["peak_phase"])
        yield Answer(row["case_id"], "peak_phase", 1.0, right)


def _step(row: dict[str, str], directory: Path) -> TrainingStep | None:
    config = _config(directory / row["config_file"])
    model = Architecture(row["model"], config["model_type"], config, source=row["config_file"])
    try:
        return training_step(model, _run(row))
    except Exception:
        return None


@cache
def _config(path: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads(path.read_text())
    return config


def _run(row: dict[str, str]) -> TrainingRun:
    """The settings of a row in llmsize's words."""
    adapted, checkpointed = row["mode"] == "lora", row["grad_ckpt"] == "full"
    targets = ("all-linear",) if row["lora_targets"] == "all-linear" else QUERY_AND_VALUE
    lora = LoRA(int(row["lora_r"]), targets, float(row["lora_dropout"])) if adapted else None
    setting = Setting(
        batch=int(row["batch"]),
        sequence=int(row["seq"]),
        format=BF16 if row["weight_dtype"] == "bf16" else FP32,
        autocast=BF16 if row["autocast"] == "bf16" else None,
        attention="eager" if row["attn"] == "eager" else "sdpa",
        padded=row["padded"] == "True",
        training=True,
        trained=frozenset() if adapted else None,
        lora=lora,
        checkpoint_every=int(checkpointed),
        input_gradients=adapted and checkpointed,
        keep_outputs=row["keep_outputs"] == "True",
    )
    precision = "mixed" if row["master_weights"] == "fp32_copy" else "pure-16bit"
    return TrainingRun(
        precision=presets.get(Precision, precision),
        optimizer=presets.get(Optimizer, "adamw"),
        setting=setting,
        fused_optimizer=row["optimizer"] != "adamw_foreach",
        accumulation=int(row["grad_accum"]),
    )


def inference_memory(rows: list[dict[str, str]], directory: Path) -> Iterator[Answer]:
    """The cache after a prefill, and the peaks of prefill and of one decoded token."""
    for row in rows:
        config = _config(directory / row["config_file"])
        model = Architecture(row["model"], config["model_type"], config, source=row["config_file"])
        setting = Setting(
            batch=int(row["batch"]),
            sequence=int(row["seq"]),
            format=BF16 if row["weight_dtype"] == "bf16" else FP32,
            attention="eager" if row["attn"] == "eager" else "sdpa",
            last_logits=row["logits_to_keep"] == "1",
        )
        try:
            found = generation(model, setting)
        except Exception:
            found = None
        got = {
            "param_bytes": found and found.weights,
            "kv_cache_bytes": found and found.cache,
            "peak_prefill_bytes": found and found.prefill_peak,
            "peak_decode_bytes": found and found.decode_peak,
        }
        for quantity, value in got.items():
            yield Answer(row["case_id"], quantity, int(row[quantity]), value)
