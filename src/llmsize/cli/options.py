"""Options about a model, which most commands have, and what their words become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

from llmsize import presets
from llmsize.cli.declare import Argument, Option, counting
from llmsize.errors import LLMSizeError, did_you_mean, printable
from llmsize.formats import Format
from llmsize.quick_dataclasses import replace
from llmsize.units import format_count

if TYPE_CHECKING:
    from llmsize.architecture import Architecture
    from llmsize.chart import Chart
    from llmsize.memory.overview import Storage


def completing(folder: str) -> Callable[[str], list[str]]:
    """Shell completion of the names of presets in a folder."""
    return lambda incomplete: [
        name for name in presets.names_in(folder) if name.startswith(incomplete.lower())
    ]


def _complete_family(incomplete: str) -> list[str]:
    """Every `model_type` whose forward pass is known."""
    from llmsize.anatomy.families import MODULES

    return [name for name in sorted(MODULES) if name.startswith(incomplete.lower())]


Into = Annotated[
    str | None,
    Option(
        "-o",
        "--output",
        metavar="FILE",
        show_default=False,
        help="Write .svg, .png, .html, .csv or .vl.json instead.",
    ),
]

_MODEL = {
    "help": "A preset, a `config.json`, a checkpoint or its folder, or `org/name` of the Hub.",
    "autocompletion": completing("models"),
    "show_default": False,
}
Model = Annotated[str, Argument(metavar="MODEL", **_MODEL)]
OptionalModel = Annotated[str | None, Argument(metavar="[MODEL]", **_MODEL)]
Parameters = Annotated[
    int | None,
    counting(
        "--params",
        what="parameter count",
        help="Parameter count: `7B`, `1.3b`, `124M`.",
        metavar="N",
        show_default=False,
    ),
]
AssumeFamily = Annotated[
    str,
    Option(
        "--assume-family",
        help="Take an unknown architecture for one of this family.",
        metavar="FAMILY",
        autocompletion=_complete_family,
        show_default=False,
    ),
]
Family = Annotated[
    str,
    Option(
        "--family",
        help="Only this `model_type`.",
        metavar="FAMILY",
        autocompletion=_complete_family,
    ),
]
Commercial = Annotated[bool, Option("--commercial", help="Only models for commercial use.")]
Dtype = Annotated[
    str,
    Option(
        "--dtype",
        "--quant",
        help="Format of the weights: `fp32`, `bf16`, `nf4`, `q4_k_m`, …",
        metavar="FORMAT",
        autocompletion=completing("formats"),
    ),
]
EngineName = Annotated[
    str,
    Option(
        "--engine", metavar="NAME", show_default="transformers, or llama.cpp for its files",
        help="What serves: `vllm`, `llama.cpp`, …: `llmsize show engines`.",
        autocompletion=completing("engines"),
    ),
]  # fmt: skip
Batch = Annotated[
    int, counting("--batch", what="number of sequences", help="Sequences at once.", metavar="N")
]
CONTEXT = 4096
"""Tokens of a sequence where none are asked for, or fewer if the model has fewer positions."""
OptionalContext = Annotated[
    int | None,
    counting(
        "--context", "--seq-len", what="context", help="Tokens per sequence.", metavar="TOKENS",
        show_default="4096, or the model's own if fewer",
    ),
]  # fmt: skip


def storage(text: str, *, served: bool = False) -> Storage:
    """A format that every weight takes, or a recipe of quantization over 16-bit weights.

    Where weights are `served` by an engine, a name that both have, such as `fp8`, is the recipe's.
    Raises `LLMSizeError` for a name that is neither.
    """
    from llmsize.memory.overview import Storage
    from llmsize.memory.weights import Recipe

    format = presets.find(Format, text)
    plain = format is not None and format.block_elements == 1 and not format.beside
    if format is not None and plain and not served:
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
    if not family:
        return known
    from llmsize.anatomy.families import MODULES, forward_of

    if known.family in MODULES:
        raise LLMSizeError(
            f"the family of `{printable(known.name)}` is known: `{known.family}`",
            hint="leave out `--assume-family`",
        )
    forward_of(family)
    config = {**known.config, "model_type": family}  # which families of several types ask for
    return replace(known, config=config, family=family, grade="assumed")


def taken_for(architecture: Architecture) -> tuple[str, ...]:
    """That the model is taken for one of a known family, if it is."""
    return (f"the block of `{architecture.family}`",) if architecture.grade == "assumed" else ()


def names(text: str) -> tuple[str, ...]:
    """Names between commas; none for no text. Raises `LLMSizeError` for commas alone."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if text and not found:
        raise LLMSizeError(
            f"`{printable(text)}` names nothing", hint="write names between commas, or leave it out"
        )
    return found


