"""What is stored: the tensors of a checkpoint as its headers list them, to the byte."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

from llmsize.quick_dataclasses import dataclass

PACKED = frozenset({"int32", "uint8", "int16", "uint16", "uint32"})
"""Plain integers in which weights of fewer bits are packed; their elements are not parameters."""

COMPANIONS = (
    "weight_scale", "weight_scale_inv", "input_scale", "output_scale", "k_scale", "v_scale",
    "weight_zero_point", "weight_shape", "g_idx", "SCB", "weight_format",
)  # fmt: skip
"""Last parts of the names of tensors that a quantized weight brings along (fp8, int8, GPTQ)."""


class StoredTensor(NamedTuple):
    """One tensor in a file."""

    name: str
    shape: tuple[int, ...] | None
    """Elements along each dimension, outermost first; absent where only a pickle knows it."""
    format: str
    """Name of the number format (`bf16`, `q4_k`); empty where only a pickle knows it."""
    bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The stored tensors of one model or adapter."""

    tensors: tuple[StoredTensor, ...]
    source: str
    """The file or folder whose headers were read."""
    adapter: bool = False
    """Whether these are low-rank additions (LoRA) to a model that is stored elsewhere."""
    note: str = ""
    """What these headers do not tell."""


def total_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors; headers and padding of the files are not counted."""
    return sum(tensor.bytes for tensor in checkpoint.tensors)


def bytes_by_format(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the tensors in each format, largest first."""
    sizes: dict[str, int] = {}
    for tensor in checkpoint.tensors:
        sizes[tensor.format] = sizes.get(tensor.format, 0) + tensor.bytes
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def parameters(checkpoint: Checkpoint) -> int | None:
    """Elements of all tensors that hold parameters, or `None` where the headers do not tell.

    They do not tell for PyTorch pickles, nor for weights packed in wider integers (GPTQ, AWQ,
    bitsandbytes 4 bit). Scales beside quantized weights, masks and counters are not counted.
    """
    count = 0
    for tensor in _weights(checkpoint.tensors):
        if tensor.shape is None or tensor.format in PACKED:
            return None
        count += prod(tensor.shape)
    return count


def _weights(tensors: Iterable[StoredTensor]) -> Iterable[StoredTensor]:
    for tensor in tensors:
        is_buffer = tensor.format in ("bool", "int64")
        if not is_buffer and tensor.name.rpartition(".")[2] not in COMPANIONS:
            yield tensor
