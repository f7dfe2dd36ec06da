"""Optimizers and precision recipes: what training keeps for every weight beside the weight."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal

from llmsize.errors import LLMSizeError
from llmsize.formats import BF16, FP32, Format, native, stored_bytes
from llmsize.quick_dataclasses import dataclass, field, replace

Layout = Literal["elementwise", "block", "matrix", "factored", "low_rank"]
"""How states follow a weight: a number per element; the same in blocks with a scale; per element
of matrices only; a row and a column vector per matrix; or a projection of rank `rank`."""

Stepping = Literal["fused", "foreach", "each"]
"""Which weights a step takes at once: all, in kernels that allocate nothing; all, by operations
that make copies of them; or one after the other."""

FLAT_ONLY: tuple[Layout, ...] = ("matrix", "low_rank")
"""Layouts of matrices that are parameters of their own: experts' that are stacked in one are among
the others (pytorch v2.13, torch/optim/_muon.py; transformers v5.23, trainer_optimizer.py, which
gives GaLore the weights of linear layers)."""

WEIGHT = "weight"
"""In place of a format: the format of the weight that the optimizer steps on."""


@dataclass(frozen=True, slots=True)
class Optimizer:
    """The states that one optimizer keeps, and which tensors are exceptions."""

    name: str
    states: Mapping[str, str] = field(hash=False)
    """Format by state, `weight` for that of the weights it steps on."""
    source: str
    layout: Layout = "elementwise"
    bytes_per_parameter: float | None = None
    """As published, for large matrices and fp32 weights: the answer key of this entry."""
    step_bytes: int = 0
    """Of the numbers that every tensor has on the device, such as a step counter."""
    shared_bytes: int = 0
    """Of what all tensors in the layout share, such as a map of the values of eight bits."""
    stepping: Stepping = "fused"
    step_copies: int = 0
    """Copies that a step makes of the weights it takes at once."""
    step_leftovers: int = 0
    """Copies of the weight before that are alive until then, where it takes one after the other."""
    step_format: str = WEIGHT
    """Format of such copies; weights and gradients of another one are cast first."""
    block: int = 0
    """Elements that share one fp32 scale, for the layout `block`."""
    rank: int = 0
    """For the layout `low_rank`."""
    projector: str = ""
    """Format of the stored projection, for the layout `low_rank`; empty if it is drawn anew."""
    others: Mapping[str, str] = field(default_factory=dict, hash=False)
    """States of the tensors that the layout is not used for, element by element."""
    others_step_bytes: int = 0
    """Of the numbers that each of those has on the device besides."""
    min_elements: int = 0
    """Smaller tensors are among the `others`."""
    excludes: tuple[str, ...] = ()
    """Roles of weights that are among the `others`: `embedding`, `head`, …"""
    pageable: bool = False
    """Whether the driver may move the states to host memory when the device is full."""
    vendors: tuple[str, ...] = ()
    """Makers of the accelerators that its library has kernels for; empty for any."""
    title: str = ""
    aliases: tuple[str, ...] = ()
    note: str = ""


DTYPE = "dtype"
"""In place of a format: the 16-bit format that was asked for."""


@dataclass(frozen=True, slots=True)
class Precision:
    """Which copies of the weights and gradients training keeps, and in which formats."""

    name: str
    weights: str
    gradients: str
    source: str
    master: str = ""
    """Format of the second copy that the optimizer steps on; empty if there is none."""
    autocast: bool = False
    """Whether operations cast the weights to `dtype` as they run."""
    bytes_per_parameter: tuple[int, int, int] = (0, 0, 0)
    """Weights, gradients, and optimizer with master copy, for AdamW and a 16-bit dtype: the answer
    key of this entry."""
    title: str = ""
    aliases: tuple[str, ...] = ()
    note: str = ""

    @property
    def stepped(self) -> str:
        """The format of the weights that the optimizer steps on."""
        return self.master or self.weights


def check_recipe(precision: Precision, dtype: Format) -> None:
    """Raise `LLMSizeError` for a recipe of 16-bit copies where the weights are in fp32."""
    if dtype != FP32:
        return
    if precision.autocast:
        raise LLMSizeError("autocast needs a 16-bit format", hint="`--dtype bf16` or `fp16`")
    if precision.master:
        raise LLMSizeError(
            f"`{precision.name}` keeps an fp32 copy of 16-bit weights, and these are fp32 already",
            hint="`--recipe fp32`, or `--dtype bf16`",
        )


def kept_format(precision: Precision, name: str, dtype: Format) -> Format:
    """The format of one of its copies, where `dtype` is the one that was asked for.

    Raises `LLMSizeError` for a format that no tensor has.
    """
    return dtype if name == DTYPE else native(name, "recipe", precision.name)


def state_bytes(
    optimizer: Optimizer, shape: tuple[int, ...], *, role: str = "", stepped: Format = FP32
) -> int:
    """Bytes of the states and the step counter of one weight of `shape`.

    `stepped` is the format of the weight that the optimizer works on. Scratch space of the step
    is not counted. Raises `LLMSizeError` for a format that no tensor has.
    """
    alike, elements = takes(optimizer, shape, role), prod(shape)
    states = {
        name: state_format(optimizer, format, stepped)
        for name, format in (optimizer.states if alike else optimizer.others).items()
    }
    if alike and optimizer.layout == "factored":
        kept = _factored_bytes(shape, states)
    elif alike and optimizer.layout == "low_rank":
        kept = _low_rank_bytes(optimizer, shape, states, stepped)
    else:
        kept = sum([stored_bytes(format, elements) for format in states.values()])
        if optimizer.block and (alike or optimizer.layout == "low_rank"):
            kept += stored_bytes(FP32, -(-elements // optimizer.block)) * len(states)
    return kept + optimizer.step_bytes + (0 if alike else optimizer.others_step_bytes)


def projected(optimizer: Optimizer, rank: int) -> Optimizer:
    """The optimizer with its states of matrices in a subspace of that rank (GaLore).

    The projections have the weights' format. Raises `LLMSizeError` for states that are no number
    per element already.
    """
    if optimizer.layout not in ("elementwise", "block") or not optimizer.states:
        raise LLMSizeError(
            f"{optimizer.title or optimizer.name} has no states that could be projected",
            hint="choose `adamw` or `adamw-8bit`",
        )
    return replace(
        optimizer, layout="low_rank", rank=rank, projector=WEIGHT, step_bytes=0,
        excludes=("embedding", "position", "head"),
        others=optimizer.states,
        title=f"GaLore of rank {rank} with {optimizer.title or optimizer.name}",
    )  # fmt: skip


def takes(optimizer: Optimizer, shape: tuple[int, ...], role: str = "") -> bool:
    """Whether the optimizer's layout is used for this weight, and not that of the `others`."""
    if optimizer.layout in FLAT_ONLY:
        fits = len(shape) == 2
    else:
        fits = len(shape) > 1 or optimizer.layout != "factored"
    return fits and role not in optimizer.excludes and prod(shape) >= optimizer.min_elements


