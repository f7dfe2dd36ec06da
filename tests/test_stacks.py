"""Training frameworks that put layers together in their own way."""

import csv
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest

from benchmarks.tables.held_out import held_out_training
from benchmarks.tables.training import measured_training
from llmsize import presets
from llmsize.anatomy.autograd import Leaf
from llmsize.anatomy.operations import fused_linear_cross_entropy, softmax_cross_entropy
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Tensor
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.formats import FP32, INT64, Format
from llmsize.memory.methods import Choices
from llmsize.memory.training import training_step
from llmsize.memory.training_run import training_run
from llmsize.optimizers import Optimizer, Precision
from llmsize.sources.config import read_config
from llmsize.stack import Stack

MEASURED = Path(__file__).parent / "reference" / "measured_training.csv"
HELD_OUT = MEASURED.with_name("held_out_training.csv")
LITGPT = [
    row
    for row in csv.DictReader(MEASURED.open(newline=""))
    if row["source"] == "litgpt" and row["method"] == "lora" and row["batch_per_device"] == "1"
    and row["gpus"] == "1" and row["kind"] == "measured"
]  # fmt: skip


def trained(model: str, stack: str, **choices: object) -> int:
    """Parameters that a run with query and value adapters of rank 8 trains."""
    chosen = Choices(**{"method": "lora", "rank": 8, "targets": ("q_proj", "v_proj"), **choices})  # type: ignore[arg-type]
    precision, optimizer = presets.get(Precision, "pure-16bit"), presets.get(Optimizer, "adamw")
    run = training_run(chosen, presets.get(Stack, stack), precision, optimizer)
    return training_step(presets.get(Architecture, model), run).trained


@pytest.mark.parametrize("row", LITGPT, ids=lambda row: row["model"])
def test_one_projection_of_q_k_and_v_trains_what_its_authors_print(row: dict[str, str]) -> None:
    """LitGPT's resource table names the trainable parameters of adapters on q and v."""
    assert trained(row["model"], "litgpt") == int(row["trainable_params"])


def test_litgpts_layers_are_those_of_one_block_for_all_models() -> None:
    """Falcon's fused projection has adapters on q and v, Phi-3's gate and up are two layers.

    Counted by hand from litgpt/lora.py: two down-projections beside q and v of 71 heads and of one.
    """
    assert trained("falcon-7b", "litgpt") == 32 * 8 * (2 * 4544 + 4544 + 64)
    two = trained("phi-3-mini-4k", "litgpt", targets=("gate_proj", "up_proj"))
    assert two == 32 * 8 * 2 * (3072 + 8192)


def test_the_projection_is_adapted_as_a_whole_by_no_other_method() -> None:
    """DoRA takes the norms of whole weights, and is refused for a part of one."""
    with pytest.raises(LLMSizeError, match="one projection"):
        trained("llama-2-7b", "litgpt", method="dora")


