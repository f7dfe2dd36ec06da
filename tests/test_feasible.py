"""Training runs that are known to have fitted, and what `fits` would have said of them."""

import csv
import re
from collections import Counter
from pathlib import Path

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.formats import BF16
from llmsize.memory.methods import Choices
from llmsize.memory.overview import BANDS
from llmsize.optimizers import Optimizer, Precision
from llmsize.planning.fits import Verdict, verdict
from llmsize.planning.needs import tuning
from llmsize.planning.training import Question
from llmsize.stack import Stack

TABLE = Path(__file__).parent / "reference" / "feasible_training.csv"
MPT_VOCABULARY = 50_368
FOUNDRY = presets.get(Stack, "llm-foundry")
MIXED, ADAMW = presets.get(Precision, "mixed"), presets.get(Optimizer, "adamw")


def mpt(layers: int, hidden: int, heads: int, positions: int) -> Architecture:
    """An MPT block under flash attention keeps what GPT-2's does: ALiBi lives in the kernel."""
    config = {
        "vocab_size": MPT_VOCABULARY, "n_layer": layers, "n_embd": hidden, "n_head": heads,
        "n_positions": positions, "activation_function": "gelu", "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": True,
    }  # fmt: skip
    return Architecture("mpt", "gpt2", config, "mosaicml/llm-foundry scripts/train/benchmarking")


def said(row: dict[str, str]) -> Verdict:
    """The verdict on one run of FSDP's full sharding."""
    shape = re.search(r"L,h,heads=\((\d+), (\d+), (\d+)\)", row["notes"])
    assert shape
    layers, hidden, heads = map(int, shape.groups())
    choices = Choices(
        batch=int(row["batch_per_device"]), sequence=int(row["seq_len"]), format=BF16,
        recompute="full" if row["recompute"] == "full" else "none",
    )  # fmt: skip
    model = mpt(layers, hidden, heads, int(row["seq_len"]))
    step = Question(model, choices, FOUNDRY, MIXED, ADAMW)
    need = tuning(step, int(row["gpus"])).value
    return verdict(need, int(row["bytes"]), band=BANDS["full training"])


def test_no_run_that_fitted_is_said_not_to_fit() -> None:
    """138 runs of llm-foundry's benchmarks on 40 and 80 GB cards: at least 97 % are not refused."""
    with TABLE.open() as file:
        verdicts = Counter(said(row) for row in csv.DictReader(file))
    assert verdicts.total() == 138
    assert verdicts["does not fit"] <= 0.03 * verdicts.total()
