"""The forms of scaling laws: their formulas, over the letters that `laws` explains."""

from __future__ import annotations

from typing import Literal

Form = Literal[
    "kaplan", "compute", "additive", "repeated", "over-training", "precision", "granular-experts",
    "joint-experts", "tokens-for-params", "tokens-for-compute", "params-for-compute",
    "separate-powers",
    "model-scale", "tuning", "effective-params",
]  # fmt: skip
"""The closed set of forms; each has its formulas in `FORMULAS` or its reduction in `REDUCTIONS`."""

_ADDITIVE = {
    "L | N, D": "E + A / N ** alpha + B / D ** beta",
    "L | N": "E + A / N ** alpha",
    "L | D": "E + B / D ** beta",
    "L | C": "E + (A * G ** -alpha + B * G ** beta) * (C / 6) ** (-1 / slope)",
    "N | L": "(A / (L - E)) ** (1 / alpha)",
    "D | L": "(B / (L - E)) ** (1 / beta)",
    "C | L": "6 * ((A * G ** -alpha + B * G ** beta) / (L - E)) ** slope",
    "N | L, D": "(A / (L - E - B / D ** beta)) ** (1 / alpha)",
    "D | L, N": "(B / (L - E - A / N ** alpha)) ** (1 / beta)",
    "N | C": "G * (C / 6) ** (beta / (alpha + beta))",
    "D | C": "(C / 6) ** (alpha / (alpha + beta)) / G",
    "C | N": "6 * (N / G) ** ((alpha + beta) / beta)",
    "D | N": "(N / G) ** ((alpha + beta) / beta) / N",
    "C | D": "6 * (D * G) ** ((alpha + beta) / alpha)",
    "N | D": "(D * G) ** ((alpha + beta) / alpha) / D",
    "floor": "E",
    "G": "(alpha * A / (beta * B)) ** (1 / (alpha + beta))",
    "slope": "1 / alpha + 1 / beta",
}

