"""Answers to the tables of scaling laws, training compute and measured utilization.

Everything goes through the public API. A row whose inputs do not determine what it prints is
answered with what they do give, and its cause is named in `KNOWN_WRONG`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache

from benchmarks.answers import Answer
from llmsize import presets
from llmsize.scaling.allocation import (
    allocate,
    allocate_for_loss,
    allocate_for_params,
    allocate_unique,
    reach_with_inference,
)
from llmsize.scaling.laws import ScalingLaw, additive, loss, relations, solve
from llmsize.scaling.precision import best_bits, effective_fraction
from llmsize.term import fact
from llmsize.throughput import (
    flop_per_token,
    megatron_flop_per_token,
    model_utilization,
    training_flop,
)
from llmsize.units import PF_DAY

Row = Mapping[str, str]


KNOWN_WRONG = {
    "nanogpt/rounded/optimal_params/C=2.21e19/N":
        "a grid of 16 points per decade prints its nearest point; the same constants give 326.12M "
        "in closed form, in another row of this table too, and a lower loss there",
    "nanogpt/time/days/N=124e6;D=300e9;gpus=8;peak=312e12;mfu=0.30/days":
        "the notebook computes with 124,337,664 parameters, which give 3.459 days; 124e6 give "
        "3.450",
    "chinchilla/approach3/optimal_compute_for_params/N=1.75e+11/C":
        "printed 1.26e24 for 1.26e25, as 6ND of the same row says",
    "nanochat2026/isoflop/optimal_allocation/C=5e18/D_over_N":
        "10.8 is printed beside 2,642,234,152 tokens for 250,650,865 parameters, which is 10.54; "
        "the law through the printed parameters and tokens gives 10.34",
    "ludziejewski2025/table1/optimal_allocation_moe/C=1e+20;E=4/D":
        "1.1 % off; the rounding of the constants in Table 3 moves this optimum by more than that",
    "Gopher 280B": "5.76e23 counts more than 6ND = 5.04e23; the authors' own count is 6.3e23",
    "llm.c GPT-2 350M": "printed from rounded factors, 6 × 350e6 × 31.5e9",
    "Megatron-LM GPT 530B": "the row has no speed",
    "- GPT-3 V100": "24.6 of 125 TFLOP/s is 19.7 %, not the 21.3 % printed",
    "- Gopher TPUv3": "the row has no speed",
    "- MT-NLG": "the row has no speed",
    "Megatron-Core GPT-3 175B": "the row has no speed",
    "Megatron-Core Llama-3-405B": "315 tokens/s make 827 TFLOP/s by the count that gives the 780 "
        "and 800 of the smaller models; 834 is printed",
    "LLMQ": "the row has a rounded size and no shape, so attention cannot be counted",
}  # fmt: skip
"""Rows that contradict themselves or their source, and why; by the beginning of their id."""

_LAWS = {
    ("kaplan2020", "figure1"): "kaplan-figure1",
    ("kaplan2020", ""): "kaplan",
    ("gpt3", ""): "gpt3",
    ("chinchilla", "approach1"): "approach1",
    ("chinchilla", "approach2"): "approach2",
    ("chinchilla", "approach3"): "approach3",
    ("chinchilla", "hoffmann_rounded"): "hoffmann",
    ("chinchilla", "hoffmann_tex"): "hoffmann-tex",
    ("chinchilla", "besiroglu"): "chinchilla",
    ("nanogpt", "rounded"): "hoffmann",
    ("muennighoff2023", ""): "muennighoff",
    ("sardana2024", ""): "sardana",
    ("deepseek2024", ""): "deepseek",
    ("llama3_2024", "text"): "llama3-text",
    ("llama3_2024", ""): "llama3",
    ("steplaw2025", ""): "step-law",
    ("porian2024", ""): "porian",
    ("kumar2024_precision", ""): "kumar",
    ("krajewski2024", ""): "krajewski",
    ("ludziejewski2025", ""): "ludziejewski",
    ("nanochat2026", "isoflop"): "nanochat-isoflop",
    ("nanochat2026", ""): "nanochat",
}

OBSERVED_LAWS = ("chinchilla", "hoffmann", "hoffmann-tex", "muennighoff", "gadre", "kaplan")
"""Laws whose loss is compared with observed rows, each a quantity of its own."""


@cache
def _law(name: str) -> ScalingLaw:
    return presets.get(ScalingLaw, name)


def scaling_examples(rows: Iterable[Row]) -> Iterator[Answer]:
    """Every published, computed and code-output row by its law; observed rows by each law."""
    for row in rows:
        given = _inputs(row["inputs"])
        expected = float(row["expected"])
        if row["kind"] == "observed":
            yield from _observed(row, given, expected)
            continue
        name = "/".join((row["law"], row["variant"], row["task"], row["inputs"], row["output"]))
        got = _TASKS[row["task"]](row, given)
        tolerance = float(row["rel_tol"]) if row["rel_tol"] else None
        yield Answer(name, row["kind"], expected, got, tolerance)


def _inputs(text: str) -> dict[str, float]:
    given = {}
    for part in text.split(";"):
        name, _, value = part.partition("=")
        if re.fullmatch(r"[\d.eE+-]+", value):
            given[name] = float(value)
    return given


def _observed(row: Row, given: Mapping[str, float], expected: float) -> Iterator[Answer]:
    n, d = given["N"], given.get("D")
    name = f"{row['variant']}/{row['inputs']}"
    for each in OBSERVED_LAWS:
        law = additive(_law(each))
        if law.counts == "non-embedding" and (match := re.search(r"embedding (\d+)", row["note"])):
            counted = float(match[1])
        else:
            counted = n
        got = loss(law, counted, d) if d else solve(law, "L | N", N=counted)
        yield Answer(name, f"observed, {each}", expected, got)


def _chosen(row: Row) -> ScalingLaw:
    by_variant = _LAWS.get((row["law"], row["variant"]))
    return _law(by_variant or _LAWS[row["law"], ""])


def _with_settings(law: ScalingLaw, given: Mapping[str, float]) -> ScalingLaw:
    settings = {"experts": given.get("E"), "granularity": given.get("G")}
    return additive(law, **{name: value for name, value in settings.items() if value})


def _loss(row: Row, given: Mapping[str, float]) -> float:
    law = _chosen(row)
    if "N_active" in given:
        # every expert counts in this law; Table 2 has MLPs of 8/12 of a block's parameters
        every = given["N_active"] * (4 + 8 * given["E"]) / 12
        return loss(_with_settings(law, given), every, given["D"])
    pf_days = given.get("C_min_pfday") or given.get("C_pfday")
    if pf_days:
        fixed = row["variant"] == "naive_fixed_batch"
        letter = "C_fixed_batch" if fixed else "C_min" if "C_min_pfday" in given else "C"
        return solve(law, f"L | {letter}", **{letter: pf_days * PF_DAY})
    letters = [name for name in ("N", "D", "S_min", "U") if name in given]
    return solve(law, f"L | {', '.join(letters)}", **{name: given[name] for name in letters})


def _from_loss(row: Row, given: Mapping[str, float]) -> float:
    letter = {"C_min_pfday": "C_min"}.get(row["output"], row["output"])
    value = solve(_chosen(row), f"{letter} | L", L=given["loss"])
    return value / PF_DAY if letter == "C_min" else value


def _allocation(row: Row, given: Mapping[str, float]) -> float | None:
    law, output = _chosen(row), row["output"]
    if "C_min_pfday" in given:
        return solve(law, f"{output} | C_min", C_min=given["C_min_pfday"] * PF_DAY)
    if row["law"] == "nanochat2026":
        return allocate(law, given["C"]).tokens_per_parameter
    compute = given.get("C") or given["C_flops"]
    if "U" in given:
        best = allocate_unique(law, compute, given["U"])
    else:
        best = allocate(_with_settings(law, given), compute)
    values = {
        "N": best.parameters, "N_active": best.parameters, "D": best.tokens, "loss": best.loss,
        "D_over_N": best.tokens_per_parameter, "epochs": best.tokens / given.get("U", best.tokens),
    }  # fmt: skip
    return values[output]


def _for_params(row: Row, given: Mapping[str, float]) -> float | None:
    best = allocate_for_params(_chosen(row), given["N"])
    return {"D": best.tokens, "C": best.compute, "loss": best.loss}[row["output"]]


def _for_loss(row: Row, given: Mapping[str, float]) -> float:
    best = allocate_for_loss(_chosen(row), given["loss"])
    return {"N": best.parameters, "D": best.tokens}[row["output"]]


def _with_inference(row: Row, given: Mapping[str, float]) -> float:
    law, served = _chosen(row), given["D_inf"]
    if row["output"] == "C_total_chinchilla":
        plain = allocate_for_loss(law, given["loss"])
        return plain.compute + 2 * plain.parameters * served
    best = reach_with_inference(law, given["loss"], served)
    return {"N": best.parameters, "D": best.tokens, "C_total": best.total_compute}[row["output"]]


def _hints(row: Row, given: Mapping[str, float]) -> float:
    law, letter = _chosen(row), row["output"].removesuffix("_seq2048")
    relation = next(each for each in relations(law) if each.startswith(f"{letter} |"))
    names = relation.partition("| ")[2].split(", ")
    value = solve(law, relation, **{name: given[name] for name in names})
    return value / 2048 if row["output"].endswith("_seq2048") else value


def _fraction(row: Row, given: Mapping[str, float]) -> float:
    bits = {"weights": given.get("P_w"), "activations": given.get("P_a"), "kv": given.get("P_kv")}
    return float(effective_fraction(_chosen(row), **bits).value)


def _sequence_flop(row: Row, given: Mapping[str, float], left_out: set[str]) -> float:
    """FLOP of one sequence going forward, by the table of Hoffmann et al. 2022, appendix F.

    It leaves out `embedding` and `head` itself; nanoGPT leaves out `embedding` and `softmax`.
    """
    layers, hidden, context = given["n_layer"], given["d_model"], given["seq"]
    heads = given.get("n_head", hidden // (64 if hidden < 1000 else 128))
    each = {
        "projections": layers * 8 * context * hidden**2,
        "scores": layers * 2 * context**2 * hidden,
        "softmax": layers * 3 * heads * context**2,
        "weighted values": layers * 2 * context**2 * hidden,
        "MLP": layers * 16 * context * hidden**2,
        "embedding": 2 * context * given["vocab"] * hidden,
        "head": 2 * context * given["vocab"] * hidden,
    }
    return sum(flop for part, flop in each.items() if part not in left_out)


def _flop_ratio(row: Row, given: Mapping[str, float]) -> float:
    # four attention matrices, one of relative positions, eight of the MLP, and the head
    hidden = given["d_model"]
    parameters = 13 * given["n_layer"] * hidden**2 + given["vocab"] * hidden
    forward = _sequence_flop(row, given, {"embedding", "head"})
    return 3 * forward / float(training_flop(parameters, given["seq"]).value)


def _days(row: Row, given: Mapping[str, float]) -> float:
    flop = training_flop(given["N"], given["D"]).value
    return flop / (given["gpus"] * given["peak"] * given["mfu"] * 86_400)


_NANOGPT_LEAVES_OUT = {"embedding", "softmax"}

_TASKS: dict[str, Callable[[Row, Mapping[str, float]], float | None]] = {
    "loss_from_params": _loss,
    "loss_from_tokens": _loss,
    "loss_from_compute": _loss,
    "loss_from_params_tokens": _loss,
    "loss_from_params_steps": _loss,
    "loss_from_params_tokens_unique": _loss,
    "params_from_loss": _from_loss,
    "tokens_from_loss": _from_loss,
    "compute_from_loss": _from_loss,
    "critical_batch": _from_loss,
    "optimal_allocation": _allocation,
    "optimal_allocation_moe": _allocation,
    "optimal_allocation_unique": _allocation,
    "optimal_tokens_for_compute": _allocation,
    "optimal_tokens_per_param": _allocation,
    "optimal_params": _allocation,
    "optimal_tokens_for_params": _for_params,
    "optimal_compute_for_params": _for_params,
    "optimal_for_loss": _for_loss,
    "inference_aware": _with_inference,
    "min_tokens_no_overfit": lambda row, given: solve(
        _chosen(row), "D_overfit | N", N=given["N"]
    ),
    "growth": lambda row, given: solve(_chosen(row), "D | C", C=given["C_ratio"] * PF_DAY)
    / solve(_chosen(row), "D | C", C=PF_DAY),
    "C_from_Cmin": lambda row, given: solve(
        _chosen(row), "C | C_min, B, B_crit", C_min=given["C_min"], B=given["B_over_Bcrit"],
        B_crit=1,
    ),
    "params": lambda row, given: 12 * given["n_layer"] * given["d_model"] ** 2,
    "tokens_from_compute": lambda row, given: given["C"]
    / float(training_flop(given["N"], 1).value),
    "effective_unique_tokens": lambda row, given: solve(
        _chosen(row), "D_eff | D, U", D=given["U"] * given["epochs"], U=given["U"]
    ),
    "hyperparams": _hints,
    "effective_param_fraction": _fraction,
    "optimal_precision": lambda row, given: best_bits(_chosen(row)),
    "flops_ratio_vs_6ND": _flop_ratio,
    "forward_flops": lambda row, given: _sequence_flop(row, given, _NANOGPT_LEAVES_OUT),
    "train_flops": lambda row, given: 3 * _sequence_flop(row, given, _NANOGPT_LEAVES_OUT),
    "days": _days,
}  # fmt: skip

PEAKS = {
    # llm-foundry, nanochat and llm.c divide the sparse peak of the H100 by two
    "h100": 1.979e15 / 2, "h800": 1.979e15 / 2, "h200": 1.979e15 / 2,
    "a100": 312e12, "v100": 125e12, "rtx 5060 ti": 47.4e12,
}  # fmt: skip
"""Dense bf16 peaks that the reports themselves use, in FLOP/s; fp8 doubles them."""

LOW_POWER_H100 = 989e12
"""The peak that torchtitan and Megatron-Core divide by."""


def _peak(row: Row) -> float:
    name = row["gpu"].lower()
    return next(peak for known, peak in PEAKS.items() if name.startswith(known))


def training_compute(rows: Iterable[Row]) -> Iterator[Answer]:
    """FLOP, PF-days and the utilization that GPU-hours imply."""
    for row in rows:
        if row["params"]:
            yield from _compute_row(row)
        else:
            hours, peak = float(row["gpu_hours"]), LOW_POWER_H100
            flop = float(row["published_flops"])
            got = _implied(flop, hours, peak)
            yield Answer(row["model"], "reported_mfu", float(row["reported_mfu"]), got, 0.01)


def _implied(flop: float, gpu_hours: float, peak: float) -> float:
    """The share of the peak that a whole project reached, restarts and idle time included."""
    return flop / (gpu_hours * 3600 * peak)


def _compute_row(row: Row) -> Iterator[Answer]:
    used = float(row["active_params"] or row["params"])
    per_parameter = float(row["flops_per_param_per_token"])
    flop = training_flop(used, float(row["tokens"]), per_parameter=per_parameter)
    yield Answer(row["model"], "calc_flops", float(row["calc_flops"]), float(flop.value), 0.0035)
    if row["published_flops"]:
        expected = float(row["published_flops"])
        yield Answer(row["model"], "published_flops", expected, float(flop.value), 0.0035)
    if row["published_pf_days"]:
        expected = float(row["published_pf_days"])
        yield Answer(row["model"], "published_pf_days", expected, flop.value / PF_DAY, 0.0025)
    if row["implied_mfu_6ND"]:
        plain = float(training_flop(used, float(row["tokens"])).value)
        implied = _implied(plain, float(row["gpu_hours"]), _peak(row))
        expected = float(row["implied_mfu_6ND"])
        yield Answer(row["model"], "implied_mfu_6ND", expected, implied, 0.005)


def mfu_observed(rows: Iterable[Row]) -> Iterator[Answer]:
    """Model and hardware utilization from tokens per second, by each framework's own counting."""
    for number, row in enumerate(rows, start=2):
        name = f"{row['framework']} {row['model']} {row['gpu']} line {number}"
        for quantity in ("mfu_pct", "hfu_pct", "tflops_per_gpu"):
            given_not_asked = quantity == "tflops_per_gpu" and not row["tokens_per_s_per_gpu"]
            if row[quantity] and not given_not_asked:
                kind = "llm-foundry" if row["framework"] == "llm-foundry" else "others"
                expected, got = float(row[quantity]), _utilization(row, quantity)
                yield Answer(name, f"{quantity}, {kind}", expected, got, _rounding(row, quantity))


