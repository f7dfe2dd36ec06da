"""Options that commands share, and what a command line's words become."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llmsize import presets, units
from llmsize.cli.declare import Argument, Option
from llmsize.errors import LLMSizeError, UndeterminedError, did_you_mean, printable
from llmsize.formats import Format
from llmsize.render import OUTPUT_FORMATS, OutputFormat

if TYPE_CHECKING:
    from llmsize.architecture import Architecture
    from llmsize.chart import Chart
    from llmsize.hardware import Accelerator, Machine
    from llmsize.memory.overview import Storage
    from llmsize.scaling.laws import ScalingLaw
    from llmsize.term import Term


def output_format(text: str) -> OutputFormat:
    """One of `OUTPUT_FORMATS`. Raises `LLMSizeError`."""
    for known in OUTPUT_FORMATS:
        if text.strip().lower() == known:
            return known
    raise LLMSizeError(
        f"unknown output format `{printable(text)}`",
        hint=did_you_mean(
            text, OUTPUT_FORMATS, otherwise=f"choose from {', '.join(OUTPUT_FORMATS)}"
        ),
    )


def memory_unit(text: str) -> bool:
    """Whether memory is shown in GiB. Raises `LLMSizeError` for anything but GB and GiB."""
    if text.strip().lower() not in ("gb", "gib"):
        raise LLMSizeError(f"unknown memory unit `{printable(text)}`", hint="write `GB` or `GiB`")
    return text.strip().lower() == "gib"


def default_format() -> OutputFormat:
    """A table in a terminal, plain text in a pipe."""
    return "table" if sys.stdout.isatty() else "plain"


def completing(folder: str) -> Callable[[str], list[str]]:
    """Shell completion of the names of presets in a folder."""
    return lambda incomplete: [
        name for name in presets.names_in(folder) if name.startswith(incomplete.lower())
    ]


def _search(directory: Path | None) -> Path | None:
    presets.search_first(directory)
    return directory


def _positive(given: str | int) -> int:
    """A count; defaults come as they are."""
    return units.parse_count(str(given), "number")


_GENERAL = "Output"

Explain = Annotated[
    bool,
    Option(
        "--explain",
        help="Show formula, values, source and grade of every number.",
        rich_help_panel=_GENERAL,
    ),
]
Output = Annotated[
    str,
    Option(
        "--format",
        help=f"{', '.join(OUTPUT_FORMATS)}; a table in a terminal, plain in a pipe.",
        autocompletion=lambda: list(OUTPUT_FORMATS),
        show_default=False,
        metavar="FORMAT",
        rich_help_panel=_GENERAL,
    ),
]
Units = Annotated[
    str,
    Option(
        "--units",
        help="GB (10⁹ bytes) or GiB (2³⁰ bytes).",
        autocompletion=lambda: ["GB", "GiB"],
        rich_help_panel=_GENERAL,
    ),
]
PresetsDir = Annotated[
    Path | None,
    Option(
        "--presets",
        help="Search your own presets in DIR first.",
        metavar="DIR",
        callback=_search,
        is_eager=True,
        rich_help_panel=_GENERAL,
    ),
]

Into = Annotated[
    Path | None,
    Option(
        "-o",
        "--output",
        metavar="FILE",
        show_default=False,
        help="Write .svg, .png, .html, .csv or .vl.json instead.",
    ),
]

Model = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="A preset, a `config.json`, or a folder that holds one.",
        autocompletion=completing("models"),
        show_default=False,
    ),
]
Parameters = Annotated[
    int | None,
    Option(
        "--params",
        help="Parameter count: `7B`, `1.3b`, `124M`.",
        metavar="N",
        parser=lambda text: units.parse_count(text, "parameter count"),
        show_default=False,
    ),
]
AssumeFamily = Annotated[
    str,
    Option(
        "--assume-family",
        help="Take an unknown architecture for one of this family.",
        metavar="FAMILY",
        show_default=False,
    ),
]
Dtype = Annotated[
    str,
    Option(
        "--dtype",
        help="Format of the weights: `fp32`, `fp16`, `bf16`, `int8`, …",
        metavar="FORMAT",
        autocompletion=completing("formats"),
    ),
]
Batch = Annotated[int, Option("--batch", help="Sequences at once.", metavar="N", parser=_positive)]
Context = Annotated[
    int | None,
    Option(
        "--context",
        help="Tokens per sequence.",
        metavar="TOKENS",
        parser=lambda text: units.parse_count(text, "context"),
        show_default=False,
    ),
]

_SCALING = "Training run"


OptionalModel = Annotated[
    str | None,
    Argument(
        metavar="[MODEL]",
        help="A preset, a `config.json`, or a folder that holds one.",
        autocompletion=completing("models"),
        show_default=False,
    ),
]
Tokens = Annotated[
    float | None,
    Option(
        "--tokens",
        help="Training tokens: `300B`, `15T`.",
        metavar="D",
        parser=lambda text: float(units.parse_count(text, "token count")),
        show_default=False,
        rich_help_panel=_SCALING,
    ),
]
UniqueTokens = Annotated[
    float | None,
    Option(
        "--unique-tokens",
        help="Tokens that differ; the rest repeat them.",
        metavar="U",
        parser=lambda text: float(units.parse_count(text, "count of unique tokens")),
        show_default=False,
        rich_help_panel=_SCALING,
    ),
]
Compute = Annotated[
    float | None,
    Option(
        "--compute",
        help="Training compute: `1e21` FLOP or `3640PF-days`.",
        metavar="C",
        parser=units.parse_flop,
        show_default=False,
        rich_help_panel=_SCALING,
    ),
]
TargetLoss = Annotated[
    float | None,
    Option(
        "--target-loss",
        help="The loss to reach, in the unit of the law.",
        metavar="L",
        min=0,
        show_default=False,
        rich_help_panel=_SCALING,
    ),
]
Law = Annotated[
    str | None,
    Option(
        "--law",
        help="A scaling law, or `all` to compare them.",
        metavar="NAME",
        autocompletion=completing("laws"),
        show_default=False,
        rich_help_panel=_SCALING,
    ),
]
Experts = Annotated[
    int | None,
    Option(
        "--experts",
        help="Experts per layer, for laws of mixtures of experts.",
        metavar="N",
        parser=_positive,
        show_default=False,
        rich_help_panel=_SCALING,
    ),
]
Granularity = Annotated[
    int | None,
    Option(
        "--granularity",
        help="How many times finer than a dense MLP each expert is.",
        metavar="G",
        parser=_positive,
        show_default=False,
        rich_help_panel=_SCALING,
    ),
]
Mfu = Annotated[
    float | None,
    Option(
        "--mfu",
        "--efficiency",
        help="Share of the peak that training reaches; the measured median unless given.",
        metavar="SHARE",
        show_default=False,
        rich_help_panel=_SCALING,
    ),
]


Price = Annotated[
    float | None,
    Option(
        "--price",
        help="Of one GPU for an hour.",
        metavar="PRICE",
        min=0,
        show_default=False,
    ),
]
Prices = Annotated[
    Path | None,
    Option(
        "--prices",
        help="Your own dated price list, a JSON file, in place of `--price`.",
        metavar="FILE",
        show_default=False,
    ),
]


def price(machine: Machine | None, given: float | None, listed: Path | None) -> Term | None:
    """The price of one device for an hour, as given or from the user's list; `None` for neither.

    Raises `LLMSizeError` if both are given, or for a machine that the list does not have.
    """
    from llmsize.term import fact

    if listed is None:
        unit = "$/GPU-hour"
        return None if given is None else fact("price", given, unit=unit, source="given")
    if given is not None:
        raise LLMSizeError("--price and --prices both say what it costs", hint="give one of them")
    if machine is None:
        raise LLMSizeError("a price of what?", hint="name the accelerator with `--gpu`")
    from llmsize.sources.prices import price_of, read_prices

    found = price_of(read_prices(listed), machine)
    if found is None:
        raise LLMSizeError(
            f"no price of {machine.title} in `{printable(str(listed))}`",
            hint="add it by its name or an alias, or give `--price`",
        )
    return found


def storage(text: str) -> Storage:
    """A format that every weight takes, or a recipe of quantization over 16-bit weights.

    Raises `LLMSizeError` for a name that is neither.
    """
    from llmsize.memory.overview import Storage
    from llmsize.memory.weights import Recipe

    format = presets.find(Format, text)
    if format is not None and format.block_elements == 1 and not format.beside:
        return Storage(format.name, format)
    recipe = presets.find(Recipe, text)
    if recipe is not None:
        return Storage(recipe.name, presets.get(Format, "bf16"), recipe)
    if format is not None:
        return Storage(format.name, format)
    known = [*presets.names(Format), *presets.names(Recipe)]
    raise LLMSizeError(
        f"unknown dtype `{printable(text)}`",
        hint=did_you_mean(text, known, otherwise="see `llmsize show formats` and `recipes`"),
    )


_MACHINE = "Hardware"

Gpu = Annotated[
    str | None,
    Option(
        "--gpu",
        help="An accelerator, such as `rtx-4090`, or `auto` for the one in this computer.",
        metavar="NAME",
        autocompletion=completing("accelerators"),
        show_default=False,
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
        show_default=False,
        rich_help_panel=_MACHINE,
    ),
]
Gpus = Annotated[
    int | None,
    Option(
        "--gpus",
        help="How many of them.",
        metavar="N",
        parser=_positive,
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
        show_default=False,
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


def machine(
    gpu: str | None = None,
    vram: int | None = None,
    gpus: int | None = None,
    instance: str | None = None,
    reserve: int = 0,
) -> Machine | None:
    """The machine that the options describe, or nothing if none is given.

    `--vram` beside `--gpu` corrects the memory of a card that comes in several sizes.
    Raises `LLMSizeError` for unknown names and for options that contradict each other.
    """
    from llmsize.hardware import Accelerator, Instance, plain_machine, rented, reserving, slug
    from llmsize.hardware import machine as machine_of

    if instance is not None and (gpu or vram or gpus):
        raise LLMSizeError(
            "`--instance` already says which GPUs and how many",
            hint="leave out `--gpu`, `--vram` and `--gpus`",
        )
    if instance is not None:
        offer = presets.get(Instance, instance)
        named = presets.get(Accelerator, offer.accelerator) if offer.accelerator else None
        return reserving(rented(offer, named), reserve)
    if gpu is not None and gpu.strip().lower() == "auto":
        return reserving(_found(gpus), reserve)
    accelerator = presets.get(Accelerator, slug(gpu)) if gpu is not None else None
    if vram is not None:
        plain = plain_machine(vram, devices=gpus or 1)
        return reserving(replace(plain, accelerator=accelerator), reserve)
    if accelerator is not None:
        return reserving(machine_of(accelerator, count=gpus or 1), reserve)
    return None


def _found(gpus: int | None) -> Machine:
    """The devices of this computer; `gpus` takes the first so many of them."""
    from llmsize.hardware import Accelerator
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


def architecture(text: str) -> Architecture:
    """The model that an argument names: a preset, a file, a folder, `-`, or one of the Hub.

    Raises `LLMSizeError` for a name that is none of them, and for weights without a shape.
    """
    from llmsize.architecture import Architecture

    if "/" not in text and (known := presets.find(Architecture, text)):
        return known  # the common case, without the readers of every kind of file
    from llmsize.sources.resolve import resolve

    source = resolve(text)
    if source.architecture is None:
        raise LLMSizeError(
            f"`{printable(text)}` does not say what shape the model has",
            hint="give the folder that holds its `config.json`",
        )
    return source.architecture


def assuming(known: Architecture, family: str) -> Architecture:
    """The model as one of `family`, if that is asked for; what follows is then assumed.

    Raises `LLMSizeError` for a family that is not known, and where the model's own one is.
    """
    from llmsize.anatomy.families import MODULES, forward_of

    if not family:
        return known
    if known.family in MODULES:
        raise LLMSizeError(
            f"the family of `{printable(known.name)}` is known: `{known.family}`",
            hint="leave out `--assume-family`",
        )
    forward_of(family)
    return replace(known, family=family, grade="assumed")


def own_dtype(architecture: Architecture) -> str:
    """The format that a model's weights were published in; empty if its configuration is silent."""
    config = architecture.config
    return str(config.get("torch_dtype") or config.get("dtype") or "").removeprefix("torch.")


