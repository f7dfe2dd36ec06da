"""What runs where: engines and frameworks on accelerators, and formats that chips have.

The expected answers are the makers' own: NVIDIA's table of compute capabilities, vLLM v0.15.1
docs/features/quantization (supported hardware; Turing: pull request 34319) and
vllm/platforms/cuda.py, bitsandbytes v0.50.0 docs (installation), transformers v5.23.0
quantizers/quantizer_finegrained_fp8.py, TensorRT-LLM supported-hardware.html, SGLang
model_runner.py. Drafts: vllm/config/speculative.py, llama.cpp common/speculative.cpp (128
entries), transformers generation/utils.py.
"""

import pytest

from llmsize import fits, infer, presets, train
from llmsize.anatomy import traced
from llmsize.answer import Absent
from llmsize.architecture import Architecture
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError
from llmsize.formats import Format
from llmsize.hardware import Accelerator
from llmsize.planning.support import check_draft, obstacle, obstacle_to

RUNS = [
    ("vllm", "v100", True), ("vllm", "p100-pcie-16gb", False), ("vllm", "k80", False),
    ("vllm", "mi300x", True), ("vllm", "m3-max", False), ("sglang", "t4", True),
    ("sglang", "v100", False), ("tensorrt-llm", "a100", True), ("tensorrt-llm", "t4", False),
    ("tensorrt-llm", "mi300x", False), ("mlx", "m3-max", True), ("mlx", "rtx-4090", False),
    ("transformers", "k80", False), ("transformers", "p40", True), ("ollama", "k80", False),
    ("llama.cpp", "k80", True), ("llama.cpp", "m3-max", True), ("llama.cpp", "rx-7900-xtx", True),
]  # fmt: skip

STORES = [
    ("vllm", "t4", "bf16", False), ("vllm", "a10", "bf16", True), ("vllm", "v100", "fp16", True),
    ("vllm", "v100", "awq-int4-g128", False), ("vllm", "t4", "awq-int4-g128", True),
    ("vllm", "tpu-v5e", "awq-int4-g128", True), ("vllm", "trainium1", "awq-int4-g128", False),
    ("vllm", "v100", "gptq-int4-g128", True), ("vllm", "v100", "ct-w8a8", False),
    ("vllm", "a100", "fp8-channel", True), ("vllm", "v100", "fp8-channel", False),
    ("vllm", "t4", "fp8-channel", True), ("vllm-0.11", "t4", "fp8-channel", False),
    ("vllm", "t4", "mxfp4", False), ("vllm", "t4", "ct-w4a16-g128", True),
    ("vllm", "mi250", "fp8-channel", False), ("vllm", "mi300x", "fp8-channel", True),
    ("transformers", "a100", "fp8-block", False), ("transformers", "l4", "fp8-block", True),
    ("transformers", "v100", "llm-int8", False), ("transformers", "t4", "llm-int8", True),
    ("transformers", "p40", "nf4", True), ("tensorrt-llm", "a100", "fp8-tensor", False),
    ("transformers", "m3-max", "bf16", True), ("llama.cpp", "t4", "bf16", True),
    ("transformers", "tpu-v4", "nf4", False), ("transformers", "mi300x", "nf4", True),
    ("transformers", "trainium1", "llm-int8", False), ("transformers", "m3-max", "nf4-dq", True),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "card", "runs"), RUNS)
def test_an_engine_runs_where_its_makers_say(engine: str, card: str, runs: bool) -> None:
    """Makers of accelerators and the least compute capability decide, and the reason is told."""
    reason = obstacle(presets.get(Engine, engine), presets.get(Accelerator, card))
    assert bool(reason) is not runs


@pytest.mark.parametrize(("engine", "card", "format", "runs"), STORES)
def test_a_format_needs_its_units(engine: str, card: str, format: str, runs: bool) -> None:
    """Weights are computed and stored where the engine has kernels for the chip."""
    asked = presets.get(Format, format), presets.get(Engine, engine)
    assert bool(obstacle_to(*asked, presets.get(Accelerator, card))) is not runs