def _rounding(row: Row, quantity: str) -> float:
    """Relative half width of the digits printed, of the result and of what it is made from."""
    if row["framework"] == "llm-foundry":
        return 0.0005
    timed = re.search(r"([\d.]+) s(/iter| \(total)", row["note"])
    made_from = [row["tokens_per_s_per_gpu"], row["tflops_per_gpu"], timed[1] if timed else ""]
    return sum(_half_digit(printed) for printed in (row[quantity], *made_from) if printed)


def _half_digit(printed: str) -> float:
    """Half of the last significant digit as a share: 400 is 4e2 to one part in eighty."""
    digits = len(printed.partition(".")[2])
    zeros = 0 if digits else len(printed) - len(printed.rstrip("0"))
    return 0.5 * 10.0 ** (min(zeros, 1) - digits) / float(printed)


VOCABULARY = {"Llama-3": 128_256, "1.1B": 32_000}
"""Embedding rows of models whose authors leave the embedding out of N (their config.json)."""

MEGATRON_VOCABULARY = 51_200
"""GPT-2's 50,257 rounded up to a multiple of 1024 (arXiv:2104.04473, Section 5)."""


def _utilization(row: Row, quantity: str) -> float | None:
    peak, tflops = _peak_of(row), row["tflops_per_gpu"]
    if peak is None:
        return None
    if tflops and quantity != "tflops_per_gpu":
        return 100 * float(tflops) * 1e12 / peak
    per_token = _per_token(row, hardware=quantity == "hfu_pct")
    speed = _speed(row)
    if per_token is None or speed is None:
        return None
    if quantity == "tflops_per_gpu":
        return per_token * speed / 1e12
    counted = fact("FLOP per token", per_token, unit="FLOP/token", source=row["source"])
    return 100 * float(model_utilization(counted, speed, peak).value)


