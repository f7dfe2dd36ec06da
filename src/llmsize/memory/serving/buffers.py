"""llama.cpp and Ollama: buffers whose sizes their own allocator decides."""

from __future__ import annotations

from llmsize.errors import LLMSizeError
from llmsize.memory.llamacpp.buffers import memory
from llmsize.memory.serving.parts import runtime
from llmsize.memory.serving.question import Serving
from llmsize.quick_dataclasses import replace
from llmsize.term import Term, total


def places(question: Serving) -> tuple[Term, ...]:
    """llama.cpp's own buffers, and the context on each device that it opens.

    Raises `LLMSizeError` for weights that are no GGUF file's.
    """
    if question.file is None:
        raise LLMSizeError("llama.cpp needs a GGUF type", hint="`--quant q4_k_m`")
    server = replace(
        question.server,
        context=question.context * question.batch, sequences=question.batch, keys=question.keys,
        values=question.values, gpu_layers=question.gpu_layers, devices=question.devices,
        cpu_moe_layers=question.host_experts,
    )  # fmt: skip
    names = {"model": "weights", "KV cache": "KV cache", "compute buffer": "activations"}
    places = []
    for place in memory(question.file, server).parts:
        parts = [replace(part, name=names[part.name]) for part in place.parts]
        if place.name != "host":
            parts.append(runtime(question))
        places.append(total(place.name, *parts))
    return tuple(places)
