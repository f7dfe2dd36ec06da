"""What a model needs on one device and on several, in every way of using it."""

from math import ceil

import pytest

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.cli import options
from llmsize.cli.jobs import need_of, workload
from llmsize.cli.jobs import step as fits_step
from llmsize.formats import BF16, FP32, INT4, Format
from llmsize.memory import overview
from llmsize.memory.methods import Choices
from llmsize.memory.overview import Job, Storage
from llmsize.memory.weights import Recipe
from llmsize.optimizers import Optimizer, Precision
from llmsize.planning.needs import estimated, tuning
from llmsize.planning.training import Question
from llmsize.quick_dataclasses import replace
from llmsize.stack import Stack

PRECISION: dict[str, str] = {"full": "mixed", "lora": "pure-16bit", "qlora": "pure-16bit"}


def step(name: str, method: str) -> Question:
    return step_of(model(name), method)


def step_of(architecture: Architecture, method: str) -> Question:
    """One sequence of 2,048 tokens, every layer recomputed."""
    base = presets.get(Format, "nf4") if method == "qlora" else None
    return Question(
        architecture, Choices(method, base=base, recompute="full"),
        presets.get(Stack, "transformers"), presets.get(Precision, PRECISION[method]),
        presets.get(Optimizer, "adamw"),
    )  # fmt: skip


def model(name: str) -> Architecture:
    return presets.get(Architecture, name)


def test_what_a_recipe_leaves_alone_is_in_the_format_that_is_asked_for() -> None:
    """SmolLM-135M: 49,152 embeddings and 61 norms of 576 channels, two bytes more each in fp32."""
    subject, recipe = overview.subject(model("smollm-135m")), presets.get(Recipe, "nf4")
    narrow, wide = (
        overview.stored(
            subject, Storage("nf4", format, recipe), lambda name: presets.get(Format, name)
        ).value
        for format in (BF16, FP32)
    )
    assert wide - narrow == 2 * (49_152 + 61) * 576


def test_falcon_40b_by_qlora_is_of_the_30_gb_class() -> None:
    """QLoRA brings Falcon-40B to a single card of about 30 GB."""
    need = tuning(step("falcon-40b", "qlora"))
    assert 28e9 < need.value < 36e9


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_more_devices_never_need_more_of_each(method: str) -> None:
    """Dividing the states lowers what each device holds, down to its activations."""
    needs = [tuning(step("llama-3.1-8b", method), devices).value for devices in (1, 2, 8, 64)]
    assert needs == sorted(needs, reverse=True)


def test_devices_divide_states_and_gather_two_layers() -> None:
    """Llama 2 7B on eight: 2 + 4 + 8 bytes a parameter live through the step and 2 of gradients
    come, all divided (arXiv:1910.02054); whole are the embedding, the head and the final norm, and
    the layer at work and the next one (arXiv:2304.11277), all in 16 bits."""
    parameters, layer = 6_738_415_616, 4 * 4096**2 + 3 * 4096 * 11_008 + 2 * 4096
    work = workload(options.storage("bf16"), 1, 2048)
    parts = tuning(fits_step(model("llama-2-7b"), work, "full training"), 8).parts[0]
    assert parts.part("lives through the step").value == pytest.approx(
        14 * parameters / 8, rel=1e-6
    )
    assert parts.part("gradients").value == 2 * parameters / 8
    assert parts.part("gathered weights").value == 2 * (2 * 32_000 * 4096 + 4096 + 2 * layer)


def test_who_loads_whole_weights_has_them_beside_a_share() -> None:
    """Llama 2 7B in 16 bits with peft's 39,976,960 parameters of rank 16 in fp32, and an eighth."""
    question = step("llama-2-7b", "lora")
    stack = replace(question.stack, loads_whole=True)
    allocated = tuning(replace(question, stack=stack), 8).parts[0]
    weights = 2 * 6_738_415_616 + 4 * 39_976_960
    assert allocated.value == weights + weights // 8


def test_blocks_of_a_format_are_stored_whole() -> None:
    """GPT-2's 124,439,808 parameters, two in a byte; and one more takes a byte of its own."""
    for parameters, size in ((None, 62_219_904), (124_439_809, 62_219_905)):
        shape = overview.subject(model("gpt2"), parameters)
        assert overview.uniform(shape, INT4).value == size


@pytest.mark.parametrize("job", ["full training", "LoRA", "QLoRA"])
@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-70b"])
def test_formulas_agree_with_the_step_that_is_walked(name: str, job: Job) -> None:
    """On one device and on many, what stands in for a bare count is within 15 % of the model's."""
    subject = overview.subject(model(name))
    work = workload(options.storage("nf4" if job == "QLoRA" else "bf16"), 1, 2048)
    question = fits_step(model(name), work, job)
    for devices in (1, 2, 8, 64):
        formula = estimated(subject, work, job, devices).value
        assert formula == pytest.approx(tuning(question, devices).value, rel=0.15)


def test_quantizing_the_base_saves_memory_and_so_does_freezing_it() -> None:
    """QLoRA needs less than LoRA, and LoRA less than full training."""
    ways: tuple[str, ...] = ("qlora", "lora", "full")
    needs = [tuning(step("llama-2-7b", way)).value for way in ways]
    assert needs == sorted(needs)


def test_a_pool_is_made_of_a_share_of_the_device() -> None:
    """Of seven billion parameters in 16 bits what vLLM itself holds is nine tenths
    (`--gpu-memory-utilization`): weights, a cache of 2,048 tokens of eight KV heads in 32 layers,
    and one layer's activations by the published rule."""
    shape = overview.subject(model("llama-3.1-8b"), 7_000_000_000)
    work = workload(options.storage("bf16"), 1, 2048, "vllm")
    inside = 2 * 7_000_000_000 + 2048 * 32 * 2 * 8 * 128 * 2 + 34 * 2048 * 4096
    assert estimated(shape, work, "inference").value == ceil(inside / 0.9)


@pytest.mark.parametrize("engine", ["", "vllm"])
@pytest.mark.parametrize("devices", [1, 2])
def test_layers_that_cache_nothing_have_weights(engine: str, devices: int) -> None:
    """Nemotron 3 Nano has 31.6 billion parameters (its report), whatever its 52 layers keep."""
    subject = overview.subject(model("nemotron-3-nano-30b-a3b"))
    work = workload(options.storage("bf16"), 1, 4096, engine)
    weights = need_of(subject, work, "inference", devices).part("weights").value
    share = 31.6e9 * 2 / devices
    assert 0.99 * share < weights < 1.2 * share
