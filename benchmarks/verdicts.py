"""What `fits` says of runs that are known to have fitted, or to have run out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from benchmarks.answers import Answer
from llmsize import presets
from llmsize.errors import LLMSizeError
from llmsize.planning.fits import Band, Verdict, verdict
from llmsize.planning.needs import tuning
from llmsize.planning.training import Question

Row = Mapping[str, str]

WRONG: dict[str, tuple[Verdict, str]] = {
    "fits": ("does not fit", "fitted, not said not to fit"),
    "capacity": ("does not fit", "fitted, not said not to fit"),
    "oom": ("fits", "ran out of memory, not said to fit"),
}
"""By kind of row, the verdict that would be wrong, and what the answer is called."""

METHODS = ("full", "full (pretrain)", "lora", "qlora")
"""What is judged."""


def verdicts(rows: Iterable[Row], question: Callable[[Row], Question]) -> Iterator[Answer]:
    """1 for every run on which the verdict is not wrong, 0 for the others.

    A run of several devices is one that divides everything; a run whose adapters' rank is not
    published is judged with ours and counted apart.
    """
    for row in rows:
        if row["kind"] not in WRONG:
            continue
        wrong, quantity = WRONG[row["kind"]]
        if not _expressible(row):
            yield Answer(row["id"], f"{quantity}; layout not expressible", 1.0, None)
            continue
        if "lora" in row["method"] and not row["lora_rank"]:
            quantity += "; rank not published"
        try:
            room = int(row["bytes"])
            need = tuning(question(row), int(row["gpus"]), room).value
            said = verdict(need, room, band=presets.get(Band, "training").share)
            yield Answer(row["id"], quantity, 1.0, float(said != wrong))
        except LLMSizeError:
            yield Answer(row["id"], quantity, 1.0, None)


def _expressible(row: Row) -> bool:
    """Whether batch and length are known and nothing is divided but the states of the step."""
    known = row["batch_per_device"].isdigit() and row["seq_len"].isdigit() and row["gpus"].isdigit()
    whole = all(row[degree] in ("", "1") for degree in ("tp", "pp", "cp", "ep"))
    alone = row["gpus"] == "1" or row["zero_stage"][:1] in ("2", "3")
    kept = row["offload"] in ("", "none")
    return known and whole and alone and kept and row["method"] in METHODS
