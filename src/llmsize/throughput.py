"""From a model and its tokens to FLOP, time, energy and money.

Peaks are dense and in the format of the matrix products; a utilization is a share of that peak.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmsize.errors import LLMSizeError
from llmsize.hardware import Accelerator
from llmsize.quick_dataclasses import dataclass
from llmsize.term import Term, fact, term
from llmsize.units import format_share

PALM = "arXiv:2204.02311, appendix B"
MEGATRON = "arXiv:2104.04473, Equation 3; without recompute arXiv:2205.05198, Equation 7"


@dataclass(frozen=True, slots=True)
class Utilization:
    """What share of the peak real training runs reached, on one kind of device."""

    name: str
    median: float
    low: float
    """The smallest among the runs."""
    high: float
    """The largest among the runs."""
    runs: int
    source: str
    accelerators: tuple[str, ...] = ()
    """Beginnings of the names of accelerators it speaks of; empty for any."""
    format: str = ""
    """Number format of the peak that it is a share of."""
    title: str = ""
    note: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Bandwidth(Utilization):
    """What share of its memory bandwidth one kind of device reached while it decoded.

    Of published runs with one sequence and a short context: the bytes of the weights that a token
    needs, times tokens per second, over the bandwidth.
    """

    bits: int = 16
    """Of each weight, about: 16, or 4 where they are unpacked for their products."""


BETWEEN = 7
"""Weights of more bits are read nearly as fast as those of 16, since 8 need no unpacking."""


def measured_bandwidth(
    known: Iterable[Bandwidth], accelerator: Accelerator, bits: float
) -> Bandwidth:
    """The runs on this kind of device with weights of about so many bits, or those on any.

    Raises `LLMSizeError` if there are neither.
    """
    wanted = 16 if bits > BETWEEN else 4
    alike = [entry for entry in known if entry.bits == wanted]
    for entry in alike:
        if entry.accelerators and accelerator.name.startswith(entry.accelerators):
            return entry
    for entry in alike:
        if not entry.accelerators:
            return entry
    raise LLMSizeError("no measured bandwidth", hint="`llmsize show bandwidths` has those known")


def training_flop(parameters: float, tokens: float, *, per_parameter: float = 6) -> Term:
    """FLOP of training: two forward and four backward for each parameter that a token meets.

    Attention over the context is not counted. An encoder-decoder shows each token half of its
    parameters (`per_parameter` 3); a mixture of experts counts its active ones.
    Kaplan et al. 2020, Section 2.1.
    """
    formula = "6 * N * D" if per_parameter == 6 else "per_parameter * N * D"
    spare = {} if per_parameter == 6 else {"per_parameter": per_parameter}
    return term(
        "training compute", formula, unit="FLOP", grade="formula", N=parameters, D=tokens,
        source="arXiv:2001.08361, Section 2.1", note="attention over the context is not counted",
        **spare,
    )  # fmt: skip


def flop_per_token(
    parameters: float,
    *,
    layers: int,
    width: int,
    context: int,
    trained: float | None = None,
    recompute: bool = False,
) -> Term:
    """FLOP for one training token, attention over `context` tokens included.

    `width` is heads × head size. Without causal masking, as PaLM counts. `trained` parameters need
    a gradient of their own, all of them unless given: the frozen ones of LoRA cost 4N, not 6N.
    `recompute` adds the forward pass once more, which hardware does and a model does not need.
    """
    weights = "6 * N" if trained is None else "(4 * N + 2 * trained)"
    formula = f"{weights} + 12 * layers * width * context"
    if recompute:
        formula += " + 2 * N + 4 * layers * width * context"
    spare = {} if trained is None else {"trained": trained}
    return term(
        "FLOP per token", formula, unit="FLOP/token", source=PALM, grade="formula",
        note="attention without causal masking",
        N=parameters, layers=layers, width=width, context=context, **spare,
    )  # fmt: skip


def megatron_flop_per_token(
    *, layers: int, hidden: int, context: int, vocabulary: int, recompute: str = "none"
) -> Term:
    """FLOP for one training token as Megatron-LM counts: from the shape, for GPT with 4h MLPs.

    `recompute` is `none` for the model's own, or what hardware does beyond: `selective` (attention
    once more) or `full`.
    """
    formulas = {
        "none": "72 * L * h**2 * (1 + s / (6 * h) + V / (12 * L * h))",
        "selective": "72 * L * h**2 * (1 + s / (3 * h) + V / (12 * L * h))",
        "full": "96 * L * h**2 * (1 + s / (6 * h) + V / (16 * L * h))",
    }
    return term(
        "FLOP per token", formulas[recompute], unit="FLOP/token", source=MEGATRON, grade="formula",
        L=layers, h=hidden, s=context, V=vocabulary,
    )  # fmt: skip


def model_utilization(per_token: Term, tokens_per_second: float, peak: float) -> Term:
    """The share of one device's peak that its tokens per second make use of (MFU).

    It is HFU where `per_token` counts recomputed work too.
    """
    return term(
        "utilization", "flop_per_token * tokens_per_second / peak", unit="", grade="formula",
        source=PALM, flop_per_token=per_token.value, tokens_per_second=tokens_per_second,
        peak=peak,
    )  # fmt: skip


def measured_utilization(
    known: Iterable[Utilization], accelerator: Accelerator, format: str
) -> Utilization:
    """The measurements that speak of this device and format, or those of whole projects.

    Raises `LLMSizeError` if there are neither.
    """
    anything = None
    for entry in known:
        if entry.format == format and accelerator.name.startswith(entry.accelerators or "?"):
            return entry
        if not entry.accelerators:
            anything = entry
    if anything is None:
        raise LLMSizeError("no measured utilization", hint="give one: `--mfu 0.4`")
    return anything


def efficiency(measured: Utilization, share: float | None = None) -> Term:
    """`share` of the peak as given, or the measured median as a fact with its spread.

    Raises `LLMSizeError` for a share that is none.
    """
    if share is not None:
        if not 0 < share <= 1:
            raise LLMSizeError(
                f"a utilization of {share:g} is impossible", hint="give a share above 0 and up to 1"
            )
        return fact("utilization", share, unit="", source="given")
    low, high = format_share(measured.low), format_share(measured.high)
    spread = f"median, {low} to {high} over {measured.runs} runs"
    if measured.runs == 1:
        spread = "of one run"
    return Term(
        "utilization", measured.median, "", source=measured.source,
        grade="fitted" if measured.accelerators else "assumed",
        note="; ".join(filter(None, (spread, measured.note))),
    )  # fmt: skip


def training_time(flop: Term, *, devices: int, peak: Term, efficiency: Term) -> Term:
    """Seconds for `flop` on so many devices at that share of their peak."""
    return term(
        "time", "flop / (devices * peak * utilization)", unit="seconds", grade=efficiency.grade,
        source=flop.source, flop=flop.value, devices=devices, peak=peak.value,
        utilization=efficiency.value,
    )  # fmt: skip


def device_hours(seconds: Term, devices: int) -> Term:
    """Devices × hours, which is what is billed."""
    return term(
        "GPU-hours", "devices * seconds / 3600", unit="GPU-hours", grade=seconds.grade,
        source=seconds.source, devices=devices, seconds=seconds.value,
    )  # fmt: skip


def energy(hours: Term, accelerator: Accelerator) -> Term:
    """Kilowatt-hours of the devices at their rated power; hosts and cooling are not counted.

    Raises `LLMSizeError` if no rated power is published.
    """
    if accelerator.tdp_watts is None:
        raise LLMSizeError(
            f"no rated power is published for {accelerator.title}", hint="leave the energy out"
        )
    return term(
        "energy", "gpu_hours * watts / devices / 1000", unit="kWh", grade=hours.grade,
        source=accelerator.source, note="rated power of the devices alone",
        gpu_hours=hours.value, watts=accelerator.tdp_watts, devices=accelerator.devices,
    )  # fmt: skip


def cost(hours: Term, price: Term) -> Term:
    """What the hours cost at a price for each; its unit is such as `$/GPU-hour`.

    Raises `LLMSizeError` for a price that is negative or beyond reason.
    """
    if not 0 <= price.value < 1e9:
        raise LLMSizeError(
            f"a price of {price.value:g} is impossible", hint="give a price per GPU-hour"
        )
    return term(
        "cost", "gpu_hours * price", unit=price.unit.partition("/")[0], grade=hours.grade,
        source=f"price: {price.source}", gpu_hours=hours.value, price=price.value,
    )  # fmt: skip


def affordable_flop(*, devices: int, seconds: float, peak: Term, efficiency: Term) -> Term:
    """FLOP that so many devices do in that time: what a reservation is worth."""
    return term(
        "compute", "devices * seconds * peak * utilization", unit="FLOP", grade=efficiency.grade,
        source=peak.source, devices=devices, seconds=seconds, peak=peak.value,
        utilization=efficiency.value,
    )  # fmt: skip
