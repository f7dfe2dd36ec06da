"""Reading a model's configuration with its traps: absent, misspelt, negative, enormous."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmsize.errors import LLMSizeError, printable

LARGEST = 10**9
"""No dimension of a model is larger; what claims to be is a mistake."""


MOST = 1000
"""No model has more layers, or heads in a layer; more would only take long to refuse."""


class Config:
    """The fields of one `config.json`, each asked for by its name or an older one."""

    __slots__ = ("fields", "model")

    def __init__(self, fields: Mapping[str, Any], model: str) -> None:
        """`model` names the architecture in errors."""
        self.fields = fields
        self.model = model

    def size(self, *names: str, default: int | None = None) -> int:
        """A positive whole number, from the first of `names` that is present."""
        value = self.value(*names)
        if value is None:
            if default is None:
                raise self.error(
                    f"has no `{names[0]}`", "add that field, as in the published config"
                )
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
            raise self.error(
                f"has `{names[0]}` = {printable(repr(value), 40)}",
                f"it must be a whole number from 1 to {LARGEST:,}",
            )
        return value

    def few(self, *names: str, default: int | None = None) -> int:
        """A number of things that are gone through one by one, such as layers or heads."""
        number = self.size(*names, default=default)
        if number > MOST:
            raise self.error(
                f"has `{names[0]}` = {number:,}", f"it must be a whole number from 1 to {MOST:,}"
            )
        return number

    def heads(self, hidden: int, *names: str, default: int | None = None) -> int:
        """A number of heads that share `hidden` channels evenly."""
        heads = self.few(*names, default=default)
        if hidden % heads:
            raise self.error(
                f"has {heads} heads that do not divide {hidden}", f"correct `{names[0]}`"
            )
        return heads

    def count(self, *names: str, default: int = 0) -> int:
        """A whole number that may be zero, such as a number of experts."""
        value = self.value(*names)
        return 0 if value == 0 and not isinstance(value, bool) else self._optional(names, default)

    def _optional(self, names: tuple[str, ...], default: int) -> int:
        return default if self.value(*names) is None else self.size(*names)

    def flag(self, *names: str, default: bool = False) -> bool:
        """True or false."""
        value = self.value(*names)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(
                f"has `{names[0]}` = {printable(repr(value), 40)}", "write true or false"
            )
        return value

    def number(self, *names: str, default: float = 0.0) -> float:
        """A finite number, such as a dropout probability."""
        value = self.value(*names)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self.error(f"has `{names[0]}` = {printable(repr(value), 40)}", "write a number")
        return float(value)

    def text(self, *names: str, default: str = "") -> str:
        """A word, such as an activation's name."""
        value = self.value(*names)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.error(f"has `{names[0]}` = {printable(repr(value), 40)}", "write a name")
        return value

    def sequence(self, *names: str) -> Sequence[Any] | None:
        """A list, such as one entry a layer, or `None` if absent."""
        value = self.value(*names)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) > 100_000:
            raise self.error(f"has `{names[0]}` = {printable(repr(value), 40)}", "write a list")
        return value

    def each_layer(self, layers: int, *names: str) -> Sequence[Any] | None:
        """A list's entry for each of so many layers, or `None` if the list is absent."""
        listed = self.sequence(*names)
        if listed is not None and len(listed) < layers:
            name = next(name for name in names if self.fields.get(name) is not None)
            raise self.error(f"has {len(listed)} `{name}` for {layers} layers", "give one a layer")
        return None if listed is None else listed[:layers]

    def every_layer(self, layers: int, *names: str) -> Sequence[Any]:
        """The same of a list that the model cannot do without."""
        listed = self.each_layer(layers, *names)
        if listed is None:
            raise self.error(f"has no `{names[0]}`", "give one a layer")
        return listed

    def value(self, *names: str) -> Any:
        """The first of `names` that is present and not null."""
        for name in names:
            value = self.fields.get(name)
            if value is not None:
                return value
        return None

    def changed(self, **fields: Any) -> Config:
        """The same configuration with these fields in place of its own."""
        return Config({**self.fields, **fields}, self.model)

    def error(self, message: str, hint: str) -> LLMSizeError:
        """An error about this configuration."""
        return LLMSizeError(f"the configuration of `{printable(self.model)}` {message}", hint=hint)
