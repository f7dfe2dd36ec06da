"""Training methods against peft: trained parameters, states, what is kept, and both peaks.

The rows have five layers of each model; benchmarks/measure_trace.py made them with `--mode`
(transformers 5.23, peft 0.21, torch 2.13). Published counts are PEFT's MetaMath benchmark and
LitGPT's resource tables, as in measured_training.csv.
"""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import run_of

from benchmarks.tables.traces import method_traces
from llmsize import presets
from llmsize.anatomy import LoRA, Setting, run_forward
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.formats import INT4, Format
from llmsize.memory.methods import METHODS, Choices, check_options
from llmsize.memory.peak import peak_memory
from llmsize.memory.training import training_step
from llmsize.optimizers import Optimizer
from llmsize.sources.config import architecture, read_config
from llmsize.term import term

REFERENCE = Path(__file__).parent / "reference"
QV = ("q_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj")

with (REFERENCE / "method_traces.csv").open() as table:
    ROWS = list(csv.DictReader(table))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["case_id"])
def test_a_method_trains_keeps_and_peaks_as_peft_does(row: dict[str, str]) -> None:
    """Counts, states, kept bytes and all peaks equal the traced step to the byte."""
    answers = {answer.quantity: answer for answer in method_traces([row], REFERENCE)}
    assert {name: a.got for name, a in answers.items()} == {
        name: a.expected for name, a in answers.items()
    }


PUBLISHED = (
    ("llama-3.2-3b", Choices("lora", rank=32, targets=("q_proj", "v_proj")), 9_175_040),
    ("llama-3.2-3b", Choices("dora", rank=32, targets=("q_proj", "v_proj")), 9_289_728),
    ("llama-3.2-3b", Choices("lora-fa", rank=32, targets=("q_proj", "v_proj")), 3_670_016),
    ("llama-3.2-3b", Choices("ia3"), 286_720),
    ("llama-3.2-3b", Choices("prompt-tuning", tokens=200), 614_400),
    ("llama-3.2-3b", Choices("p-tuning", tokens=20), 28_382_208),
    ("llama-3.2-3b", Choices("norms"), 175_104),
    ("llama-3.2-3b", Choices("vera", rank=256, targets=("q_proj", "v_proj")), 129_024),
    ("llama-3.2-3b", Choices("loha", rank=32, targets=("q_proj", "v_proj")), 18_350_080),
    ("llama-3.2-3b", Choices("lokr", rank=32, factor=4, targets=("q_proj", "v_proj")), 2_294_656),
    ("llama-3.2-3b", Choices("miss", rank=64, targets=("q_proj", "v_proj")), 7_340_032),
    ("llama-3.2-3b", Choices("boft", targets=("q_proj", "v_proj")), 802_816),
    ("llama-3.2-3b", Choices("adaption-prompt", tokens=100), 8_601_628),
    ("llama-3.2-3b", Choices("trainable-tokens", tokens=2), 6_144),
    ("llama-2-7b", Choices("llama-adapter"), 1_229_760),
    ("llama-2-7b", Choices("llama-adapter-v2"), 4_279_744),
    ("stablelm-base-alpha-3b", Choices("llama-adapter"), 573_888),
    ("stablelm-base-alpha-3b", Choices("llama-adapter-v2"), 2_125_248),
)


@pytest.mark.parametrize(("model", "choices", "published"), PUBLISHED)
def test_trained_parameters_are_those_that_were_published(
    model: str, choices: Choices, published: int
) -> None:
    """PEFT's and LitGPT's own counts, to the parameter."""
    step = training_step(presets.get(Architecture, model), run_of(replace(choices, sequence=64)))
    assert step.trained == published


def test_modules_to_save_are_trained_copies_beside_the_frozen_ones() -> None:
    """peft's own count and bytes for five layers of Llama-2-7B with embedding and head."""
    base = presets.get(Architecture, "llama-2-7b")
    model = replace(base, config={**base.config, "num_hidden_layers": 5})
    choices = Choices("lora", sequence=64, modules_to_save=("embed_tokens", "lm_head"))
    step = training_step(model, run_of(choices))
    assert step.trained == 268_390_400
    assert step.static.part("weights").value == 3_097_403_392


def test_the_embeddings_gradient_stays_in_every_micro_batch() -> None:
    """peft asks for it where layers run again; traced with 2 batches of 5 × 333 (torch 2.13)."""
    model = read_config(REFERENCE / "trace_configs" / "llama-3.2-1b-2-layers.json", "two layers")
    choices = Choices("miss", batch=5, sequence=333, rank=4, targets=QV, recompute="full",
                      accumulation=2)  # fmt: skip
    step = training_step(
        model, run_of(choices)._replace(optimizer=presets.get(Optimizer, "adamw-foreach"))
    )
    assert (step.peaks["backward"], step.peaks["step"]) == (3_358_910_084, 782_702_868)


