"""What spares a search of the catalogue its work is true: bounds are below needs."""

import pytest

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.cli import catalogue, options
from llmsize.cli.jobs import need_of, workload
from llmsize.errors import LLMSizeError
from llmsize.memory import overview
from llmsize.memory.overview import JOBS, Job

TOKENS = 3000
FAMILIES = {
    model.family: model.name
    for model in presets.every(Architecture).values()
    if (model.context_length or TOKENS) >= TOKENS and not model.note.startswith("an encoder")
}
SAMPLED = [FAMILIES[family] for family in sorted(FAMILIES)[::3]]
ENDLESS = 10**18


def ways(job: Job) -> dict[str, str]:
    """The formats that make sense for a job; of the files of llama.cpp one stands for all."""
    if job == "inference":
        return {name: catalogue.STORAGES[name] for name in ("fp16/bf16", "int8", "nf4", "q4_k_m")}
    return {"nf4": "nf4"} if job == "QLoRA" else {"fp16/bf16": "bf16"}


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("job", JOBS)
def test_no_need_is_below_its_bound(name: str, job: Job) -> None:
    """What is passed over for its bound would not have fitted: a model of every third family."""
    model = presets.get(Architecture, name)
    works = {title: workload(options.storage(s), 2, TOKENS) for title, s in ways(job).items()}
    asked = 0
    for devices in (1, 4):
        least = catalogue.bound(works, overview.subject, job, ENDLESS, devices)
        for title, work in works.items():
            try:
                needed = need_of(overview.subject(model), work, job, devices).value
            except LLMSizeError:
                continue  # no such file, or nothing to adapt
            assert least(model, title) <= needed
            asked += 1
    assert asked
