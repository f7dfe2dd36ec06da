"""Preferences and policies: other heads, other models, other moments.

The rows of objective_traces.csv have five layers of each model. The heads are TRL 1.16's own code
(trl/kernels/chunked_logprob.py with its Triton kernels left out, trl/trainer/reward_trainer.py) on
fake CUDA tensors, as benchmarks/measure_trace.py has them.
"""

import csv
import re
from pathlib import Path

import pytest
from training_runs import run_of

from benchmarks.tables.traces import objective_steps, objective_traces
from llmsize import presets
from llmsize.anatomy import Setting
from llmsize.architecture import Architecture
from llmsize.cli import run as run_command
from llmsize.errors import LLMSizeError
from llmsize.formats import Format
from llmsize.memory.generation import generation
from llmsize.memory.methods import Choices
from llmsize.memory.objectives import OBJECTIVES, Reference, objective_named, objective_notes
from llmsize.memory.peak import peak_memory
from llmsize.memory.training import TrainingStep, training_step

REFERENCE = Path(__file__).parent / "reference"

with (REFERENCE / "objective_traces.csv").open() as table:
    ROWS = list(csv.DictReader(table))


with (REFERENCE / "objective_steps.csv").open() as table:
    STEPS = list(csv.DictReader(table))
"""Whole steps, by benchmarks/measure_objective.py (TRL 1.16, transformers 5.23, peft 0.21, torch
2.13), of every model, objective and setting that was tried and could be traced."""


def step(**words: object) -> TrainingStep:
    choices = Choices(**{"sequence": 256, "recompute": "full", **words})  # type: ignore[arg-type]
    return training_step(presets.get(Architecture, "smollm-135m"), run_of(choices))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case_id"])
def test_a_head_keeps_and_peaks_as_trl_does(row: dict[str, str]) -> None:
    """Within 16 KB: the tensors that say which tokens count are made in another way."""
    answers = list(objective_traces([row], REFERENCE))
    assert answers
    for answer in answers:
        slack = 0 if answer.quantity == "params_trainable" else 16_384
        assert answer.got == pytest.approx(answer.expected, abs=slack, rel=0), answer


@pytest.mark.parametrize("row", STEPS, ids=lambda row: row["case_id"])
def test_a_step_with_its_reference_is_as_traced(row: dict[str, str]) -> None:
    """Policy, reference and backward pass of TRL's losses: to 20 kB, or to 0.02 %."""
    answers = list(objective_steps([row], REFERENCE))
    assert answers
    for answer in answers:
        assert answer.got == pytest.approx(answer.expected, rel=2e-4, abs=20_000), answer


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_parts_of_the_peak_sum_to_it(objective: str, method: str) -> None:
    """Whatever the objective, everything alive at the highest moment is listed."""
    found = step(objective=objective, method=method)
    assert peak_memory(found).value == found.total == max(found.peaks.values())
    assert found.total == max(point.highest for point in found.timeline)


def test_a_reference_is_one_more_model_unless_adapters_are_switched_off() -> None:
    """DPO of all weights holds 134,515,008 frozen ones beside them; with LoRA it holds none."""
    full, lora = step(objective="dpo"), step(objective="dpo", method="lora")
    before = step(objective="dpo", reference="precomputed")
    assert full.static.part("reference model").value == 2 * 134_515_008
    assert "reference" in lora.peaks
    assert "reference model" not in {part.name for part in lora.static.parts}
    assert "reference" not in before.peaks


@pytest.mark.parametrize(
    ("objective", "reference", "said"),
    [
        ("sft", "none", ""),
        ("grpo", "none", "without a reference"),
        ("grpo", "model", ""),
        ("dpo", "model", "the reference runs after"),
        ("dpo", "adapter", "the reference runs after"),
        ("dpo", "precomputed", "were computed before training"),
        ("reward", "none", ""),
    ],
)
def test_it_is_said_whether_and_when_a_reference_runs(
    objective: str, reference: Reference, said: str
) -> None:
    """What TRL 1.16 has as `beta`, `precompute_ref_log_probs` and a pass of its own."""
    found = " ".join(objective_notes(OBJECTIVES[objective], reference))
    assert said in found
    assert bool(said) == ("reference" in found)


def test_a_pair_is_two_sequences() -> None:
    """Chosen and rejected run in one batch: one pair of DPO is two sequences of GRPO."""
    pair = step(objective="dpo", reference="precomputed")
    two = step(objective="grpo", batch=2, completion=255)
    assert pair.peaks["backward"] == pytest.approx(two.peaks["backward"], rel=1e-3)


