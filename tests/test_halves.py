"""Halves of layers that are alike are traced once, and show the same as each of them would."""

from __future__ import annotations

import pytest

from llmsize import presets
from llmsize.anatomy import LoRA, Setting, run_forward
from llmsize.architecture import Architecture
from llmsize.memory.generation import generation
from llmsize.memory.training import TrainingRun, TrainingStep, training_step
from llmsize.optimizers import Optimizer, Precision

ADAPTER = LoRA(rank=8, targets=("all-linear",))
SETTINGS = {
    "full": Setting(sequence=512, training=True),
    "adapters": Setting(sequence=512, training=True, trained=frozenset(), adapter=ADAPTER),
    "norms that keep what layers are handed": Setting(sequence=512, training=True, fused_norm=True),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("name", ["gemma-3-1b", "deepseek-v3", "jamba-v0.1"])
def test_a_half_that_was_traced_shows_others(
    name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step whose halves are each traced has the same timeline, to the byte."""
    model = presets.get(Architecture, name)
    shared = _step(model, setting)
    _trace_every_half(monkeypatch)
    each = _step(model, setting)
    assert shared.timeline == each.timeline
    assert (shared.static, shared.gradients) == (each.static, each.gradients)


@pytest.mark.parametrize("name", ["gemma-3-1b", "deepseek-v3"])
def test_a_prompt_has_halves_that_are_alike_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept for a backward pass, and layers hold their attention's weights to the end."""
    model, setting = presets.get(Architecture, name), Setting(sequence=512, attention="eager")
    shared = generation.__wrapped__(model, setting)
    _trace_every_half(monkeypatch)
    assert generation.__wrapped__(model, setting) == shared


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["gemma-2-2b", "gpt-oss-20b"])
def test_windows_that_look_alike_are_one(
    name: str, padded: bool, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no mask is kept, layers of every window do the same, and a step has the same peaks."""
    model, setting = presets.get(Architecture, name), setting._replace(padded=padded)
    one, parts = _step(model, setting), run_forward(model, setting)[0].places
    monkeypatch.setattr("llmsize.anatomy.decoder._alike", lambda t, windows, frame, around: windows)
    each = _step(model, setting)
    assert (one.peaks, one.kept, one.static) == (each.peaks, each.kept, each.static)
    assert len(parts) < len(run_forward(model, setting)[0].places)


def _trace_every_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmsize.anatomy.trace._code", lambda part: (object(),))


def _step(model: Architecture, setting: Setting) -> TrainingStep:
    run = TrainingRun(presets.get(Precision, "bf16"), presets.get(Optimizer, "adamw"), setting)
    return training_step.__wrapped__(model, run)
