"""What offloading takes off the device and puts on the host, and what replicas add."""

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from training_runs import run_of

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.memory.host import bus_traffic, evictable, host_memory
from llmsize.memory.methods import Choices
from llmsize.memory.training import TrainingRun, TrainingStep, training_step
from llmsize.term import Term

MODELS = ("gpt2", "smollm-135m", "qwen3-0.6b", "gemma-2-2b", "opt-125m")

choices = st.builds(
    Choices,
    method=st.sampled_from(["full", "lora", "norms"]),
    batch=st.integers(1, 4),
    sequence=st.sampled_from([64, 512]),
    recompute=st.sampled_from(["none", "full"]),
    accumulation=st.sampled_from([1, 4]),
    objective=st.sampled_from(["sft", "dpo", "ppo"]),
)
models = st.sampled_from(MODELS)
precisions = st.sampled_from(["pure-16bit", "fp32", "amp", "mixed", "megatron"])
optimizers = st.sampled_from(["adamw", "adamw-8bit", "sgd"])


def step(model: str, run: TrainingRun) -> TrainingStep:
    return training_step(presets.get(Architecture, model), run)


def host(model: str, run: TrainingRun) -> Term:
    return host_memory(presets.get(Architecture, model), run)


@tried(25)
@given(models, choices, precisions, optimizers)
def test_offloading_takes_from_the_device_and_loses_nothing(
    model: str, chosen: Choices, precision: str, optimizer: str
) -> None:
    """Each further place takes no more on the device; what is static is somewhere."""
    kept = step(model, run_of(chosen, precision, optimizer))
    before = kept
    for place in ("optimizer", "parameters"):
        run = run_of(replace(chosen, offload=place), precision, optimizer)
        moved = step(model, run)
        assert all(moved.peaks[phase] <= before.peaks[phase] for phase in kept.peaks)
        on_host = host(model, run)
        assert moved.static.value + on_host.value >= kept.static.value
        assert on_host.value == sum(part.value for part in on_host.parts)
        before = moved


@pytest.mark.parametrize(("place", "each"), [("optimizer", 16), ("parameters", 18)])
def test_mixed_precision_takes_what_deepspeed_estimates(place: str, each: int) -> None:
    """DeepSpeed's estimators for ZeRO-2 and ZeRO-3 with offload say 16 and 18 bytes a parameter,
    before their factor for buffers."""
    run = run_of(Choices(sequence=64, offload=place), "mixed")  # type: ignore[arg-type]
    found, on_host = step("gpt2", run), host("gpt2", run)
    rounding = on_host.part("rounding of pinned blocks").value
    counters = 4 * (12 * 12 + 4)  # AdamW's fp32 step of each of GPT-2's tensors
    assert on_host.value - rounding - counters == each * found.trained


def test_a_value_model_sends_its_own_gradients() -> None:
    """It is trained whole beside LoRA's policy: GPT-2's 124,439,808 parameters and a head of 768,
    two bytes each, as gradients to the host and as weights back."""
    run = run_of(Choices("lora", objective="ppo", sequence=64, offload="optimizer"))
    crossing = bus_traffic(presets.get(Architecture, "gpt2"), run)
    assert crossing.part("value model").value == 2 * 2 * (124_439_808 + 768)


def test_the_device_holds_two_blocks_of_offloaded_weights() -> None:
    """Of GPT-2 small these are the head (the tied embedding, and the final norm) and a layer:
    50257 · 768 + 2 · 768, and 12 · 768² + 13 · 768 parameters; or the first layer beside the
    embeddings of 50257 tokens and 1024 positions."""
    found = step("gpt2", run_of(Choices(sequence=64, offload="parameters")))
    layer = 12 * 768**2 + 13 * 768
    assert found.static.part("weights").value == 2 * ((50257 + 1024) * 768 + layer)


