"""How long a command takes to start: `python benchmarks/startup.py [--check]`.

Whole processes, warm, with compiled bytecode, against `python -c pass` on the same machine: the
median of 20 of each, taken in turns so that a busy machine disturbs both alike. And the same
estimate by the Python API, once the model is loaded: the least of 20, in time of the processor.
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import os
import statistics
import subprocess
import sys
import time

RUNS = 20
NOTHING = ["-c", "pass"]
BUDGETS = {
    "estimate llama-2-7b --format json": 8.0,
    "estimate llama-2-7b --format table": 12.0,
}
"""Largest ratio to an interpreter that does nothing."""
LOADED_BUDGET = 2.0
"""Milliseconds of an estimate whose model is loaded."""


def seconds(arguments: list[str]) -> float:
    """Wall time of one interpreter with these arguments, its output thrown away."""
    environment = os.environ | {"COLUMNS": "80"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - begin


def ratio(command: str, runs: int = RUNS) -> tuple[float, float]:
    """Median milliseconds of a command, and its ratio to an interpreter that does nothing."""
    arguments = ["-m", "llmsize", *command.split()]
    seconds(arguments)
    pairs = [(seconds(NOTHING), seconds(arguments)) for _ in range(runs)]
    nothing, something = (statistics.median(column) for column in zip(*pairs, strict=True))
    return something * 1000, something / nothing


def loaded(runs: int = RUNS) -> float:
    """Least milliseconds of an estimate by the Python API whose model is loaded."""
    import llmsize

    def once() -> float:
        begin = time.process_time()
        llmsize.estimate("llama-2-7b")
        return time.process_time() - begin

    once()
    return min(once() for _ in range(runs)) * 1000


def compile_imports() -> None:
    """Bytecode for what the commands import; installers such as uv leave it out."""
    for package in ("llmsize", "typer", "rich", "yaml", "click", "pydantic"):
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations if found else None) or ():
            compileall.compile_dir(folder, quiet=2)


def main() -> int:
    """Print the times; 1 if `--check` finds one above its budget."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--runs", type=int, default=RUNS)
    arguments = parser.parse_args()
    compile_imports()
    late = False
    for command, budget in BUDGETS.items():
        milliseconds, times = ratio(command, arguments.runs)
        late |= times > budget
        print(f"{milliseconds:7.1f} ms {times:6.2f} × (budget {budget:g} ×)  llmsize {command}")
    milliseconds = loaded(arguments.runs)
    late |= milliseconds > LOADED_BUDGET
    print(f"{milliseconds:7.2f} ms (budget {LOADED_BUDGET:g} ms) llmsize.estimate, model loaded")
    return 1 if arguments.check and late else 0


if __name__ == "__main__":
    sys.exit(main())
