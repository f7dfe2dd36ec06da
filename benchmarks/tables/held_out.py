"""Answers to peaks of training that were searched for after the model was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.answers import Answer
from benchmarks.tables.training import reading
from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.formats import Format
from llmsize.hardware import Accelerator
from llmsize.memory.host import evictable
from llmsize.memory.methods import Choices
from llmsize.memory.peak import device_memory
from llmsize.memory.training_run import training_run
from llmsize.optimizers import Optimizer, Precision
from llmsize.sources.config import read_config
from llmsize.stack import Stack
from llmsize.units import MIB

Row = Mapping[str, str]


def held_out_training(rows: list[Row], directory: Path) -> Iterator[Answer]:
    """Peaks of real runs on one device, by what read them: the allocator, or the driver."""
    for row in rows:
        stack = _stack(row)
        run = training_run(
            _choices(row), stack, presets.get(Precision, row["precision"]),
            presets.get(Optimizer, row["optimizer"]),
        )  # fmt: skip
        model = _model(row["model"], directory)
        meter, *_ = row["metric"].split(",")
        card = presets.find(Accelerator, row["gpu"])
        got = reading(device_memory(model, run, stack, _room(card), card), meter)
        if meter != "device":  # PyTorch does not see what bitsandbytes pages
            got -= int(evictable(model, run).value) if run.optimizer.pageable else 0
        yield Answer(row["id"], f"peak, {row['metric']}", int(row["bytes"]), got)


def _room(card: Accelerator | None) -> int | None:
    """The memory of a card that is known."""
    return card.visible_mib * MIB if card and card.visible_mib else None


def _model(name: str, directory: Path) -> Architecture:
    """A preset, or a configuration beside the table."""
    found = presets.find(Architecture, name)
    return found or read_config(directory / "trace_configs" / f"{name}.json", name)


def _stack(row: Row) -> Stack:
    """The framework, with what the program of a row does in another way.

    `keep_outputs` does, `fp32_logits=no` does not, `loss=eager` chooses.
    """
    facts = (word.partition("=") for word in row["as_run"].split())
    as_run = {name: (value or True) if value != "no" else False for name, _, value in facts}
    return replace(presets.get(Stack, row["stack"]), **as_run)


def _choices(row: Row) -> Choices:
    """What a row says that was chosen."""
    attention = row["attention"] or "sdpa"
    assert attention in ("sdpa", "eager") and row["recompute"] in ("none", "full")
    return Choices(
        method=row["method"],
        batch=int(row["batch"]),
        sequence=int(row["seq_len"]),
        accumulation=int(row["accumulation"]),
        format=presets.get(Format, row["dtype"]),
        base=presets.get(Format, row["base"]) if row["base"] else None,
        rank=int(row["rank"] or 16),
        targets=tuple(filter(None, row["targets"].split(","))),
        adapter_dropout=float(row["adapter_dropout"]),
        recompute="full" if row["recompute"] == "full" else "none",
        attention="eager" if attention == "eager" else "sdpa",
        upcast=row["upcast"] == "yes",
        fused_backward=row["fused_backward"] == "yes",
    )
