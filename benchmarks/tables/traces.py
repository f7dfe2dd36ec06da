"""Steps of real models, followed tensor by tensor: `benchmarks/measure_trace.py` and its kin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

from benchmarks.answers import Answer
from benchmarks.tables.kept import Kept, kept_by_place
from llmsize import presets
from llmsize.anatomy import LoRA, Setting, run_forward
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.formats import BF16, FP32
from llmsize.memory.generation import generation
from llmsize.memory.methods import Choices, method_named
from llmsize.memory.objectives import objective_named
from llmsize.memory.timeline import level, stretches
from llmsize.memory.training import TrainingRun, TrainingStep, training_step
from llmsize.memory.training_run import training_run
from llmsize.optimizers import Optimizer, Precision
from llmsize.sources.config import architecture, read_config
from llmsize.stack import Stack

Row = Mapping[str, str]

QUERY_AND_VALUE = ("q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")
"""What `qv` stands for in the table: these two, or the fused projection."""


def training_memory(rows: list[Row], directory: Path) -> Iterator[Answer]:
    """Bytes of what is static, of what is kept, and of the peaks of each phase."""
    for row in rows:
        step = _step(row, directory)
        static = {part.name: int(part.value) for part in step.static.parts} if step else {}
        places = _places(row, directory) if step else None
        got = {
            "param_bytes": static.get("weights"),
            "master_bytes": static.get("master weights", 0),
            "grad_bytes": step and step.gradients,
            "optim_bytes": static.get("optimizer states"),
            "act_end_fwd_bytes": step and step.kept,
            "amp_weight_cast_bytes": places and places.casts,
            "act_per_layer_bytes": places and places.per_layer,
            "act_layers_bytes": places and places.in_layers,
            "act_nonlayer_bytes": places and places.outside,
            "peak_fwd_bytes": step and step.peaks["forward"],
            "peak_bwd_bytes": step and step.peaks["backward"],
            "peak_fwd_bwd_bytes": step and max(step.peaks["forward"], step.peaks["backward"]),
            "peak_step_bytes": step and step.peaks["step"],
            "peak_total_bytes": step and step.total,
        }
        if row["autocast"] == "none":  # the column then has other copies of weights
            got.pop("amp_weight_cast_bytes")
        for quantity, value in got.items():
            if expected := int(row[quantity] or 0):
                yield Answer(row["case_id"], quantity, expected, value)
        if not row["peak_phase"]:
            continue
        named = {"forward": "fwd", "backward": "bwd", "step": "step"}
        right = None if step is None else float(named[step.phase] == row["peak_phase"])
        yield Answer(row["case_id"], "peak_phase", 1.0, right)


training_traces = encoder_traces = training_memory
"""Further families, and encoders with either head: tables of the same columns."""


def steps(rows: list[Row], directory: Path) -> Iterator[tuple[str, Architecture, TrainingRun]]:
    """The model and the run of each row, with its name."""
    for row in rows:
        yield row["case_id"], _model(row, directory), _run(row)


def _step(row: Row, directory: Path) -> TrainingStep | None:
    try:
        return training_step(_model(row, directory), _run(row))
    except LLMSizeError:
        return None


def _places(row: Row, directory: Path) -> Kept:
    """What is kept where; of a single layer, that in the middle."""
    middle = int(row["num_layers"] or 0) // 2
    return kept_by_place(_model(row, directory), _run(row).setting, middle)


def _model(row: Row, directory: Path) -> Architecture:
    return _read(directory / row["config_file"], row["model"])


_read = cache(read_config)


KINDS = {"adamw_fused": "adamw", "adamw_foreach": "adamw-foreach"}
"""The optimizers of the tables."""


def _run(row: Row) -> TrainingRun:
    """The settings of a row in llmsize's words."""
    adapted, checkpointed = row["mode"] == "lora", row["grad_ckpt"] == "full"
    named = row["lora_targets"]
    targets = QUERY_AND_VALUE if named == "qv" else (named,)
    lora = (
        LoRA(rank=int(row["lora_r"]), targets=targets, dropout=float(row["lora_dropout"]))
        if adapted
        else None
    )
    setting = Setting(
        batch=int(row["batch"]),
        sequence=int(row["seq"]),
        format=BF16 if row["weight_dtype"] == "bf16" else FP32,
        autocast=BF16 if row["autocast"] == "bf16" else None,
        attention="eager" if row["attn"] == "eager" else "sdpa",
        padded=row["padded"] == "True",
        training=True,
        trained=frozenset() if adapted else None,
        adapter=lora,
        checkpoint_every=int(checkpointed),
        input_gradients=checkpointed,
        keep_outputs=row["keep_outputs"] == "True",
    )
    precision = "mixed" if row["master_weights"] == "fp32_copy" else "pure-16bit"
    return TrainingRun(
        precision=presets.get(Precision, precision),
        optimizer=presets.get(Optimizer, KINDS[row["optimizer"]]),
        setting=setting,
        accumulation=int(row["grad_accum"]),
    )


def inference_memory(rows: list[Row], directory: Path) -> Iterator[Answer]:
    """The cache after a prefill, and the peaks of prefill and of one decoded token."""
    for row in rows:
        setting = Setting(
            batch=int(row["batch"]),
            sequence=int(row["seq"]),
            format=BF16 if row["weight_dtype"] == "bf16" else FP32,
            attention="eager" if row["attn"] == "eager" else "sdpa",
            last_logits=row["logits_shape"].split("x")[1] == "1",  # not every model heeds a wish
        )
        try:
            found = generation(_model(row, directory), setting)
        except LLMSizeError:
            found = None
        got = {
            "param_bytes": found and found.weights,
            "kv_cache_bytes": found and found.cache,
            "peak_prefill_bytes": found and found.prefill_peak,
            "peak_decode_bytes": found and found.decode_peak,
        }
        for quantity, value in got.items():
            yield Answer(row["case_id"], quantity, int(row[quantity]), value)