def test_formulas_of_prompts_can_be_evaluated() -> None:
    """What lives at the peak is an expression of its inputs' names."""
    run = run_of(Choices("trainable-tokens", tokens=8000))
    step = training_step(presets.get(Architecture, "smollm-135m"), run)
    parts = [part for role in peak_memory(step).parts for part in role.parts if part.formula]
    assert any("_tokens" in part.formula for part in parts)
    for part in parts:
        again = term(part.name, part.formula, unit=part.unit, **part.inputs)
        assert again.value == part.value


@pytest.mark.parametrize("method", ["trainable-tokens", "prompt-tuning", "prefix-tuning"])
def test_prompts_of_an_encoder_with_a_decoder_are_refused(method: str) -> None:
    """T5's class is one though a configuration need not say so (transformers 5.23, `T5Config`)."""
    sizes = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2}
    model = architecture({"model_type": "t5", "vocab_size": 100, **sizes}, "small", "small")
    with pytest.raises(LLMSizeError, match="encoder, whose prompt is not modelled"):
        training_step(model, run_of(Choices(method, sequence=16)))


def test_houlsby_adapters_have_two_bottlenecks_a_layer() -> None:
    """2 × (2hm + h + m) parameters a layer (Houlsby et al. 2019, section 2.1)."""
    model = presets.get(Architecture, "gpt2")
    step = training_step(model, run_of(Choices("houlsby", width=64, sequence=64)))
    assert step.trained == 12 * 2 * (2 * 768 * 64 + 768 + 64)
    one = training_step(model, run_of(Choices("pfeiffer", width=64, sequence=64)))
    assert one.trained * 2 == step.trained


def test_a_prefix_is_keys_and_values_of_every_layer() -> None:
    """Tokens × layers × 2 × the width of keys (Li and Liang 2021): 20 × 32 × 2 × 1,024."""
    model = presets.get(Architecture, "llama-3-8b")
    step = training_step(model, run_of(Choices("prefix-tuning", sequence=64)))
    assert step.trained == 20 * 32 * 2 * 1024


@pytest.mark.parametrize("stack", ["transformers-4", "litgpt"])
def test_experts_that_are_linear_layers_have_adapters_each(stack: str) -> None:
    """242,225,152 of Mixtral 8x7B, rank 16 on every linear layer (peft 0.10,
    github.com/huggingface/peft/issues/1594), and no copies of the experts' weights.
    """
    model = presets.get(Architecture, "mixtral-8x7b")
    base = presets.get(Format, "nf4")
    found = training_step(
        model, run_of(Choices("qlora", base=base, sequence=512, recompute="full"), stack=stack)
    )
    assert found.trained == 242_225_152
    experts = 8 * 3 * 4096 * 14336 * 2
    assert found.total - found.static.value - found.gradients < experts


def test_galore_keeps_less_than_the_optimizer_it_projects() -> None:
    """Table 1 of GaLore: mr + 2nr for a matrix, so less than 2mn; the rank raises it."""
    model = presets.get(Architecture, "smollm-135m")
    states = [
        training_step(model, run_of(Choices(method, rank=rank, sequence=64))).static.part(
            "optimizer states"
        ).value
        for method, rank in (("galore", 32), ("galore", 128), ("full", 16))
    ]  # fmt: skip
    assert states[0] < states[1] < states[2]


def test_galore_begins_with_what_the_last_plain_weight_left() -> None:
    """Five layers of DeepSeek-Coder-1.3B in fp16, traced with galore-torch 1.0, rank 8 (torch 2.13,
    transformers 5.23): a head's two temporaries are there beside the first projected gradient."""
    base = presets.get(Architecture, "deepseek-coder-1.3b")
    model = replace(base, config={**base.config, "num_hidden_layers": 5})
    choices = Choices("galore", rank=8, sequence=1024, format=presets.get(Format, "fp16"))
    assert training_step(model, run_of(choices)).peaks["step"] == 2_338_443_780


@pytest.mark.parametrize(("format", "traced"), [("bf16", 1_214_976), ("fp32", 3_437_568)])
def test_galore_has_the_states_of_a_traced_step(format: str, traced: int) -> None:
    """galore-torch 1.0 on transformers 5.23, rank 8 (torch 2.13): projections are views in fp32."""
    config = {"model_type": "llama", "hidden_size": 128, "num_attention_heads": 4, "head_dim": 32,
              "num_key_value_heads": 2, "intermediate_size": 352, "num_hidden_layers": 3,
              "vocab_size": 1000, "tie_word_embeddings": False}  # fmt: skip
    choices = Choices("galore", rank=8, sequence=64, format=presets.get(Format, format))
    step = training_step(architecture(config, "small", "small"), run_of(choices))
    assert step.static.part("optimizer states").value == traced


