"""Published runs of training: their peaks, and whether they fitted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from benchmarks.answers import Answer
from benchmarks.verdicts import verdicts
from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.formats import BF16, FP16, FP32, Format
from llmsize.hardware import Accelerator, slug
from llmsize.memory.methods import Choices, Recompute
from llmsize.memory.peak import device_memory
from llmsize.optimizers import Optimizer, Precision
from llmsize.planning.training import Question, run_of
from llmsize.stack import Stack
from llmsize.term import Term

BLOG_2023 = "hf-4bit-blog"
"""The post of 24 May 2023: with bitsandbytes 0.39.0, and a transformers that computes Llama's
attention by nothing but eager operations (pull request 26572 is of December). The post states
neither ranks nor targets."""

STACKS = {"torchtune": "torchtune", "litgpt": "lit-gpt-2023", "unsloth": "unsloth",
          "torchtitan": "torchtitan", "hf-docs": "transformers-4-torch-1",
          "xmem-data": "transformers-4", BLOG_2023: "transformers-4"}  # fmt: skip
"""The framework of each source; transformers for all others."""

METHODS = {
    "full": "full", "lora": "lora", "qlora": "qlora", "lora (dora)": "dora", "ln_tuning": "norms",
    "lora (lora-fa)": "lora-fa", "hira": "hira", "ia3": "ia3", "prompt_tuning": "prompt-tuning",
    "ptuning": "p-tuning", "prefixtuning": "prefix", "adaptionprompt": "adaption-prompt",
    "lora (rslora)": "rslora", "adapter (LLaMA-Adapter)": "llama-adapter",
    "adapter on 4-bit base": "llama-adapter", "adapter v2": "llama-adapter-v2",
    "adapter v2 on 4-bit base": "llama-adapter-v2",
}  # fmt: skip

VIRTUAL_TOKENS = {"prompt_tuning": 200, "ptuning": 20, "prefixtuning": 200,
                  "adaptionprompt": 100, "trainable_tokens": 2}  # fmt: skip
"""Lengths of the prompts in PEFT's benchmark (method_comparison/MetaMathQA/experiments)."""

OPTIMIZERS = {
    "AdamW": "adamw", "Adam": "adamw", "SGD (no momentum)": "sgd", "Adafactor": "adafactor",
    "AdamW8bit, fused in backward": "adamw-8bit", "AdamW, fused in backward": "adamw",
    "AdamW (fp32 states)": "adamw", "LoRA r=100 Adam": "adamw", "adamw_8bit": "adamw-8bit",
    "PagedAdamW (bnb, 32-bit)": "adamw-fp32", "Adam8bit (bnb)": "adamw-8bit",
    "LoRA-FA AdamW": "adamw",
}  # fmt: skip


def measured_training(rows: list[dict[str, str]]) -> Iterator[Answer]:
    """Published peaks of real runs on one device, in the meter that each was read with."""
    for row in rows:
        measured = row["kind"] in ("measured", "measured_derived") and row["grade"] == "A"
        if not (measured and row["gpus"] == "1"):
            continue
        try:
            asked = _question(row)
            memory = device_memory(
                asked.architecture, run_of(asked), asked.stack, card=asked.accelerator
            )
            got = reading(memory, _meter(row["metric"]))
            yield Answer(row["id"], "training, any meter", int(row["bytes"]), got)
        except LLMSizeError:
            got = None
        yield Answer(row["id"], f"peak, {_meter(row['metric'])}", int(row["bytes"]), got)
    yield from verdicts(rows, _question)


def feasible_training(rows: list[dict[str, str]]) -> Iterator[Answer]:
    """Benchmark runs of llm-foundry, which fitted: whether they are not said not to."""
    yield from verdicts(rows, _foundry)


def _question(row: Mapping[str, str]) -> Question:
    """The step of a row. Raises `LLMSizeError` for a model or an optimizer that is not known."""
    return Question(
        _headed(row), _published(row), _stack(row), _precision(row),
        presets.get(Optimizer, _optimizer(row)), presets.find(Accelerator, slug(row["gpu"])),
    )  # fmt: skip


def _headed(row: Mapping[str, str]) -> Architecture:
    """The model of a row, with a classifier's head where its notes say so."""
    model = presets.get(Architecture, row["model"])
    if not row["notes"].startswith("sequence classification"):
        return model
    heads = {"architectures": ["BertForSequenceClassification"]}
    return replace(model, config={**model.config, **heads})


MPT_VOCABULARY = 50_368


