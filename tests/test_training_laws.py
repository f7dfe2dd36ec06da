"""What holds for any training step, whatever the model and the setting."""

from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from training_runs import run_of

from llmsize import presets
from llmsize.anatomy import Setting, run_forward
from llmsize.anatomy.autograd import backward
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.formats import Format
from llmsize.memory.methods import METHODS, QUANTIZED, Choices, Method
from llmsize.memory.peak import peak_memory
from llmsize.memory.training import TrainingStep, training_step
from llmsize.memory.training_run import training_run
from llmsize.optimizers import Optimizer, Precision
from llmsize.stack import Stack
from llmsize.term import evaluate

MODELS = ("gpt2", "pythia-160m", "smollm-135m", "qwen3-0.6b", "gemma-2-2b", "opt-125m")

choices = st.builds(
    Choices,
    method=st.sampled_from(["full", "lora", "norms"]),
    batch=st.integers(1, 8),
    sequence=st.sampled_from([64, 128, 512]),
    rank=st.sampled_from([1, 8, 64]),
    recompute=st.sampled_from(["none", "full", "selective"]),
    padded=st.booleans(),
)
models = st.sampled_from(MODELS)
precisions = st.sampled_from(["pure-16bit", "fp32", "amp", "mixed", "megatron"])
stacks = st.sampled_from(["transformers", "liger", "torchtune", "torchtitan"])


def step(
    model: str, chosen: Choices, precision: str = "pure-16bit", stack: str = "transformers"
) -> TrainingStep:
    run = run_of(chosen, precision, stack=stack)
    return training_step(presets.get(Architecture, model), run)


@tried(40)
@given(models, choices, precisions, stacks)
def test_the_parts_of_the_peak_sum_to_it(
    model: str, chosen: Choices, precision: str, stack: str
) -> None:
    """Everything alive at the peak is listed, and every product listed is its own value."""
    check_sums(step(model, chosen, precision, stack))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_parts_of_the_peak_of_every_method_sum_to_it(method: Method) -> None:
    """In the first model that can be trained so: biases, gated layers, a head of its own."""
    base = presets.get(Format, "nf4") if method.name in QUANTIZED else None
    chosen = Choices(method.name, batch=2, sequence=64, rank=4, base=base, frozen_layers=1)
    for model in ("gpt2", "smollm-135m", "pythia-160m"):
        with suppress(LLMSizeError):
            run = run_of(chosen, optimizer=method.optimizer or "adamw")
            check_sums(training_step(presets.get(Architecture, model), run))
            return
    pytest.fail("no model is trained so")


def test_what_layers_share_is_counted_once() -> None:
    """Nothing that is alive has less than no bytes where layers without a window scale queries."""
    beam = presets.get(Architecture, "beam-1.0-501b-a23b")
    check_sums(training_step(beam, run_of(Choices("full", sequence=2048))))


def check_sums(found: TrainingStep) -> None:
    memory = peak_memory(found)
    assert memory.value == found.total
    for part in memory.walk():
        assert part.value >= 0
        if part.formula:
            assert part.value == evaluate(part.formula, part.inputs)
        elif part.parts:
            assert part.value == sum(below.value for below in part.parts)


@tried(30)
@given(models, choices, precisions)
def test_more_of_anything_never_takes_less(model: str, chosen: Choices, precision: str) -> None:
    """Bytes grow with batch and sequence."""
    small = step(model, chosen, precision)
    for more in (
        replace(chosen, batch=chosen.batch + 1),
        replace(chosen, sequence=2 * chosen.sequence),
    ):
        large = step(model, more, precision)
        assert large.kept > small.kept
        assert large.total >= small.total


@tried(30)
@given(models, choices)
def test_recomputation_never_keeps_more(model: str, chosen: Choices) -> None:
    """What is kept at the end of the forward pass falls, or stays, when blocks run again."""
    kept = [
        step(model, replace(chosen, recompute=how)).kept for how in ("full", "selective", "none")
    ]
    assert kept[0] <= kept[1] <= kept[2]


@tried(20)
@given(models, st.sampled_from([1, 4, 16, 64]))
def test_lora_has_smaller_states_than_full_training(model: str, rank: int) -> None:
    """Adapters' gradients and optimizer states stay below those of all weights; rank adds."""
    full = step(model, Choices(sequence=64))
    lora = step(model, Choices(method="lora", sequence=64, rank=rank))
    more = step(model, Choices(method="lora", sequence=64, rank=rank + 1))
    assert lora.trained < full.trained
    assert lora.gradients < full.gradients
    assert lora.static.part("optimizer states").value < full.static.part("optimizer states").value
    assert more.trained > lora.trained


@pytest.mark.parametrize("model", MODELS)
def test_a_frozen_model_keeps_no_weight_gradients(model: str) -> None:
    """With adapters alone trained, their gradients are all there are after the step."""
    found = step(model, Choices(method="lora", sequence=64, rank=4))
    gradients = sum(n for what, n in found.moment.live.items() if what.role == "gradient")
    assert gradients <= found.gradients


@pytest.mark.parametrize("model", MODELS)
def test_what_layers_hand_back_is_no_gradient_of_a_weight(model: str) -> None:
    """Where blocks run again below trained adapters, all gradients are those of the adapters."""
    chosen = Choices(method="lora", sequence=64, rank=64, recompute="full")
    found = step(model, chosen)
    parts = {part.name: part.value for part in peak_memory(found).parts}
    assert min(parts.values()) >= 0
    assert parts.get("gradients", 0) <= found.gradients


@pytest.mark.parametrize("model", ["gpt2", "gemma-2-2b", "deepseek-v3", "inkling", "jamba-v0.1"])
def test_no_tensor_grows_faster_than_the_batch(model: str) -> None:
    """Of twice as many sequences every tensor has twice the bytes, or as many as before."""

    def sizes(batch: int) -> list[int]:
        setting = Setting(batch=batch, sequence=160, training=True)
        trace, loss = run_forward(presets.get(Architecture, model), setting)
        backward(trace, loss)
        return [abs(change) for change, _ in trace.events]

    assert all(b in (a, 2 * a) for a, b in zip(sizes(2), sizes(4), strict=True))


def test_a_step_of_more_layers_is_folded_like_one_that_is_unrolled() -> None:
    """Four layers are traced one by one, five are folded: the fifth adds what the fourth did."""
    base = presets.get(Architecture, "smollm-135m")
    kept = []
    for layers in (3, 4, 5, 6):
        model = replace(base, config={**base.config, "num_hidden_layers": layers})
        run = training_run(
            Choices(sequence=64), presets.get(Stack, "transformers"),
            presets.get(Precision, "pure-16bit"), presets.get(Optimizer, "adamw"),
        )  # fmt: skip
        found = training_step(model, run)
        kept.append((found.kept, found.total))
    differences = {(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(kept)}
    assert len(differences) == 1