def _peak_of(row: Row) -> float | None:
    if row["gpu"].startswith("TPU"):
        return None
    if row["framework"] in ("torchtitan", "Megatron-Core"):
        return LOW_POWER_H100
    return _peak(row) * (2 if "fp8" in row["precision"] else 1)


def _speed(row: Row) -> float | None:
    if row["tokens_per_s_per_gpu"]:
        return float(row["tokens_per_s_per_gpu"])
    if timed := re.match(r"(\d+) sequences in ([\d.]+) s", row["note"]):
        return int(timed[1]) * int(row["seq_len"]) / float(timed[2])
    return None


def _per_token(row: Row, *, hardware: bool) -> float | None:
    parameters = float(row["params"])
    if not row["n_layers"]:
        return float(training_flop(parameters, 1).value)
    layers, width, context = (int(row[key]) for key in ("n_layers", "d_model", "seq_len"))
    if row["framework"] == "Megatron-LM":
        recompute = row["activation_ckpt"] if hardware else "none"
        counted = megatron_flop_per_token(
            layers=layers, hidden=width, context=context, vocabulary=MEGATRON_VOCABULARY,
            recompute=recompute,
        )  # fmt: skip
        return float(counted.value)
    for name, vocabulary in VOCABULARY.items():
        if row["model"].startswith(name):
            parameters -= vocabulary * width
    recompute = hardware and row["activation_ckpt"] == "True"
    counted = flop_per_token(
        parameters, layers=layers, width=width, context=context, recompute=recompute
    )
    return float(counted.value)
