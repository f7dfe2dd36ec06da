"""Answers to measurements of inference engines, published as logs and benchmarks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from benchmarks.answers import Answer
from llmsize import presets
from llmsize.anatomy import Trace, traced
from llmsize.architecture import Architecture
from llmsize.engine import Engine, on_card, scheduled
from llmsize.errors import LLMSizeError
from llmsize.formats import Format
from llmsize.hardware import Accelerator
from llmsize.memory.serving import Serving, need, pool, serving
from llmsize.memory.weights import Recipe, weight_bytes
from llmsize.term import Term
from llmsize.units import GIB

Row = Mapping[str, str]

ENGINES = {
    "vLLM 0.19.0": "vllm", "vLLM 0.11.0": "vllm-0.11", "vLLM 0.6.5": "vllm-0.6",
    "transformers 4.38.2": "transformers-4.44", "llama.cpp CUDA (2025-05)": "llama.cpp",
    "llama.cpp (2025-09)": "llama.cpp", "torchao + torch.compile": "gpt-fast",
    "vLLM 0.6.6": "vllm-0.7", "vLLM 0.7": "vllm-0.7", "vLLM 0.7.3": "vllm-0.7",
    "vLLM 0.8.5": "vllm-0.7", "vLLM 0.9.2": "vllm-0.11", "vLLM 0.26.0": "vllm-0.26",
    "vLLM 0.31.0": "vllm-0.26", "SGLang 0.4": "sglang", "transformers 4.38": "transformers-4.44",
}  # fmt: skip
"""Everything else is transformers of today. The logs of 0.6.5 are of a pull request that counted
the context as 0.6.4 does, those of 0.8.5 of the engine V0."""

RECIPES = {
    "GPTQ-Int8": "gptq-int8-g128", "GPTQ-Int4": "gptq-int4-g128", "AWQ": "awq-int4-g128",
    "AWQ-INT4": "awq-int4-g128", "AWQ 4-bit": "awq-int4-g128", "FP8": "fp8-block",
    "GPTQ 4-bit (GPTQModel)": "gptq-int4-g128", "GPTQ 4-bit (AutoGPTQ)": "gptq-int4-g128",
    "bitsandbytes fp4": "fp4", "bitsandbytes int8": "llm-int8",
    "bitsandbytes nf4": "nf4-dq",  # without double quantization less than a context is left
    "quanto w4a16": "w4a16", "torchao int4wo": "torchao-int4-g128",
    "int8wo": "torchao-int8", "fp6": "torchao-fp6", "int8dq": "torchao-int8dq",
    "int4wo-64": "torchao-int4-g64",
    "autoquant-int4hqq": "torchao-int4-hqq-g64", "float8wo": "torchao-float8",
    "float8dq-tensor": "torchao-float8dq", "float8dq-row": "torchao-float8dq",
    "int4wo-64-sparse-marlin": "torchao-int4-sparse-g64",
    "w8a8 int8 (compressed-tensors)": "w8a8", "w4a16 (compressed-tensors)": "w4a16",
    "fp8 dynamic (compressed-tensors)": "fp8", "fp8 (quantized while loading)": "fp8-tensor",
    "mxfp4": "mxfp4", "IQ3_M": "iq3_m",
}  # fmt: skip
"""What a row calls its quantization → the recipe."""

KERNELS_UNKNOWN = "AWQ 4-bit"
"""Some of its kernels keep 1.6 GiB more than others (`awq-exllama`): a run that does not name its
own is judged apart."""

FILES = {
    "AWQ 4-bit": "awq-int4-g128", "MXFP4": "mxfp4", "float8 rowwise": "fp8", "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}  # fmt: skip
"""Beginning of the note of a row about files → the recipe."""

POSITIONS = {"Qwen2-": 32_768}
"""Beginning of the name of an instruction-tuned model → its `max_position_embeddings`, where the
preset is of the base model."""

QUANTIZED = re.compile(r"-(awq|fp8-dynamic|quantized\.\w+|awq-g128)$")
LOG = "log breakdown per GPU"
TAKEN = ("weights", "activation", "non_torch", "cuda_graph", "context")
"""Parts of a log that are taken before the pool of the KV cache gets the rest."""


def measured_inference(rows: list[Row]) -> Iterator[Answer]:
    """Parts of a server's log, peaks of allocators and drivers."""
    for number, row in enumerate(rows, 2):
        name = f"line {number} {row['engine']} {row['model']} {row['quant']}".strip()
        for quantity, expected, got in _row(row):
            yield Answer(name, quantity, expected, got)


def held_out_inference(rows: list[Row]) -> Iterator[Answer]:
    """The same of logs and tables that were searched for when the model was finished."""
    return measured_inference(rows)


def _row(row: Row) -> Iterator[tuple[str, float, float | None]]:
    try:
        asked: Serving | None = _serving(row)
    except LLMSizeError:
        asked = None
    if row["metric"] == LOG:
        server = row["engine"].partition(" ")[0]
        found = _log(row, asked) if asked else {}
        printed = {
            part: float(row[f"{part}_gib"]) for part in (*TAKEN, "kv_pool") if row[f"{part}_gib"]
        }
        for part, expected in printed.items():
            yield f"{server} {part}_gib", expected, found.get(part)
        if printed.keys() >= {*TAKEN}:
            taken = sum(found[part] for part in TAKEN) if found else None
            yield f"{server} without its pool, total_gib", sum(printed[p] for p in TAKEN), taken
        if row["kv_tokens"]:
            yield f"{server} kv_tokens", float(row["kv_tokens"]), found.get("tokens")
        return
    if row["metric"].startswith("memory not in"):
        yield "llama.cpp context_gib", float(row["context_gib"]), _engine(row).context / GIB
        return
    places = [p for p in need(asked) if p.name != "host"] if asked else []
    if row["weights_gib"]:
        weights = sum(place.part("weights").value for place in places) - _left_out(row, asked)
        yield "weights_gib", float(row["weights_gib"]), weights / GIB if places else None
    if row["total_gib"]:
        got = sum(_total(row, place) for place in places) / GIB
        unknown = "; kernels not published" if row["quant"] == KERNELS_UNKNOWN else ""
        quantity = f"{row['metric']}, total_gib{unknown}"
        yield quantity, float(row["total_gib"]), got if places else None


