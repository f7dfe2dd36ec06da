"""How far llmsize is from reality: `python benchmarks/accuracy.py DIR [--json] [--check]`.

Every CSV in DIR, and `model_configs.json`, is answered by the function of its name in a module of
`benchmarks/tables/`, which gets the rows (and the directory, if it takes two arguments) and yields
an `Answer` per number. A table without a function is reported as no measure, or as not answered.
`--check` compares with `benchmarks/thresholds.toml` and exits with 1 where one is missed.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import math
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.answers import Answer, ledger  # noqa: E402 - needs the path above

Rows = list[dict[str, str]]
Table = Callable[..., Iterable[Answer]]

UNANSWERED = "  not answered"
COLUMNS = ("cases", "answered", "median", "p90", "p95", "max", "bias", "≤1%", "≤3%", "≤5%", "≤10%")

NO_MEASURE = {
    "accelerators.csv": "facts that presets repeat: tests/test_hardware.py compares each",
    "aws_instances.csv": "facts that presets repeat: tests/test_hardware.py compares each",
    "decode_speed.csv": "what presets/bandwidths/ are the medians of: tests/test_bandwidths.py",
    "device_context.csv": "what device contexts were fitted to: tests/test_device_context.py",
    "finetuning_speed.csv": "what launch times were fitted to: tests/test_finetuning.py",
}
"""Tables that no model is held against, and why."""

FAILED = "failed"
"""The quantity of a row that its function broke down on: no miss, but a mistake of ours."""


def measure(directory: Path) -> dict[str, Any]:
    """The ledger of every table in `directory`, as the JSON document has it."""
    known = tables()
    found = {}
    for path in sorted([*directory.glob("*.csv"), *directory.glob("model_configs.json")]):
        rows = _rows(path)
        function = known.get(path.stem)
        answers = list(_answers(function, rows, directory)) if function else []
        found[path.name] = {"rows": len(rows), "quantities": ledger(answers)}
    return {"tables": found}


def _rows(path: Path) -> Rows:
    """The lines of a table, or the entries of a JSON list."""
    with path.open(newline="", encoding="utf-8") as file:
        return json.load(file) if path.suffix == ".json" else list(csv.DictReader(file))


def tables() -> dict[str, Table]:
    """The public functions of the modules in `benchmarks/tables/`, by name."""
    found: dict[str, Table] = {}
    for path in sorted((HERE / "tables").glob("*.py")):
        if path.stem == "__init__":
            continue
        module = import_module(f"benchmarks.tables.{path.stem}")
        for name, value in vars(module).items():
            own = inspect.isfunction(value) and value.__module__ == module.__name__
            if own and not name.startswith("_"):
                found[name] = value
    return found


def _answers(function: Table, rows: Rows, directory: Path) -> Iterator[Answer]:
    """All answers; a row that makes the function fail is a case of its own, without an answer."""
    try:
        yield from list(_ask(function, rows, directory))
        return
    except Exception as failure:
        print(f"{function.__name__}: {type(failure).__name__}: {failure}", file=sys.stderr)
    for number, row in enumerate(rows, 2):
        try:
            yield from list(_ask(function, [row], directory))
        except Exception as failure:
            what = f"{type(failure).__name__}: {failure}"
            print(f"{function.__name__}, line {number}: {what}", file=sys.stderr)
            yield Answer(f"line {number}", FAILED, 1.0, None)


def _ask(function: Table, rows: Rows, directory: Path) -> Iterable[Answer]:
    takes = len(inspect.signature(function).parameters)
    return function(rows, directory) if takes > 1 else function(rows)


def report(measured: dict[str, Any]) -> str:
    """The ledger as text: one line per quantity, then its worst cases."""
    lines = []
    for name, table in measured["tables"].items():
        lines += ["", f"{name}: {table['rows']} rows"]
        if not table["quantities"]:
            lines.append(f"  no measure: {NO_MEASURE[name]}" if name in NO_MEASURE else UNANSWERED)
            continue
        width = max(map(len, table["quantities"]))
        lines.append("  ".join([" " * (width + 2), *(f"{column:>9}" for column in COLUMNS)]))
        for quantity, found in table["quantities"].items():
            lines.append("  ".join([f"  {quantity:<{width}}", *map("{:>9}".format, _cells(found))]))
        for quantity, found in table["quantities"].items():
            lines += [_worst(quantity, case) for case in found["worst"] if case["error"] != 0]
    return "\n".join(lines).strip() + "\n"


def _cells(found: dict[str, Any]) -> list[str]:
    within = (f"{found['within'][level]:.1%}" for level in ("0.01", "0.03", "0.05", "0.1"))
    errors = (found[name] for name in ("median", "p90", "p95", "max", "bias"))
    shown = ("–" if error is None else f"{error:.3%}" for error in errors)
    return [str(found["cases"]), str(found["answered"]), *shown, *within]


def _worst(quantity: str, case: dict[str, Any]) -> str:
    if case["got"] is None:
        return f"    {quantity}: {case['id']}: expected {case['expected']:.6g}, no answer"
    off = "" if case["error"] is None else f", off by {case['error']:.3%}"
    return (
        f"    {quantity}: {case['id']}: expected {case['expected']:.6g}, got {case['got']:.6g}{off}"
    )


_TRACED = "followed tensor by tensor on fake CUDA tensors"
MEASURED_BY = {
    "training_memory.csv": f"steps of real transformers models, {_TRACED} "
    "(`benchmarks/measure_trace.py`)",
    "training_traces.csv": f"steps of further families with few layers each, {_TRACED}",
    "encoder_traces.csv": f"steps of encoders with either head, {_TRACED}",
    "method_traces.csv": f"steps with peft's methods, {_TRACED}",
    "settings_traces.csv": f"steps under settings drawn at random, {_TRACED}",
    "model_traces.csv": f"steps of models whose configurations were drawn at random, {_TRACED}",
    "kernel_traces.csv": f"steps with stand-ins that allocate as kernels' sources do, {_TRACED}",
    "objective_traces.csv": f"steps with heads of TRL's own code, {_TRACED}",
    "objective_steps.csv": f"steps of TRL's losses, {_TRACED} (`benchmarks/measure_objective.py`)",
    "inference_memory.csv": f"a prefill and one decoded token of transformers models, {_TRACED}",
    "feasible_training.csv": "llm-foundry's benchmarks, which ran on the cards they name",
    "measured_training.csv": "peaks that others published of real runs, grade A, on one device",
    "measured_inference.csv": "engines' own logs and drivers' readings that others published",
    "held_out_inference.csv": "logs and readings that were searched for afterwards: all that were "
    "found with their settings, of sources that no other table has; no constant is from them",
    "held_out_training.csv": "peaks of runs that were searched for afterwards: of frameworks' "
    "and an estimator's own tables, whose settings are all in their "
    "repositories; no constant is from them",
    "held_out_llamacpp.csv": "lines of llama.cpp's logs that were searched for afterwards",
    "gguf_sizes.csv": "llama.cpp's quantizer in a dry run, and published files",
    "kv_cache.csv": "llama.cpp's allocator in a dry run, and engines' logs",
    "llamacpp_buffers.csv": "llama.cpp's allocator in a dry run",
    "llamacpp_families.csv": "llama.cpp's own projection for further models",
    "llamacpp_recurrent.csv": "llama.cpp's own projection for recurrent and hybrid models",
    "quant_formats.csv": "quantized layers that were counted, and format definitions",
    "param_counts.csv": "models instantiated by transformers, and published counts",
    "scaling_constants.csv": "papers and authors' code, each constant with its place",
    "scaling_examples.csv": "papers' tables, authors' code, and observed runs",
    "training_compute.csv": "papers and model cards",
    "mfu_observed.csv": "frameworks' published benchmarks",
}
"""Who measured a table, for the page."""


def page(measured: dict[str, Any]) -> str:
    """The ledger as a page of the documentation: the worst first, then per table the numbers, and
    the worst cases of each.
    """
    lines = [
        "<!-- generated by `python benchmarks/accuracy.py tests/reference --page` -->",
        "# Accuracy",
        "",
        "Errors are |got − expected| / expected; a case without an answer counts as a miss. The",
        "tables are in `tests/reference/`, the functions that answer them in `benchmarks/tables/`.",
    ]
    answered = {name: t for name, t in measured["tables"].items() if t["quantities"]}
    lines += ["", *_furthest(answered)]
    for name, table in answered.items():
        lines += ["", f"## {name}", "", f"{MEASURED_BY.get(name, 'reference table')}.", ""]
        lines += ["| quantity | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        for quantity, found in table["quantities"].items():
            lines.append(f"| {quantity} | " + " | ".join(_cells(found)) + " |")
        worst = [
            _worst(quantity, case).strip()
            for quantity, found in table["quantities"].items()
            for case in found["worst"][:2]
            if case["error"] != 0
        ]
        lines += ["", "Worst cases:", "", *(f"- {case}" for case in worst)] if worst else []
    return "\n".join(lines) + "\n"


FURTHEST = 20
"""Quantities that the page begins with."""


def _furthest(answered: dict[str, Any]) -> Iterator[str]:
    """The quantities whose worst cases are furthest off, and those; no answer is furthest."""
    found = [
        (quantity["worst"][0], name, called, quantity)
        for name, table in answered.items()
        for called, quantity in table["quantities"].items()
        if quantity["worst"][0]["error"] != 0
    ]
    found.sort(key=lambda entry: math.inf if entry[0]["error"] is None else entry[0]["error"])
    yield "## The worst first\n"
    yield "| table | quantity | cases | median | p95 | worst | of |"
    yield "|---" * 7 + "|"
    for case, name, called, quantity in reversed(found[-FURTHEST:]):
        off = "no answer" if case["error"] is None else f"{case['error']:.1%}"
        errors = (quantity["median"], quantity["p95"])
        middle = " | ".join("–" if error is None else f"{error:.2%}" for error in errors)
        yield f"| {name} | {called} | {quantity['cases']} | {middle} | {off} | {case['id']} |"


def missed(measured: dict[str, Any], thresholds: dict[str, Any]) -> Iterator[str]:
    """Each threshold that is missed: `answered` is a least share, the others largest errors.

    A function that breaks down on a row is missed in every table.
    """
    for table, answers in measured["tables"].items():
        if FAILED in answers["quantities"]:
            broken = answers["quantities"][FAILED]["cases"]
            yield f"{table}: {broken} rows made its function fail"
    for table, quantities in thresholds.items():
        for quantity, limits in quantities.items():
            found = measured["tables"].get(table, {}).get("quantities", {}).get(quantity)
            if found is None:
                yield f"{table}: {quantity}: not answered"
                continue
            for statistic, limit in limits.items():
                if statistic == "answered":
                    got, good = (share := found["answered"] / found["cases"]), share >= limit
                else:
                    got = found[statistic]
                    good = got is not None and abs(got) <= limit
                if not good:
                    yield f"{table}: {quantity}: {statistic} is {got}, the threshold {limit}"


def main() -> int:
    """Print the ledger; 1 if `--check` finds a threshold that is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--page", action="store_true", help="write docs/accuracy.md")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if not arguments.directory.is_dir():
        parser.error(f"no directory {arguments.directory}")
    measured = measure(arguments.directory)
    if arguments.page:
        (HERE.parent / "docs" / "accuracy.md").write_text(page(measured))
        return 0
    print(json.dumps(measured, indent=2) if arguments.json else report(measured), end="")
    if not arguments.check:
        return 0
    thresholds = tomllib.loads((HERE / "thresholds.toml").read_text())
    failures = list(missed(measured, thresholds))
    print("\n".join(failures) or "every threshold is met", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
