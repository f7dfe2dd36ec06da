"""Rotary position embedding: cosines and sines of every position, and what is turned by them.

transformers v5.23, as in `blocks`: models/llama/modeling_llama.py and its kin. Local variables live
as long as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, Format


class Rotation(NamedTuple):
    """What rotary embedding multiplies by: batch, sequence, channels, or heads between."""

    cosines: Tensor
    sines: Tensor


Table = Callable[[Trace, Tensor, int, Format | None], Rotation]
"""Makes the cosines and sines of that many channels, in a format or that of the tensor."""

Turn = Callable[[Trace, Tensor, Tensor, Rotation], tuple[Tensor, Tensor]]
"""Rotary embedding of q and k by heads."""


# --- which channels, by what ----------------------------------------------------------------------


IN_SECTIONS = frozenset((
    "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_omni_text",
    "qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_omni_moe_text", "glm4v_text", "glm4v_moe_text",
    "glm_ocr_text", "paddleocr_vl_text",
))  # fmt: skip
"""Types whose tokens have three positions each: time, height and width."""


def rotated(c: Config, head_dim: int, default: float, kind: str) -> int:
    """How many channels of a head are rotated in layers of that kind; none by default: none."""
    if not default:
        return 0
    nested = c.value("rope_parameters", "rope_scaling")
    if isinstance(nested, dict) and isinstance(nested.get(kind), dict):
        nested = nested[kind]
    if isinstance(nested, dict) and nested.get("rope_type") == "proportional":
        return head_dim  # all are multiplied, some by an angle of zero
    inner = nested.get("partial_rotary_factor") if isinstance(nested, dict) else None
    share = Config({"inner": inner, **c.fields}, c.model).number(
        "inner", "partial_rotary_factor", "rotary_pct", default=default
    )
    channels = c.count("rotary_dim") or int(head_dim * share)
    if not 0 < channels <= head_dim:
        raise c.error(
            f"rotates {channels:,} of the {head_dim} channels of a head",
            "correct `head_dim` or `partial_rotary_factor`",
        )
    odd = channels < head_dim and channels % 2  # angles are of pairs, also that of the last one
    return channels + odd


# --- cosines and sines ----------------------------------------------------------------------------


def table(t: Trace, x: Tensor, channels: int, format: Format | None = None) -> Rotation:
    """The cosines and sines of every position, made once for all layers, in `format` or `x`'s."""
    _frequencies(t, channels)
    return tabulated(t, channels, format or x.format)