def _log(row: Row, asked: Serving) -> dict[str, float]:
    """What the engine would print."""
    places = need(asked)
    # of a pipeline the log shows a stage in the middle
    place = places[len(places) // 2 - (len(places) == 2)]
    card = float(row["gpu_total_gib"] or 0)
    left = pool(asked, int(card * GIB), float(row["utilization"] or asked.engine.utilization))
    parts = {
        "activation": "activations", "non_torch": "libraries",
        "cuda_graph": "CUDA graphs", "context": "context",
    }  # fmt: skip
    known = {part.name for part in place.walk()}
    loaded = ("weights", "absorbed matrices", "rotary tables", "blocks beyond tensors",
              "vision tower", "audio tower", "projector")  # fmt: skip
    return {
        **{name: place.part(part).value / GIB for name, part in parts.items() if part in known},
        "weights": sum(p.value for p in place.parts if p.name in loaded) / GIB,
        "kv_pool": left.bytes / GIB,
        "tokens": float(left.tokens),
    }


def _total(row: Row, place: Term) -> float:
    """The parts that the row's meter sees."""
    parts = {part.name: part.value for part in place.parts}
    if row["metric"].startswith("torch memory reported"):
        return parts["weights"] + parts["KV cache"]
    if row["metric"].startswith("peak torch"):
        return place.value - parts["context and libraries"]
    if row["metric"].startswith("device memory"):
        return place.value + _engine(row).display  # everything on the card, its screen included
    return place.value


def _left_out(row: Row, asked: Serving | None) -> float:
    """The input embedding, where a row says that it leaves it out."""
    if asked is None or "exclude the input embedding" not in row["note"]:
        return 0
    return sum(weight_bytes(w, format) for w, format in asked.weights if w.role == "embedding")


def _engine(row: Row) -> Engine:
    if row["engine"] == "transformers" and row["source"].startswith("QwenLM/Qwen "):
        return presets.get(Engine, "transformers-4.35")  # the first Qwen, with code of its own
    engine = presets.get(Engine, ENGINES.get(row["engine"], "transformers"))
    return _told(engine, row) if row.get("card") else engine


def _told(engine: Engine, row: Row) -> Engine:
    """As it is on the card that a row names, with what its scheduler was told."""
    card = presets.get(Accelerator, row["card"])
    memory = int(float(row["gpu_total_gib"]) * GIB)
    engine = on_card(engine, card.name, memory, card.compute_capability, int(row["tp"]))
    sequences, tokens = row["max_num_seqs"], row["max_num_batched_tokens"]
    if not (sequences or tokens):
        return engine
    return scheduled(engine, int(sequences) if sequences else None, int(tokens) if tokens else None)


@lru_cache(maxsize=256)
def _model(name: str) -> tuple[Architecture, Trace]:
    plain = QUANTIZED.sub("", name.lower().replace(" ", "-"))
    base = plain.rpartition("/")[2]
    for candidate in (name, plain, base, base.removeprefix("meta-")):
        if found := presets.find(Architecture, candidate):
            found = _instructed(found, name)
            return found, traced(found)
    raise LLMSizeError(f"unknown model `{name}`", hint="add a preset")


def _instructed(base: Architecture, name: str) -> Architecture:
    """The instruction-tuned model of that name, made of its base model."""
    positions = [count for begin, count in POSITIONS.items() if name.startswith(begin)]
    if not positions or not name.endswith("-Instruct"):
        return base
    return replace(base, config={**base.config, "max_position_embeddings": positions[0]})


def _serving(row: Row) -> Serving:
    """The settings of a row in llmsize's words."""
    architecture, trace = _model(row["model"])
    engine = _engine(row)
    recipe = _recipe(row)
    format = presets.get(Format, row["dtype"] or "bf16")
    wanted = {"": format.name, "auto": format.name, "f16": "fp16", "fp8": "fp8"}
    cached = presets.get(Format, wanted.get(row["kv_dtype"], row["kv_dtype"]))
    made = serving(
        architecture, trace, engine, recipe, _format, format=format, keys=cached, values=cached
    )
    prompt, new = int(row["context"] or 0), int(row["new_tokens"] or 0)
    return replace(
        made, context=prompt + new or 256, prompt=0 if row["metric"] == LOG else prompt or 1,
        batch=int(row["batch"] or 1), devices=int(row["tp"] or row["n_gpu"] or 1),
        stages=int(row["pp"] or 1),
        gpu_layers=int(row["gpu_layers"]) if row["gpu_layers"] else None,
    )  # fmt: skip


def _recipe(row: Row) -> Recipe | None:
    noted = [recipe for begin, recipe in FILES.items() if row["note"].startswith(begin)]
    if not row["quant"]:
        return presets.get(Recipe, noted[0]) if noted else None
    if row["quant"] not in RECIPES:
        raise LLMSizeError(f"unknown quantization {row['quant']}", hint="add a recipe")
    return presets.get(Recipe, RECIPES[row["quant"]])


@lru_cache(maxsize=256)
def _format(name: str) -> Format:
    return presets.get(Format, name)