def test_galore_in_8_bit_is_what_was_measured() -> None:
    """LLaMA-Factory's table 4: 15.43 GB for Llama-2-7B, rank 128, 512 tokens, layer by layer."""
    choices = Choices("galore", rank=128, sequence=512, recompute="full", fused_backward=True)
    step = training_step(
        presets.get(Architecture, "llama-2-7b"), run_of(choices, optimizer="adamw-8bit")
    )
    assert step.total == pytest.approx(15.43e9, rel=0.05)


def test_lomo_keeps_neither_states_nor_all_gradients() -> None:
    """LOMO steps every weight by SGD as its gradient comes (Lv et al. 2023)."""
    model = presets.get(Architecture, "smollm-135m")
    lomo = training_step(model, run_of(Choices("lomo", sequence=64), optimizer="sgd"))
    full = training_step(model, run_of(Choices("full", sequence=64), optimizer="sgd"))
    assert lomo.static.part("optimizer states").value == 0
    assert lomo.total < full.total


def test_lora_goes_around_an_embedding_or_a_tied_head_by_name() -> None:
    """peft's `lora.Embedding` has rank × (rows + width) numbers, and so has a linear head."""
    model = presets.get(Architecture, "gpt2")
    for name in ("wte", "lm_head"):
        choices = Choices("lora", rank=8, targets=(name,), sequence=64)
        assert training_step(model, run_of(choices)).trained == 8 * (50_257 + 768)


def test_what_has_no_way_around_an_embedding_says_so() -> None:
    """IA3's layers are linear ones."""
    with pytest.raises(LLMSizeError, match="is an embedding"):
        training_step(
            presets.get(Architecture, "gpt2"), run_of(Choices("ia3", targets=("wte",), sequence=64))
        )


def test_gptq_layers_keep_their_weights_in_16_bit() -> None:
    """`torch.matmul(x, weights)` keeps `weights` where `x` wants a gradient (GPTQModel,
    nn_modules/qlinear/torch.py): in Llama-2-7B those of all layers but the first one's q, k and v.
    """
    model, kept = presets.get(Architecture, "llama-2-7b"), {}
    for name in ("gptq-int4-g128", "nf4"):
        run = run_of(Choices("qlora", base=presets.get(Format, name), sequence=64))
        kept[name] = training_step(model, run).kept
    hidden, inner = 4096, 11008
    layers = 32 * (4 * hidden**2 + 3 * hidden * inner)
    assert kept["gptq-int4-g128"] - kept["nf4"] == 2 * (layers - 3 * hidden**2)


@pytest.mark.parametrize("base", ["nf4", "nf4-dq", "llm-int8", "gptq-int4-g128"])
def test_a_quantized_base_is_smaller_and_is_dequantized_one_by_one(base: str) -> None:
    """The weights shrink; a 16-bit copy of one matrix lives while it is used."""
    model, format = presets.get(Architecture, "llama-3-8b"), presets.get(Format, base)
    plain = training_step(model, run_of(Choices("lora", sequence=64)))
    quantized = training_step(model, run_of(Choices("qlora", base=format, sequence=64)))
    assert quantized.static.part("weights").value < 0.65 * plain.static.part("weights").value


def test_an_int8_base_keeps_what_its_layers_read() -> None:
    """bitsandbytes keeps the 16-bit input of every int8 layer, so more than beside NF4."""
    model = presets.get(Architecture, "llama-3-8b")
    kept = [
        training_step(
            model, run_of(Choices("qlora", base=presets.get(Format, base), sequence=512))
        ).kept
        for base in ("nf4", "llm-int8")
    ]
    assert kept[1] > kept[0]


def test_upcasting_doubles_what_is_not_quantized() -> None:
    """Embeddings, head and norms of Llama-3-8B are 1,050,939,392 parameters: 2 bytes more each."""
    model, base = presets.get(Architecture, "llama-3-8b"), presets.get(Format, "nf4")
    choices = Choices("qlora", base=base, sequence=64)
    weights = [
        training_step(model, run_of(replace(choices, upcast=upcast))).static.part("weights").value
        for upcast in (False, True)
    ]
    assert weights[1] - weights[0] == 2 * (2 * 128_256 * 4096 + 65 * 4096)


# Parameters of the linear modules, all parameters and layers (transformers 5.23: modules whose type
# is nn.Linear, less `get_keys_to_not_convert`). Mamba has a `dt_proj`, too.
MAMBA = {"in_proj": 56_623_104, "x_proj": 2_949_120, "out_proj": 28_311_552}, 129_135_360, 24
FALCON_MAMBA = {"in_proj": 4_294_967_296, "x_proj": 150_994_944, "dt_proj": 134_217_728,
                "out_proj": 2_147_483_648}, 7_272_665_088, 64  # fmt: skip