def test_every_nvidia_card_on_sale_has_a_compute_capability() -> None:
    """Each is one of NVIDIA's versions, and bf16 comes with 8.0, fp8 with 8.9, as in its peaks."""
    for card in presets.every(Accelerator).values():
        has = card.compute_capability
        assert (has is not None) == (card.vendor == "NVIDIA" and card.generation != "Rubin")
        if has is not None and {"fp16", "fp32"} <= card.peak_tflops.keys():
            assert ("bf16" in card.peak_tflops) == (has >= 8.0), card.name
            assert ("fp8" in card.peak_tflops) == (has >= 8.9), card.name


def test_what_is_asked_for_is_refused_and_what_is_not_is_chosen() -> None:
    """`--dtype bf16` on a T4 is refused; without it a bf16 model is computed in fp16, as said."""
    for command in (infer, train):
        with pytest.raises(LLMSizeError, match=r"capability 8\.0, and Tesla T4 has 7\.5") as told:
            command("llama-2-7b", dtype="bf16", gpu="t4")
        assert "emulate" in told.value.hint
        assert "`--dtype fp16`" in told.value.hint
        chosen = command("llama-3.1-8b", gpu="t4")
        assert not isinstance(chosen, str)
        assert chosen.question["dtype"] == "fp16"
        assert any("fp16" in line and "7.5" in line for line in chosen.assumptions)


def test_what_is_fp32_throughout_is_said_to_be_computed_in_nothing_else() -> None:
    """A V100 has no bf16, which a recipe that has no 16-bit copy does not ask for; others do."""
    plain, mixed = (train("bert-base", gpu="v100", recipe=recipe) for recipe in ("fp32", "amp"))
    assert not any("computed in fp16" in line for line in plain.assumptions)
    assert any("computed in fp16" in line for line in mixed.assumptions)


def test_only_what_the_card_has_is_proposed() -> None:
    """transformers has no fp8 on an A100, so the best quantization that fits is another one."""
    answer = infer("llama-2-70b", gpu="a100", fit="quant")
    assert answer.question["quant"] not in ("fp8", None)


@pytest.mark.parametrize(
    ("engine", "model", "draft", "reason"),
    [
        ("vllm", "llama-3.1-8b", "llama-3.2-1b", ""),
        ("vllm", "qwen2.5-7b", "qwen2.5-0.5b", "151,936 entries, the model has 152,064"),
        ("llama.cpp", "qwen2.5-7b", "qwen2.5-0.5b", ""),
        ("llama.cpp", "llama-3.1-8b", "qwen2.5-0.5b", "another vocabulary"),
        ("transformers", "llama-3.1-8b", "qwen2.5-0.5b", ""),
        ("transformers", "qwen2.5-0.5b", "qwen2.5-7b", "the smaller model drafts"),
    ],
)
def test_a_draft_has_the_models_vocabulary_and_is_smaller(
    engine: str, model: str, draft: str, reason: str
) -> None:
    """vLLM compares the entries, llama.cpp allows 128 more or fewer, transformers translates."""
    asked = (
        presets.get(Engine, engine),
        *(traced(presets.get(Architecture, name)) for name in (model, draft)),
    )
    if reason:
        with pytest.raises(LLMSizeError) as refused:
            check_draft(*asked)
        assert reason in f"{refused.value} {refused.value.hint}"
    else:
        told = check_draft(*asked)
        assert ("needs both tokenizers" in told) == (engine == "transformers")


def test_weights_are_trained_in_formats_of_optimizers() -> None:
    """Neither fp8 nor integers are, on any card; what is frozen may be quantized."""
    for format in ("fp8", "int8"):
        with pytest.raises(LLMSizeError, match="are not trained"):
            train("gpt2", dtype=format)


def test_fits_leaves_out_what_the_card_has_no_kernels_for() -> None:
    """LLM.int8 needs Turing: on a V100 there is neither a largest count nor a model in int8."""
    answer = fits(gpu="v100")
    assert not isinstance(answer, str)
    cell = next(row for row in answer.answer[0].rows if row.name == "int8").cells["inference"]
    assert isinstance(cell, Absent)
    assert "7.5" in cell.reason
