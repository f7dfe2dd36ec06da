"""Parts of memory for one model or a bare count: what they are, and how sure of it."""

import csv
from pathlib import Path

import pytest

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.cli.estimate import format_named
from llmsize.cli.options import storage
from llmsize.engine import Engine
from llmsize.memory import overview
from llmsize.memory.overview import COMPONENTS, JOBS, RUNTIME, Job, Parts, Subject, Workload
from llmsize.optimizers import Optimizer, Precision
from llmsize.quick_dataclasses import replace
from llmsize.stack import Stack
from llmsize.term import Term

REFERENCE = Path(__file__).parent / "reference"
GPT2 = presets.get(Architecture, "gpt2")


def work(dtype: str = "bf16", optimizer: str = "adamw", recipe: str = "pure-16bit") -> Workload:
    """One sequence of 100 tokens."""
    return Workload(
        storage(dtype, served=True), presets.get(Precision, recipe),
        presets.get(Optimizer, optimizer), format_named, batch=1, context=100,
    )  # fmt: skip


def parts_of(subject: Subject, asked: Workload, job: Job) -> Parts:
    return overview.need(subject, asked, job)


def term_of(parts: Parts, name: str) -> Term:
    """The part of that name, which is there."""
    part = parts[name]
    assert isinstance(part, Term)
    return part


def bare(times: int) -> Subject:
    """So many times GPT-2's count, in its shape."""
    return overview.subject(GPT2, times * overview.subject(GPT2).parameters)


def test_a_file_of_llama_cpp_has_the_bytes_of_all_its_tensors() -> None:
    """As llama-quantize counts them, some of Q4_K_M's in six bits."""
    with (REFERENCE / "gguf_sizes.csv").open() as table:
        row = next(
            row
            for row in csv.DictReader(table)
            if (row["model"], row["quant"]) == ("llama-2-7b", "Q4_K_M")
        )
    subject = overview.subject(presets.get(Architecture, "llama-2-7b"))
    parts = parts_of(subject, work("q4_k_m"), "inference")
    assert term_of(parts, "weights").value == int(row["tensor_bytes"])


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("bf16", 2), ("nf4", 2)])
def test_the_cache_is_in_the_format_of_plain_weights(dtype: str, size: int) -> None:
    """A key and a value of 768 channels for 12 layers and 100 tokens; beside blocks in 16 bits."""
    parts = parts_of(overview.subject(GPT2), work(dtype), "inference")
    assert term_of(parts, "KV cache").value == 2 * 768 * 12 * 100 * size


def test_states_of_adapters_are_those_of_their_own_matrices() -> None:
    """Adafactor keeps an fp32 number a row and a column of each of GPT-2's adapters of rank 16,
    which go from 768, 768, 768 and 3,072 channels to 2,304, 768, 3,072 and 768."""
    layers = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
    each = sum((16 + inputs) + (outputs + 16) for inputs, outputs in layers)
    roots = 2 * len(layers)  # the root mean square of each matrix, by which its step is scaled
    parts = parts_of(overview.subject(GPT2), work(optimizer="adafactor"), "LoRA")
    assert term_of(parts, "optimizer states").value == 12 * 4 * (each + roots)


def test_qlora_keeps_a_quantized_base_beside_fp32_adapters() -> None:
    """SmolLM's 30 layers of seven matrices in blocks of 64 numbers: 36 bytes each, and the sixteen
    fp32 values of NF4 once a matrix (bitsandbytes, `QuantState`); all else is in 16 bits."""
    outward = {576: (576, 192, 192, 576, 1536, 1536), 1536: (576,)}
    shapes = [(inputs, outputs) for inputs, those in outward.items() for outputs in those]
    matrices = 30 * sum(inputs * outputs for inputs, outputs in shapes)
    base = matrices // 64 * 36 + 30 * 7 * 64 + 2 * (134_515_008 - matrices)
    subject = overview.subject(presets.get(Architecture, "smollm-135m"))
    frozen, adapters = term_of(parts_of(subject, work("nf4"), "QLoRA"), "weights").parts
    assert frozen.value == base
    assert adapters.value == 4 * 30 * 16 * sum(map(sum, shapes))


def test_states_of_all_weights_are_those_of_their_shapes() -> None:
    """Adafactor again, for GPT-2 itself: rows and columns of matrices, one number a number of a
    vector, and a root mean square for each of 148 tensors, all in fp32."""
    c = 768
    matrices = (c + 3 * c) + (c + c) + 2 * (c + 4 * c)
    vectors = 4 * c + 3 * c + c + 4 * c + c  # norms, and the biases of the four matrices
    outside = (50257 + c) + (1024 + c) + 2 * c
    parts = parts_of(overview.subject(GPT2), work(optimizer="adafactor"), "full training")
    expected = 4 * (12 * (matrices + vectors) + outside + 148)
    assert term_of(parts, "optimizer states").value == expected


