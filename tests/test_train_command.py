"""`llmsize train`: what it answers, what it refuses."""

import csv
from pathlib import Path
from typing import Any

import pytest
from asking import answered

import llmsize
from llmsize.cli import run


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    return answered(capsys, "train", *words, codes=(0, 1))


def device_bytes(document: dict[str, Any]) -> int:
    value: int = document["answer"][0]["rows"][-1]["cells"]["memory"]["value"]
    return value


def without_cache(document: dict[str, Any]) -> int:
    """Tensors and context."""
    rows = {row["name"]: row["cells"]["memory"]["value"] for row in document["answer"][0]["rows"]}
    value: int = rows["device memory"] - rows["allocator slack"]
    return value


@pytest.mark.parametrize(
    ("card", "said"),
    [(("--gpu", "t4"), "fitted to the card's threads"), (("--vram", "16GB"), "whatever the card"),
     ((), "whatever the card")],
)  # fmt: skip
def test_the_context_says_whether_it_is_of_the_card(
    capsys: pytest.CaptureFixture[str], card: tuple[str, ...], said: str
) -> None:
    """Memory alone does not tell a card, and so not what CUDA keeps for its threads."""
    assert any(said in told for told in answer(capsys, "gpt2", *card)["assumptions"])


def test_lora_trains_its_adapters_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 32 on q and v of Llama-3.2-3B are 9,175,040 parameters (PEFT's MetaMath benchmark)."""
    words = ("llama-3.2-3b", "--method", "lora", "--rank", "32", "--targets", "q_proj,v_proj")
    notes = answer(capsys, *words)["notes"]
    assert any("9.18M parameters are trained" in note for note in notes)


def test_a_small_card_is_too_small_and_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """A full 8B step does not fit 24 GB; the exit code is 1 and a change is named."""
    code = run(["train", "llama-3-8b", "--vram", "24GB", "--format", "plain"])
    told = capsys.readouterr().out
    assert code == 1
    assert "to make it fit:" in told


def test_a_rank_that_ends_at_a_layer_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Keys of Llama-3.2-1B have 8 × 64 channels, which end the search before the card does."""
    words = ("llama-3.2-1b", "--method", "lora", "--fit", "rank", "--gpu", "h100")
    notes = answer(capsys, *words)["notes"]
    assert "the largest rank that fits: 512, and the largest that all adapted layers take" in notes


@pytest.mark.parametrize("what", ["batch", "seq-len"])
def test_the_largest_that_fits_fits_and_the_next_does_not(
    what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A solved knob is a maximum: one more is too much."""
    words = ["smollm-135m", "--method", "lora", "--vram", "8GB", "--fit", what]
    document = answer(capsys, *words)
    key = what.replace("-", "_")
    found = document["question"][key]
    assert device_bytes(document) <= 8 * 10**9
    more = answer(capsys, *words[:5], f"--{what}", str(found + 1))
    assert device_bytes(more) > 8 * 10**9


@pytest.mark.parametrize(
    "words",
    [
        ["llama-3-8b", "--batch", "0"],
        ["llama-3-8b", "--method", "lorra"],
        ["llama-3-8b", "--method", "lora", "--targets", "nonsense"],
        ["llama-3-8b", "--recompute", "sometimes"],
        ["llama-3-8b", "--optimizer", "adamm"],
        ["llama-3-8b", "--offload-checkpoints"],
        ["llama-3-8b", "--method", "frozen"],
        ["llama-3-8b", "--fit", "batch"],
        ["llama-3-8b", "--fit", "colour", "--vram", "24GB"],
        ["llama-3-8b", "--method", "lora", "--rank", "100000"],
        ["llama-3-8b", "--offload", "everything"],
        ["llama-3-8b", "--offload", "optimizer", "--gpus", "2"],
        ["llama-3-8b", "--every", "2"],
        ["llama-3-8b", "--method", "frozen", "--freeze", "33"],
        ["llama-3-8b", "--method", "lora", "--adapter-dtype", "int8"],
        ["llama-3-8b", "--method", "qlora", "--base", "bf16"],
        ["llama-3-8b", "--method", "qlora", "--base", "q4_0"],
        ["llama-3-8b", "--method", "qlora", "--base", "int64"],
        ["mistral-7b-v0.1", "--method", "adaption-prompt", "--stack", "lit-gpt-2023"],
        ["llama-3-8b", "--method", "bitfit"],
        ["llama-3-8b", "--modules-to-save", "lm_head"],
        ["llama-3-8b", "--rollouts", "4"],
    ],
)
def test_bad_choices_are_refused_with_a_hint(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every mistake is one error, one hint and exit code 2."""
    assert run(["train", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert "\nhint: " in told.err


@pytest.mark.parametrize(
    "words",
    [
        {"method": "qlora", "targets": "q_proj,v_proj", "adapter_dropout": 0.1, "upcast": True,
         "padded": True, "attention": "eager", "recompute": "full", "every": 2},
        {"method": "frozen", "freeze": 5, "compile": True, "vram": "4GB", "accumulate": 2},
        {"method": "prompt-tuning", "virtual_tokens": 7, "objective": "dpo", "reference": "none"},
    ],
)  # fmt: skip
def test_the_question_can_be_asked_again(words: dict[str, Any]) -> None:
    """What a document says was asked are the words that ask it."""
    once = llmsize.train("smollm-135m", seq_len=64, **words)
    asked = {word: value for word, value in once.question.items() if value is not None}
    asked["vram"] = asked.pop("memory_bytes", None)
    assert llmsize.train(**asked) == once


def test_a_base_has_the_names_of_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Adapters beside int8 are beside bitsandbytes' LLM.int8, as transformers loads it."""
    short, long = (answer(capsys, "smollm-135m", "--method", "qlora", "--base", base)
                   for base in ("int8", "llm-int8"))  # fmt: skip
    assert short == long


def test_changes_are_shown_where_it_does_not_fit_and_on_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each row's saving is what the same command has less with that option given, but for what the
    allocator caches.
    """
    words = ("smollm-135m", "--attention", "eager")
    needed = without_cache(answer(capsys, *words))
    for more in (("--changes",), ("--vram", "2GB")):
        table = answer(capsys, *words, *more)["answer"][-1]
        rows = {row["name"]: row["cells"] for row in table["rows"]}
        saved = [cells["saves"]["value"] for cells in rows.values()]
        assert saved == sorted(saved, reverse=True)
        for name, option in (
            ("use SDPA for attention", ("--attention", "sdpa")),
            ("recompute every block", ("--recompute", "full")),
            ("offload the optimizer", ("--offload", "optimizer")),
            ("train LoRA adapters only", ("--method", "lora")),
        ):
            then = without_cache(answer(capsys, *words, *option))
            assert (name in rows) == (then < needed)  # fp32 adapters may keep more
            if name in rows:
                assert rows[name]["then"]["value"] == then
                assert rows[name]["saves"]["value"] == needed - then


@pytest.mark.parametrize(
    "words", [("--recipe", "mixed", "--vram", "21GB"), ("--dtype", "fp32", "--vram", "23GB")]
)
def test_what_is_trained_changes_last(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """An NF4 base alone would fit, too, but several smaller changes together keep the method."""
    found = answer(capsys, "llama-3.2-1b", "--gpus", "2", *words)
    fitting = {row["name"] for row in found["answer"][-1]["rows"] if row["cells"]["fits"] == "yes"}
    assert "train LoRA on an NF4 base" in fitting
    remedy = next(note for note in found["notes"] if note.startswith("to make it fit"))
    assert "use 8-bit optimizer states" in remedy
    assert "LoRA" not in remedy


@pytest.mark.parametrize(("card", "runs"), [("rtx-4090", True), ("tpu-v5e", False),
                                            ("trainium1", False)])  # fmt: skip
def test_no_change_names_what_the_card_does_not_run(
    capsys: pytest.CaptureFixture[str], card: str, runs: bool
) -> None:
    """Neither bitsandbytes nor Liger has kernels for TPUs or Trainium, as their guides say."""
    table = answer(capsys, "llama-3-8b", "--gpu", card, "--changes")["answer"][-1]
    named = {row["name"] for row in table["rows"]}
    foreign = {"train LoRA on an NF4 base", "use 8-bit optimizer states",
               "use Liger's fused kernels"}  # fmt: skip
    assert named & foreign == (foreign if runs else set())
    assert "train LoRA adapters only" in named


def test_an_optimizer_without_kernels_for_the_card_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is not proposed there is not taken either."""
    assert run(["train", "llama-2-7b", "--gpu", "tpu-v5e", "--optimizer", "adamw-8bit"]) == 2
    assert "TPU v5e is of Google" in capsys.readouterr().err


def test_an_impossible_change_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    """Prefix tuning cannot recompute; that it does not fit is still an answer."""
    found = answer(capsys, "smollm-135m", "--method", "prefix", "--vram", "1GB")
    assert found["verdict"] is False


def test_the_timeline_is_written_into_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The highest point of the curves, and the mark, is what is allocated at the peak."""
    document = answer(capsys, "smollm-135m")
    rows = document["answer"][0]["rows"]
    peak = next(row for row in rows if row["name"] == "allocated at the peak")
    file = tmp_path / "step.csv"
    assert run(["train", "smollm-135m", "--timeline", "-o", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"
    drawn = list(csv.DictReader(file.read_text().splitlines()))
    assert max(float(row["y"]) for row in drawn) == peak["cells"]["memory"]["value"]
    assert {"lives through the step", "forward", "backward", "step"} < {r["curve"] for r in drawn}
    assert run(["train", "smollm-135m", "-o", str(file)]) == 2
    assert "--timeline" in capsys.readouterr().err


def test_a_block_that_layers_share_is_recomputed_under_autocast() -> None:
    """Its weights are cast once in the forward pass and for every call in the backward pass: the
    peak that `benchmarks/measure_trace.py` follows with transformers 5.23 on torch 2.13."""
    model = Path(__file__).parent / "reference" / "trace_configs" / "zamba2-six-calls.json"
    step = llmsize.train(model, batch=2, seq_len=100, recipe="amp", recompute="full")
    assert step.answer[0].column("memory")["allocated at the peak"].value == 45_231_322


def test_replicas_and_offload_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes are of each device; what is offloaded has tables of its own, with sums."""
    many = answer(capsys, "smollm-135m", "--gpus", "4")
    assert "on each of 4 devices" in str(many["headline"])
    found = answer(capsys, "smollm-135m", "--offload", "parameters")
    _, host, bus = found["answer"]  # type: ignore[misc]
    assert host["title"] == "host memory"
    for table, column in ((host, "memory"), (bus, "bytes")):
        *parts, whole = [row["cells"][column]["value"] for row in table["rows"]]
        assert sum(parts) == whole


def test_experts_beside_a_quantized_base_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Who expects QLoRA of Mixtral in 26 GB reads why it takes 100."""
    assert run(["train", "mixtral-8x7b", "--method", "qlora", "--recompute", "full"]) == 0
    assert "one tensor, which is not quantized" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("stack", ["transformers-4", "litgpt"])
def test_experts_that_are_quantized_are_not_said_to_stay(
    stack: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts that are linear layers are quantized: 46.7B parameters take less than 30 GB."""
    found = answer(capsys, "mixtral-8x7b", "--method", "qlora", "--stack", stack)
    assert found["answer"][0]["rows"][0]["cells"]["memory"]["value"] < 30 * 10**9
    assert not any("which is not quantized" in text for text in found["assumptions"])


@pytest.mark.parametrize(
    ("words", "told"),
    [(["lora"], ": rank 16 in every linear layer"),
     (["lora", "--rank", "8", "--targets", "c_attn"], ": rank 8 in c_attn"),
     (["galore"], ", by projections of rank 128"), (["full"], "")],
)  # fmt: skip
def test_the_rank_is_told_with_what_is_trained(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """GaLore's own rank is 128 (its README, and transformers' `rank` for it), no adapter's."""
    notes = answer(capsys, "gpt2", "--method", *words)["notes"]
    assert any(note.endswith(f"parameters are trained{told}") for note in notes)


@pytest.mark.parametrize(
    ("words", "told"),
    [("dpo", "the reference runs after the policy's forward pass"),
     ("dpo --reference precomputed", "were computed before training"),
     ("grpo", "`--reference model` adds one"), ("grpo --reference model", "")],
)  # fmt: skip
def test_what_is_said_of_a_reference_is_about_the_one_there_is(
    words: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was precomputed does not run, and one that is there needs not be added."""
    assumed = answer(capsys, "gpt2", "--objective", *words.split())["assumptions"]
    found = [text for text in assumed if "reference" in text]
    assert [told in text for text in found] == ([True] if told else [])


@pytest.mark.parametrize(
    ("share", "says", "close"),
    [(2.0, "fits in", False), (1.01, "is tight in", True), (0.99, "is tight in", True),
     (0.5, "does not fit in", False)],
)  # fmt: skip
def test_a_close_call_is_called_one(
    share: float, says: str, close: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured runs are off by 13 % at the 95th percentile, so a hundredth decides nothing; and
    where tensors fit, the allocator gets along with a hundredth less than it would cache.
    """
    words = ("smollm-135m", "--method", "lora")
    budget = int(share * device_bytes(answer(capsys, *words)))
    found = answer(capsys, *words, "--vram", f"{budget}B")
    assert says in str(found["headline"])
    assert any("a close call" in note for note in found["notes"]) == close
    assert found["verdict"] == (share > 0.9)


def test_gaps_make_a_run_fail_whose_tensors_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """With room for tensors and context to the byte there is none for what lies between tensors."""
    words = ("gpt2", "--batch", "4")
    rows = {row["name"]: row for row in answer(capsys, *words)["answer"][0]["rows"]}
    size = {name: row["cells"]["memory"]["value"] for name, row in rows.items()}
    least = size["device memory"] - size["allocator slack"]
    found = answer(capsys, *words, "--vram", f"{least}B")
    assert found["verdict"] is False
    assert any("in pieces too small" in note for note in found["notes"])


def test_pairs_are_in_the_headline(capsys: pytest.CaptureFixture[str]) -> None:
    """A batch of preferences is twice as many sequences as pairs."""
    found = answer(capsys, "gpt2", "--objective", "dpo", "--batch", "3", "--seq-len", "64")
    assert "3 × 2 × 64 tokens" in str(found["headline"])


def test_liger_is_proposed_where_it_is_one_line_more(capsys: pytest.CaptureFixture[str]) -> None:
    """Its kernels are put into transformers' models, not into another framework's."""
    for stack, proposed in (("transformers", True), ("nanogpt", False), ("transformers-4", False)):
        table = answer(capsys, "llama-3-8b", "--stack", stack, "--changes")["answer"][-1]
        named = {row["name"] for row in table["rows"]}
        assert ("use Liger's fused kernels" in named) == proposed


def test_double_quantization_saves_three_eighths_of_a_bit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """0.373 bits for each quantized weight (QLoRA, section 3)."""
    found = answer(capsys, "llama-2-7b", "--method", "qlora", "--changes")
    rows = {row["name"]: row["cells"] for row in found["answer"][-1]["rows"]}
    linear = 6_738_415_616 - 2 * 32_000 * 4096 - 65 * 4096  # without embeddings, head and norms
    saved = rows["use double quantization"]["saves"]["value"]
    assert saved == pytest.approx(0.373 / 8 * linear, rel=0.01)
    twice = answer(capsys, "llama-2-7b", "--method", "qlora", "--base", "nf4-dq", "--changes")
    assert "use double quantization" not in {r["name"] for r in twice["answer"][-1]["rows"]}


@pytest.mark.parametrize(("card", "told"), [("tpu-v4", True), ("mi300x", False), ("h100", False)])
def test_a_card_without_cudas_pytorch_is_told(
    card: str, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """PyTorch on AMD is the same with HIP (its notes on HIP); on a TPU a compiler plans memory."""
    assumed = answer(capsys, "gpt2", "--gpu", card)["assumptions"]
    assert any("counted as PyTorch runs on" in text for text in assumed) == told


def test_several_devices_are_said_to_hold_copies(capsys: pytest.CaptureFixture[str]) -> None:
    """More cards need more of each, which only data parallel training explains."""
    assert run(["train", "smollm-135m", "--gpus", "2"]) == 0
    assert "every device has a copy of everything" in " ".join(capsys.readouterr().out.split())


def test_an_engine_that_is_not_there_does_not_sleep(capsys: pytest.CaptureFixture[str]) -> None:
    """`--vllm-sleep` says something about the share of vLLM only."""
    assert run(["train", "gpt2", "--objective", "grpo", "--vllm-sleep"]) == 2
    assert "--vllm-share" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "--recipe mixed"), (["--method", "lora"], "--recipe amp"),
     (["--method", "lora", "--recipe", "amp"], ""), (["--recipe", "mixed"], ""),
     (["--dtype", "fp32"], "")],
)  # fmt: skip
def test_the_usual_recipe_is_told_where_another_one_ran(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trainers keep a master copy or run adapters under autocast; the default does neither."""
    found = [note for note in answer(capsys, "gpt2", *words)["notes"] if "--recipe" in note]
    assert [told in note for note in found] == ([True] if told else [])


def test_a_tower_that_is_not_loaded_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma 3 4B has a SigLIP tower of 417 million parameters (Gemma 3 report, section 2.1)."""
    told = answer(capsys, "gemma-3-4b", "--method", "lora")["assumptions"]
    assert any("417M parameters" in text for text in told)


def test_a_target_that_no_layer_has_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """peft adapts what it finds of a list and is silent about the rest; a typing error is not."""
    words = ("gpt2", "--method", "lora", "--targets", "c_attn,c_atn")
    document = answered(capsys, "train", *words)
    assert "no layer is called `c_atn`: peft adapts the others" in document["notes"]