def method_traces(rows: list[Row], directory: Path) -> Iterator[Answer]:
    """Steps with peft's methods: what is trained, static, kept, and the peak of each phase."""
    for row in rows:
        method = method_named(row["mode"])
        takes_targets = "targets" in method.takes and row["lora_targets"] == "qv"
        choices = Choices(
            method.name, batch=int(row["batch"]), sequence=int(row["seq"]),
            rank=int(row["lora_r"]), adapter_dropout=float(row["lora_dropout"]),
            targets=QUERY_AND_VALUE if takes_targets else (), tokens=int(row["virtual_tokens"]),
            attention="eager" if row["attn"] == "eager" else "sdpa",
        )  # fmt: skip
        step = training_step(_shortened(row, directory), _plain_run(row, choices))
        static = {part.name: int(part.value) for part in step.static.parts}
        yield from _compared(row, {
            "params_trainable": step.trained,
            "param_bytes": static["weights"],
            "grad_bytes": step.gradients,
            "optim_bytes": static["optimizer states"],
            "act_end_fwd_bytes": step.kept,
            "peak_fwd_bytes": step.peaks["forward"],
            "peak_bwd_bytes": step.peaks["backward"],
            "peak_step_bytes": step.peaks["step"],
        })  # fmt: skip


HEADS = {"score": "reward", "log-probabilities": "dpo"}
"""The objective that has each head."""


def objective_traces(rows: list[Row], directory: Path) -> Iterator[Answer]:
    """Heads of preference objectives alone, without a reference model."""
    for row in rows:
        objective = HEADS[row["head"]]
        choices = Choices(
            row["mode"], objective=objective, batch=int(row["batch"]) // 2,
            sequence=int(row["seq"]), reference="precomputed" if objective == "dpo" else None,
        )  # fmt: skip
        step = training_step(_shortened(row, directory), _plain_run(row, choices))
        yield from _compared(row, _of_objective(step, step.peaks["forward"]))


def objective_steps(rows: list[Row], directory: Path) -> Iterator[Answer]:
    """Whole steps of TRL's losses, the reference's pass included."""
    for row in rows:
        pairs = objective_named(row["objective"]).pairs
        choices = Choices(
            row["mode"], objective=row["objective"], batch=int(row["batch"]) // (1 + pairs),
            sequence=int(row["seq"]), completion=0 if pairs else int(row["scored"]),
        )  # fmt: skip
        model = read_config(directory / row["config_file"], row["case_id"])
        step = training_step(model, _plain_run(row, choices))
        forward = max(step.peaks["forward"], step.peaks.get("reference", 0))
        found = _of_objective(step, forward) | {"peak_step_bytes": step.peaks["step"]}
        yield from _compared(row, found)


def _of_objective(step: TrainingStep, forward: int) -> dict[str, int]:
    return {
        "params_trainable": step.trained,
        "act_end_fwd_bytes": step.kept,
        "peak_fwd_bytes": forward,
        "peak_bwd_bytes": step.peaks["backward"],
    }


def _compared(row: Row, found: Mapping[str, int]) -> Iterator[Answer]:
    for quantity, got in found.items():
        yield Answer(row["case_id"], quantity, int(row[quantity]), got)


def _shortened(row: Row, directory: Path) -> Architecture:
    """The model of a row, of which the first layers were traced."""
    config = json.loads((directory / "configs" / f"{row['model']}.json").read_text())
    layers = next(k for k in ("num_hidden_layers", "n_layer", "num_layers") if k in config)
    return architecture(config | {layers: int(row["layers"])}, row["model"], row["model"])


def _plain_run(row: Row, choices: Choices) -> TrainingRun:
    """A run of transformers in the format that a row names, all of it by AdamW."""
    choices = replace(
        choices,
        format=FP32 if row["dtype"] == "fp32" else BF16,
        recompute="full" if row["checkpoint"] == "True" else "none",
    )
    run = training_run(
        choices, presets.get(Stack, "transformers"), presets.get(Precision, "pure-16bit"),
        presets.get(Optimizer, "adamw"),
    )  # fmt: skip
    autocast = BF16 if row["autocast"] == "bf16" else None
    return run._replace(setting=run.setting._replace(autocast=autocast))


def kernel_traces(rows: list[Row], directory: Path) -> Iterator[Answer]:
    """Recurrent layers by kernels of their own: what the forward pass keeps."""
    for row in rows:
        expected = int(row["kept_bytes"])
        yield Answer(row["model_type"], "kept_bytes", expected, kept(row, directory, fused=True))


def kept(row: Row, directory: Path, *, fused: bool) -> int:
    """Bytes that the forward pass leaves alive, by kernels or by the reference's operations."""
    setting = Setting(
        batch=int(row["batch"]), sequence=int(row["seq"]), format=BF16,
        attention="eager" if row["attn"] == "eager" else "sdpa", training=True,
        fused_recurrence=fused,
    )  # fmt: skip
    tape, _loss = run_forward(_read(directory / row["config_file"], row["model_type"]), setting)
    return level([part for part in stretches(tape) if part.phase == "forward"])
