"""`llmsize fits`: the largest models for a memory, and whether one fits."""

import json
from typing import Any

import pytest
from asking import answered

from llmsize.cli import run
from llmsize.cli.fits import JOB_NAMES

GB = 10**9


def document(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    """The JSON document of one run that exits with `code`."""
    return answered(capsys, "fits", *words, codes=(code,))


@pytest.fixture(scope="module")
def sixteen() -> dict[str, Any]:
    """What fits 16 GB."""
    import contextlib
    import io

    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        assert run(["fits", "--vram", "16GB", "--all", "--format", "json"]) == 0
    found: dict[str, Any] = json.loads(written.getvalue())
    return found


def test_fewer_bits_hold_more_parameters(sixteen: dict[str, Any]) -> None:
    """For inference, every format of the list holds more than the one before it."""
    rows = sixteen["answer"][0]["rows"]
    counts = [row["cells"]["inference"]["value"] for row in rows if row["name"] != "int8"]
    assert len(rows) == 8
    assert [row["name"] for row in rows[:4]] == ["fp32", "fp16/bf16", "int8", "q8_0"]
    assert counts == sorted(counts)


def test_no_count_is_larger_than_its_bare_weights_allow(sixteen: dict[str, Any]) -> None:
    """Sixteen bytes per parameter for training, two for 16-bit inference, half a byte for 4-bit."""
    least = {("fp32", "inference"): 4, ("fp16/bf16", "inference"): 2, ("int8", "inference"): 1,
             ("nf4", "inference"): 0.5, ("fp32", "full training"): 16,
             ("fp16/bf16", "full training"): 16, ("nf4", "QLoRA"): 0.5}  # fmt: skip
    rows = {row["name"]: row["cells"] for row in sixteen["answer"][0]["rows"]}
    for (storage, job), size in least.items():
        assert 0 < rows[storage][job]["value"] * size < 16 * GB


def test_jobs_that_make_no_sense_have_a_reason(sixteen: dict[str, Any]) -> None:
    """Quantized weights are not trained in full, QLoRA is the nf4 row, and a file is served."""
    rows = {row["name"]: row["cells"] for row in sixteen["answer"][0]["rows"]}
    assert "reason" in rows["int8"]["full training"]
    assert "reason" in rows["fp16/bf16"]["QLoRA"]
    assert all("reason" in rows["q4_k_m"][job] for job in ("LoRA", "QLoRA", "full training"))


def test_models_take_the_most_precise_format_that_fits(sixteen: dict[str, Any]) -> None:
    """1.1B in 16 bit, 13B in 4 bit; nothing of 70B is listed."""
    models = {row["name"]: row["cells"] for row in sixteen["answer"][1]["rows"]}
    assert models["tinyllama-1.1b"]["weights in"] == "fp16/bf16"
    assert models["llama-2-13b"]["weights in"] == "nf4"
    assert "llama-2-70b" not in models
    assert all(row["needs"]["value"] <= 16 * GB * 1.1 for row in models.values())


def test_the_exit_code_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """Zero for a model that fits, one for a model that does not."""
    words = ("llama-2-7b", "--dtype", "fp16", "--vram")
    assert document(capsys, *words, "24GB", code=0)["verdict"] is True
    assert document(capsys, *words, "12GB", code=1)["verdict"] is False


@pytest.mark.parametrize("job", JOB_NAMES)
def test_every_job_is_asked_for_one_model(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each job of the table can be asked for alone; a small model fits a large card in all."""
    found = document(capsys, "gpt2", "--vram", "80GB", "--job", job)
    assert found["verdict"] is True


def test_two_devices_hold_what_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 2 70B in fp16, 138 GB, fits two cards of 80 GB and not one."""
    words = ("llama-2-70b", "--gpu", "a100-sxm-80gb", "--dtype", "fp16")
    document(capsys, *words, code=1)
    document(capsys, *words, "--gpus", "2", code=0)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "no memory to fit into"),
        (["--vram", "16"], "cannot read the memory `16`"),
        (["gpt2", "--vram", "16GB", "--job", "infer"], "unknown job `infer`"),
        (["gpt2", "--vram", "16GB", "--job", "full", "--dtype", "nf4"], "are not trained"),
    ],
)
def test_mistakes_are_named(
    words: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, one error and one hint, nothing on stdout."""
    assert run(["fits", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert error in captured.err
    assert "\nhint: " in captured.err


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("llama-3.1-8b", "--dtype bf16 --context 32768"),
        ("gemma-3-12b", "--dtype nf4 --batch 4"),
        ("mixtral-8x7b", "--dtype bf16 --gpus 4"),
        ("qwen3.5-9b", "--dtype bf16"),
        ("deepseek-v2-lite", "--dtype llm-int8"),
        ("mamba2-2.7b", "--dtype bf16 --batch 3"),
        ("llama-3.2-3b", "--dtype q4_k_m --engine llama.cpp"),
        ("gemma-2-9b", "--dtype q6_k --engine llama.cpp --context 9000"),
        ("nemotron-3-nano-30b-a3b", "--dtype bf16 --engine vllm --batch 8"),
        ("qwen3-30b-a3b", "--dtype awq-int4-g128 --engine vllm --gpus 2"),
        ("mistral-7b-v0.3", "--dtype fp8 --engine sglang --batch 32"),
        ("qwen3-8b", "--dtype awq-int4-g128 --engine vllm --batch 4 --gpu a10g"),
    ],
)
def test_serving_needs_what_infer_says(
    model: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One question has one answer, whichever command is asked: part by part, to the byte.

    Beside it, an engine with a pool leaves a share of every device alone.
    """
    said = words.split()
    said += [] if "--gpu" in said else ["--vram", "200GB"]
    fits = document(capsys, model, *said)
    needed = {row["name"]: row["cells"]["bytes"]["value"] for row in fits["answer"][0]["rows"]}
    stored = said[1]
    asked = said if stored == "bf16" else [*said[2:], "--quant", stored]
    if stored != "bf16" and "llama.cpp" not in said:
        asked += ["--dtype", "bf16"]
    assert run(["infer", model, *asked, "--format", "json"]) in (0, 1)
    rows = json.loads(capsys.readouterr().out)["answer"][0]["rows"]
    fullest = max(rows[-1]["cells"], key=lambda place: rows[-1]["cells"][place]["value"])
    inferred = {
        row["name"]: row["cells"][fullest]["value"] for row in rows if fullest in row["cells"]
    }
    alone = needed.pop("left alone by the engine", 0)
    assert needed.popitem()[1] - alone == inferred.pop("total")
    assert needed == inferred


def test_the_longest_context_names_what_the_model_was_made_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Llama 3 has 8,192 positions (its `config.json`), and an H100 has room for more."""
    assert run(["fits", "llama-3-8b", "--gpu", "h100"]) == 0
    assert "(8,192 is what the model was made for)" in " ".join(capsys.readouterr().out.split())


def test_several_prompts_are_said_to_be_read_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Their activations are what an engine that reads in pieces does not need."""
    run(["fits", "qwen2.5-7b", "--gpu", "h100", "--batch", "64"])
    assert "all prompts are read at once" in " ".join(capsys.readouterr().out.split())


def test_a_file_of_llama_cpp_is_asked_about_as_infer_asks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without `--dtype` llama.cpp loads its own 16-bit file, and a smaller one is a change.

    What the host holds of it is said beside the device's memory.
    """
    words = ("qwen2.5-7b", "--engine", "llama.cpp", "--gpu", "rtx-3060")
    found = document(capsys, *words, code=1)
    served = answered(capsys, "infer", *words, codes=(1,))
    assert found["question"]["dtype"] == "gguf-f16"
    needed = found["answer"][0]["rows"][-1]["cells"]["bytes"]["value"]
    places = served["answer"][0]["rows"][-1]["cells"]
    assert needed == places["GPU 0"]["value"]
    room = {row["name"]: row["cells"]["bytes"]["value"] for row in found["answer"][1]["rows"]}
    assert room["needed on the host"] == places["host"]["value"]
    assert any("store the weights in q8_0" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("words", "told"),
    [("--vram 16GB --rank 64", "--job lora"), ("gpt2 --vram 16GB --commercial", "MODEL"),
     ("gpt2 --vram 16GB --family llama", "MODEL"), ("gpt2 --vram 16GB --all", "MODEL"),
     ("--vram 16GB --strict", "leave it out"), ("gpt2 --which gpu --gpu t4", "`--gpu`"),
     ("gpt2 --which gpu --gpus 4", "`--gpus`"),
     ("gpt2 --vram 16GB --job qlora --dtype fp16", "--job lora"),
     ("gpt2 --vram 16GB --job lora --dtype q4_k_m", "nf4"),
     ("gpt2 --vram 16GB --job lora --dtype int4", "nf4")],
)  # fmt: skip
def test_no_option_is_ignored(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What says nothing about the question is refused, with a word on what to do instead."""
    assert run(["fits", *words.split()]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "begins"),
    [("--gpu t4 --job lora", "Tesla T4 tunes up to"), ("--gpu t4", "Tesla T4 serves up to"),
     ("--gpu t4 --vram 8GB --job full", "Tesla T4 with 8.00 GB trains up to")],
)  # fmt: skip
def test_the_headline_is_about_the_job(
    words: str, begins: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is asked is answered first, about the memory that is meant."""
    found = document(capsys, *words.split(), "--family", "gpt2")
    assert found["headline"].startswith(begins)


def test_one_format_is_listed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """`--dtype` chooses the row, and the models in it."""
    found = document(capsys, "--gpu", "t4", "--dtype", "q4_k_m", "--family", "gpt2")
    assert [row["name"] for row in found["answer"][0]["rows"]] == ["q4_k_m"]
    assert {row["cells"]["weights in"] for row in found["answer"][1]["rows"]} == {"q4_k_m"}


def test_a_memory_that_holds_nothing_is_a_no(capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code of a list without an entry is that of a model that does not fit."""
    assert document(capsys, "--vram", "1MB", "--family", "gpt2", code=1)["verdict"] is False


def test_counts_do_not_wait_for_the_next_usual_depth(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the cache is most of the memory, a quarter of the bytes still hold more parameters."""
    words = "--gpu t4 --engine vllm --batch 64 --family gpt2"
    rows = document(capsys, *words.split())["answer"][0]["rows"]
    counts = {row["name"]: row["cells"]["inference"]["value"] for row in rows}
    assert counts["fp16/bf16"] < counts["fp8"] < counts["awq-int4"]


def test_what_a_card_does_not_run_is_not_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    """LLM.int8 needs compute capability 7.5 (bitsandbytes, installation), and a V100 has 7.0."""
    notes = document(capsys, "llama-3.1-8b", "--gpu", "v100-sxm2-16gb", code=1)["notes"]
    assert any("store the weights in nf4" in note for note in notes)
    for job, cards in (("inference", 3), ("qlora", 3)):
        found = document(capsys, "gpt2", "--dtype", "nf4", "--job", job, "--which", "gpu", "--all")
        names = [row["name"] for row in found["answer"][0]["rows"]]
        assert len(names) > cards
        assert not any(name.startswith(("TPU", "Trainium")) for name in names)


def test_an_empty_list_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """A table of headings alone would look as if something were missing."""
    found = document(capsys, "--gpu", "t4", "--min-params", "999T")
    assert "no model that llmsize knows and that is asked for fits" in found["notes"]


def test_the_first_remedy_is_no_alternative(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 2 70B in four bits is larger than 16 GB: layers in host memory are all that is left."""
    told = document(capsys, "llama-2-70b", "--vram", "16GB", code=1)["notes"]
    assert told[0].startswith("to make it fit: keep ")
    assert not any(note.startswith("or ") for note in told)


def test_weights_are_named_by_the_word_of_infer_too(capsys: pytest.CaptureFixture[str]) -> None:
    """`infer --quant q4_k_m` and `fits --quant q4_k_m` mean the same weights."""
    asked = document(capsys, "llama-2-7b", "--gpu", "t4", "--quant", "q4_k_m")
    assert asked == document(capsys, "llama-2-7b", "--gpu", "t4", "--dtype", "q4_k_m")


def test_an_estimate_beyond_the_memory_is_not_said_to_be_within(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where `train` says that it does not fit, the headline of `fits` says no less."""
    for size, said in (("23.5GB", "is tight on"), ("19.5GB", "is just too large for")):
        found = answered(capsys, "fits", "llama-2-7b", "--job", "lora", "--context", "8192",
                         "--vram", size, codes=(0, 1))  # fmt: skip
        assert found["question"]["answer"] == "tight"
        assert f"llama-2-7b {said}" in found["headline"]
        assert (said == "is tight on") == found["verdict"]