@pytest.mark.parametrize(
    ("name", "stack", "counts", "called"),
    [
        ("mamba-130m", "transformers", MAMBA, tuple(MAMBA[0])),
        ("mamba-130m", "transformers-kernels", MAMBA, ("in_proj",)),
        ("falcon-mamba-7b", "transformers", FALCON_MAMBA, tuple(FALCON_MAMBA[0])),
    ],
)
def test_matrices_of_layers_that_mamba_calls_are_quantized(
    name: str, stack: str, counts: tuple[dict[str, int], int, int], called: tuple[str, ...]
) -> None:
    """NF4 has half a byte and 1/16 of one for fp32 scales of 64, and a table of 16 a matrix.

    Mamba multiplies by `dt_proj.weight` itself, Falcon-Mamba calls a quantized `dt_proj`, and
    kernels are handed all behind `in_proj`: what is not called stays in 16 bit.
    """
    linear, parameters, layers = counts
    packed = sum(linear[module] for module in called)
    choices = Choices("qlora", base=presets.get(Format, "nf4"), rank=1, sequence=32)
    step = training_step(presets.get(Architecture, name), run_of(choices, stack=stack))
    weights = step.static.part("weights").value - 4 * step.trained  # without fp32 adapters
    tables = layers * len(called) * 16 * 4
    assert weights == packed * 9 // 16 + tables + 2 * (parameters - packed)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_source_and_runs_or_says_why(name: str) -> None:
    """On Qwen2.5, which has biases, norms and a tied head, all but one method run."""
    method = METHODS[name]
    choices = Choices(
        name, sequence=32, frozen_layers=4 if name == "frozen" else 0,
        base=presets.get(Format, "nf4") if name in ("qlora", "qdora") else None,
    )  # fmt: skip
    assert method.source
    if name == "adaption-prompt":
        with pytest.raises(LLMSizeError, match="no family that peft"):
            training_step(presets.get(Architecture, "qwen2.5-0.5b"), run_of(choices))
        return
    step = run_of(choices, optimizer=method.optimizer or "adamw")
    assert training_step(presets.get(Architecture, "qwen2.5-0.5b"), step).trained > 0


@pytest.mark.parametrize(
    ("model", "trained"),
    [("opt-125m", 12 * 16 * (4 * 768 + 3072 + 768)), ("qwen2.5-0.5b", 24 * 16 * 12_672)],
)
def test_parts_are_summed_whatever_shape_the_tokens_have(model: str, trained: int) -> None:
    """MiSS has a row of outputs for each of its ranks; OPT folds sequences before its MLP."""
    step = training_step(presets.get(Architecture, model), run_of(Choices("miss", sequence=32)))
    assert step.trained == trained


def test_an_option_that_a_method_has_not_is_refused() -> None:
    """IA3 has no rank, and the message says what it has."""
    with pytest.raises(LLMSizeError, match="`ia3` has no rank"):
        check_options(METHODS["ia3"], ["rank"])


@pytest.mark.parametrize("method", ["prefix-tuning", "llama-adapter"])
def test_a_model_without_attention_has_no_place_for_a_prefix(method: str) -> None:
    """Mamba keeps no keys and values."""
    model = presets.get(Architecture, "mamba-130m")
    with pytest.raises(LLMSizeError, match=r"reads what is trained|no part that|has no"):
        training_step(model, run_of(Choices(method, sequence=32)))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (Choices("prefix-tuning", recompute="full"), "does not work with recomputation"),
        (Choices("lora", modules_to_save=("nonsense",)), "no module is called `nonsense`"),
        (Choices("ia3", targets=("nonsense",)), "no linear layer is called `nonsense`"),
        (Choices("houlsby", width=100_000), "is wider than"),
        (Choices("dora", rank=100_000), "above the dimensions"),
        (Choices("trainable-tokens", tokens=10**8), "trained tokens in a vocabulary"),
        (Choices("lomo"), "does not step with AdamW"),
        (Choices("qlora"), "needs a quantized base"),
        (Choices("llama-adapter"), "no part that the adapters go to"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(choices: Choices, message: str) -> None:
    """One clear error each."""
    with pytest.raises(LLMSizeError, match=message):
        training_step(presets.get(Architecture, "gpt2"), run_of(replace(choices, sequence=32)))


@pytest.mark.parametrize(
    "setting",
    [Setting(format=INT4), Setting(autocast=INT4), Setting(adapter=LoRA(("all-linear",), INT4))],
)
def test_nothing_is_computed_in_a_format_of_blocks(setting: Setting) -> None:
    """PyTorch's tensors have elements: two that share a byte are stored, and never computed in."""
    with pytest.raises(LLMSizeError, match="nothing is computed in `int4`"):
        run_forward(presets.get(Architecture, "gpt2"), setting)