SILENT = "bf16"
"""The format of a checkpoint that names none: what most are published in, as large as fp16, which
takes its place on a card without it."""


def own_dtype(architecture: Architecture) -> str:
    """The format that a model's weights were published in; empty if its configuration is silent."""
    config = architecture.config
    return str(config.get("torch_dtype") or config.get("dtype") or "").removeprefix("torch.")


def own_storage(architecture: Architecture) -> Storage:
    """How a model's checkpoint stores its weights, quantized or not; bf16 if it is silent.

    Raises `LLMSizeError` for a quantization that llmsize does not know.
    """
    plain = storage(own_dtype(architecture) or SILENT)
    if not architecture.stored:
        return plain
    from llmsize.sources.quantization import recipe_name

    return storage(recipe_name(architecture.stored))._replace(format=plain.format)


def usual_engine(storage: Storage) -> str:
    """llama.cpp for its own files, transformers for everything else."""
    gguf = storage.recipe is not None and storage.recipe.container == "gguf"
    return "llama.cpp" if gguf else "transformers"


def requantized(architecture: Architecture, name: str) -> tuple[str, ...]:
    """What training from weights in the format `name` assumes of a quantized checkpoint."""
    if not architecture.stored:
        return ()
    method = printable(str(architecture.stored.get("quant_method", "quantized")), 40)
    return (f"training starts from weights in {name}; those of the checkpoint are in {method}",)


def usual_length(architecture: Architecture, most: int = CONTEXT) -> int:
    """Tokens of a sequence where none are asked for: so many, or the positions that there are."""
    return min(most, architecture.context_length or most)


def beyond_positions(architecture: Architecture, tokens: int) -> tuple[str, ...]:
    """That a sequence is longer than any the model was made for, if it is."""
    positions = architecture.context_length
    if positions is None or tokens <= positions:
        return ()
    return (f"{tokens:,} tokens are more than the {positions:,} positions that the model was made "
            "for",)  # fmt: skip


def language_model_alone(architecture: Architecture) -> tuple[str, ...]:
    """What training leaves out of a checkpoint for several media, if it is of one."""
    from llmsize.anatomy.towers import towers

    beside = [
        part.name if part.parameters is None
        else f"{part.name} ({format_count(part.parameters)} parameters)"
        for part in towers(architecture.config, architecture.name)
    ]  # fmt: skip
    if not beside:
        return ()
    return (f"the language model alone is loaded and trained, without {' and '.join(beside)}",)


def drawn_into(charts: Sequence[Chart], file: str) -> str:
    """Write the charts into a file, in the format of its ending, and say where.

    Raises `LLMSizeError` for an unknown ending, without the extra `plot`, and for a bad folder.
    """
    from pathlib import Path

    from llmsize.render.picture import picture

    data = picture(charts, Path(file).name)
    try:
        Path(file).write_bytes(data)
    except OSError as failure:
        raise LLMSizeError(
            f"cannot write `{printable(str(file))}`: {failure.strerror}",
            hint="choose a folder that exists",
        ) from None
    return f"{file}\n"
