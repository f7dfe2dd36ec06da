"""A model as one engine serves it: what it is computed in, and how its weights are stored."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from llmsize import presets
from llmsize.anatomy import Trace
from llmsize.architecture import Architecture
from llmsize.cli import options
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError
from llmsize.formats import Format
from llmsize.hardware import Accelerator
from llmsize.memory.serving import Serving, serving
from llmsize.memory.weights import Recipe
from llmsize.planning.support import check_support, obstacle_to
from llmsize.quick_dataclasses import dataclass, replace
from llmsize.sources.quantization import recipe_name

PREDICTION = "mtp"
"""In place of a draft model: multi-token prediction by the model itself."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model for one engine, before it is known how its weights are stored."""

    architecture: Architecture
    trace: Trace
    engine: Engine
    format: Format
    cache: Format
    accelerator: Accelerator | None = None
    assumed: str = ""
    """Why it is not computed in the format of its weights."""

    def stored(self, name: str) -> Serving:
        """The model with weights by the recipe or in the format of that name.

        Raises `LLMSizeError` where the engine or the accelerator does not have it.
        """
        # `fp8` is a format, too: of every weight
        recipe = presets.find(Recipe, name) if name else None
        storage = options.storage(name) if name and recipe is None else None
        if self.engine.allocation == "buffers" and recipe is None:
            recipe = presets.get(Recipe, f"gguf-{name}" if storage else self.engine.recipe)
        plain = storage.format if storage and recipe is None else self.format
        if recipe is None and storage and plain.block_bytes < 2:
            raise LLMSizeError(
                f"`{plain.name}` alone does not say how weights are quantized",
                hint=f"name a recipe: {', '.join(_named_alike(plain.name))}",
            )
        if recipe is not None:
            check_support(self.engine, self.accelerator, _format_named(recipe.base))
        return serving(
            self.architecture, self.trace, self.engine, recipe, _format_named, format=plain,
            keys=self.cache, values=self.cache,
        )  # fmt: skip


class Setting(NamedTuple):
    """One row of a table: how the weights are stored, tokens and sequences."""

    stored: str
    context: int
    batch: int


def own_recipe(subject: Subject) -> str:
    """How the checkpoint itself is stored, unless the engine reads files that it is none of."""
    stored, files = subject.architecture.stored, subject.engine.recipe
    is_file = stored.get("quant_method") == "gguf"
    return files if files and not is_file else recipe_name(stored)


def restored(question: Serving, subject: Subject, name: str) -> Serving:
    """The same question with weights stored in another way."""
    made = subject.stored(name)
    return replace(question, weights=made.weights, file=made.file)


def recipes(subject: Subject) -> tuple[str, ...]:
    """Ways to store the weights that are commonly published for the engine, from the best."""
    engine, accelerator = subject.engine, subject.accelerator
    plain = () if engine.allocation == "buffers" else ("",)
    return (*plain, *(
        name for name in engine.published
        if accelerator is None
        or not obstacle_to(_format_named(presets.get(Recipe, name).base), engine, accelerator)
    ))  # fmt: skip


def _named_alike(name: str) -> list[str]:
    """Recipes that have a format's name in theirs."""
    return [recipe for recipe in presets.names(Recipe) if name in recipe] or ["llm-int8", "nf4"]


@lru_cache(maxsize=512)
def _format_named(name: str) -> Format:
    return presets.get(Format, name)