@pytest.mark.parametrize(
    "case", ["gpt2_b1_s1024_bf16", "gpt2_b8_s1024_ampbf16", "gpt2_b8_s1024_ampbf16_ckpt"]
)
def test_the_parts_of_full_training_are_the_traced_peak(case: str) -> None:
    """To the byte, but for the step counters of 148 tensors, fp32 numbers that it leaves out."""
    with (REFERENCE / "training_memory.csv").open() as table:
        row = next(row for row in csv.DictReader(table) if row["case_id"] == case)
    asked = work(recipe="amp" if row["autocast"] == "bf16" else "pure-16bit")._replace(
        batch=int(row["batch"]), context=int(row["seq"]), recompute=row["grad_ckpt"] != "none"
    )
    parts = parts_of(overview.subject(GPT2), asked, "full training")
    names = ("weights", "gradients", "optimizer states", "activations")
    found = sum(int(term_of(parts, name).value) for name in names)
    assert found + 4 * 148 == int(row["peak_total_bytes"])


def test_what_is_stored_in_blocks_is_not_trained_itself() -> None:
    """16 bits are, and nothing that a recipe has quantized."""
    assert storage("bf16").trainable
    assert not storage("nf4").trainable
    assert not storage("q4_k_m", served=True).trainable


def test_an_engine_that_reads_in_pieces_has_no_more_at_work() -> None:
    """34 bytes a token and channel (Korthikanti et al. 2022): of all prompts, or of a piece."""
    engine = replace(presets.get(Engine, "vllm"), prefill=2048)
    many = work()._replace(batch=64)
    for asked, tokens in (
        (many, 6400), (many._replace(engine=engine), 2048), (work()._replace(engine=engine), 100),
    ):  # fmt: skip
        parts = parts_of(overview.subject(GPT2), asked, "inference")
        assert term_of(parts, "activations").value == 34 * tokens * 768


@pytest.mark.parametrize(
    ("asked", "job", "name"),
    [
        (work("nf4"), "inference", "weights"),
        (work("q4_k_m"), "inference", "weights"),
        (work(optimizer="adafactor"), "full training", "optimizer states"),
    ],
)
def test_what_is_summed_over_a_shape_follows_the_count(
    asked: Workload, job: Job, name: str
) -> None:
    """Three times the parameters in the same shape take three times the bytes."""
    one, three = (term_of(parts_of(bare(n), asked, job), name) for n in (1, 3))
    assert three.value == 3 * one.value
    assert (one.grade, three.grade) == ("exact", "assumed")


def grades(subject: Subject, job: Job) -> dict[str, str]:
    parts = parts_of(subject, work(), job)
    return {name: part.grade for name, part in parts.items() if isinstance(part, Term)}


def test_what_follows_from_an_assumed_shape_is_assumed() -> None:
    """Weights are counted, whatever the shape; cache and activations stand or fall with it."""
    known, stand_in = (grades(bare(n), "inference") for n in (1, 2))
    assert (known["KV cache"], known["activations"]) == ("exact", "formula")
    assert (stand_in["KV cache"], stand_in["activations"]) == ("assumed", "assumed")
    assert known["weights"] == stand_in["weights"] == "exact"
    trained = [grades(bare(n), "full training")["activations"] for n in (1, 2)]
    assert trained == ["formula", "assumed"]


def test_a_published_shape_that_is_a_guess_is_no_better() -> None:
    """What follows from a preset that says `assumed` is assumed, too."""
    guessed = overview.subject(replace(GPT2, grade="assumed"))
    assert grades(guessed, "inference")["KV cache"] == "assumed"


@pytest.mark.parametrize("job", JOBS)
def test_every_job_says_something_of_every_component(job: Job) -> None:
    """A number, or the reason why there is none."""
    parts = parts_of(overview.subject(GPT2), work(), job)
    assert tuple(parts) == COMPONENTS
    assert all(isinstance(part, Term) or part for part in parts.values())


def test_the_runtime_s_own_memory_is_that_of_the_stack() -> None:
    """The overview and `train` with transformers count the same context."""
    assert RUNTIME.value == presets.get(Stack, "transformers").context


def test_a_master_copy_is_beside_the_states() -> None:
    """Rajbhandari et al. 2020: of each parameter an fp32 copy and two fp32 moments."""
    parts = parts_of(overview.subject(GPT2), work(recipe="mixed"), "full training")
    states = term_of(parts, "optimizer states")
    assert [part.value for part in states.parts] == [8 * 124_439_808, 4 * 124_439_808]


def test_of_several_devices_each_has_a_share_and_its_own_runtime() -> None:
    """101 bytes on two devices are 51 on the fuller one; what is beside is on each, whole."""
    weights, own = (Term(name, size, "bytes") for name, size in (("weights", 101), ("own", 7)))
    shared = overview.on_each({"weights": weights, "own": own}, 2, own)
    assert isinstance(shared, Term)
    assert shared.value == 51 + 7 + RUNTIME.value