def test_runs_of_2023_are_met_within_a_hundredth() -> None:
    """What Lit-GPT's authors read from the allocator, quantized bases included."""
    rows = [row for row in csv.DictReader(MEASURED.open(newline="")) if row["source"] == "litgpt"]
    answers = [a for a in measured_training(rows) if a.got is not None]
    assert len(answers) >= 13
    errors = sorted(abs(a.got / a.expected - 1) for a in answers)  # type: ignore[operator]
    assert errors[len(errors) // 2] <= 0.005
    assert errors[-1] <= 0.01


def test_runs_of_2024_are_met_within_an_eightieth() -> None:
    """The same of LitGPT's later models, whose graph outlives the step where layers are 4-bit."""
    rows = [row for row in csv.DictReader(HELD_OUT.open(newline="")) if "litgpt" in row["stack"]]
    errors = [
        abs(a.got / a.expected - 1)
        for a in held_out_training(rows, HELD_OUT.parent)
        if a.got is not None
    ]
    assert len(errors) >= 26
    assert max(errors) <= 0.0125


def test_torchtunes_own_table_is_met_within_an_eighth() -> None:
    """Each step of the README's cumulative table, from nothing saved to QLoRA."""
    rows = [
        row for row in csv.DictReader(MEASURED.open(newline="")) if row["source"] == "torchtune"
    ]
    errors = {
        a.id: abs(a.got / a.expected - 1) for a in measured_training(rows) if a.got is not None
    }
    assert len(errors) >= 9
    assert sorted(errors.values())[len(errors) // 2] <= 0.02
    assert max(errors.values()) <= 0.125


SHIFTED = (
    ("gpt2-2-layers", "fp32", False, False, 195_389_176, 1_043_179_096, 1_165_764_728),
    ("gpt2-2-layers", "bf16", True, False, 201_239_304, 727_662_696, 726_854_520),
    ("llama-3.2-1b-2-layers", "fp32", True, False, 770_828_264, 5_643_213_112, 8_513_036_632),
    ("llama-3.2-1b-2-layers", "bf16", False, False, 380_332_056, 3_340_839_272, 4_125_188_440),
    ("llama-3.2-1b-2-layers", "bf16", False, True, 380_332_056, 3_209_505_128, 4_125_188_440),
    ("llama-3.2-1b-2-layers", "bf16", True, True, 643_000_344, 3_209_505_128, 4_387_856_728),
)
"""Kept bytes and both peaks of 4 × 128 tokens, traced by benchmarks/measure_trace.py (transformers
5.23, torch 2.13) with the loss of transformers 4.46 in the place of its own, while the loop holds
the logits or not, and with the head of 4.45's Llama, which hands out fp32, or that of 5.23."""


@pytest.mark.parametrize("traced", SHIFTED)
def test_the_loss_of_transformers_4_copies_its_logits(
    traced: tuple[str, str, bool, bool, int, int, int],
) -> None:
    """Whether or not the loop holds the logits, bytes are those of the traced step."""
    name, format, held, fp32, kept, forward, backward = traced
    model = read_config(MEASURED.parent / "trace_configs" / f"{name}.json", name)
    stack = replace(
        presets.get(Stack, "transformers-4"), keep_outputs=held, fp32_logits=fp32, loss_in_fp32=True
    )
    choices = Choices(batch=4, sequence=128, format=presets.get(Format, format))
    recipe = presets.get(Precision, "pure-16bit")
    run = training_run(choices, stack, recipe, presets.get(Optimizer, "adamw"))
    step = training_step(model, run)
    assert (step.kept, step.peaks["forward"], step.peaks["backward"]) == (kept, forward, backward)


def test_gpt2_of_transformers_4_hands_its_logits_to_the_loss_as_they_are() -> None:
    """Traced likewise, with the loss that 4.45.2's modeling_gpt2.py writes out."""
    model = read_config(MEASURED.parent / "trace_configs" / "gpt2-2-layers.json", "gpt2")
    choices = Choices(batch=4, sequence=128, format=presets.get(Format, "bf16"))
    recipe, adamw = presets.get(Precision, "pure-16bit"), presets.get(Optimizer, "adamw")
    run = training_run(choices, presets.get(Stack, "transformers-4"), recipe, adamw)
    step = training_step(model, run)
    peaks = step.peaks["forward"], step.peaks["backward"]
    assert (step.kept, *peaks) == (98_715_020, 522_614_132, 582_886_516)


def test_gradients_that_are_set_to_zero_stay() -> None:
    """Before PyTorch 2.0 a forward pass runs beside the last step's gradients."""
    model = presets.get(Architecture, "bert-base")
    recipe, adamw = presets.get(Precision, "fp32"), presets.get(Optimizer, "adamw")
    now, then = (
        training_step(
            model, training_run(Choices(batch=2), presets.get(Stack, name), recipe, adamw)
        )
        for name in ("transformers-4", "transformers-4-torch-1")
    )
    assert then.peaks["forward"] - now.peaks["forward"] == then.gradients == 4 * 109_514_298


def test_softmax_kept_its_input_before_pytorch_1_11() -> None:
    """BERT-large: once more the scores of 24 layers and 16 heads, and the 30,522 logits."""
    model = presets.get(Architecture, "bert-large")
    recipe, adamw = presets.get(Precision, "fp32"), presets.get(Optimizer, "adamw")
    early = presets.get(Stack, "transformers-4-torch-1")
    choices = Choices(batch=4, sequence=512, attention="eager", format=FP32)
    before, since = (
        training_step(model, training_run(choices, stack, recipe, adamw)).kept
        for stack in (early, replace(early, softmax_keeps_input=False))
    )
    scores, logits = 24 * 16 * 512 * 512, 512 * 30_522
    assert before - since == 4 * (scores + logits) * FP32.block_bytes


def test_trl_computes_the_loss_of_sft_like_that_of_dpo() -> None:
    """Both from the same tiles (trl v1.16, `add_fused_lm_head`), so a batch keeps the same."""
    model = presets.get(Architecture, "smollm-135m")
    recipe, adamw = presets.get(Precision, "pure-16bit"), presets.get(Optimizer, "adamw")
    stack = presets.get(Stack, "trl")
    sft, dpo = (
        training_step(model, training_run(choices, stack, recipe, adamw))
        for choices in (
            Choices(batch=4),
            Choices(batch=2, objective="dpo", reference="precomputed"),
        )
    )
    assert sft.kept == dpo.kept
    assert sft.peaks["backward"] == dpo.peaks["backward"]


def test_trl_keeps_adapters_over_a_quantized_base_in_16_bit() -> None:
    """Two moments of 2 bytes for each parameter, and of 4 beside a base that is not quantized."""
    model = presets.get(Architecture, "smollm-135m")
    recipe, adamw = presets.get(Precision, "pure-16bit"), presets.get(Optimizer, "adamw")
    nf4 = presets.get(Format, "nf4")
    quantized, plain = (
        training_step(model, training_run(choices, presets.get(Stack, "trl"), recipe, adamw))
        for choices in (Choices("qlora", base=nf4, sequence=64), Choices("lora", sequence=64))
    )
    for step, moment in ((quantized, 2), (plain, 4)):
        states = step.static.part("optimizer states").value
        assert states == pytest.approx(2 * moment * step.trained, rel=1e-3)


def test_an_earlier_trainer_steps_with_copies_of_all_weights() -> None:
    """A full step of Mistral-7B on an A100 peaked at 72,434,853,376 bytes in the optimizer.

    fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv at 0aab2c6, with transformers 4.45.2.
    """
    model, stack = (
        presets.get(Architecture, "mistral-7b-v0.1"),
        presets.get(Stack, "transformers-4"),
    )
    choices = Choices(batch=4, sequence=4096, recompute="full")
    optimizer = presets.get(Optimizer, stack.optimizer)
    run = training_run(choices, stack, presets.get(Precision, "pure-16bit"), optimizer)
    step = training_step(model, run)
    assert step.phase == "step"
    assert step.total == pytest.approx(72_434_853_376, rel=0.001)


def test_ligers_loss_adds_to_the_heads_gradient_in_place() -> None:
    """Beside both gradients and a number a token, the logits of one chunk live at most: 4,096
    tokens of 4,096 channels over 128,256 words are 32 chunks of 128 (v0.6.0, v0.8.5).
    """
    tokens, hidden, vocabulary = 4096, 4096, 128_256
    t, bf16 = Tape(), presets.get(Format, "bf16")
    x, weight = (Tensor((size, hidden), bf16, None, Leaf()) for size in (tokens, vocabulary))
    fused_linear_cross_entropy(t, x, weight, t.new("labels", (tokens,), INT64), vocabulary)
    made = 2 * (tokens + vocabulary) * hidden + 4 * tokens
    labels, chunk = 8 * tokens, 2 * 128 * vocabulary
    assert max(accumulate(change for change, _ in t.events)) == labels + made + chunk


@pytest.mark.parametrize(("stack", "written_out"), [("transformers", True), ("litgpt", False)])
def test_litgpt_runs_falcon_with_a_fused_kernel(stack: str, written_out: bool) -> None:
    """Its own block needs no mask and repeats the only key; transformers' takes neither kernel."""
    run = training_run(
        Choices(method="lora", sequence=512), presets.get(Stack, stack),
        presets.get(Precision, "pure-16bit"), presets.get(Optimizer, "sgd"),
    )  # fmt: skip
    live = training_step(presets.get(Architecture, "falcon-7b"), run).moment.live
    assert any(what.shape[-2:] == (512, 512) for what in live) is written_out


NANOGPT = Architecture(
    "nanogpt", "gpt2",
    {"vocab_size": 5000, "n_positions": 1024, "n_embd": 256, "n_layer": 2, "n_head": 4,
     "activation_function": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
     "tie_word_embeddings": True},
    "GPT of karpathy/nanoGPT, model.py",
)  # fmt: skip
TORCHTITAN = Architecture(
    "torchtitan", "llama",
    {"vocab_size": 5000, "max_position_embeddings": 128, "hidden_size": 256,
     "intermediate_size": 896, "num_hidden_layers": 2, "num_attention_heads": 8,
     "num_key_value_heads": 2, "hidden_act": "silu", "tie_word_embeddings": False},
    "Transformer of pytorch/torchtitan, torchtitan/models/llama3/model/model.py",
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "recipe", "kept", "backward", "step"),
    [
        (NANOGPT, "amp", 21_077_048, 63_667_372, 49_959_028),
        (TORCHTITAN, "pure-16bit", 11_170_872, 47_022_732, 34_142_296),
    ],
)
def test_models_that_frameworks_bring_themselves(
    model: Architecture, recipe: str, kept: int, backward: int, step: int
) -> None:
    """nanoGPT's and torchtitan's own classes, traced on fake CUDA tensors with torch 2.13.

    Their data has the labels shifted already, and torchtitan's rotary table is a buffer.
    """
    choices = Choices(batch=2, sequence=128, format=presets.get(Format, "bf16"))
    run = training_run(
        choices, presets.get(Stack, model.name), presets.get(Precision, recipe),
        presets.get(Optimizer, "adamw"),
    )  # fmt: skip
    found, labels, table = training_step(model, run), 2 * 128 * 8, 128 * 32 * 4
    assert found.kept - labels == pytest.approx(kept, abs=table)
    assert found.peaks["backward"] == pytest.approx(backward, abs=labels)
    assert found.peaks["step"] == pytest.approx(step, abs=table)


def test_megatrons_loss_keeps_probabilities_in_fp32() -> None:
    """A trace of its function: 4 bytes a logit kept, 6 bytes at the peaks of both passes."""
    t = Tape()
    hidden = Tensor((256, 64), presets.get(Format, "bf16"), None, Leaf())
    logits = t.new("mm", (256, 8192), hidden.format, t.record(lambda *_: (None,), (hidden,), ()))
    loss = softmax_cross_entropy(t, logits, Tensor((256,), INT64, None))
    del logits
    sizes = list(accumulate(size for size, _ in t.events))
    assert loss.node is not None
    assert round(max(sizes) / (256 * 8192)) == 6
    assert round(sizes[-1] / (256 * 8192)) == 4


def test_a_loop_that_holds_its_logits_holds_what_their_graph_does() -> None:
    """bitsandbytes 0.42's layers hold their inputs, and LitGPT's logits the graph of those layers.

    So at the end of a forward pass there is a second set, and the logits in fp32 (counted by hand:
    three inputs of 4,096 and one of 11,008 channels for each token of a Llama-2-7B layer, of which
    the first layer's first wants no gradient, and the head's).
    """
    tokens, layers, hidden, inner, vocabulary = 512, 32, 4096, 11008, 32000
    choices = Choices(method="qlora", sequence=tokens, targets=("q_proj",), rank=8,
                      base=presets.get(Format, "nf4"))  # fmt: skip
    stack = presets.get(Stack, "litgpt-2024")
    last, first = (
        training_step(presets.get(Architecture, "llama-2-7b"), training_run(
            choices, which, presets.get(Precision, "pure-16bit"), presets.get(Optimizer, "adamw"),
        ))
        for which in (stack, replace(stack, keeps_graph=False))
    )  # fmt: skip
    inputs = layers * (3 * hidden + inner) * tokens * 2
    *_, before, _ = [point for point in last.timeline if point.phase == "forward"]
    alone = next(point for point in first.timeline if point.place == before.place)
    assert before.after - alone.after == inputs + tokens * vocabulary * 4
    assert last.kept == first.kept
