"""`llmsize estimate`: the table for a parameter count and for real models."""

import json
from pathlib import Path

import pytest

import llmsize
from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.cli import run
from llmsize.ladder import Ladder, nearest, of_size

GB = 10**9


def cells(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, dict[str, int]]:
    """Values by row and column of the one table of `llmsize estimate`."""
    assert run(["estimate", *words, "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["answer"][0]["rows"]
    return {
        row["name"]: {job: cell["value"] for job, cell in row["cells"].items() if "value" in cell}
        for row in rows
    }


def test_seven_billion_in_fp16_are_14_gb(capsys: pytest.CaptureFixture[str]) -> None:
    """Two bytes for each of exactly the parameters that were given."""
    assert cells(capsys, "--params", "7B", "--dtype", "fp16")["weights"]["inference"] == 14 * GB


def test_a_preset_says_how_large_a_7b_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 2 `7B` has 6,738,415,616 parameters, 13.48 GB in fp16."""
    table = cells(capsys, "llama-2-7b", "--dtype", "fp16")
    assert table["weights"]["inference"] == 2 * 6_738_415_616


def test_two_billion_in_fp32_take_32_gb_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights 4N, gradients 4N, two fp32 moments 8N."""
    table = cells(capsys, "--params", "2B", "--dtype", "fp32")
    column = {name: values.get("full training") for name, values in table.items()}
    assert column["weights"] == column["gradients"] == 8 * GB
    assert column["optimizer states"] == 16 * GB
    assert column["model states"] == 32 * GB


def test_the_convention_of_the_article(capsys: pytest.CaptureFixture[str]) -> None:
    """It counts 16N for AdamW, 48 GB for 2B, and 1.2 × weights for inference."""
    table = cells(capsys, "--params", "2B", "--dtype", "fp32", "--convention", "article")
    assert table["weights"]["full training"] == table["gradients"]["full training"] == 8 * GB
    assert table["optimizer states"]["full training"] == 32 * GB
    assert table["total"]["full training"] == 48 * GB
    assert table["total"]["inference"] == 9.6 * GB


def test_the_default_says_why_the_article_counts_more(capsys: pytest.CaptureFixture[str]) -> None:
    """Both conventions are named where they differ."""
    assert run(["estimate", "--params", "2B", "--dtype", "fp32"]) == 0
    assert "--convention article" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "bytes_per_parameter"),
    [("mixed", 16), ("megatron", 18), ("pure-16bit", 8), ("amp", 16), ("fp32", 16)],
)
def test_recipes_keep_their_published_bytes(
    recipe: str, bytes_per_parameter: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rajbhandari et al. 2020 for 16, Megatron-LM for 18, torchtune for 8."""
    table = cells(capsys, "--params", "1B", "--dtype", "bf16", "--recipe", recipe)
    assert table["model states"]["full training"] == bytes_per_parameter * GB


def test_qlora_of_llama_7b_has_the_base_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """The base of QLoRA's figure 6 is 5,046 MB with double quantization and more kept in 32 bit."""
    table = cells(capsys, "llama-7b", "--dtype", "bf16")
    assert 3.8 * GB < table["weights"]["QLoRA"] < 5.1 * GB


def test_no_adapters_beside_a_file_of_llama_cpp(capsys: pytest.CaptureFixture[str]) -> None:
    """llama.cpp's files are served and not trained; QLoRA has a base of its own."""
    table = cells(capsys, "llama-2-7b", "--dtype", "q4_k_m")
    assert table["weights"].keys() == {"inference", "QLoRA"}


def test_what_an_optimizer_allocates_is_not_taken_for_activations() -> None:
    """Mixed precision steps on fp32 copies of 6,738,415,616 gradients: at 128 tokens the peak."""
    short, long = (llmsize.estimate("llama-2-7b", context=tokens) for tokens in (128, 8192))
    peak = short.answer[0].column("full training")["activations"]
    assert peak.value == pytest.approx(4 * 6_738_415_616, rel=1e-5)
    told = "full training peaks while the optimizer steps"
    assert [any(told in note for note in found.notes) for found in (short, long)] == [True, False]


def test_adapters_that_keep_more_than_full_training_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """fp32 adapters keep wide copies of their inputs; where that is more, a note says so."""
    kept = cells(capsys, "llama-2-7b")["activations"]
    assert kept["LoRA"] > kept["full training"]
    assert run(["estimate", "llama-2-7b", "--format", "json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert any("LoRA saves states" in note for note in notes)


@pytest.mark.parametrize("model", ["gpt2", "bloom-560m", "gemma-3-4b", "gpt-oss-20b", "mamba-130m"])
def test_it_agrees_with_infer_about_inference(model: str) -> None:
    """One model in one place is one question, whichever command it is put to."""
    overview = llmsize.estimate(model, context=1024)
    served = llmsize.infer(model, context=1024)
    assert overview.answer[0].column("inference")["total"].value == (
        served.answer[0].column("GPU 0")["total"].value
    )


@pytest.mark.parametrize(
    ("model", "job", "method", "recipe"),
    [("llama-3.1-8b", "full training", "full", "mixed"), ("llama-3.1-8b", "LoRA", "lora", "amp"),
     ("llama-3.1-8b", "QLoRA", "qlora", "pure-16bit"), ("t5-small", "QLoRA", "qlora", "amp")],
)  # fmt: skip
def test_it_agrees_with_train_about_training(
    model: str, job: str, method: str, recipe: str
) -> None:
    """Tensors and context are the same, but for step counters; `train` adds what is cached."""
    asked = {"dtype": "bf16", "recipe": recipe}
    overview = llmsize.estimate(model, context=2048, **asked)
    step = llmsize.train(model, method=method, seq_len=2048, **asked)
    shown = step.answer[0].column("memory")
    least = shown["device memory"].value - shown["allocator slack"].value
    assert 0 <= least - overview.answer[0].column(job)["total"].value < 4096


@pytest.mark.parametrize("recipe", ["mixed", "megatron", "amp"])
def test_fp32_weights_have_no_16_bit_recipe(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A master copy and autocast are for 16-bit weights, wherever they are asked for."""
    for command in (["estimate", "gpt2"], ["train", "gpt2"]):
        assert run([*command, "--dtype", "fp32", "--recipe", recipe]) == 2
        assert "--dtype bf16" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["int8", "fp64", "int4"])
def test_no_adapters_beside_what_nothing_is_computed_in(
    dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Integers without scales and fp64 are no base; QLoRA has its own, and 16 bit around it."""
    table = cells(capsys, "gpt2", "--dtype", dtype)
    plain = cells(capsys, "gpt2", "--dtype", "bf16")
    assert "LoRA" not in table["total"]
    assert table["total"]["QLoRA"] == plain["total"]["QLoRA"]


@pytest.mark.parametrize(
    "words", [["estimate", "--params", "7B"], ["train", "gpt2"], ["fits", "gpt2", "--vram", "8GB"]]
)
def test_one_unit_in_all_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`--units GiB` is about headlines and notes, too: GB and GiB are never mixed."""
    assert run([*words, "--units", "GiB", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    told = " ".join((found["headline"], *found["assumptions"], *found["notes"]))
    assert "iB" in told
    assert " GB" not in told
    assert " MB" not in told


def test_a_checkpoint_in_fp32_has_16_bit_copies_by_a_recipe_of_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """GPT-2 is published in fp32; mixed precision keeps 2 + 2 + 12 bytes of each parameter."""
    table = cells(capsys, "gpt2", "--recipe", "mixed")
    assert table["model states"]["full training"] == 16 * 124_439_808
    assert table["weights"]["inference"] == 4 * 124_439_808


def test_positions_that_the_model_does_not_have_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """GPT-2 has 1,024 of them, as its configuration says."""
    for words in (["estimate", "gpt2"], ["infer", "gpt2"], ["fits", "gpt2", "--vram", "8GB"]):
        assert run([*words, "--context", "2048"]) == 0
        assert "more than the 1,024 positions" in " ".join(capsys.readouterr().out.split())


def test_a_bare_count_assumes_a_shape_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """The cache is that of a named model, graded assumed, with the range of its peers."""
    assert run(["estimate", "--params", "7B", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row["cells"] for row in document["answer"][0]["rows"]}
    assert rows["KV cache"]["inference"]["grade"] == "assumed"
    assert rows["weights"]["inference"]["grade"] == "exact"
    assert any("nearest known model" in text for text in document["assumptions"])
    assert any("llama-2-7b" in text for text in document["assumptions"])


def test_the_ladder_has_the_counts_of_its_models() -> None:
    """Every rung is a preset, with the count that the preset publishes."""
    ladder = presets.get(Ladder, "dense")
    for name, parameters in ladder.rungs.items():
        assert presets.get(Architecture, name).published_parameters == parameters


def test_the_nearest_rung_is_nearest_by_ratio() -> None:
    """Three is nearer to four than to two."""
    ladder = Ladder("three", {"two": 2 * GB, "four": 4 * GB}, "test")
    assert nearest(ladder, 3 * GB) == "four"
    assert of_size(ladder, 4 * GB) == ["four"]
    assert of_size(ladder, 100 * GB) == []


@pytest.mark.parametrize("command", ["estimate", "train", "infer", "inspect"])
def test_an_unknown_architecture_can_be_taken_for_a_known_one(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is an error that offers `--assume-family`, and an answer with it."""
    config = {
        "model_type": "llamb", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
        "num_attention_heads": 4, "intermediate_size": 128,
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    assert run([command, str(file)]) == 2
    assert "--assume-family llama" in capsys.readouterr().err
    assert run([command, str(file), "--assume-family", "llama"]) == 0
    assert "assumed: the block of `llama`" in capsys.readouterr().out
