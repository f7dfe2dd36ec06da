"""Answers to the table of published constants, and to the runs behind the Chinchilla law.

What the presets of laws, accelerators and utilizations hold is compared with the table, row by row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import log10

from benchmarks.answers import Answer
from llmsize import presets
from llmsize.hardware import Accelerator, peak
from llmsize.scaling.calibration import Observation, calibrate
from llmsize.scaling.laws import PEARCE_SONG, ScalingLaw, loss
from llmsize.throughput import Utilization
from llmsize.units import PF_DAY

Row = Mapping[str, str]

READ = ("read", "derived")
"""How a constant was checked if it may be shipped; the others are from memory or second hand."""

LAWS = {
    "kaplan2020": "kaplan", "gpt3": "gpt3", "chinchilla:hoffmann_rounded": "hoffmann",
    "chinchilla:hoffmann_tex": "hoffmann-tex", "chinchilla:besiroglu": "chinchilla",
    "chinchilla:sardana_code": "sardana", "muennighoff2023": "muennighoff",
    "deepseek2024": "deepseek", "steplaw2025": "step-law", "porian2024": "porian",
    "kumar2024_precision": "kumar", "frantar2025_epm": "frantar",
    "krajewski2024:moe64": "krajewski", "krajewski2024:dense": "krajewski-dense",
    "ludziejewski2025": "ludziejewski", "nanochat2026": "nanochat-isoflop",
    "cerebras_gpt": "cerebras", "minicpm2024": "minicpm", "rule_of_thumb": "twenty",
}  # fmt: skip
"""The table's laws and ours."""

SYMBOLS = {
    "alpha_Cmin": "alpha_C_min", "LND_alpha_N": "ND_alpha_N", "LND_alpha_D": "ND_alpha_D",
    "LND_N_c": "ND_N_c", "LND_D_c": "ND_D_c", "LNS_alpha_N": "NS_alpha_N", "LNS_S_c": "S_c",
    "LNS_alpha_S": "alpha_S", "LNS_N_c": "NS_N_c", "fixedbatch_N_coef": "fixed_N_coefficient",
    "fixedbatch_N_exp": "fixed_N_exponent", "overfit_D_coef": "overfit_coefficient",
    "overfit_D_exp": "overfit_exponent", "coef": "coefficient", "exp": "exponent",
    "coef_f0": "C_unit", "R_D_star": "R_D", "R_N_star": "R_N", "a_tuned_RW": "exponent",
    "gamma_w": "gamma_weights", "n_w": "n_weights", "gamma_a": "gamma_activations",
    "n_a": "n_activations", "weight_only_4bit": "weights_4bit", "full_4bit": "all_4bit",
    "full_1bit": "all_1bit", "sparsity50": "half_sparse", "tokens_per_param": "coefficient",
}  # fmt: skip
"""The table's symbols that are called otherwise in our presets; endings follow `ENDINGS`."""

ENDINGS = {"_coef": "_coefficient", "_exp": "_exponent"}

ELSEWHERE = {
    ("kaplan2020", "C_c_min_figure1"): ("kaplan-figure1", "C_c_min"),
    ("krajewski2024:dense", "c"): ("krajewski-dense", "E"),
    ("llama3_2024", "alpha_text"): ("llama3-text", "exponent"),
    ("llama3_2024", "A_text"): ("llama3-text", "coefficient"),
    ("llama3_2024", "alpha_fig3"): ("llama3", "exponent"),
    ("llama3_2024", "A_fig3"): ("llama3", "coefficient"),
    ("nanochat2026", "tokens_per_param_2026jan"): ("nanochat", "coefficient"),
}
"""Constants of a law that another preset of ours holds."""

NEGATED = {("gpt3", "exp"), ("cerebras_gpt", "exp")}
"""Exponents that our form writes with the other sign."""

MEASURED = {"mfu_bench_A100_bf16": "a100-bf16", "mfu_bench_H100_bf16": "h100-bf16",
            "mfu_bench_H100_fp8_peak1979": "h100-fp8", "mfu_project": "project"}  # fmt: skip