def _factored_bytes(shape: tuple[int, ...], states: Mapping[str, Format]) -> int:
    *stack, rows, columns = shape
    per_matrix = {"row": rows, "column": columns}
    return sum(
        stored_bytes(format, prod(stack) * per_matrix.get(name, rows * columns))
        for name, format in states.items()
    )


def factors(optimizer: Optimizer, shape: tuple[int, ...]) -> int:
    """Rows and columns of which a factored optimizer makes a weight's second moment again."""
    if optimizer.layout != "factored" or not takes(optimizer, shape):
        return 0
    return prod(shape[:-2]) * (shape[-2] + shape[-1])


def _low_rank_bytes(
    optimizer: Optimizer, shape: tuple[int, ...], states: Mapping[str, Format], stepped: Format
) -> int:
    """The moments of a subspace, and the projection into it.

    That one is cast to 16 bit, but in fp32 it is a view of all singular vectors, which stay
    (jiaweizzhao/GaLore, galore_torch/galore_projector.py, `get_orthogonal_matrix`).
    """
    short, long = sorted(shape)
    rank = min(optimizer.rank, short)
    kept = sum(stored_bytes(format, rank * long) for format in states.values())
    if optimizer.block:
        kept += stored_bytes(FP32, -(-rank * long // optimizer.block)) * len(states)
    if optimizer.projector:
        format = state_format(optimizer, optimizer.projector, stepped)
        kept += stored_bytes(format, short * (short if format == FP32 else rank))
    return kept


def projection_bytes(
    optimizer: Optimizer, shape: tuple[int, ...], role: str, format: Format
) -> int:
    """What a step in a subspace allocates for one weight of that `format`, at its highest.

    The update is brought back whole and scaled; when the subspace is chosen anew, the gradient is
    decomposed in fp32 (jiaweizzhao/GaLore, galore_torch/{adamw,galore_projector}.py; workspaces of
    the decomposition are not counted). Weights that are not projected make two temporaries.
    """
    whole = stored_bytes(format, prod(shape))
    if not takes(optimizer, shape, role):
        return 2 * whole
    short, long = sorted(shape)
    update = 2 * whole + 3 * subspace_bytes(optimizer, shape, format)
    decomposed = 2 * short * long + short * short
    return max(update, stored_bytes(FP32, decomposed) if optimizer.projector else 0)


def subspace_bytes(optimizer: Optimizer, shape: tuple[int, ...], format: Format) -> int:
    """What a weight of that `format` takes in the optimizer's subspace."""
    short, long = sorted(shape)
    return stored_bytes(format, min(optimizer.rank, short) * long)


def leftover_bytes(before: int, after: int) -> int:
    """What two weights in a row that are not projected, of `before` and `after` bytes, allocate.

    The two temporaries of the one are there until those of the other take their names, one by one.
    """
    return max(2 * before + after, before + 2 * after)


def orthogonalization_bytes(
    optimizer: Optimizer, shape: tuple[int, ...], role: str, format: Format
) -> int:
    """What Muon's step allocates for one weight of that `format`, at its highest.

    The gradient with its momentum, two rounds of it in bf16, and two matrices of its shorter side
    (pytorch v2.13, torch/optim/_muon.py, `_zeropower_via_newtonschulz`). Weights that AdamW steps
    take nothing, as its fused kernel does.
    """
    if not takes(optimizer, shape, role):
        return 0
    short, long = sorted(shape)
    rounds = stored_bytes(BF16, 2 * short * long + 2 * short * short)
    return stored_bytes(format, short * long) + rounds


def state_format(optimizer: Optimizer, name: str, stepped: Format) -> Format:
    """The format of a state, where `weight` is that of the weight that is stepped on.

    Raises `LLMSizeError` for a format that no tensor has.
    """
    return stepped if name == WEIGHT else native(name, "optimizer", optimizer.name)
