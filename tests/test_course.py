"""Few layers are traced for many: which ones, and that they show the same as all of them."""

from __future__ import annotations

import gc
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsize import presets
from llmsize.anatomy import LoRA, Setting, course, run_forward
from llmsize.anatomy.autograd import backward
from llmsize.architecture import Architecture
from llmsize.memory.training import TrainingRun, TrainingStep, training_step
from llmsize.memory.weights import checkpoint
from llmsize.optimizers import Optimizer, Precision

KINDS = st.lists(st.sampled_from("abc"), min_size=1, max_size=60).map(tuple)
PERIODIC = st.builds(
    lambda start, pattern, times, rest: (*start, *pattern * times, *rest),
    st.lists(st.sampled_from("abc"), max_size=3),
    st.lists(st.sampled_from("abc"), min_size=1, max_size=6).map(tuple),
    st.integers(1, 12),
    st.lists(st.sampled_from("abc"), max_size=3),
)

MODELS = (
    "gemma-3-1b",
    "jamba-v0.1",
    "gpt-oss-120b",
    "qwen3-next-80b-a3b",
    "deepseek-v3",
    "lfm2-1.2b",
    "gemma-4-26b-a4b",
    "t5-small",
)
ATTENTION = LoRA(rank=8, targets=("o_proj", "out_proj", "o"))
SETTINGS = {
    "full": Setting(batch=2, sequence=512, training=True),
    "eager": Setting(batch=2, sequence=512, training=True, attention="eager", padded=True),
    "recomputed": Setting(sequence=512, training=True, checkpoint_every=1),
    "some recomputed": Setting(sequence=512, training=True, checkpoint_every=3),
    "adapters behind attention": Setting(
        sequence=512, training=True, trained=frozenset(), adapter=ATTENTION
    ),
    "first layers frozen": Setting(sequence=512, training=True, frozen_layers=2),
    "long, recomputed": Setting(
        sequence=4096,
        training=True,
        attention="eager",
        checkpoint_every=1,
        trained=frozenset(),
        adapter=ATTENTION,
    ),
}


@given(KINDS | PERIODIC)
def test_every_layer_has_one_turn(kinds: tuple[str, ...]) -> None:
    """The turns hold each layer once, under its own kind."""
    turns = course.course(kinds)
    held = sorted((index, turn.kind) for turn in turns for index in turn.indices)
    assert held == list(enumerate(kinds))


@given(KINDS | PERIODIC, st.integers(0, 4))
def test_a_turn_is_shown_between_neighbours_of_the_same_kinds(
    kinds: tuple[str, ...], apart: int
) -> None:
    """What is traced for a turn is of its kind, as are the traced ones before and after it."""
    turns = course.course(kinds)
    around = _around([turn.kind for turn in turns])
    shown = course.shown_by(turns, min(apart, len(turns)))
    traced = sorted(set(shown))
    between = dict(zip(traced, _around([turns[n].kind for n in traced]), strict=True))
    assert [between[n] for n in shown] == around
    assert list(shown[:apart]) == list(range(len(turns)))[:apart]


def test_a_pattern_is_traced_once() -> None:
    """Of Gemma 3's 62 layers, five local ones to a global one, six differ in their neighbours."""
    kinds = (("l",) * 5 + ("g",)) * 10 + ("l", "l")
    assert len(set(course.shown_by(course.course(kinds)))) == 6


