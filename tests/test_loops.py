"""Loops of which few turns are traced, against the same loops traced turn by turn."""

import pytest

from llmsize.anatomy import Setting, loops, run_forward
from llmsize.anatomy.autograd import backward
from llmsize.architecture import Architecture
from llmsize.memory.generation import generation
from llmsize.memory.timeline import level, peak, stretches

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 96, "tie_word_embeddings": True}
ATTENTION = {"num_attention_heads": 4, "head_dim": 16, "intermediate_size": 80}

MODELS = {
    "mamba": SMALL,
    "qwen3_5_text": {
        **SMALL, **ATTENTION, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "kimi_linear": {
        **SMALL, **ATTENTION, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "linear_num_heads": 4, "linear_head_dim": 16, "num_experts": 4,
        "num_experts_per_token": 2, "moe_intermediate_size": 32, "num_shared_experts": 1,
        "layer_types": ["linear_attention", "linear_attention"],
    },
}  # fmt: skip

SETTING = Setting(batch=2, sequence=640, attention="eager")


def step(family: str, setting: Setting) -> tuple[int, ...]:
    """What a training step leaves alive before its backward pass, and both peaks."""
    trace, loss = run_forward(Architecture(family, family, MODELS[family], "test"), setting)
    trace.enter(-1, "backward")
    backward(trace, loss)
    parts = list(stretches(trace))
    kept = level([part for part in parts if part.phase == "forward"])
    return kept, peak(parts, "forward").bytes, peak(parts, "backward").bytes


@pytest.mark.parametrize("checkpoint_every", [0, 1])
@pytest.mark.parametrize("family", MODELS)
def test_few_turns_train_like_all(
    family: str, checkpoint_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a loop keeps and peaks at does not depend on how many of its turns are traced."""
    setting = SETTING._replace(training=True, checkpoint_every=checkpoint_every)
    few = step(family, setting)
    monkeypatch.setattr(loops, "APART", SETTING.sequence)
    assert few == step(family, setting)


@pytest.mark.parametrize("family", MODELS)
def test_few_turns_generate_like_all(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peaks of a prompt and of the next token do not depend on it either."""
    architecture = Architecture(family, family, MODELS[family], "test")
    generated = generation.__wrapped__  # not what was remembered of the same prompt
    few = generated(architecture, SETTING)
    monkeypatch.setattr(loops, "APART", SETTING.sequence)
    every = generated(architecture, SETTING)
    assert (few.prefill_peak, few.decode_peak) == (every.prefill_peak, every.decode_peak)