def law(text: str, *, experts: int | None = None, granularity: int | None = None) -> ScalingLaw:
    """The law of that name, at the number and granularity of experts that are given."""
    from llmsize.scaling.laws import ScalingLaw, additive

    given = {"experts": experts, "granularity": granularity}
    known = {name: float(value) for name, value in given.items() if value is not None}
    found = presets.get(ScalingLaw, text)
    for name in known:
        if name not in found.settings:
            raise LLMSizeError(
                f"`{found.name}` says nothing about {name}",
                hint=f"leave out --{name}, or name a law that does: `--law all` lists them",
            )
    return additive(found, **known)


def laws(*, experts: int | None = None, granularity: int | None = None) -> list[ScalingLaw]:
    """Every law that the given settings are enough for."""
    from llmsize.scaling.laws import ScalingLaw

    given = {"experts": experts, "granularity": granularity}
    known = {name for name, value in given.items() if value is not None}
    return [
        law(each.name, **{name: given[name] for name in each.settings})
        for each in presets.every(ScalingLaw).values()
        if known.issuperset(each.settings)
    ]


def efficiency(accelerator: Accelerator, format: str, mfu: float | None) -> Term:
    """The share of the peak as given, or as measured for that accelerator and format."""
    from llmsize.throughput import Utilization, measured_utilization
    from llmsize.throughput import efficiency as efficiency_of

    known = presets.every(Utilization).values()
    return efficiency_of(measured_utilization(known, accelerator, format), mfu)


