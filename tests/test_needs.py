"""What a model needs on one device and on several, in every way of using it."""

import pytest

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.cli import options
from llmsize.cli.jobs import need_of, workload
from llmsize.cli.jobs import step as fits_step
from llmsize.formats import BF16, FP32, Format
from llmsize.memory import overview
from llmsize.memory.methods import Choices
from llmsize.memory.overview import Job, Storage
from llmsize.memory.weights import Recipe
from llmsize.optimizers import Optimizer, Precision
from llmsize.planning.needs import estimated, tuning
from llmsize.planning.training import Question
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


@pytest.mark.parametrize("engine", ["", "vllm"])
@pytest.mark.parametrize("devices", [1, 2])
def test_layers_that_cache_nothing_have_weights(engine: str, devices: int) -> None:
    """Nemotron 3 Nano has 31.6 billion parameters (its report), whatever its 52 layers keep."""
    subject = overview.subject(model("nemotron-3-nano-30b-a3b"))
    work = workload(options.storage("bf16"), 1, 4096, engine)
    weights = need_of(subject, work, "inference", devices).part("weights").value
    share = 31.6e9 * 2 / devices
    assert 0.99 * share < weights < 1.2 * share