def test_a_tied_head_is_held_with_the_last_layer() -> None:
    """Of Qwen3 0.6B: 151,936 tokens of 1,024 channels and the final norm; and in a layer products
    of 2,048, 2 × 1,024, 2,048 and 3 × 3,072 channels, two norms, and those of 128-channel heads."""
    found = step("qwen3-0.6b", run_of(Choices(sequence=64, offload="parameters")))
    layer = 1024 * (2048 + 2 * 1024 + 2048 + 3 * 3072) + 2 * 1024 + 2 * 128
    assert found.static.part("weights").value == 2 * (151_936 * 1024 + 1024 + layer)


def test_a_head_of_its_own_is_held_without_the_embedding() -> None:
    """Of Pythia 160M: 50,304 rows of 768 channels and the final norm, and a layer as GPT-2's."""
    found = step("pythia-160m", run_of(Choices(sequence=64, offload="parameters")))
    layer = 12 * 768**2 + 13 * 768
    assert found.static.part("weights").value == 2 * (50_304 * 768 + 2 * 768 + layer)


def test_megatron_steps_on_18_bytes_a_parameter() -> None:
    """bf16 weights, fp32 main gradients, a master copy and two moments, and nothing beside them:
    docs/source/api-guide/dist_optimizer.md of Megatron-LM, without a distributed optimizer."""
    found = step("gpt2", run_of(Choices(sequence=64), "megatron"))
    beside = sum(found.static.part(name).value for name in ("inputs", "buffers"))
    beside += 4 * (12 * 12 + 4) + 4  # AdamW's fp32 step of each of GPT-2's tensors, and the loss
    assert found.peaks["step"] - beside == 18 * found.trained


def test_gradients_cross_once_a_micro_batch_and_weights_once_a_step() -> None:
    """16-bit gradients of four micro-batches go down, the stepped weights come up once."""
    model = presets.get(Architecture, "gpt2")
    run = run_of(Choices(sequence=64, offload="optimizer", accumulation=4))
    trained = training_step(model, run).trained
    crossing = bus_traffic(model, run)
    assert crossing.part("gradients to the host").value == 4 * 2 * trained
    assert crossing.part("stepped weights to the device").value == 2 * trained


def test_offloaded_checkpoints_are_what_layers_take_in() -> None:
    """Twelve layers of GPT-2 take 2 × 64 × 768 numbers of 16 bits; positions stay."""
    run = run_of(Choices(batch=2, sequence=64, recompute="full", offload_checkpoints=True))
    assert host("gpt2", run).part("offloaded checkpoints").value == 12 * 2 * 64 * 768 * 2


def powers_of_two_above(*sizes: int) -> int:
    """What is added where each of the sizes becomes the next power of two."""
    return sum(next(2**n for n in range(64) if 2**n >= size) - size for size in sizes)


@pytest.mark.parametrize("place", ["optimizer", "parameters"])
def test_every_pinned_tensor_takes_a_power_of_two(
    place: Literal["optimizer", "parameters"],
) -> None:
    """CachingHostAllocator.h rounds up what each of two tensors a weight takes: its gradient, and
    the copy that is stepped on or the weight itself; here those of GPT-2 in 16 bits."""
    c = 768
    layer = [c * 3 * c, 3 * c, c * c, c, c * 4 * c, 4 * c, 4 * c * c, c, c, c, c, c]
    tensors = [50257 * c, 1024 * c, *12 * layer, c, c]
    assert sum(tensors) == 124_439_808
    rounding = powers_of_two_above(*(2 * size for size in tensors))
    on_host = host("gpt2", run_of(Choices(sequence=64, offload=place)))
    assert on_host.part("rounding of pinned blocks").value == 2 * rounding


def test_a_copy_to_step_on_is_there_where_the_weights_are_not() -> None:
    """torchao's CPUOffloadOptimizer copies each trained weight, in its format; streamed weights are
    stepped on where they are."""
    optimizer = host("gpt2", run_of(Choices(sequence=64, offload="optimizer")))
    streamed = host("gpt2", run_of(Choices(sequence=64, offload="parameters")))
    assert optimizer.part("weights to step on").value == 2 * 124_439_808
    assert streamed.part("weights").value == 2 * 124_439_808
    assert "weights to step on" not in {part.name for part in streamed.parts}
    assert "weights" not in {part.name for part in optimizer.parts}


