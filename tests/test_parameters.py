"""Parameter counts against instantiated models."""

import csv
import json
from pathlib import Path

import pytest

from llmsize.anatomy import traced
from llmsize.anatomy.families import MODULES
from llmsize.anatomy.parameters import by_component, count
from llmsize.architecture import Architecture

REFERENCE = Path(__file__).parent / "reference"

with (REFERENCE / "param_counts.csv").open() as table:
    ROWS = [row for row in csv.DictReader(table) if row["model_type"] in MODULES]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_counts_equal_the_instantiated_model(row: dict[str, str]) -> None:
    """The fold over the forward pass counts every parameter that the real model has."""
    config = json.loads((REFERENCE / row["config_file"]).read_text())
    model = Architecture(row["model"], row["model_type"], config, source=row["config_file"])
    weights = traced(model).weights.values()
    counted = count(weights)
    assert counted.total == int(row["total_params"])
    assert counted.embedding == int(row["embedding_params"])
    assert counted.head == int(row["lm_head_params"])
    assert counted.active == int(row["active_params"])
    assert by_component(weights).value == counted.total
