"""`llmsize time`: how long training takes, and what it costs in hours, energy and money."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import typer

from llmsize import presets, units
from llmsize.anatomy import traced
from llmsize.anatomy.flops import forward_flop_per_token
from llmsize.anatomy.parameters import count
from llmsize.cli import options
from llmsize.errors import LLMSizeError
from llmsize.estimate import Cell, Estimate, Row, Table
from llmsize.hardware import Accelerator, peak, slug
from llmsize.term import Term, term
from llmsize.throughput import (
    PALM,
    Utilization,
    cost,
    device_hours,
    efficiency,
    energy,
    measured_utilization,
    training_flop,
    training_time,
)

EXAMPLES = (
    "llmsize time --params 7B --tokens 2T --gpu a100-sxm-80gb --gpus 1024",
    "llmsize time llama-3.1-8b --tokens 15T --gpu h100-sxm-80gb --gpus 512 --price 2.5",
    "llmsize time --params 8B --trained 40M --tokens 50M --gpu rtx-4090",
)

SEQUENCE = 4096
"""Tokens that attention sees where nothing else is said."""

POWER = "Power is the rated power of the devices; hosts, network and cooling come on top."

SequenceLength = Annotated[
    int | None,
    typer.Option(
        "--seq-len", help="Tokens per training sequence.", metavar="TOKENS",
        parser=lambda text: units.parse_count(text, "sequence length"), show_default="4096",
    ),
]  # fmt: skip
Trained = Annotated[
    int | None,
    typer.Option(
        "--trained", help="Parameters that are trained, if not all: the adapters of LoRA.",
        metavar="N", parser=lambda text: units.parse_count(text, "count of trained parameters"),
        show_default=False,
    ),
]  # fmt: skip
Recompute = Annotated[
    bool, typer.Option("--recompute", help="Every layer is recomputed in the backward pass.")
]
Price = Annotated[
    float | None,
    typer.Option("--price", help="Money per GPU-hour.", metavar="PRICE", min=0, show_default=False),
]
Format = Annotated[
    str, typer.Option("--dtype", help="Format of the products: `bf16`, `fp8`.", metavar="FORMAT")
]


def time(
    tokens: options.Tokens,
    model: options.OptionalModel = None,
    params: options.Parameters = None,
    gpu: options.Gpu = None,
    gpus: options.Gpus = None,
    mfu: options.Mfu = None,
    price: Price = None,
    seq_len: SequenceLength = None,
    trained: Trained = None,
    recompute: Recompute = False,
    dtype: Format = "bf16",
) -> Estimate:
    """FLOP, wall time, GPU-hours, energy and cost of training on so many tokens."""
    if tokens is None:
        raise LLMSizeError("training needs tokens", hint="add --tokens, such as `--tokens 300B`")
    counted = _flop(model, params, tokens, seq_len, trained)
    question = {"model": model, "parameters": params, "tokens": tokens, "gpu": gpu, "gpus": gpus,
                "seq_len": seq_len, "dtype": dtype}  # fmt: skip
    if gpu is None:
        headline = f"{units.format_flop(counted[0].value)} to train on {_count(tokens)} tokens"
        return Estimate("time", question, headline, tuple(counted), notes=tuple(_notes(counted)))
    accelerator = presets.get(Accelerator, slug(gpu))
    measured = measured_utilization(presets.every(Utilization).values(), accelerator, dtype)
    cases = _cases(measured, mfu)
    devices = (gpus or 1) * accelerator.devices
    table = _table(counted[0], tokens, accelerator, dtype, devices, cases, price)
    middle = table.rows[1].cells["measured median" if mfu is None else "given"]
    assert isinstance(middle, Term)
    terms = [*counted, peak(accelerator, dtype), *_hardware(recompute, cases)]
    return Estimate(
        "time",
        question,
        f"{units.format_duration(middle.value)} on {devices} × {accelerator.title}",
        (*terms, table),
        assumptions=tuple(f"utilization is the {e.note}" for e in cases.values() if e.note),
        notes=(*_notes(counted), POWER),
    )


def _count(value: float) -> str:
    return units.format_count(value)


def _flop(
    model: str | None,
    params: int | None,
    tokens: float,
    seq_len: int | None,
    trained: int | None,
) -> list[Term]:
    """FLOP of the run: by the anatomy first where there is a model, then by 6ND."""
    if (model is None) == (params is None):
        raise LLMSizeError("what is trained?", hint="give either MODEL or --params")
    if model is None:
        assert params is not None
        return [_by_count(params, tokens, trained)]
    architecture = options.architecture(model)
    context = seq_len or min(SEQUENCE, architecture.context_length or SEQUENCE)
    trace = traced(architecture)
    forward = forward_flop_per_token(trace, context)
    active = count(trace.weights.values()).active
    backward = 2 if trained is None else 1
    spare = {} if trained is None else {"trained": trained}
    by_anatomy = term(
        "training compute, by the anatomy",
        "forward * (1 + backward) * D" + ("" if trained is None else " + 2 * trained * D"),
        unit="FLOP", source=forward.source, grade="formula",
        note="matrices and attention, without causal masking",
        forward=forward.value, backward=backward, D=tokens, **spare,
    )  # fmt: skip
    return [by_anatomy, _by_count(active, tokens, trained),
            replace(forward, note=f"in sequences of {context:,} tokens")]  # fmt: skip


def _by_count(parameters: int, tokens: float, trained: int | None) -> Term:
    if trained is None:
        return replace(training_flop(parameters, tokens), name="training compute, by 6ND")
    if trained > parameters:
        raise LLMSizeError(
            f"{_count(trained)} trained parameters in a model of {_count(parameters)}",
            hint="--trained is the part that gets gradients",
        )
    return term(
        "training compute, frozen weights", "(4 * N + 2 * trained) * D", unit="FLOP", source=PALM,
        grade="formula", note="frozen weights pass gradients on but get none",
        N=parameters, trained=trained, D=tokens,
    )  # fmt: skip


def _cases(measured: Utilization, mfu: float | None) -> dict[str, Term]:
    """The utilization as given, or the measured median between its extremes."""
    if mfu is not None:
        return {"given": efficiency(measured, mfu)}
    middle = efficiency(measured)
    ends = {"slowest measured": measured.low, "fastest measured": measured.high}
    low, high = (replace(middle, value=value, note="") for value in ends.values())
    return {"slowest measured": low, "measured median": middle, "fastest measured": high}


def _table(
    flop: Term,
    tokens: float,
    accelerator: Accelerator,
    dtype: str,
    devices: int,
    cases: dict[str, Term],
    price: float | None,
) -> Table:
    rows: dict[str, dict[str, Cell]] = {}
    rate = peak(accelerator, dtype)
    for name, share in cases.items():
        seconds = training_time(flop, devices=devices, peak=rate, efficiency=share)
        hours = device_hours(seconds, devices)
        speed = term(
            "speed", "D / seconds / devices", unit="tokens/s/GPU", grade=share.grade, note="",
            source="definition", D=tokens, seconds=seconds.value, devices=devices,
        )  # fmt: skip
        made = [("utilization (MFU)", share), ("time", seconds), ("speed", speed),
                ("GPU-hours", hours)]  # fmt: skip
        if accelerator.tdp_watts is not None:
            made.append(("energy", energy(hours, accelerator)))
        if price is not None:
            made.append(("cost", cost(hours, price)))
        for row, cell in made:
            rows.setdefault(row, {})[name] = cell
    return Table("", tuple(cases), tuple(Row(name, cells) for name, cells in rows.items()))


def _hardware(recompute: bool, cases: dict[str, Term]) -> list[Term]:
    """The share of the peak that the hardware does, recomputed work included: 4/3 of MFU."""
    if not recompute:
        return []
    share = cases.get("given") or cases["measured median"]
    return [term("utilization of the hardware (HFU)", "mfu * 4 / 3", unit="", source=PALM,
                 grade=share.grade, note="a third more work is done than the model needs",
                 mfu=share.value)]  # fmt: skip


def _notes(counted: list[Term]) -> Iterator[str]:
    if len(counted) > 1:
        ratio = counted[0].value / counted[1].value
        yield (f"The anatomy counts {ratio:.3f} × 6ND: attention over the sequence is added, and "
               "the embedding is looked up, not multiplied.")  # fmt: skip