def test_ppo_has_four_models() -> None:
    """Policy, reference, reward and value model; policy and value model have optimizer states."""
    found = step(objective="ppo")
    names = {part.name for part in found.static.parts}
    assert {"weights", "reference model", "reward model", "value model"} <= names
    value = found.static.part("value model")
    assert value.value > 2 * found.static.part("reward model").value
    logits = 2 * 256 * 49_152  # which its trainer has statistics of after the step
    assert 0 <= found.left - 2 * 134_515_008 - logits <= 4  # the policy's own gradients, its loss


def test_a_reference_is_quantized_as_the_base_is() -> None:
    """TRL 1.16 loads both with one `quantization_config` (trl/trainer/dpo_trainer.py)."""
    base = presets.get(Format, "nf4")
    found = step(objective="dpo", method="qlora", base=base, reference="model")
    adapters = found.gradients  # in fp32, as they are themselves
    held = found.static.part("weights").value - adapters
    assert found.static.part("reference model").value == held < 134_515_008


def test_a_value_model_is_trained_whole_and_so_not_quantized() -> None:
    """Beside a quantized policy it has two bytes a parameter, and so has the reward model."""
    base = presets.get(Format, "nf4")
    found = step(objective="ppo", method="qlora", base=base)
    whole = 2 * (134_515_008 + 576)  # tied, with a head of one number
    assert found.static.part("value model").part("weights").value == whole
    assert found.static.part("reward model").value == whole


@pytest.mark.parametrize("method", ["frozen", "lora"])
def test_a_policy_that_is_frozen_in_part_has_a_value_model_that_is_not(method: str) -> None:
    """What is frozen is the policy's: states and gradients of the value model stay the same."""
    whole = step(objective="ppo")
    frozen = step(objective="ppo", method=method, frozen_layers=10)
    assert frozen.static.part("value model").value == whole.static.part("value model").value
    assert frozen.beside["step"].value == whole.beside["step"].value
    gradients = 2 * (134_515_008 + 576)  # two bytes a parameter, with a head of one number
    assert 0 <= frozen.beside["step"].value - gradients <= 4  # the loss


def test_a_rollout_has_token_ids_and_a_cache_for_every_sequence() -> None:
    """Eight sequences of 256 tokens in int64; a key and a value of 3 heads of 64 channels for 30
    layers, in 16 bits, and the logits of a token each."""
    written = step(objective="grpo", rollouts=8, completion=100).stages["rollouts"]
    assert written.part("token ids").value == 8 * 8 * 256
    cached = 2 * 30 * 3 * 64 * 2 * 8 * 255
    passed = written.part("keys, values and the pass").value
    assert cached < passed < 1.2 * cached


@pytest.mark.parametrize("completion", [1, 100, 255])
def test_a_rollout_is_generation(completion: int) -> None:
    """The higher of the prompt's pass and the last token's, which agree with traced models
    (test_generation.py), above weights, buffers and token ids."""
    model = presets.get(Architecture, "smollm-135m")
    setting = Setting(batch=8, sequence=256 - completion, last_logits=True)
    first, last = generation(model, setting), generation(model, setting._replace(sequence=255))
    prompt = first.prefill_peak - first.weights - first.buffers - 8 * 8 * (256 - completion)
    token = last.decode_peak - last.weights - last.buffers - 8 * 8 * 256
    written = step(objective="grpo", rollouts=8, completion=completion).stages["rollouts"]
    assert written.part("keys, values and the pass").value == max(prompt, token)


def test_scoring_holds_the_logits_of_what_was_written_once() -> None:
    """They are a stack by then (TRL, trl/experimental/ppo, `logitss`): fp32 for 49,152 tokens."""
    scoring = step(objective="ppo", rollouts=8, completion=100).stages["scoring"]
    assert scoring.part("logits of the rollouts").value == 4 * 8 * 100 * 49_152
    reference = 2 * 256 * 49_152  # logits, of which a reward model makes one number
    assert scoring.part("a frozen model's pass").value > reference


def test_a_reference_reads_as_many_sequences_as_the_policy() -> None:
    """Four times the batch are four times the rows in its pass, whose weights are counted apart."""
    few, many = (
        step(objective="grpo", reference="model", rollouts=8, batch=n).stages["scoring"].value
        for n in (1, 4)
    )
    assert many > 3 * few


def test_more_rollouts_take_more_only_while_they_are_written() -> None:
    """The cache of a rollout is gone when the policy is trained."""
    few, many = (step(objective="grpo", rollouts=n) for n in (8, 64))
    assert many.peaks["rollouts"] > few.peaks["rollouts"]
    assert many.peaks["backward"] == few.peaks["backward"]


