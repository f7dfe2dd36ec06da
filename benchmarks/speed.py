"""How long an estimate takes once the model is loaded: `python benchmarks/speed.py [--check]`.

Processor time of one process, the least of some runs. Time goes with the events of a trace (births
and deaths of tensors), so those are shown beside it: unlike time, they are the same everywhere.

`--table tests/reference` asks every row of `training_memory.csv` instead, one new question each.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count as counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import llmsize
from benchmarks.tables.traces import steps
from llmsize import presets
from llmsize.anatomy import LoRA, Setting, run_forward, traced
from llmsize.anatomy.autograd import backward
from llmsize.anatomy.parameters import count
from llmsize.architecture import Architecture
from llmsize.memory.training import TrainingRun, training_step
from llmsize.optimizers import Optimizer, Precision

RUNS = 15
_step, _outline = training_step.__wrapped__, traced.__wrapped__
"""What nobody asked for before: neither is remembered."""

FULL = Setting(batch=2, sequence=2048, training=True)
ADAPTED = FULL._replace(trained=frozenset(), adapter=LoRA(rank=16, targets=("all-linear",)))
SETTINGS = {
    "full": FULL,
    "LoRA": ADAPTED,
    "recomputed": FULL._replace(checkpoint_every=1),
}
BUDGETS = {
    ("gpt2", "full"): 3.0,
    ("llama-3-8b", "full"): 3.5,
    ("llama-3-8b", "LoRA"): 7.0,
    ("llama-3-8b", "recomputed"): 5.0,
    ("mixtral-8x7b", "full"): 5.5,
    ("qwen3-30b-a3b", "full"): 5.5,
    ("mamba-2.8b", "full"): 8.0,
    ("gemma-3-27b", "full"): 9.0,
    ("gemma-3-27b", "LoRA"): 13.0,
    ("deepseek-v3", "full"): 7.0,
    ("deepseek-v3", "LoRA"): 11.0,
}
"""Milliseconds for a training step of a model: half as much again as a slow core takes."""

ASKED: dict[str, dict[str, str]] = {
    "full": {},
    "LoRA": {"method": "lora", "targets": "all-linear"},
    "recomputed": {"recompute": "full"},
}
"""The same settings in the words of `llmsize.train`."""
ASKING = 1.5
"""Milliseconds that a question may take beside its step: to read the words and find the presets."""
BAR = 3.0
"""Milliseconds that the step of a row of the reference table should take."""
SLOWEST = 8
"""Rows that are listed."""

COUNTING = {"llama-3-8b": 1.0, "deepseek-v3": 3.0, "jamba-v0.1": 3.0}
"""The same for counting its parameters."""

SEARCHING = {
    "--vram 16GB": 1000.0,
    "--vram 80GB": 1200.0,
    "--vram 80GB --job full": 1000.0,
    "--vram 80GB --job lora": 1700.0,
    "--vram 80GB --job qlora": 1300.0,
    "--vram 24GB --all": 3000.0,
    "--vram 80GB --job qlora --all": 7500.0,
}
"""The same for `llmsize fits`, which searches the catalogue: a whole process with its start."""
SEARCHES = 2
"""Runs of each."""


class Line(NamedTuple):
    """One measurement."""

    what: str
    milliseconds: float
    budget: float
    events: int = 0
    """Of the trace; none are counted where there are many."""


def least(
    ask: Callable[[], object], runs: int, clock: Callable[[], float] = time.process_time
) -> float:
    """Milliseconds of processor time of the fastest of some runs."""
    took = []
    for _ in range(runs):
        begin = clock()
        ask()
        took.append(clock() - begin)
    return min(took) * 1000


def children() -> float:
    """Seconds of processor time of all processes that were started and have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


def new_question(model: str, words: dict[str, str]) -> Callable[[], object]:
    """What asks `llmsize.train` about another length of its sequences every time."""
    lengths = counter(1000, 8)
    return lambda: llmsize.train(model, batch=2, seq_len=next(lengths), **words)


def search(words: str) -> None:
    """Ask `llmsize fits` in a process of its own."""
    command = [sys.executable, "-m", "llmsize", "fits", *words.split()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def events(model: Architecture, setting: Setting) -> int:
    """How many tensors come to life and go in the trace of a step."""
    trace, loss = run_forward(model, setting)
    trace.leave_autocast()
    trace.enter(-1, "backward")
    backward(trace, loss)
    return len(trace.events)


def lines(runs: int) -> Iterator[Line]:
    """Every measurement in turn."""
    precision, optimizer = presets.get(Precision, "bf16"), presets.get(Optimizer, "adamw")
    for (name, how), budget in BUDGETS.items():
        model, setting = presets.get(Architecture, name), SETTINGS[how]
        run = TrainingRun(precision, optimizer, setting)
        took = least(lambda model=model, run=run: _step(model, run), runs)
        yield Line(f"{name}, {how}", took, budget, events(model, setting))
        took = least(new_question(name, ASKED[how]), runs)
        yield Line(f"{name}, {how}: llmsize.train, not asked before", took, budget + ASKING)
    for name, budget in COUNTING.items():
        model = presets.get(Architecture, name)
        took = least(lambda model=model: count(_outline(model).weights.values()), runs)
        yield Line(f"{name}, parameters", took, budget, len(traced(model).events))
    for words, budget in SEARCHING.items():
        took = least(lambda words=words: search(words), min(runs, SEARCHES), children)
        yield Line(f"fits {words}", took, budget)


def print_table(directory: Path, runs: int) -> None:
    """How many rows of the reference table are below the bar, the slowest, and all together."""
    with (directory / "training_memory.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    took = {
        name: least(lambda model=model, run=run: _step(model, run), runs)
        for name, model, run in steps(rows, directory)
    }
    below = sum(milliseconds <= BAR for milliseconds in took.values())
    print(f"{below} of {len(took)} rows within {BAR:g} ms")
    print(f"{statistics.median(took.values()):7.2f} ms in the median")
    print(f"{sum(took.values()):7.0f} ms together")
    for name in sorted(took, key=lambda name: -took[name])[:SLOWEST]:
        print(f"{took[name]:7.2f} ms {name}")


def main() -> int:
    """Print the times; 1 if `--check` finds one above its budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--table", type=Path, help="the directory of the reference tables")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(arguments.table, arguments.runs)
        return 0
    late = False
    for line in lines(arguments.runs):
        late |= line.milliseconds > line.budget
        print(
            f"{line.milliseconds:7.2f} ms (budget {line.budget:4.1f})  "
            f"{line.events:6,} events  {line.what}",
            flush=True,
        )
    return 1 if arguments.check and late else 0


if __name__ == "__main__":
    sys.exit(main())
