"""Checkpoints that are quantized already, and experts that recipes of linear layers leave alone."""

import json
from pathlib import Path

import pytest

import llmsize
from llmsize.answer import Estimate, Table
from llmsize.term import Term

HIDDEN, INNER, LAYERS, VOCABULARY = 512, 1024, 2, 1000
NORMS = HIDDEN * (2 * LAYERS + 1)
LINEAR = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)


@pytest.fixture
def awq(tmp_path: Path) -> str:
    """The folder of a Llama whose linear layers are AWQ with groups of 128."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float16",
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096, "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def cell(answer: Estimate, row: str, column: str) -> float:
    """One number of the first table of an answer."""
    table = next(part for part in answer.answer if isinstance(part, Table))
    found = table.column(column)[row]
    assert isinstance(found, Term)
    return found.value


def test_a_quantized_checkpoint_is_served_as_it_is_stored(awq: str) -> None:
    """AWQ: 4 bits a weight, a 16-bit scale and a 4-bit zero a group of 128; the rest in 16 bit."""
    kept = 2 * (2 * VOCABULARY * HIDDEN + NORMS) + LINEAR // 2 + LINEAR // 128 * 20 // 8
    assert cell(llmsize.estimate(awq), "weights", "inference") == kept
    assert cell(llmsize.fits(awq, vram="8GB"), "weights", "bytes") == kept
    assert cell(llmsize.infer(awq), "weights", "GPU 0") == kept


def test_a_dtype_that_is_given_goes_before_the_checkpoint_s_own(awq: str) -> None:
    """Two bytes for every parameter if fp16 is asked for."""
    count = 2 * VOCABULARY * HIDDEN + NORMS + LINEAR
    assert cell(llmsize.estimate(awq, dtype="fp16"), "weights", "inference") == 2 * count


def test_training_says_that_it_starts_from_other_weights(awq: str) -> None:
    """Quantized weights are not trained: what is assumed instead is told."""
    for answer in (llmsize.train(awq), llmsize.fits(awq, job="lora", vram="8GB")):
        assert any("those of the checkpoint are in awq" in said for said in answer.assumptions)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("model", ["qwen3-30b-a3b", "gpt-oss-20b", "llama-2-7b"])
def test_the_overview_holds_the_weights_that_train_does(model: str, method: str) -> None:
    """Frozen weights and adapters are the same in both commands, experts included."""
    job = {"lora": "LoRA", "qlora": "QLoRA"}[method]
    step = llmsize.train(model, method=method, rank=16, targets="all-linear")
    assert cell(llmsize.estimate(model), "weights", job) == cell(step, "weights", "memory")


def test_experts_in_one_tensor_stay_in_16_bit() -> None:
    """bitsandbytes replaces linear layers: 45.1B of Mixtral's parameters are experts' weights."""
    experts = 32 * 8 * 3 * 4096 * 14336
    answer = llmsize.infer("mixtral-8x7b", quant="nf4")
    assert cell(answer, "weights", "GPU 0") > 2 * experts
    assert any("one tensor" in said for said in answer.assumptions)
    assert cell(llmsize.infer("mixtral-8x7b", quant="nf4", engine="vllm"), "weights", "GPU 0") < (
        experts
    )
