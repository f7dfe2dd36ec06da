"""Which of a model's parameters a law counts, and what a bare number is taken for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmsize.scaling.laws import ScalingLaw, non_embedding_parameters, total_parameters
from llmsize.units import format_count

if TYPE_CHECKING:
    from llmsize.anatomy.parameters import Parameters


def counted(law: ScalingLaw, model: Parameters) -> int:
    """The N of `law` for a model: exact, from its anatomy.

    A law of dense models takes the active parameters of a mixture of experts.
    """
    match law.counts:
        case "non-embedding":
            return model.non_embedding
        case "all but embedding":
            return model.active - model.embedding - model.position
        case "total of all experts":
            return model.total
        case _:
            return model.active


def reading(law: ScalingLaw, n: float) -> str:
    """What a bare count is read as, and what it would be if it were the other kind."""
    said = f"{format_count(n)} is read as the law's own N, {law.counts} parameters"
    if law.counts == "non-embedding":
        other = non_embedding_parameters(n)
        return f"{said}; a total of {format_count(n)} has about {format_count(other)} of them {_BY}"
    if law.counts == "total":
        other = total_parameters(n)
        return f"{said}; {format_count(n)} without embeddings are about {format_count(other)} {_BY}"
    return said


_BY = "(Pearce & Song 2024)"