def _foundry(row: Mapping[str, str]) -> Question:
    """A step of llm-foundry's benchmarks, whose shapes are in the notes.

    An MPT block under flash attention keeps what GPT-2's does: ALiBi lives in the kernel.
    """
    shape = re.search(r"L,h,heads=\((\d+), (\d+), (\d+)\)", row["notes"])
    assert shape
    layers, hidden, heads = map(int, shape.groups())
    config = {
        "vocab_size": MPT_VOCABULARY, "n_layer": layers, "n_embd": hidden, "n_head": heads,
        "n_positions": int(row["seq_len"]), "activation_function": "gelu", "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": True,
    }  # fmt: skip
    model = Architecture("mpt", "gpt2", config, "mosaicml/llm-foundry scripts/train/benchmarking")
    choices = Choices(
        batch=int(row["batch_per_device"]), sequence=int(row["seq_len"]), format=BF16,
        recompute="full" if row["recompute"] == "full" else "none",
    )  # fmt: skip
    return Question(
        model, choices, presets.get(Stack, "llm-foundry"), presets.get(Precision, "mixed"),
        presets.get(Optimizer, "adamw"),
    )  # fmt: skip


def _stack(row: Mapping[str, str]) -> Stack:
    """The framework; torchtune's cumulative table turns chunked losses on in a row of its own."""
    name = "transformers" if "Hugging Face" in row["notes"] else STACKS.get(row["source"])
    stack = presets.get(Stack, name or "transformers")
    if row["source"] == "xmem-data":  # perf_estimator/trainer/train_loop.py holds `outputs`
        stack = replace(stack, keep_outputs=True)
    if row["source"] == BLOG_2023:
        stack = replace(stack, keeps_quantized_inputs=True)
    before = row["notes"].startswith(("+ packed", "+ compile"))
    return replace(stack, loss="eager") if before else stack


def _optimizer(row: Mapping[str, str]) -> str:
    return OPTIMIZERS.get(row["optimizer"], row["optimizer"])


def _precision(row: Mapping[str, str]) -> Precision:
    if row["weight_dtype"].startswith("fp32 shards"):
        return presets.get(Precision, "mixed")
    fp32 = row["weight_dtype"] == "fp32"
    amp = fp32 and "AMP" in row["compute_dtype"]
    return presets.get(Precision, "amp" if amp else "fp32" if fp32 else "pure-16bit")


METERS = ("allocated", "reserved", "device")
"""Each reads what the one before it does, and the next part of the memory of a device."""


def reading(memory: Term, meter: str) -> int:
    """What a meter reads of the memory of a device: all but the parts of those after it."""
    after = len(METERS) - 1 - METERS.index(meter)
    return sum(int(part.value) for part in memory.parts[: len(memory.parts) - after])


def _meter(metric: str) -> str:
    if "reserved" in metric:
        return "reserved"
    return "device" if "NVML" in metric else "allocated"


def _published(row: Mapping[str, str]) -> Choices:
    """A row's settings; of a range of lengths the longest, which sets the peak."""
    modules = row["lora_targets"].replace("all linear", "").split(" ")[0] or "all-linear"
    short = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    targets = tuple(short.get(name, name) for name in modules.split(","))
    fp32 = row["weight_dtype"] == "fp32"
    return Choices(
        method=METHODS.get(row["method"], row["method"]),
        batch=int(row["batch_per_device"]),
        sequence=int("".join(c for c in row["seq_len"].split(" ")[0] if c.isdigit()) or 512),
        padded=row["seq_len"].startswith("<="),
        format=(FP16 if "fp16" in row["compute_dtype"] else FP32) if fp32 else BF16,
        rank=int(row["lora_rank"] or 16),
        targets=targets,
        adapter_dropout=0.05 if row["source"] == "litgpt" else 0.0,  # litgpt/finetune/lora.py
        tokens=VIRTUAL_TOKENS.get(row["method"], 0),
        factor=_factor(row["source_ref"]),
        base=_quantized(row),
        recompute=next((kind for kind in RECOMPUTED if row["recompute"].startswith(kind)), "none"),
        offload_checkpoints="offload" in row["recompute"],
        attention="eager" if row["attention"] == "eager" or row["source"] == BLOG_2023 else "sdpa",
        fused_backward="fused in backward" in row["optimizer"],
        compiled=row["compile"] == "yes",
    )


RECOMPUTED: tuple[Recompute, ...] = ("full", "selective")


def _factor(result: str) -> int:
    """LoKr's factor, which the name of a result of PEFT's benchmark has where it is given."""
    given = re.search(r"-factor(\d+)", result)
    return int(given[1]) if given else 0


def _quantized(row: Mapping[str, str]) -> Format | None:
    """The format of a quantized base, where there is one."""
    quantized = any(kind in row["weight_dtype"] for kind in ("nf4", "int8", "int4"))
    return presets.get(Format, _base(row["weight_dtype"])) if quantized else None


def _base(weights: str) -> str:
    """The format of a quantized base, by what the table calls it."""
    if "int8" in weights:
        return "llm-int8"
    return "nf4-dq" if "double" in weights else "nf4"
