"""Known models by size: a shape to assume where only a parameter count is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log

SPAN = 1.25
"""Models whose counts differ by less than this factor are of one size."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """Published parameter counts of models that differ mostly in size."""

    name: str
    rungs: Mapping[str, int]
    """Parameters by model preset."""
    source: str


def nearest(ladder: Ladder, parameters: int) -> str:
    """The model whose count has the smallest ratio to `parameters`."""
    return min(ladder.rungs, key=lambda name: abs(log(ladder.rungs[name] / parameters)))


def of_size(ladder: Ladder, parameters: int) -> list[str]:
    """The models within a factor of `SPAN`, smallest first; none if the size is unusual."""
    least, most = parameters / SPAN, parameters * SPAN
    near = [name for name, count in ladder.rungs.items() if least <= count <= most]
    return sorted(near, key=ladder.rungs.__getitem__)