FORMULAS: dict[Form, dict[str, str]] = {
    "kaplan": {
        "L | N": "(N_c / N) ** alpha_N",
        "L | D": "(D_c / D) ** alpha_D",
        "L | C_min": "(C_c_min * PF_day / C_min) ** alpha_C_min",
        "L | C": "(C_c_min * PF_day / (C / 2)) ** alpha_C_min",
        "L | C_fixed_batch": "(C_c * PF_day / C_fixed_batch) ** alpha_C",
        "N | L": "N_c * L ** (-1 / alpha_N)",
        "D | L": "D_c * L ** (-1 / alpha_D)",
        "C_min | L": "C_c_min * PF_day * L ** (-1 / alpha_C_min)",
        "C | L": "2 * C_c_min * PF_day * L ** (-1 / alpha_C_min)",
        "C_fixed_batch | L": "C_c * PF_day * L ** (-1 / alpha_C)",
        "L | N, D": "((ND_N_c / N) ** (ND_alpha_N / ND_alpha_D) + ND_D_c / D) ** ND_alpha_D",
        "N | L, D": "ND_N_c / (L ** (1 / ND_alpha_D) - ND_D_c / D) ** (ND_alpha_D / ND_alpha_N)",
        "D | L, N": "ND_D_c / (L ** (1 / ND_alpha_D) - (ND_N_c / N) ** (ND_alpha_N / ND_alpha_D))",
        "L | N, S_min": "(NS_N_c / N) ** NS_alpha_N + (S_c / S_min) ** alpha_S",
        "S_min | L, N": "S_c / (L - (NS_N_c / N) ** NS_alpha_N) ** (1 / alpha_S)",
        "N | L, S_min": "NS_N_c / (L - (S_c / S_min) ** alpha_S) ** (1 / NS_alpha_N)",
        "B_crit | L": "B_star / L ** (1 / alpha_B)",
        "S_min | S, B, B_crit": "S / (1 + B_crit / B)",
        "C_min | C, B, B_crit": "C / (1 + B / B_crit)",
        "C | C_min, B, B_crit": "C_min * (1 + B / B_crit)",
        "N | C_min": "N_coefficient * (C_min / PF_day) ** N_exponent",
        "B | C_min": "B_coefficient * (C_min / PF_day) ** B_exponent",
        "S_min | C_min": "S_coefficient * (C_min / PF_day) ** S_exponent",
        "D | C_min": "D_coefficient * (C_min / PF_day) ** D_exponent",
        "C_min | N": "PF_day * (N / N_coefficient) ** (1 / N_exponent)",
        "N | C": "N_coefficient * (C / 2 / PF_day) ** N_exponent",
        "D | C": "D_coefficient * (C / 2 / PF_day) ** D_exponent",
        "C | N": "2 * PF_day * (N / N_coefficient) ** (1 / N_exponent)",
        "C | D": "2 * PF_day * (D / D_coefficient) ** (1 / D_exponent)",
        "D | N": "D_coefficient * (N / N_coefficient) ** (D_exponent / N_exponent)",
        "N | D": "N_coefficient * (D / D_coefficient) ** (N_exponent / D_exponent)",
        "N | C_fixed_batch": "fixed_N_coefficient * (C_fixed_batch / PF_day) ** fixed_N_exponent",
        "D_overfit | N": "overfit_coefficient * N ** overfit_exponent",
    },
    "compute": {
        "L | C": "offset + coefficient * (C / C_unit) ** -exponent",
        "C | L": "C_unit * (coefficient / (L - offset)) ** (1 / exponent)",
        "floor": "offset",
    },
    "additive": _ADDITIVE,
    "repeated": {
        **_ADDITIVE,
        "L | N, D, U": "E + A / N_eff ** alpha + B / D_eff ** beta",
        "D_eff | D, U": "D_eff",
        "N_eff | N, D, U": "N_eff",
        # Beyond the first epoch tokens lose value with e-folding R_D epochs, and parameters beyond
        # what the unique tokens ask for lose it likewise (Eq. 5 and 6).
        "D_eff": "min(D, U) * (1 + R_D * (1 - exp((1 - D / min(D, U)) / R_D)))",
        "N_eff": "U_N * (1 + R_N * (1 - exp((1 - N / U_N) / R_N)))",
        "U_N": "min(N, G * (min(D, U) * G) ** (beta / alpha))",
        "E": "exp(log_E)",
        "A": "exp(log_A)",
        "B": "exp(log_B)",
    },
    "tokens-for-params": {
        "D | N": "coefficient * N ** exponent",
        "N | D": "(D / coefficient) ** (1 / exponent)",
        "C | N": "6 * coefficient * N ** (1 + exponent)",
        "C | D": "6 * D * (D / coefficient) ** (1 / exponent)",
        "N | C": "(C / (6 * coefficient)) ** (1 / (1 + exponent))",
        "D | C": "C / 6 / (C / (6 * coefficient)) ** (1 / (1 + exponent))",
    },
    "tokens-for-compute": {
        "D | C": "coefficient * C ** exponent",
        "N | C": "C ** (1 - exponent) / (6 * coefficient)",
        "C | D": "(D / coefficient) ** (1 / exponent)",
        "N | D": "(D / coefficient) ** (1 / exponent) / (6 * D)",
        "C | N": "(6 * coefficient * N) ** (1 / (1 - exponent))",
        "D | N": "(6 * coefficient * N) ** (1 / (1 - exponent)) / (6 * N)",
    },
    "params-for-compute": {
        "N | C": "coefficient * (C / C_unit) ** exponent",
        "D | C": "C / (6 * coefficient * (C / C_unit) ** exponent)",
        "C | N": "C_unit * (N / coefficient) ** (1 / exponent)",
        "D | N": "C_unit * (N / coefficient) ** (1 / exponent) / (6 * N)",
        "C | D": "(6 * coefficient * D / C_unit ** exponent) ** (1 / (1 - exponent))",
        "N | D": "(6 * coefficient * D / C_unit ** exponent) ** (1 / (1 - exponent)) / (6 * D)",
        "lr | N": "lr_coefficient * (N / N_ref) ** lr_exponent",
        "B | N": "sequence * B_coefficient * (N / N_ref) ** B_exponent",
    },
    "separate-powers": {
        "N | C": "N_coefficient * C ** N_exponent",
        "D | C": "D_coefficient * C ** D_exponent",
        "C | N": "(N / N_coefficient) ** (1 / N_exponent)",
        "C | D": "(D / D_coefficient) ** (1 / D_exponent)",
        "D | N": "D_coefficient * (N / N_coefficient) ** (D_exponent / N_exponent)",
        "N | D": "N_coefficient * (D / D_coefficient) ** (N_exponent / D_exponent)",
    },
    "model-scale": {
        "M | C": "M_coefficient * C ** M_exponent",
        "D | C": "D_coefficient * C ** D_exponent",
        "C | D": "(D / D_coefficient) ** (1 / D_exponent)",
        "lr | C": "lr_coefficient * C ** lr_exponent",
        "B | C": "B_coefficient * C ** B_exponent",
    },
    "tuning": {
        "lr | N, D": "lr_coefficient * N ** lr_N_exponent * D ** lr_D_exponent",
        "B | D": "B_coefficient * D ** B_D_exponent",
    },
    "precision": {
        # the share of parameters that count, for what is quantized; ratios only, so no loss here
        "share | bits_weights": "1 - exp(n_weights - bits_weights / gamma_weights)",
        "share | bits_activations": "1 - exp(n_activations - bits_activations / gamma_activations)",
        "share | bits_kv": "1 - exp(n_kv - bits_kv / gamma_kv)",
    },
    "effective-params": {
        "N_weights_4bit | N": "weights_4bit * N",
        "N_all_4bit | N": "all_4bit * N",
        "N_all_1bit | N": "all_1bit * N",
        "N_half_sparse | N": "half_sparse * N",
    },
}
"""The formulas of each form. A name without `|` is an abbreviation used by the others."""

_EXPERTS = "(1 / (1 / (experts - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max))"

REDUCTIONS: dict[Form, dict[str, str]] = {
    "over-training": {
        "E": "E", "A": "a * 6 ** -eta", "alpha": "2 * eta", "B": "b * 6 ** -eta", "beta": "2 * eta",
    },
    "granular-experts": {
        "E": "c", "A": "g / granularity ** gamma + a", "alpha": "alpha", "B": "b", "beta": "beta",
    },
    "joint-experts": {
        "E": "c",
        "A": f"a * {_EXPERTS} ** delta",
        "alpha": f"-(alpha + gamma * log({_EXPERTS}))",
        "B": f"b * {_EXPERTS} ** omega",
        "beta": f"-(beta + zeta * log({_EXPERTS}))",
    },
}  # fmt: skip
"""Forms that are additive laws once their settings are chosen: the additive law's constants."""