def test_neighbours_that_look_alike_are_traced_once() -> None:
    """Where a layer cannot tell a local from a global neighbour, one of each kind does."""
    turns = course.course((("l",) * 5 + ("g",)) * 10 + ("l", "l"))
    shown = course.shown_by(turns, seen=[()] * (len(turns) + 2))
    assert [turns[n].kind for n in sorted(set(shown))] == ["l", "g"]


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("name", MODELS)
def test_few_layers_show_what_all_do(
    name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step followed through every single layer has the same sizes, to the byte, and at its peak
    as much alive for the same reasons."""
    model = presets.get(Architecture, name)
    few = _step(model, setting)
    unrolled = partial(run_forward, unrolled=True)
    monkeypatch.setattr("llmsize.memory.training.run_forward", unrolled)
    every = _step(model, setting)
    assert few.peaks == every.peaks
    assert few.static == every.static
    assert (few.kept, few.gradients, few.trained) == (every.kept, every.gradients, every.trained)
    assert few.moment.operation == every.moment.operation
    assert _reasons(few) == _reasons(every)


@pytest.mark.parametrize(("name", "dense"), [("gemma-3-27b", 62), ("deepseek-v3", 3)])
def test_halves_that_are_alike_are_traced_once(name: str, dense: int) -> None:
    """With adapters the first layer's attention is unlike the others', and the dense feed-forward
    of all that have one is one: Gemma 3 27B's 62 layers, and the first 3 of DeepSeek V3."""
    adapter = LoRA(rank=8, targets=("all-linear",))
    setting = Setting(sequence=512, training=True, trained=frozenset(), adapter=adapter)
    trace, _ = run_forward(presets.get(Architecture, name), setting)
    found = [w for (_, weight), w in trace.weights.items() if weight == "mlp.gate_proj.weight"]
    assert [len(w.indices) for w in found] == [dense]


@pytest.mark.parametrize(
    ("name", "most"), [("llama-3-8b", 500), ("gemma-3-27b", 1300), ("deepseek-v3", 1000)]
)
def test_a_step_takes_few_events(name: str, most: int) -> None:
    """Time goes with the events of a trace: they are as many as a few layers have, not all."""
    setting = Setting(batch=2, sequence=2048, training=True)
    trace, loss = run_forward(presets.get(Architecture, name), setting)
    trace.enter(-1, "backward")
    backward(trace, loss)
    assert len(trace.events) <= most


def test_inputs_that_wait_on_the_host_come_back_as_they_lay() -> None:
    """T5's relative positions are not row-major, and layers that run again take them as they were:
    offloading frees 512 tokens of 512 channels in bf16 for each of 12 layers, and what goes along.
    """
    model, setting = presets.get(Architecture, "t5-small"), SETTINGS["recomputed"]
    moved = _step(model, setting._replace(offload_checkpoints=True))
    assert _step(model, setting).kept - moved.kept >= 12 * 512 * 512 * 2


@pytest.mark.parametrize("name", ["llama-3-8b", "gemma-3-1b", "deepseek-v3"])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=list(SETTINGS))
def test_what_a_step_has_made_goes_with_it(name: str, setting: Setting) -> None:
    """Nothing of a step refers to itself, to wait for the garbage collector: sweeps make many."""
    model = presets.get(Architecture, name)
    _step(model, setting)
    gc.collect()
    gc.disable()
    try:
        _step(model, setting)
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_weights_of_all_layers_are_there() -> None:
    """Each traced layer's weights are named once for every layer that it stands for."""
    model = presets.get(Architecture, "jamba-v0.1")
    outlined = {(w.name, w.shape) for w in _weights(model, outline=True)}
    assert outlined == {(w.name, w.shape) for w in _weights(model, outline=False)}


def _weights(model: Architecture, *, outline: bool) -> list[object]:
    trace, _ = run_forward(model, Setting(), outline=outline)
    return list(checkpoint(model, trace).weights)


def _step(model: Architecture, setting: Setting) -> TrainingStep:
    precision, optimizer = presets.get(Precision, "bf16"), presets.get(Optimizer, "adamw")
    traced = training_step.__wrapped__  # not what was remembered of the same step
    return traced(model, TrainingRun(precision, optimizer, setting))


def _reasons(step: TrainingStep) -> Counter[str]:
    """Bytes alive at the peak, by why they are."""
    alive: Counter[str] = Counter()
    for what, size in step.moment.live.items():
        alive[what.role] += size
    return alive


def _around(kinds: list[str]) -> list[tuple[str, ...]]:
    """Each with its neighbours."""
    return [
        (*before, after)
        for before, (_, after) in zip(pairwise(["", *kinds]), pairwise([*kinds, ""]), strict=True)
    ]
