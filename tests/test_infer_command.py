"""`llmsize infer`: what it answers, what it refuses."""

import json
from typing import Any

import pytest
from asking import answered

from llmsize.cli import run


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    return answered(capsys, "infer", *words, codes=(0, 1))


def device_bytes(document: Any) -> int:
    cells = document["answer"][0]["rows"][-1]["cells"]
    return max(cell["value"] for place, cell in cells.items() if place != "host")


def test_two_24_gb_cards_run_a_70b_in_four_bits(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama-3.3-70B in Q4_K_M fits two RTX 4090; Q6_K (57.9 GB of file) does not."""
    words = ("llama-3.3-70b", "--engine", "llama.cpp", "--gpu", "rtx-4090", "--gpus", "2")
    assert answer(capsys, *words, "--quant", "q4_k_m")["verdict"] is True
    assert answer(capsys, *words, "--quant", "q6_k")["verdict"] is False


def test_the_best_quantization_that_fits_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """An 8B model on 12 GB: eight bits (8.5 GB) fit, sixteen do not."""
    words = ("llama-3.1-8b", "--engine", "llama.cpp", "--vram", "12GB", "--fit", "quant")
    assert answer(capsys, *words)["question"]["quant"] == "q8_0"


@pytest.mark.parametrize(
    ("engine", "what", "step"),
    [("transformers", "context", 1), ("vllm", "users", 1), ("ollama", "context", 256)],
)
def test_the_largest_that_fits_fits_and_the_next_does_not(
    engine: str, what: str, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A solved knob is a maximum: one step more is too much."""
    words = ["llama-3.2-1b", "--engine", engine, "--vram", "8GB"]
    solved = answer(capsys, *words, "--fit", what)
    assert solved["verdict"] is True
    knob = what.replace("users", "batch")
    more = str(solved["question"][knob] + step)
    assert answer(capsys, *words, f"--{knob}", more)["verdict"] is False


def test_layers_that_do_not_fit_go_to_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    """`--offload cpu` fills the card; the bytes that cross the bus are told."""
    found = answer(capsys, "llama-3.1-70b", "--gpu", "rtx-4090", "--offload", "cpu")
    assert found["verdict"] is True
    assert 0 < found["question"]["gpu_layers"] < 80
    assert any("cross the bus" in note for note in found["notes"])


def test_the_cheapest_change_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """An 8B model in 16 bits does not fit 12 GB; the exit code is 1 and a change is named."""
    assert run(["infer", "llama-3.1-8b", "--vram", "12GB"]) == 1
    assert "to make it fit: store the weights in fp8" in capsys.readouterr().out


def test_vllm_tells_what_its_log_would(capsys: pytest.CaptureFixture[str]) -> None:
    """The pool in tokens and the concurrency are there to be compared with a log."""
    words = ("llama-3.1-8b", "--engine", "vllm", "--gpu", "h100-sxm-80gb", "--context", "8192")
    notes = answer(capsys, *words)["notes"]
    assert any("GPU KV cache size" in note for note in notes)
    assert any("Maximum concurrency for 8,192 tokens" in note for note in notes)


def test_a_bound_of_speed_is_the_bandwidth_over_the_bytes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """16.06 GB of weights on 3,350 GB/s: no more than about 209 tokens per second."""
    found = answer(capsys, "llama-3.1-8b", "--gpu", "h100-sxm-80gb", "--context", "128")
    rate = found["answer"][1]["rows"][1]["cells"]["at best"]
    assert 3350 / 16.06 < rate["value"] < 3350 / 14.9
    assert "bound" in rate["note"]


def test_adapters_of_an_8b_model_have_42_million_weights(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rank 16 on every linear layer of Llama-3.1-8B: 41,943,040 weights (as PEFT prints)."""
    found = answer(capsys, "llama-3.1-8b", "--engine", "vllm", "--adapters", "2")
    rows = {row["name"]: row["cells"]["GPU 0"]["value"] for row in found["answer"][0]["rows"]}
    assert rows["LoRA adapters"] == 2 * 2 * 41_943_040


def test_experts_on_the_host_leave_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    """With the experts of all 48 layers on the host, a 30B mixture needs under 6 GB of a card."""
    words = ("qwen3-30b-a3b", "--engine", "llama.cpp", "--quant", "q4_k_m")
    assert device_bytes(answer(capsys, *words)) > 18e9
    assert device_bytes(answer(capsys, *words, "--cpu-moe", "48")) < 6e9


def test_a_draft_model_is_beside_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    """A draft adds weights, cache and rotary table; its 501 MiB of embeddings lie in 502."""
    words = ("llama-3.1-8b", "--engine", "vllm")
    alone = device_bytes(answer(capsys, *words))
    both = device_bytes(answer(capsys, *words, "--draft", "llama-3.2-1b"))
    held = 2 * 1_235_814_400 + 2 * 131_072 * 64 + 2**20
    assert both - alone == held + 2 * 16 * 8 * 64 * 2 * 4096


def test_devices_that_share_a_model_share_its_draft(capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM's draft has the tensor parallelism of its model: four devices, a quarter of it each."""
    words = ("llama-3.1-8b", "--engine", "vllm", "--gpus", "4")
    alone = device_bytes(answer(capsys, *words))
    both = device_bytes(answer(capsys, *words, "--draft", "llama-3.2-1b"))
    matrices = 1_235_814_400 - 33 * 2048
    least = (2 * matrices + 2 * 16 * 8 * 64 * 2 * 4096) // 4
    assert least < both - alone < least + 2**25  # norms, rotary tables and whole blocks


def test_a_models_own_prediction_layer_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-V3's README_WEIGHTS.md: 11.5B parameters without embedding and head, in fp8."""
    document = answer(capsys, "deepseek-v3", "--engine", "vllm", "--draft", "mtp")
    row = next(row for row in document["answer"][0]["rows"] if row["name"] == "draft model")
    (cell,) = row["cells"].values()
    joining = 2 * 2 * 7168**2  # bytes of the matrix for two hidden states, in 16 bit
    assert cell["value"] == pytest.approx(11.5e9 + joining, rel=0.005)
    assert document["question"]["draft"] == "mtp"


def test_a_draft_grows_with_the_context_that_is_solved_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its keys and values have as many tokens as the model's."""
    words = ("llama-3.1-8b", "--draft", "llama-3.2-1b", "--fit", "context", "--vram", "24GB")
    rows = {
        row["name"]: row["cells"]["GPU 0"] for row in answer(capsys, *words)["answer"][0]["rows"]
    }
    cached = {part["name"]: part["value"] for part in rows["draft model"]["parts"]}
    assert cached["draft KV cache"] * 32 * 128 == rows["KV cache"]["value"] * 16 * 64


@pytest.mark.parametrize("values", ["4096,32768", "4096:32768:x8"])
def test_several_contexts_are_a_table(values: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A list and a range give one row for each value."""
    rows = answer(capsys, "gemma-3-12b", "--context", values)["answer"][0]["rows"]
    assert len(rows) == 2
    assert rows[1]["cells"]["KV cache"]["value"] == 2.3125 * 2**30


@pytest.mark.parametrize(
    "words",
    [
        ["llama-3.1-8b", "--engine", "vlm"],
        ["llama-3.1-8b", "--quant", "q4_k_m", "--engine", "transformers"],
        ["llama-3.1-8b", "--engine", "llama.cpp", "--quant", "nf4"],
        ["llama-3.1-8b", "--engine", "llama.cpp", "--kv-dtype", "fp8"],
        ["llama-3.1-8b", "--fit", "context"],
        ["llama-3.1-8b", "--fit", "colour", "--vram", "24GB"],
        ["llama-3.1-8b", "--context", "4096:8192:x1"],
        ["llama-3.1-8b", "--context", "1:8192"],
        ["llama-3.1-8b", "--context", "0"],
        ["llama-3.1-8b", "--dtype", "int8"],
        ["llama-3.1-8b", "--dtype", "fp8", "--engine", "vllm"],
        ["llama-3.1-8b", "--dtype", "q8_0", "--engine", "llama.cpp"],
        ["llama-3.1-8b", "--dtype", "q4_k_m"],
        ["llama-3.1-8b", "--offload", "moon", "--vram", "24GB"],
        ["llama-3.1-8b", "--engine", "vllm", "--vram", "24GB", "--gpu-memory-utilization", "1.5"],
        ["llama-3.1-8b", "--engine", "vllm", "--gpus", "3"],
        ["llama-3.1-8b", "--ubatch", "256"],
        ["llama-3.1-8b", "--engine", "llama.cpp", "--tensor-split", "a,b"],
        ["llama-3.1-8b", "--engine", "llama.cpp", "--tensor-split", "0,0", "--gpus", "2"],
        ["llama-3.1-8b", "--prompt", "5000", "--context", "4096"],
        ["llama-3.1-8b", "--beams", "2", "--num-return-sequences", "4"],
        ["llama-3.1-8b", "--quant", "fp8_e5m2", "--engine", "vllm"],
    ],
)
def test_bad_choices_are_refused_with_a_hint(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every mistake is one error, one hint and exit code 2."""
    assert run(["infer", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert "\nhint: " in told.err


def test_fp8_of_an_engine_leaves_embeddings_and_head(capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM quantizes the linear layers: 2 × 128,256 × 4,096 and 266,240 of norms stay 16-bit.

    Beside the linear layers' 6,979,321,856 bytes are fp32 scales, one for each output at most.
    """
    assert (
        run(["infer", "llama-3.1-8b", "--engine", "vllm", "--quant", "fp8", "--format", "json"])
        == 0
    )
    table = json.loads(capsys.readouterr().out)["answer"][0]
    weights = next(row for row in table["rows"] if row["name"] == "weights")
    (cell,) = weights["cells"].values()
    least = 6_979_321_856 + 2 * (2 * 128_256 * 4096 + 65 * 4096)
    outputs = 32 * (4096 + 1024 + 1024 + 4096 + 2 * 14_336 + 4096)
    assert least <= cell["value"] <= least + 4 * outputs


def test_devices_that_share_every_layer_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """What the headline gives is of each of them, not of all."""
    assert run(["infer", "llama-3.1-8b", "--engine", "vllm", "--gpus", "8"]) == 0
    assert "on each of 8 GPUs" in capsys.readouterr().out


def test_a_pool_that_is_too_small_says_how_large_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM takes nine tenths of a device by default: 16.2 of 18 GB."""
    run(["infer", "llama-3.1-8b", "--engine", "vllm", "--vram", "18GB"])
    assert "of the 16.20 GB that vLLM takes" in " ".join(capsys.readouterr().out.split())


def test_the_fullest_device_and_the_host_are_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """A comma before what the host has, and one before the verdict."""
    split = ("--engine", "llama.cpp", "--gpu", "rtx-4090", "--gpus", "2", "--tensor-split", "3,1")
    assert run(["infer", "llama-3.1-8b", *split]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "on GPU 0, the fullest, and " in told
    assert "on the host, fits in" in told


def test_experts_of_a_dense_model_are_not_moved(capsys: pytest.CaptureFixture[str]) -> None:
    """`--n-cpu-moe` of llama.cpp moves tensors named `_exps`; where there are none, it says so."""
    words = ("llama-3.1-8b", "--engine", "llama.cpp")
    moved = answer(capsys, *words, "--n-cpu-moe", "4")
    assert any("no layer has experts" in note for note in moved["notes"])
    assert device_bytes(moved) == device_bytes(answer(capsys, *words))


def test_the_prompt_of_an_encoder_is_apart_from_the_context(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Flan-T5-XL keeps 24 × 2 × 32 × 64 × 2 bytes for each token that either side has."""
    said = answer(capsys, "flan-t5-xl", "--prompt", "512", "--context", "128")
    rows = {row["name"]: row["cells"]["GPU 0"] for row in said["answer"][0]["rows"]}
    assert rows["KV cache"]["value"] == (512 + 128) * 24 * 2 * 32 * 64 * 2


def first_token(document: Any) -> float:
    return float(document["answer"][1]["rows"][0]["cells"]["at best"]["value"])


def test_a_shared_prefix_is_computed_once(capsys: pytest.CaptureFixture[str]) -> None:
    """16 prompts of 4,096 tokens with 3,072 in common are 19,456 tokens, not 65,536."""
    words = ("llama-3.1-8b", "--engine", "vllm", "--gpu", "h100", "--context", "4096", "--batch")
    apart = first_token(answer(capsys, *words, "16"))
    common = first_token(answer(capsys, *words, "16", "--shared-prefix", "3072"))
    assert common / apart == pytest.approx(19_456 / 65_536, rel=0.001)


def test_no_speed_is_measured_where_the_host_computes(capsys: pytest.CaptureFixture[str]) -> None:
    """Published runs had every layer on the card."""
    words = ("llama-3.1-8b", "--engine", "llama.cpp", "--quant", "q4_k_m", "--gpu", "rtx-4090")
    for layers, measured in (("20", False), ("33", True)):
        rows = answer(capsys, *words, "--gpu-layers", layers)["answer"][1]["rows"]
        assert ("value" in rows[1]["cells"]["as measured"]) is measured


def test_a_change_is_named_beside_experts_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM leaves experts or bytes to the host, so a change replaces what was asked for."""
    words = ("qwen3-235b-a22b", "--engine", "vllm", "--gpu", "h100", "--gpus", "4")
    said = answer(capsys, *words, "--cpu-moe", "3")
    assert said["verdict"] is False
    assert said["notes"][-1].startswith("to make it fit: ")


def test_a_recurrent_model_has_beams_without_keys(capsys: pytest.CaptureFixture[str]) -> None:
    """Mamba keeps a state for each beam; there are no keys that change places."""
    alone, four = (
        answered(capsys, "infer", "mamba-130m", "--context", "256", "--beams", beams)
        for beams in ("1", "4")
    )
    states = [
        next(row for row in found["answer"][0]["rows"] if row["name"] == "recurrent state")
        for found in (alone, four)
    ]
    sizes = [state["cells"]["GPU 0"]["value"] for state in states]
    assert sizes[1] == 4 * sizes[0]


def test_files_of_llama_cpp_run_in_llama_cpp(capsys: pytest.CaptureFixture[str]) -> None:
    """Who asks for a GGUF type need not name the engine that reads it."""
    document = answer(capsys, "llama-3.2-1b", "--quant", "q4_k_m")
    assert document["question"]["engine"] == "llama.cpp"


def test_what_was_solved_for_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The largest value is in a line of its own, not only in the headline."""
    document = answer(capsys, "llama-3.2-1b", "--vram", "8GB", "--fit", "batch")
    batch = document["question"]["batch"]
    assert f"the most that fits: {batch} sequences at once" in document["notes"]


def test_a_70b_has_files_for_one_card_of_24_gb(capsys: pytest.CaptureFixture[str]) -> None:
    """bartowski/Meta-Llama-3.1-70B-Instruct-GGUF: 26.4 GB as Q2_K, 24.1 GB as IQ2_M."""
    words = ("llama-3.1-70b", "--engine", "llama.cpp", "--gpu", "rtx-4090", "--context", "2048")
    document = answer(capsys, *words, "--fit", "quant")
    assert document["question"]["quant"] == "iq2_m"
    assert document["verdict"] is True


def test_eight_bits_are_said_to_cost_less_than_two(capsys: pytest.CaptureFixture[str]) -> None:
    """llama.cpp's table of perplexities: 0.0004 more with q8_0, 0.87 more with q2_k."""
    words = ("llama-3.1-8b", "--engine", "llama.cpp", "--vram")
    for memory, cost in (("12GB", "hardly any quality"), ("4GB", "much quality")):
        assert f"costs {cost})" in answer(capsys, *words, memory)["notes"][-1]


def test_users_are_sequences_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """`--fit users` finds a number of what `--users` takes."""
    assert answer(capsys, "gpt2", "--users", "5") == answer(capsys, "gpt2", "--batch", "5")