def affordable(gpu_hours: float, gpu: str | None, mfu: float | None) -> Term:
    """FLOP that so many hours of an accelerator do in bf16, and by which utilization."""
    from llmsize.hardware import peak
    from llmsize.throughput import affordable_flop

    if gpu is None:
        raise LLMSizeError("--gpu-hours need an accelerator", hint="add --gpu h100-sxm-80gb")
    from llmsize.hardware import Accelerator, slug

    accelerator = presets.get(Accelerator, slug(gpu))
    share = efficiency(accelerator, "bf16", mfu)
    flop = affordable_flop(
        devices=1, seconds=gpu_hours * 3600, peak=peak(accelerator, "bf16"), efficiency=share
    )
    said = f"{share.value:.0%} of the bf16 peak of {accelerator.title}"
    return replace(flop, note=f"{said} ({share.note or 'given'})")


def drawn_into(charts: Sequence[Chart], path: Path) -> str:
    """Write the charts into a file, in the format of its ending, and say where.

    Raises `LLMSizeError` for an unknown ending, without the extra `plot`, and for a bad folder.
    """
    from llmsize.render.picture import picture

    data = picture(charts, path.name)
    try:
        path.write_bytes(data)
    except OSError as failure:
        raise LLMSizeError(
            f"cannot write `{printable(str(path))}`: {failure.strerror}",
            hint="choose a folder that exists",
        ) from None
    return f"{path}\n"
