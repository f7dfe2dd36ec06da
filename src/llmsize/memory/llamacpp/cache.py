"""The KV buffer of llama.cpp: cells, streams, windows and padding.

llama.cpp 0c1e57098: src/llama-context.cpp, src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmsize.anatomy.cache import LayerCache
from llmsize.formats import FP16, FP32, Format, stored_bytes
from llmsize.quick_dataclasses import dataclass

CELL_BLOCK = 256
"""Cells of a cache come in multiples of this."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Where tensors live: how ggml rounds them up there."""

    alignment: int
    """Every tensor starts at a multiple of this many bytes."""
    row_padding: int = 1
    """The last row of a quantized tensor is padded to a multiple of this many elements."""


HOST = Memory(alignment=32)
"""ggml-impl.h, `TENSOR_ALIGNMENT`."""
CUDA = Memory(alignment=128, row_padding=512)
"""ggml-cuda.cu, `ggml_backend_cuda_buffer_type_get_alignment` and `MATRIX_ROW_PADDING`."""


def tensor_bytes(format: Format, row: int, rows: int, memory: Memory) -> int:
    """Bytes that ggml allocates for `rows` rows of `row` elements in `memory`."""
    size = stored_bytes(format, row) * rows
    if format.block_elements > 1 and row % memory.row_padding:
        size += stored_bytes(format, memory.row_padding - row % memory.row_padding)
    return aligned(size, memory.alignment)


def aligned(size: int, alignment: int) -> int:
    """`size`, rounded up to a multiple of `alignment`."""
    return -(-size // alignment) * alignment


@dataclass(frozen=True, slots=True)
class Server:
    """The options of `llama-server` and `llama-cli` that decide its memory."""

    context: int
    """`-c`, tokens of all slots together."""
    ubatch: int = 512
    """`-ub`, tokens that are computed at once."""
    sequences: int = 1
    """`-np`, slots."""
    unified: bool = False
    """`--kv-unified`: slots share one stream of cells instead of splitting the context."""
    flash_attention: bool = True
    """`-fa`."""
    keys: Format = FP16
    """`-ctk`."""
    values: Format = FP16
    """`-ctv`."""
    full_windows: bool = False
    """`--swa-full`."""
    gpu_layers: int | None = None
    """`-ngl`, counted from the output matrix downwards; `None` for all."""
    cpu_moe_layers: int = 0
    """`--n-cpu-moe`, layers whose experts stay in host memory, from the first."""
    devices: int = 1
    """Accelerators; 0 for the host alone."""
    tensor_split: tuple[float, ...] = ()
    """`--tensor-split`, shares of the layers; empty for equal ones."""
    cache_on_host: bool = False
    """`--no-kv-offload`."""
    logits_of_all: bool = False
    """Logits of every token of a batch, as `llama-perplexity` needs; a server takes one a slot."""

    @property
    def streams(self) -> int:
        """Separate runs of cells."""
        return 1 if self.unified else self.sequences

    @property
    def cells(self) -> int:
        """Cells of one stream."""
        context = aligned(self.context, CELL_BLOCK)
        return aligned(context // self.streams, CELL_BLOCK)


def layer_cells(layer: LayerCache, server: Server) -> int:
    """Cells of one stream that `layer` keeps: a window, what is in flight, and padding."""
    if layer.kind != "window" or server.full_windows:
        return server.cells
    windows = layer.window * (server.sequences if server.unified else 1)
    return aligned(min(server.cells, windows + server.ubatch), CELL_BLOCK)


def layer_cache_bytes(layer: LayerCache, server: Server, memory: Memory = CUDA) -> int:
    """Bytes of the cache of one layer, all slots together."""
    if layer.kind == "none":
        return 0
    state = tensor_bytes(FP32, layer.state, server.sequences, memory) if layer.state else 0
    if layer.kind == "recurrent":
        return state
    rows = layer_cells(layer, server) * server.streams
    keys = tensor_bytes(server.keys, layer.kv_heads * layer.key_dim, rows, memory)
    if not layer.value_dim:
        return state + keys
    values = tensor_bytes(server.values, layer.kv_heads * layer.value_dim, rows, memory)
    return state + keys + values


def cache_bytes(layers: Iterable[LayerCache], server: Server, memory: Memory = CUDA) -> int:
    """Bytes of the KV buffer of `layers`, all in the same memory."""
    return sum(layer_cache_bytes(layer, server, memory) for layer in layers)
