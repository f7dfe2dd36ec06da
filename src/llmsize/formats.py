"""Number formats: a block of elements and the bytes it takes, scales included."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from llmsize.errors import LLMSizeError, did_you_mean, printable
from llmsize.quick_dataclasses import dataclass, field

IEEE = "IEEE 754-2019, table 3.5"


@dataclass(frozen=True, slots=True)
class Format:
    """How numbers are stored: `block_elements` of them take `block_bytes`.

    What a block does not hold (a scale per row, a code book per tensor) is stored `beside` it.
    """

    name: str
    block_elements: int
    """Elements that share scales and are stored together; 1 for plain numbers."""
    block_bytes: int
    """Bytes of one block, its scales and zero points included."""
    source: str
    title: str = ""
    """The name people know it by, if it is another."""
    aliases: tuple[str, ...] = ()
    note: str = ""
    beside: Mapping[str, Mapping[str, int]] = field(default_factory=dict, hash=False)
    """Further tensors of one quantized matrix: `bytes` for every run of `elements`, or for every
    tile of `rows` × `columns`; a dimension that is not given is spanned whole."""

    fallback: str = ""
    """The format that its library takes for a row that is not a whole number of blocks."""
    vendors: tuple[str, ...] = ()
    """Makers of the accelerators that its library has kernels for; empty for any."""

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def bits_per_element(self) -> float:
        """Bits for one element of a block, its share of the block's scales included."""
        return 8 * self.block_bytes / self.block_elements


def stored_bytes(format: Format, elements: int) -> int:
    """Bytes of the blocks of `elements` in `format`; the last block is stored whole."""
    if format.block_elements == 1:
        return elements * format.block_bytes
    return -(-elements // format.block_elements) * format.block_bytes


@lru_cache(maxsize=4096)  # layers repeat their shapes
def matrix_bytes(format: Format, rows: int, columns: int) -> int:
    """Bytes of a weight of `rows` outputs and `columns` inputs, and of all that is `beside` it."""
    return sum(matrix_tensors(format, rows, columns))


def quantized_scales(format: Format, elements: int) -> int:
    """The scales of so many elements, where they are quantized themselves (QLoRA's double
    quantization), and are brought back before the weight is; else 0."""
    return -(-elements // format.block_elements) if "absmax_of_absmax" in format.beside else 0


def matrix_tensors(format: Format, rows: int, columns: int) -> list[int]:
    """Bytes of each tensor that such a weight is stored as, its blocks first."""
    beside = (
        _count(format, tensor, side, rows, columns) * side["bytes"]
        for tensor, side in format.beside.items()
    )
    return [stored_bytes(format, rows * columns), *beside]


def _count(format: Format, tensor: str, side: Mapping[str, int], rows: int, columns: int) -> int:
    unknown = side.keys() - {"bytes", "elements", "rows", "columns"}
    if unknown or "bytes" not in side or any(value < 1 for value in side.values()):
        raise LLMSizeError(
            f"format `{format.name}`: cannot read `beside: {printable(tensor)}`",
            hint="give `bytes`, and `elements` or `rows` and `columns`, each above zero",
        )
    if "elements" in side:
        return -(-rows * columns // side["elements"])
    return -(-rows // side.get("rows", rows)) * -(-columns // side.get("columns", columns))


def _plain(name: str, size: int, source: str, *aliases: str) -> Format:
    return Format(name, 1, size, source, aliases=aliases)


FP64 = _plain("fp64", 8, IEEE, "float64", "double")
FP32 = _plain("fp32", 4, IEEE, "float32", "float", "f32")
TF32 = _plain(
    "tf32", 4, "NVIDIA A100 whitepaper 2020: stored as fp32, multiplied with 10 mantissa bits"
)
FP16 = _plain("fp16", 2, IEEE, "float16", "half", "f16")
BF16 = _plain("bf16", 2, "Intel BFLOAT16 definition 2018", "bfloat16")
FP8_E4M3 = _plain("fp8_e4m3", 1, "arXiv:2209.05433", "fp8", "float8_e4m3fn", "f8_e4m3")
FP8_E5M2 = _plain("fp8_e5m2", 1, "arXiv:2209.05433", "float8_e5m2", "f8_e5m2")
INT64 = _plain("int64", 8, "two's complement", "i64")
INT32 = _plain("int32", 4, "two's complement", "i32")
INT16 = _plain("int16", 2, "two's complement", "i16")
INT8 = _plain("int8", 1, "two's complement", "i8")
UINT8 = _plain("uint8", 1, "unsigned binary", "u8")
BOOL = _plain("bool", 1, "one byte in every tensor library")
INT4 = Format("int4", 2, 1, "two's complement, two in a byte, no scales", aliases=("i4",))

NATIVE = {
    f.name: f
    for f in (FP64, FP32, TF32, FP16, BF16, FP8_E4M3, FP8_E5M2, INT64, INT32, INT16, INT8, UINT8,
              BOOL, INT4)
}  # fmt: skip
"""The formats of tensors in memory; quantized storage formats are presets."""

TRAINED = (FP32, FP16, BF16)
"""What weights are trained in; optimizers step in no others."""


def native(name: str, kind: str, owner: str) -> Format:
    """The format of tensors of that name; `kind` and `owner` say who names it.

    Raises `LLMSizeError` for a format that no tensor has.
    """
    found = NATIVE.get(name)
    if found is None:
        raise LLMSizeError(
            f"{kind} `{owner}`: unknown format `{printable(name)}`",
            hint=did_you_mean(name, NATIVE, otherwise=f"formats: {', '.join(NATIVE)}"),
        )
    return found