def test_ppo_keeps_the_logits_of_what_it_writes() -> None:
    """In fp32 for each of 49,152 tokens, step by step and as one tensor: TRL's `generate` stacks
    what transformers returns, `torch.stack(output.logits, 1)`."""
    written = step(objective="ppo", rollouts=8, completion=100).stages["rollouts"]
    logits = written.part("logits of the rollouts")
    assert logits.value == 2 * 4 * 8 * 100 * 49_152


def test_an_engine_that_sleeps_leaves_its_memory_to_training() -> None:
    """vLLM on the same device is there throughout, or only while it writes."""
    awake = step(objective="grpo", engine=10**9)
    asleep = step(objective="grpo", engine=10**9, engine_sleeps=True)
    assert awake.peaks["backward"] - asleep.peaks["backward"] == 10**9
    assert awake.peaks["rollouts"] == asleep.peaks["rollouts"]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (Choices(objective="sft", reference="model"), "has no reference"),
        (Choices(objective="dpo", reference="adapter"), "no adapters to switch off"),
        (Choices(objective="grpo", completion=2048), "leave nothing of 2,048"),
        (Choices(objective="dpo", completion=2048), "leave nothing of 2,048"),
        (Choices(completion=100), "takes all tokens"),
        (Choices(objective="reward", completion=100), "one number"),
    ],
)
def test_what_an_objective_has_not_is_refused(choices: Choices, message: str) -> None:
    """One clear error each."""
    with pytest.raises(LLMSizeError, match=message):
        run_of(choices)


def test_a_completion_is_all_that_trl_scores() -> None:
    """Of a prompt without labels no logits are made, nor are its last hidden states copied (TRL
    v1.16, trainer/utils.py, `hidden_states[mask] if compact`).
    """
    model = presets.get(Architecture, "smollm-135m")
    few, all_ = (
        training_step(model, run_of(Choices(completion=n, recompute="full"), stack="trl"))
        for n in (300, 0)
    )
    rows = 2047 - 300
    index_copy = 576 * 2  # of each scored token, in 16 bit
    assert all_.kept - few.kept == pytest.approx(rows * index_copy, rel=0.05)
    assert few.peaks["forward"] < all_.peaks["forward"]


@pytest.mark.parametrize("more", [(), ("--completion", "100")])
def test_the_longest_sequence_has_a_prompt(
    more: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A search over lengths begins where something is left of them beside what is written."""
    words = ("--objective", "grpo", "--fit", "seq-len", "--vram", "8GB", *more)
    assert run_command(["train", "smollm-135m", *words]) == 0
    assert "the largest seq-len that fits" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["dpo", "grpo", "ppo"])
def test_a_pass_of_another_model_is_graded_like_the_policys_own(objective: str) -> None:
    """What was followed is no exact number, whichever model it was followed in."""
    found = step(objective=objective, sequence=64)
    assert found.stages
    assert {stage.grade for stage in found.stages.values()} == {"formula"}


def test_a_wrong_objective_gets_a_close_one() -> None:
    """A misspelt name is answered with a close one."""
    with pytest.raises(LLMSizeError, match="unknown objective `dpoo`"):
        objective_named("dpoo")


@pytest.mark.parametrize(
    "words",
    [
        ["--objective", "sft", "--completion", "100"],
        ["--objective", "grpo", "--vllm-share", "0.3"],
        ["--objective", "dpo", "--rollouts", "8"],
        ["--method", "ia3", "--rank", "8"],
        ["--method", "ia3", "--fit", "rank", "--vram", "24GB"],
        ["--method", "prompt-tuning", "--targets", "q_proj"],
    ],
)
def test_the_command_refuses_what_does_not_apply(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, an error and a hint."""
    assert run_command(["train", "smollm-135m", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "\nhint: " in told


def test_the_command_says_when_what_lives(capsys: pytest.CaptureFixture[str]) -> None:
    """Every model's passes have their highest moment, in the order in which TRL's PPO has them."""
    words = ["smollm-135m", "--objective", "ppo", "--seq-len", "256", "--format", "plain"]
    assert run_command(["train", *words]) == 0
    told = capsys.readouterr().out
    moments = told.partition("the highest of each moment: ")[2].splitlines()[0]
    assert re.findall("([a-z][a-z' ]+) [0-9]", moments) == [
        "rollouts", "scoring", "forward", "backward", "value model's backward", "step",
    ]  # fmt: skip


def test_a_reference_reads_between_the_policys_passes() -> None:
    """TRL's DPO runs it where the policy's activations are kept, and nothing of it is left."""
    *_, before, read, _ = (
        point for point in step(objective="dpo").timeline if point.phase != "step"
        and point.place in ("head and loss", "other models")
    )  # fmt: skip
    assert (before.phase, read.phase) == ("forward", "reference")
    assert before.after == read.after < read.highest