def tabulated(t: Trace, channels: int, format: Format, sequences: int = 1) -> Rotation:
    """The same, from frequencies that are counted elsewhere, for all `sequences` or for each."""
    grad, t.grad = t.grad, False
    position = t.new("to", (sequences, t.sequence, 1), FP32)
    half = t.new("mul", (sequences, t.sequence, channels // 2), FP32)
    del position
    angles = t.new("cat", (sequences, t.sequence, channels), FP32)
    result = cosines_and_sines(t, angles, format)
    t.grad = grad
    del half
    return result


def table_by_sequence(t: Trace, x: Tensor, channels: int, format: Format | None = None) -> Rotation:
    """The same with a position for each token of each sequence."""
    _frequencies(t, channels)
    cosines, sines = tabulated(t, channels, format or x.format, t.batch)
    shape = (t.batch, 1, t.sequence, channels)
    return Rotation(cosines.view(*shape), sines.view(*shape))


def _frequencies(t: Trace, channels: int) -> None:
    """Count the inverse frequencies of a table, and a copy of them as they were."""
    t.rotated.append(channels)
    t.buffers += 2 * FP32.block_bytes * (channels // 2)


def half_table(t: Trace, x: Tensor, channels: int, format: Format | None = None) -> Rotation:
    """The same for one half of the channels, which the other half shares (gpt-oss)."""
    _frequencies(t, channels)
    position = t.new("to", (1, t.sequence, 1), FP32)
    angles = t.new("mul", (1, t.sequence, channels // 2), FP32)
    del position
    return cosines_and_sines(t, angles, format or x.format)


def cosines_and_sines(t: Trace, angles: Tensor, format: Format) -> Rotation:
    """The scaled cosine and sine of every angle, in `format`."""
    cosines = ops.scale(t, ops.unary(t, "cos", angles))
    sines = ops.scale(t, ops.unary(t, "sin", angles))
    return Rotation(ops.to(t, cosines, format), ops.to(t, sines, format))


def complex_table(t: Trace, x: Tensor, channels: int, format: Format | None = None) -> Rotation:
    """The same as complex numbers, a cosine and a sine each, in one table."""
    _frequencies(t, channels)
    half = (1, t.sequence, channels // 2)
    position = t.new("to", (1, t.sequence, 1), FP32)
    angles = t.new("mul", half, FP32)
    del position
    ones = t.new("ones_like", half, FP32)
    polar = t.new("polar", (1, t.sequence, channels), FP32)
    del ones
    both = t.new("mul", polar.shape, FP32)
    del angles, polar
    return Rotation(both, both)


def table_in_sections(t: Trace, x: Tensor, channels: int, format: Format | None = None) -> Rotation:
    """The same where each token of each sequence has three positions: time, height and width."""
    _frequencies(t, channels)
    format = format or x.format
    angles = t.new("mul", (3, t.batch, t.sequence, channels // 2), FP32)
    cosines = ops.scale(t, ops.unary(t, "cos", angles))
    sines = ops.scale(t, ops.unary(t, "sin", angles))
    sines = t.new("cat", (t.batch, 1, t.sequence, channels), FP32)
    cosines = t.new("cat", (t.batch, 1, t.sequence, channels), FP32)
    return Rotation(ops.to(t, cosines, format), ops.to(t, sines, format))


class Rope(NamedTuple):
    """How a model makes its cosines and sines."""

    table: Table = table
    format: Format | None = None
    """Their format if not that of the embeddings."""
    apart: bool = False
    """Whether layers with a window have some of their own."""


def read(c: Config, format: Format | None = None) -> Rope:
    """How that type makes them, in `format` if not in that of the embeddings."""
    return Rope(table_in_sections if c.text("model_type") in IN_SECTIONS else table, format)


def tables(
    t: Trace, rope: Rope, x: Tensor, channels: int, local_channels: int, windows: Iterable[int]
) -> Mapping[int, Rotation | None]:
    """Cosines and sines for each window, the same for all or apart; `None` without rotation."""
    if not rope.apart:
        rotation = rope.table(t, x, channels, rope.format) if channels else None
        return dict.fromkeys((0, *windows), rotation)
    sizes = {window: local_channels if window else channels for window in sorted(windows)}
    return {w: rope.table(t, x, size, rope.format) if size else None for w, size in sizes.items()}


# --- what is turned -------------------------------------------------------------------------------


def rotate_half(t: Trace, x: Tensor) -> Tensor:
    """The second half of the channels, negated, before the first."""
    half = x.shape[-1] // 2
    lower = ops.slice_last(t, x, half)
    upper = ops.slice_last(t, x, half)
    return ops.cat(t, (ops.neg(t, upper), lower))


def rotate(t: Trace, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary position embedding of `x`: batch, heads, sequence, channels."""
    if t.setting.fused_rotary:
        return ops.rotate_in_place(t, x, cosines, sines)
    return ops.add(t, ops.mul(t, x, cosines), ops.mul(t, rotate_half(t, x), sines))


def turn(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Rotary embedding of all channels of each head of q and k, or of the first ones."""
    cosines, sines = rotation
    if cosines.shape[-1] < q.shape[-1] or t.setting.joins_rotated:
        return rotate_part(t, q, k, cosines, sines)
    return rotate(t, q, cosines, sines), rotate(t, k, cosines, sines)


def turn_pairs(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn` of neighbouring channels, which come out in two halves (DeepSeek V3)."""
    cosines, sines = (ops.slice_last(t, x, x.shape[-1] // 2) for x in rotation)
    (q_even, q_odd), (k_even, k_odd) = _even_and_odd(t, q), _even_and_odd(t, k)
    q = _rotate_pair(t, q_even, q_odd, cosines, sines)
    del q_even, q_odd
    return q, _rotate_pair(t, k_even, k_odd, cosines, sines)


def _even_and_odd(t: Trace, x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return ops.slice_last(t, x, half, 2), ops.slice_last(t, x, half, 2)


def _rotate_pair(t: Trace, even: Tensor, odd: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first = ops.sub(t, ops.mul(t, even, cosines), ops.mul(t, odd, sines))
    second = ops.add(t, ops.mul(t, odd, cosines), ops.mul(t, even, sines))
    return ops.cat(t, (first, second))


def by_token(rotation: Rotation) -> Rotation:
    """The tables for heads that lie within each token: batch, sequence, heads, channels."""
    cosines, sines = (x.view(1, x.shape[1], 1, x.shape[2]) for x in rotation)
    return Rotation(cosines, sines)


def for_pairs(t: Trace, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """The tables laid out anew for neighbouring channels, as some models do in every layer."""
    cosines, sines = (t.new("repeat", x.shape, x.format) for x in rotation)
    return cosines, sines


def turn_neighbours(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn` of neighbouring channels (Helium)."""
    cosines, sines = for_pairs(t, rotation)
    q_turned = rotate(t, q, cosines, sines)
    return q_turned, rotate(t, k, cosines, sines)


def turn_neighbours_in_fp32(
    t: Trace, q: Tensor, k: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """`turn` of neighbouring channels whose products are in fp32, cast back (ERNIE 4.5)."""
    cosines, sines = for_pairs(t, rotation)
    turned = [
        ops.add(
            t,
            ops.mul(t, ops.to(t, x, FP32), cosines),
            ops.mul(t, ops.to(t, rotate_half(t, x), FP32), sines),
        )
        for x in (q, k)
    ]
    return ops.to(t, turned[0], q.format), ops.to(t, turned[1], q.format)


def turn_and_temper(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn`, and queries that grow with their position (Ministral 3)."""
    q, k = turn(t, q, k, rotation)
    return tempered(t, q), k


def tempered(t: Trace, q: Tensor) -> Tensor:
    """Queries scaled for each token by a logarithm of its position."""
    growth = t.new("log", (1, 1, t.sequence, 1), FP32)
    return ops.mul(t, q, ops.to(t, growth, q.format))


def turn_halves(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn` by a table that both halves of the channels share (gpt-oss)."""
    turned = []
    for x in (q, k):
        half = x.shape[-1] // 2
        first, second = ops.split(t, x, half, half)
        turned.append(_rotate_pair(t, first, second, *rotation))
    return turned[0], turned[1]


def turn_complex(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn` of neighbouring channels as complex numbers in fp32, cast back (DeepSeek V2)."""
    format, both = q.format, rotation.cosines
    q, k = ops.to(t, q, FP32), ops.to(t, k, FP32)
    q_turned = ops.to(t, ops.mul_complex(t, q, both), format)
    return q_turned, ops.to(t, ops.mul_complex(t, k, both), format)


def turn_and_cast(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn` by fp32 cosines and sines, cast back (OLMo)."""
    format = q.format
    q, k = turn(t, q, k, rotation)
    return ops.to(t, q, format), ops.to(t, k, format)


def turn_in_fp32(t: Trace, q: Tensor, k: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """`turn` of q and k in fp32, cast back (Command R)."""
    format = q.format
    q, k = turn(t, ops.to(t, q, FP32), ops.to(t, k, FP32), rotation)
    return ops.to(t, q, format), ops.to(t, k, format)


def turn_in_place(
    parts: list[Tensor], t: Trace, q: Tensor, k: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """`turn` written out in attention itself, which holds the `parts` to its end (Phi)."""
    return rotate_part(t, q, k, *rotation, parts=parts)


def rotate_part(
    t: Trace,
    q: Tensor,
    k: Tensor,
    cosines: Tensor,
    sines: Tensor,
    parts: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of the first channels of each head of q and k; the rest passes.

    The `parts` that are joined are noted for those who hold them.
    """
    size = cosines.shape[-1]
    q_turned, q_rest = (ops.slice_last(t, q, n) for n in (size, q.shape[-1] - size))
    k_turned, k_rest = (ops.slice_last(t, k, n) for n in (size, k.shape[-1] - size))
    q_turned = rotate(t, q_turned, cosines, sines)
    k_turned = rotate(t, k_turned, cosines, sines)
    if parts is not None:
        parts += (q_turned, q_rest, k_turned, k_rest)
    q_turned = ops.cat(t, (q_turned, q_rest))
    k_turned = ops.cat(t, (k_turned, k_rest))
    return q_turned, k_turned