def scaling_constants(rows: Iterable[Row]) -> Iterator[Answer]:
    """Every constant that was read at its source; and that none of the others is shipped."""
    for row in rows:
        name = f"{row['law']} {row['symbol']}"
        if row["law"] == "peak_bf16_dense_tflops":
            yield Answer(row["symbol"], "dense peak", float(row["value"]), _peak(row["symbol"]))
        elif row["checked"] not in READ:
            shipped = float(_shipped(row) is not None)
            yield Answer(name, "unverified and shipped", 0.0, shipped)
        elif _is_number(row["value"]):
            yield Answer(name, f"constant, {row['checked']}", float(row["value"]), _shipped(row))


def _is_number(text: str) -> bool:
    try:
        return bool(float(text)) or True
    except ValueError:  # a formula
        return False


def _shipped(row: Row) -> float | None:
    """Our value of a constant, or nothing where no preset has it."""
    law, symbol = row["law"], row["symbol"]
    if law == "units":
        return PF_DAY
    if law == "pearce_song2024":
        return float(PEARCE_SONG)
    if symbol in MEASURED:
        return presets.get(Utilization, MEASURED[symbol]).median
    if law.startswith("chinchilla:approach"):
        return _approach(law.removeprefix("chinchilla:").removesuffix("_regression"), symbol)
    preset, letter = ELSEWHERE.get((law, symbol), (LAWS.get(law, ""), _letter(symbol)))
    if not preset:
        return None
    held = presets.get(ScalingLaw, preset).constants.get(letter)
    return -held if held is not None and (law, symbol) in NEGATED else held


def _approach(name: str, symbol: str) -> float:
    """D = k N^p as the paper prints it: N ~ C^a and D ~ C^b, or a line of logarithms."""
    held = presets.get(ScalingLaw, name).constants
    share = 1 / (1 + held["exponent"])
    return {
        "a": share, "b": 1 - share, "slope": held["exponent"],
        "intercept": log10(held["coefficient"]),
    }[symbol]  # fmt: skip


def _letter(symbol: str) -> str:
    if symbol in SYMBOLS:
        return SYMBOLS[symbol]
    symbol = symbol.removeprefix("opt_")
    for ending, ours in ENDINGS.items():
        if symbol.endswith(ending):
            return symbol.removesuffix(ending) + ours
    return symbol


def _peak(name: str) -> float | None:
    found = presets.find(Accelerator, name.replace(" ", "-"))
    format = "fp16" if name == "V100" else "bf16"
    if found is None:
        return None
    return float(peak(found, format).value) * found.devices / 1e12  # the table counts packages


OUTLIERS = 5
"""Runs of the highest loss that Besiroglu et al. leave out (arXiv:2404.10102, Section 3)."""

FITTED_TO = ("chinchilla", "hoffmann", "hoffmann-tex", "sardana")


def chinchilla_epoch_extracted(rows: Sequence[Row]) -> Iterator[Answer]:
    """The loss of each run by the laws that were fitted to them, and E, A and B refitted here."""
    runs = [_run(row) for row in rows]
    if len(runs) > 1:  # a single row is asked again only to find the one that fails
        runs.sort(key=lambda run: run.loss)
        runs = runs[:-OUTLIERS]
        law = presets.get(ScalingLaw, "chinchilla")
        refitted = calibrate(law, runs).law.constants
        for letter in ("E", "A", "B"):
            yield Answer(f"refit {letter}", "refit", law.constants[letter], refitted[letter])
    for name in FITTED_TO:
        law = presets.get(ScalingLaw, name)
        for run in runs:
            told = f"{run.parameters:.3g} parameters, {run.tokens:.3g} tokens"
            got = loss(law, run.parameters, run.tokens)
            yield Answer(told, f"loss, {name}", run.loss, got)


def _run(row: Row) -> Observation:
    """A point of the figure: its tokens follow from its compute, 6ND."""
    n = float(row["Model Size"])
    return Observation(n, float(row["Training FLOP"]) / (6 * n), float(row["loss"]))
