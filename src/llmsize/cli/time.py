"""`llmsize time`: how long training takes, and what it costs in hours, energy and money."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Annotated, Any, Literal, NamedTuple

from llmsize import presets, units
from llmsize.anatomy import outlined
from llmsize.anatomy.flops import training_flop_per_token
from llmsize.anatomy.parameters import count
from llmsize.answer import Cell, Estimate, Row, Scalar, Table
from llmsize.architecture import Architecture
from llmsize.cli import machines, options
from llmsize.cli.declare import Option, choosing, counting
from llmsize.cli.laws import Tokens
from llmsize.cli.machines import Hardware, Pricing
from llmsize.errors import LLMSizeError
from llmsize.formats import Format as Quantized
from llmsize.hardware import Accelerator, peak
from llmsize.memory.methods import METHODS, QUANTIZED, Choices, check_options, method_named
from llmsize.memory.training import check_trained
from llmsize.memory.training_run import training_run
from llmsize.optimizers import Optimizer, Precision
from llmsize.quick_dataclasses import replace
from llmsize.stack import Stack
from llmsize.term import Term, fact, term
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
    "llmsize time llama-3.1-8b --method lora --rank 16 --tokens 50M --gpu rtx-4090",
    "llmsize time --params 8B --trained 40M --tokens 50M --gpu rtx-4090",
)

POWER = "Power is the rated power of the devices; hosts, network and cooling come on top."

SequenceLength = Annotated[
    int | None,
    counting(
        "--seq-len", "--context", what="sequence length", metavar="TOKENS",
        help="Tokens per training sequence.", show_default="4096, or the model's own if fewer",
    ),
]  # fmt: skip
Trained = Annotated[
    int | None,
    counting(
        "--trained", what="count of trained parameters", metavar="N", show_default=False,
        help="Parameters of a bare count that are trained, if not all: the adapters of LoRA.",
    ),
]  # fmt: skip
MethodName = Annotated[
    str,
    Option(
        "--method", metavar="METHOD", help=f"What of MODEL is trained: {', '.join(METHODS)}.",
        autocompletion=options.completing("methods"),
    ),
]  # fmt: skip
Rank = Annotated[int | None, Option("--rank", help="Of the adapters (16).", metavar="R", min=1)]
Targets = Annotated[
    str,
    Option("--targets", metavar="NAMES", help="Linear layers that get adapters, by commas."),
]
Recompute = Annotated[
    Literal["none", "full"],
    choosing(
        "--recompute", known=("none", "full"), what="way to recompute", metavar="WAY",
        help="Blocks run again in the backward pass",
    ),
]  # fmt: skip
Format = Annotated[
    str,
    Option(
        "--dtype", metavar="FORMAT", show_default="bf16, or fp16 where the card has none",
        help="Format of the products: `bf16`, `fp8`.", autocompletion=options.completing("formats"),
    ),
]  # fmt: skip


class Work(NamedTuple):
    """What is trained."""

    seq_len: SequenceLength = None
    method: MethodName = "full"
    rank: Rank = None
    targets: Targets = ""
    trained: Trained = None


class Run(NamedTuple):
    """A training run on a machine."""

    counted: list[Term]
    """The FLOP of the run, and what is said beside it."""
    tokens: float
    accelerator: Accelerator
    devices: int
    dtype: str
    price: Term | None


def time(
    tokens: Tokens,
    model: options.OptionalModel = None,
    *,
    params: options.Parameters = None,
    gpu: machines.Gpu = None,
    gpus: machines.Gpus = None,
    instance: machines.InstanceName = None,
    mfu: machines.Mfu = None,
    pricing: Pricing,
    work: Work,
    recompute: Recompute = "none",
    dtype: Format = "",
) -> Estimate:
    """FLOP, wall time, GPU-hours, energy and cost of training on so many tokens."""
    if tokens is None:
        raise LLMSizeError("training needs tokens", hint="add them: `--tokens 300B`")
    counted = _counted(model, params, tokens, work)
    question = {"model": model, "parameters": params, "tokens": tokens, "gpu": gpu, "gpus": gpus,
                "seq_len": work.seq_len, "method": work.method, "dtype": dtype or None}  # fmt: skip
    machine = machines.machine(Hardware(gpu, gpus=gpus, instance=instance))
    price = machines.price(machine, pricing)
    if machine is None or machine.accelerator is None:
        if gpus is not None or mfu is not None or price is not None:
            raise LLMSizeError(
                "`--gpus`, `--mfu` and `--price` are about a machine", hint="name it with `--gpu`"
            )
        headline = f"{units.format_flop(counted[0].value)} to train on {_count(tokens)} tokens"
        return Estimate("time", question, headline, tuple(counted), notes=tuple(_notes(counted)))
    computed = dtype or machines.sixteen_bit(machine.accelerator)
    run = Run(counted, tokens, machine.accelerator, machine.devices, computed, price)
    return _timed(question, run, mfu, recompute=recompute == "full")


def _counted(model: str | None, params: int | None, tokens: float, work: Work) -> list[Term]:
    """The FLOP of the run first, then what is said beside it."""
    if model is not None and params is None:
        return _by_anatomy(options.architecture(model), _choices(work), tokens, work.seq_len)
    if params is not None and model is None:
        return [_by_count(params, tokens, work)]
    raise LLMSizeError("what is trained?", hint="give either MODEL or `--params`")


def _timed(
    question: Mapping[str, Scalar], run: Run, mfu: float | None, *, recompute: bool
) -> Estimate:
    """The run by the clock, at the utilization that is given or at those that were measured."""
    known = presets.every(Utilization).values()
    cases = _cases(measured_utilization(known, run.accelerator, run.dtype), mfu)
    table = _table(run, cases)
    middle = table.rows[1].cells["measured median" if mfu is None else "given"]
    assert isinstance(middle, Term)
    hardware = _hardware(run, cases) if recompute else []
    assumed = [f"utilization is the {e.note}" for e in cases.values() if e.note]
    if not question["dtype"] and run.dtype != "bf16":
        assumed.append(f"computed in {run.dtype}: {run.accelerator.title} has no bf16")
    assumed += machines.dated(run.price)
    return Estimate(
        "time",
        {**question, "dtype": run.dtype},
        f"{units.format_duration(middle.value)} on {run.devices:,} × {run.accelerator.title}",
        (*run.counted, peak(run.accelerator, run.dtype), *hardware, table),
        assumptions=tuple(assumed),
        notes=(*_notes(run.counted), POWER),
    )


def _count(value: float) -> str:
    return units.format_count(value)


def _choices(work: Work) -> Choices:
    if work.trained is not None:
        raise LLMSizeError(
            "`--trained` goes with a bare count",
            hint="of a MODEL, `--method lora --rank 16` counts what is trained",
        )
    chosen = method_named(work.method).name
    base = presets.get(Quantized, "nf4") if chosen in QUANTIZED else None
    if chosen == "frozen":
        raise LLMSizeError(
            "how many layers are frozen?",
            hint="give what is trained as a count: `--params 8B --trained 2B`",
        )
    given: dict[str, Any] = {"rank": work.rank, "targets": options.names(work.targets) or None}
    given = {choice: value for choice, value in given.items() if value is not None}
    check_options(method_named(chosen), given)
    return Choices(chosen, 1, 1, base=base, **given)


def _by_anatomy(
    architecture: Architecture, choices: Choices, tokens: float, seq_len: int | None
) -> list[Term]:
    """FLOP of the run by what its tokens meet and what wants gradients, then by 6ND."""
    context = seq_len or options.usual_length(architecture)
    run = training_run(
        choices, presets.get(Stack, "transformers"), presets.get(Precision, "pure-16bit"),
        presets.get(Optimizer, METHODS[choices.method].optimizer or "adamw"),
    )  # fmt: skip
    trace = outlined(architecture, run.setting)
    weights = list(trace.weights.values())
    trained = sum(prod(w.shape) * w.copies for w in weights if w.node is not None)
    check_trained(weights, run.setting)
    each = training_flop_per_token(trace, context)
    flop = term(
        "training compute, by the anatomy", "flop_per_token * D", unit="FLOP", grade="formula",
        source=each.part("forward pass of a token").parts[0].source,
        note="matrices and attention, without causal masking", flop_per_token=each.value, D=tokens,
    )  # fmt: skip
    active = count(w for w in weights if w.role != "adapter").active
    whole = replace(training_flop(active, tokens), name="training compute, by 6ND")
    shown = [replace(part, note=f"in sequences of {context:,} tokens") if not i else part
             for i, part in enumerate(each.parts)]  # fmt: skip
    if choices.method == "full":
        return [flop, whole, shown[0]]
    told = fact("trained parameters", trained, unit="parameters", source="the anatomy")
    return [flop, replace(whole, name="if all were trained, by 6ND"), told, *shown]


def _by_count(parameters: int, tokens: float, work: Work) -> Term:
    if work.method != "full":
        raise LLMSizeError(
            "a bare count has no layers to adapt",
            hint="name a MODEL, or say how many are trained: `--trained 40M`",
        )
    if work._replace(trained=None) != Work():
        raise LLMSizeError(
            "a bare count has no attention over a sequence and no layers to adapt",
            hint="name a MODEL, or leave out `--seq-len`, `--rank` and `--targets`",
        )
    trained = work.trained
    if trained is None:
        return replace(training_flop(parameters, tokens), name="training compute, by 6ND")
    if trained > parameters:
        raise LLMSizeError(
            f"{_count(trained)} trained parameters in a model of {_count(parameters)}",
            hint="`--trained` is the part that gets gradients",
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


def _table(run: Run, cases: dict[str, Term]) -> Table:
    rows: dict[str, dict[str, Cell]] = {}
    rate, devices = peak(run.accelerator, run.dtype), run.devices
    for name, share in cases.items():
        seconds = training_time(run.counted[0], devices=devices, peak=rate, efficiency=share)
        hours = device_hours(seconds, devices)
        speed = term(
            "speed", "D / seconds / devices", unit="tokens/s", grade=share.grade, note="",
            source="definition", D=run.tokens, seconds=seconds.value, devices=devices,
        )  # fmt: skip
        made = [("utilization (MFU)", share), ("time", seconds), ("speed of each GPU", speed),
                ("GPU-hours", hours)]  # fmt: skip
        if run.accelerator.tdp_watts is not None:
            made.append(("energy", energy(hours, run.accelerator)))
        if run.price is not None:
            made.append(("cost", cost(hours, run.price)))
        for row, cell in made:
            rows.setdefault(row, {})[name] = cell
    return Table("", tuple(cases), tuple(Row(name, cells) for name, cells in rows.items()))


def _hardware(run: Run, cases: dict[str, Term]) -> list[Term]:
    """The share of the peak that the hardware does: with the forward pass once more."""
    share, compute = cases.get("given") or cases["measured median"], run.counted[0].value
    again = next(
        (part.value * run.tokens for part in run.counted if part.unit == "FLOP/token"), compute / 3
    )
    return [term("utilization of the hardware (HFU)", "mfu * (compute + forward) / compute",
                 unit="", source=PALM, grade=share.grade, mfu=share.value, forward=again,
                 note="the forward pass is done once more than the model needs",
                 compute=compute)]  # fmt: skip


def _notes(counted: list[Term]) -> Iterator[str]:
    if len(counted) < 2:
        return
    ratio = counted[0].value / counted[1].value
    if any(part.name == "trained parameters" for part in counted):
        yield (f"{ratio:.3f} × 6ND: frozen weights pass gradients on but get none; recomputation "
               "and dequantizing are not counted.")  # fmt: skip
    else:
        yield (f"The anatomy counts {ratio:.3f} × 6ND: attention over the sequence is added, and "
               "the embedding is looked up, not multiplied.")  # fmt: skip
