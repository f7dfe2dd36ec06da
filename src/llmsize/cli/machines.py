"""Options about hardware: which, how many, how fast, and what it costs."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from llmsize import presets, units
from llmsize.cli.declare import Option, counting
from llmsize.cli.options import completing
from llmsize.errors import LLMSizeError, UndeterminedError, printable
from llmsize.hardware import (
    Accelerator,
    Instance,
    Machine,
    plain_machine,
    rented,
    reserving,
    slug,
    supports,
)
from llmsize.hardware import machine as machine_of
from llmsize.quick_dataclasses import replace
from llmsize.term import Term, fact
from llmsize.throughput import Utilization, measured_utilization
from llmsize.throughput import efficiency as efficiency_of

_MACHINE = "Hardware"

Gpu = Annotated[
    str | None,
    Option(
        "--gpu",
        help="An accelerator, such as `rtx-4090`, or `auto` for the one in this computer.",
        metavar="NAME",
        autocompletion=completing("accelerators"),
        rich_help_panel=_MACHINE,
    ),
]
Vram = Annotated[
    int | None,
    Option(
        "--vram",
        help="Memory of one device: `16GB` is 16·10⁹ bytes, `16GiB` is 16·2³⁰.",
        metavar="SIZE",
        parser=lambda text: units.parse_bytes(text, "memory"),
        rich_help_panel=_MACHINE,
    ),
]
Gpus = Annotated[
    int | None,
    counting(
        "--gpus",
        what="number of GPUs",
        help="How many of them.",
        metavar="N",
        show_default="1",
        rich_help_panel=_MACHINE,
    ),
]
InstanceName = Annotated[
    str | None,
    Option(
        "--instance",
        help="A machine to rent, such as `g5.12xlarge` or `colab-t4`.",
        metavar="NAME",
        autocompletion=completing("instances"),
        rich_help_panel=_MACHINE,
    ),
]
Reserve = Annotated[
    int,
    Option(
        "--reserve",
        help="Memory of each device left to a desktop or to other processes.",
        metavar="SIZE",
        parser=lambda text: 0 if text in (0, "0") else units.parse_bytes(text, "reserved memory"),
        show_default=False,
        rich_help_panel=_MACHINE,
    ),
]


class Hardware(NamedTuple):
    """Hardware.

    The machine that a command is about.
    """

    gpu: Gpu = None
    vram: Vram = None
    gpus: Gpus = None
    instance: InstanceName = None
    reserve: Reserve = 0


def words(asked: Hardware) -> str:
    """The same as options of a command line."""
    sizes = {"vram": asked.vram, "reserve": asked.reserve}
    written = {name: units.write_bytes(size) for name, size in sizes.items() if size}
    given = {**asked._asdict(), **written}.items()
    return " ".join(f"--{name} {value}" for name, value in given if value)


def machine(asked: Hardware) -> Machine | None:
    """The machine that the options describe, or nothing if none is given.

    `--vram` beside `--gpu` corrects the memory of a card that comes in several sizes.
    Raises `LLMSizeError` for unknown names and for options that contradict each other.
    """
    found = _described(asked)
    if found is None and asked.reserve:
        raise LLMSizeError("memory is reserved of no device", hint="name it: `--gpu rtx-4090`")
    return None if found is None else reserving(found, asked.reserve)


def _described(asked: Hardware) -> Machine | None:
    gpu, vram, gpus = asked.gpu, asked.vram, asked.gpus
    if asked.instance is not None:
        if gpu or vram or gpus:
            raise LLMSizeError(
                "`--instance` already says which GPUs and how many",
                hint="leave out `--gpu`, `--vram` and `--gpus`",
            )
        offer = presets.get(Instance, asked.instance)
        named = presets.get(Accelerator, offer.accelerator) if offer.accelerator else None
        return rented(offer, named)
    if gpu is not None and gpu.strip().lower() == "auto":
        return _found(gpus)
    accelerator = presets.get(Accelerator, slug(gpu)) if gpu is not None else None
    if vram is not None:
        return replace(plain_machine(vram, devices=gpus or 1), accelerator=accelerator)
    if accelerator is not None:
        return machine_of(accelerator, count=gpus or 1)
    return None


def _found(gpus: int | None) -> Machine:
    """The devices of this computer; `gpus` takes the first so many of them."""
    from llmsize.sources import detect

    devices = detect.devices()
    if gpus is not None and gpus > len(devices):
        raise UndeterminedError(
            f"{gpus} GPUs are asked for, {len(devices)} found on this computer",
            hint="name them with `--gpu rtx-4090 --gpus 2`",
        )
    devices = devices[:gpus]
    try:
        known = presets.get(Accelerator, detect.preset_name(devices[0])) if devices else None
    except LLMSizeError:
        known = None
    return detect.as_machine(devices, known)


Mfu = Annotated[
    float | None,
    Option(
        "--mfu",
        "--efficiency",
        help="Share of the peak that training reaches; the measured median unless given.",
        metavar="SHARE",
        rich_help_panel=_MACHINE,
    ),
]


Price = Annotated[
    float | None,
    Option(
        "--price",
        help="Of one GPU for an hour.",
        metavar="PRICE",
        min=0,
    ),
]
Prices = Annotated[
    str | None,
    Option(
        "--prices",
        help="Your own dated price list, a JSON file, in place of `--price`.",
        metavar="FILE",
    ),
]


class Pricing(NamedTuple):
    """Price."""

    price: Price = None
    prices: Prices = None


def price(machine: Machine | None, asked: Pricing) -> Term | None:
    """The price of one device for an hour, as given or from the user's list; `None` for neither.

    Raises `LLMSizeError` if both are given, or for a machine that the list does not have.
    """
    given, listed = asked.price, asked.prices
    if listed is None:
        unit = "$/GPU-hour"
        return None if given is None else fact("price", given, unit=unit, source="given")
    if given is not None:
        raise LLMSizeError(
            "`--price` and `--prices` both say what it costs", hint="give one of them"
        )
    if machine is None:
        raise LLMSizeError("a price of what?", hint="name the accelerator with `--gpu`")
    from pathlib import Path

    from llmsize.sources.prices import price_of, read_prices

    found = price_of(read_prices(Path(listed)), machine)
    if found is None:
        raise LLMSizeError(
            f"no price of {machine.title} in `{printable(str(listed))}`",
            hint="add it by its name or an alias, or give `--price`",
        )
    return found


def dated(price: Term | None) -> tuple[str, ...]:
    """What an hour costs by a list, and of when that is; nothing for a price that was given."""
    if price is None or price.source == "given":
        return ()
    return (f"{price.value:g} {price.unit}, by {price.source}",)


def sixteen_bit(accelerator: Accelerator) -> str:
    """The format that training multiplies in unless another is named: bf16, or fp16 without it."""
    return "bf16" if supports(accelerator, "bf16") else "fp16"


def efficiency(accelerator: Accelerator, format: str, mfu: float | None) -> Term:
    """The share of the peak as given, or as measured for that accelerator and format."""
    known = presets.every(Utilization).values()
    return efficiency_of(measured_utilization(known, accelerator, format), mfu)