def test_only_layers_that_run_again_have_checkpoints() -> None:
    """Every third of GPT-2's twelve layers: four inputs of 64 × 768 numbers of 16 bits."""
    run = run_of(
        Choices(sequence=64, recompute="full", recompute_every=3, offload_checkpoints=True)
    )
    assert host("gpt2", run).part("offloaded checkpoints").value == 4 * 64 * 768 * 2


def test_weights_and_checkpoints_cross_in_every_micro_batch() -> None:
    """All weights forward and backward, and what layers take in to the host and back, three times:
    GPT-2's 124,439,808 parameters, and twelve inputs of 2 × 64 × 768 numbers."""
    model, chosen = presets.get(Architecture, "gpt2"), Choices(batch=2, sequence=64, accumulation=3)
    streamed = bus_traffic(model, run_of(replace(chosen, offload="parameters")))
    assert streamed.part("weights to the device").value == 3 * 2 * 2 * 124_439_808
    recomputed = replace(chosen, recompute="full", offload_checkpoints=True)
    crossing = bus_traffic(model, run_of(recomputed)).part("checkpoints, there and back")
    assert crossing.value == 3 * 2 * 12 * 2 * 64 * 768 * 2


def test_only_a_paged_optimizer_may_be_moved() -> None:
    """Its states may go, 8 bytes a parameter for AdamW in fp32, but for those of small weights.

    Biases and norms have fewer than the 100,000 numbers from which bitsandbytes pages.
    """
    model, chosen = presets.get(Architecture, "gpt2"), Choices(sequence=64)
    paged = evictable(model, run_of(chosen, "fp32", "adamw-paged"))
    small = 12 * ((3 + 1 + 4 + 1) * 768 + 2 * 2 * 768) + 2 * 768
    trained = step("gpt2", run_of(chosen)).trained - small
    assert paged is not None
    assert paged.value == 8 * trained
    assert evictable(model, run_of(chosen)) is None


@pytest.mark.parametrize("accumulation", [1, 2])
def test_replicas_hold_buckets_as_large_as_all_gradients(accumulation: int) -> None:
    """The reducer copies gradients into buckets; views of them save as much as they take."""
    alone = Choices(sequence=64, accumulation=accumulation)
    one = step("gpt2", run_of(alone))
    copied = step("gpt2", run_of(replace(alone, replicas=4)))
    viewed = step("gpt2", run_of(replace(alone, replicas=4, bucket_views=True)))
    assert copied.gradients == 2 * one.trained
    assert copied.peaks["step"] - one.peaks["step"] == copied.gradients
    assert viewed.peaks["step"] == one.peaks["step"]


def test_megatrons_main_gradients_are_their_own_buckets() -> None:
    """A replica with an fp32 gradient buffer takes what one device alone takes."""
    alone = Choices(sequence=64)
    for views in (False, True):
        many = replace(alone, replicas=4, bucket_views=views)
        expected = step("gpt2", run_of(alone, "megatron")).peaks
        assert step("gpt2", run_of(many, "megatron")).peaks == expected


@pytest.mark.parametrize(
    ("chosen", "optimizer"),
    [
        (Choices(offload="optimizer", fused_backward=True), "adamw"),
        (Choices(offload="parameters", method="lomo"), "sgd"),
        (Choices(offload="optimizer"), "adamw-paged"),
        (Choices(offload="optimizer", replicas=2), "adamw"),
        (Choices(fused_backward=True, replicas=2), "adamw"),
        (Choices(bucket_views=True), "adamw"),
    ],
)
def test_places_that_do_not_go_together_are_refused(chosen: Choices, optimizer: str) -> None:
    """Each is an error with a hint, not a number."""
    with pytest.raises(LLMSizeError) as caught:
        run_of(chosen, optimizer=optimizer)
    assert caught.value.hint
