"""Learning rate and batch size as published fits suggest them, side by side: they disagree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from llmsize.quick_dataclasses import dataclass
from llmsize.scaling.laws import ScalingLaw, answer, relations
from llmsize.term import Term


@dataclass(frozen=True, slots=True)
class Hint:
    """What one fit suggests; absent for what it does not cover."""

    law: ScalingLaw
    learning_rate: Term | None
    batch: Term | None
    """Tokens per step."""


def hints(laws: Iterable[ScalingLaw], *, parameters: float, tokens: float) -> Iterator[Hint]:
    """The suggestions of every law among `laws` that makes any, for one run with C = 6ND."""
    known = {"N": parameters, "D": tokens, "C": 6 * parameters * tokens}
    for law in laws:
        rate, batch = (_suggested(law, letter, known) for letter in ("lr", "B"))
        if rate:
            yield Hint(law, rate, batch)


def _suggested(law: ScalingLaw, letter: str, known: dict[str, float]) -> Term | None:
    for relation in relations(law):
        target, _, given = relation.partition(" | ")
        if target == letter and set(given.split(", ")) <= known.keys():
            return answer(law, relation, "", **{name: known[name] for name in given.split(", ")})
    return None
