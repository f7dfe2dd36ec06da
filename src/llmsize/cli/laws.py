"""Options about a training run and the scaling law that it is asked of."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from llmsize import presets, units
from llmsize.cli.declare import Option, counting
from llmsize.cli.options import completing
from llmsize.errors import LLMSizeError
from llmsize.scaling.laws import ScalingLaw, additive

_SCALING = "Training run"


Tokens = Annotated[
    float | None,
    counting(
        "--tokens",
        what="token count",
        kind=float,
        help="Training tokens: `300B`, `15T`.",
        metavar="D",
        rich_help_panel=_SCALING,
    ),
]
UniqueTokens = Annotated[
    float | None,
    counting(
        "--unique-tokens",
        what="count of unique tokens",
        kind=float,
        help="Tokens that differ; the rest repeat them.",
        metavar="U",
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
        rich_help_panel=_SCALING,
    ),
]
Experts = Annotated[
    int | None,
    counting(
        "--experts",
        what="number of experts",
        help="Experts per layer, for laws of mixtures of experts.",
        metavar="N",
        rich_help_panel=_SCALING,
    ),
]
Granularity = Annotated[
    int | None,
    counting(
        "--granularity",
        what="granularity",
        help="How many times finer than a dense MLP each expert is.",
        metavar="G",
        rich_help_panel=_SCALING,
    ),
]


class Asked(NamedTuple):
    """Scaling law.

    Which one is asked, and the settings that some laws want.
    """

    law: Law = None
    experts: Experts = None
    granularity: Granularity = None

    @property
    def compared(self) -> bool:
        """Whether all laws are asked, to compare them."""
        return (self.law or "").strip().lower() == "all"

    @property
    def settings(self) -> dict[str, float]:
        """The settings that are given."""
        given = {"experts": self.experts, "granularity": self.granularity}
        return {name: float(value) for name, value in given.items() if value is not None}


def law(asked: Asked, default: str) -> ScalingLaw:
    """The law that is asked for, at the settings that are given. Raises `LLMSizeError`."""
    return named(asked.law or default, **asked.settings)


def named(name: str, **settings: float) -> ScalingLaw:
    """The law of that name at these settings.

    Raises `LLMSizeError` for an unknown name, and for settings that the law has not.
    """
    found = presets.get(ScalingLaw, name)
    for setting in settings:
        if setting not in found.settings:
            raise LLMSizeError(
                f"`{found.name}` says nothing about {setting}",
                hint=f"leave out `--{setting}`, or name a law that does: `--law all` lists them",
            )
    return additive(found, **settings)


def every(**settings: float) -> list[ScalingLaw]:
    """Every law that the given settings are enough for."""
    return [
        named(each.name, **{name: settings[name] for name in each.settings})
        for each in presets.every(ScalingLaw).values()
        if settings.keys() >= set(each.settings)
    ]
