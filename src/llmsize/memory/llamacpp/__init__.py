"""What llama.cpp allocates: its cache, its graph, its scheduler and its allocator, simulated."""

from __future__ import annotations

from llmsize.memory.llamacpp.buffers import (
    Buffers,
    Model,
    buffers,
    layer_places,
    memory,
    most_gpu_layers,
)
from llmsize.memory.llamacpp.cache import (
    CUDA,
    HOST,
    Memory,
    Server,
    cache_bytes,
    layer_cache_bytes,
    layer_cells,
)
from llmsize.memory.llamacpp.forward import Decoder

__all__ = [
    "CUDA", "HOST", "Buffers", "Decoder", "Memory", "Model", "Server", "buffers", "cache_bytes",
    "layer_cache_bytes", "layer_cells", "layer_places", "memory",
    "most_gpu_layers",
]  # fmt: skip
