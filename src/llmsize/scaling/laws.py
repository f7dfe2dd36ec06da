"""Scaling laws: loss from parameters, tokens and compute, and back.

A law is a record: constants from one source, and the form they belong to. A form is a set of
formulas, each named by what it gives and from what: `L | N, D` is the loss given parameters and
tokens. The text that is shown is the text that runs.

Letters, as in the papers: L loss · N parameters (which ones, the law says) · D training tokens ·
U unique tokens among them · C training compute in FLOP, 6ND unless the law says otherwise · C_min
the least compute that reaches a loss, at a small batch · S optimizer steps · S_min the fewest, at
a large batch · B batch in tokens · lr learning rate. Everything that mentions both C and N or D is
at the optimum: `N | C` is the best model for a budget, `D | N` the tokens that make N the best.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import repeat
from typing import Any, Literal, overload

from llmsize.errors import LLMSizeError, did_you_mean
from llmsize.term import Term, evaluate, term
from llmsize.units import PF_DAY

Form = Literal[
    "kaplan", "compute", "additive", "repeated", "over-training", "precision", "granular-experts",
    "joint-experts", "tokens-for-params", "tokens-for-compute", "params-for-compute",
    "separate-powers",
    "model-scale", "tuning", "effective-params",
]  # fmt: skip
"""The closed set of forms; each has its formulas in `FORMULAS` or its reduction in `REDUCTIONS`."""

Counts = Literal["non-embedding", "total", "active", "total of all experts", "all but embedding"]
"""Which parameters a law's N means."""


@dataclass(frozen=True, slots=True, eq=False)
class ScalingLaw:
    """One fit: its constants, what they are about, and what contradicts them.

    Compared by identity, so that its compiled formulas can be kept.
    """

    name: str
    form: Form
    constants: Mapping[str, float]
    """By the paper's letters. Compute constants of Kaplan et al. are in PF-days."""
    source: str
    """Paper and the table or equation that prints the constants."""
    title: str = ""
    counts: Counts = "total"
    """What N means."""
    loss_unit: str = "nats/token"
    tokenizer: str = ""
    corpus: str = ""
    """Losses on different corpora or tokenizers are not comparable."""
    fitted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Letter → (smallest, largest) value among the runs that the law was fitted to."""
    contradictions: tuple[str, ...] = ()
    """Where the source disagrees with itself or with others."""
    answer_keys: tuple[Mapping[str, Any], ...] = ()
    """Results that the source itself prints: `relation`, the given values, `expected`, `within`."""
    settings: tuple[str, ...] = ()
    """What must be chosen before the law gives a loss: `experts`, `granularity`."""
    experimental: bool = False
    """Fitted far from how people train; use its ratios, not its values."""
    aliases: tuple[str, ...] = ()
    note: str = ""


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


def additive(law: ScalingLaw, **settings: float) -> ScalingLaw:
    """The law E + A/N^alpha + B/D^beta that `law` is at those settings, or `law` itself.

    `over-training` (Gadre et al.) is one by algebra, with M = D/N and C = 6ND; a law of experts is
    one at a given number or granularity of them. Raises `LLMSizeError` for a missing setting.
    """
    missing = [name for name in law.settings if name not in settings]
    if missing:
        raise LLMSizeError(
            f"`{law.name}` needs the setting `{missing[0]}`",
            hint=f"give {' and '.join(law.settings)}, such as --experts 8",
        )
    if law.form not in REDUCTIONS:
        return law
    known = {**law.constants, **{name: settings[name] for name in law.settings}}
    made = {
        letter: float(evaluate(formula, _pick(formula, known)))
        for letter, formula in REDUCTIONS[law.form].items()
    }
    return replace(law, form="additive", constants=made, settings=())


def relations(law: ScalingLaw) -> list[str]:
    """What the law answers, such as `L | N, D`: the formulas whose constants it has."""
    formulas = FORMULAS.get(law.form, {})
    return [name for name in formulas if "|" in name and not _missing(law, name)]


def _missing(law: ScalingLaw, relation: str) -> frozenset[str]:
    known = {"PF_day", *law.constants, *_given(relation)}
    return _names(_inlined(law, relation)) - known


def _given(relation: str) -> list[str]:
    return [name.strip() for name in relation.partition("|")[2].split(",")]


def _pick(formula: str, known: Mapping[str, float]) -> dict[str, float]:
    return {name: known[name] for name in sorted(_names(formula))}


@lru_cache(maxsize=512)
def _names(formula: str) -> frozenset[str]:
    functions = {"exp", "log", "min", "max"}
    nodes = ast.walk(ast.parse(formula, mode="eval"))
    return frozenset(node.id for node in nodes if isinstance(node, ast.Name)) - functions


@lru_cache(maxsize=512)
def _inlined(law: ScalingLaw, relation: str) -> str:
    """The formula of `relation` with its abbreviations written out."""
    formulas = FORMULAS.get(law.form, {})
    given = set(_given(relation))

    class Inline(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            if node.id in given or node.id not in formulas or node.id in law.constants:
                return node
            return self.visit(ast.parse(formulas[node.id], mode="eval").body)  # type: ignore[no-any-return]

    return ast.unparse(Inline().visit(ast.parse(formulas[relation], mode="eval")))


@lru_cache(maxsize=512)
def function(law: ScalingLaw, relation: str) -> Callable[..., float]:
    """The formula of `relation` as a plain function of what is given, in the order written.

    Raises `LLMSizeError` if the law has no such formula.
    """
    if relation not in relations(law):
        raise LLMSizeError(
            f"`{law.name}` does not give {_spoken(relation)}",
            hint=did_you_mean(relation, [], otherwise=f"it gives {_offer(law)}"),
        )
    names: dict[str, Any] = {
        "__builtins__": {}, "exp": math.exp, "log": math.log, "min": min, "max": max,
        "PF_day": PF_DAY, **law.constants,
    }  # fmt: skip
    text = f"lambda {', '.join(_given(relation))}: {_inlined(law, relation)}"
    made: Callable[..., float] = eval(text, names)  # noqa: S307 - our text; constants are numbers
    return made


def _offer(law: ScalingLaw) -> str:
    offered = [_spoken(name) for name in relations(law)[:4]]
    return ", ".join(offered) or f"a loss once {' and '.join(law.settings)} is chosen"


OUTSIDE = "outside the fitted range"

_SPOKEN = {
    "L": "the loss", "N": "parameters", "D": "tokens", "C": "compute", "C_min": "least compute",
    "U": "unique tokens", "S": "steps", "S_min": "fewest steps", "B": "batch size",
    "B_crit": "the critical batch", "lr": "the learning rate", "M": "FLOP per token",
    "C_fixed_batch": "compute at a fixed batch", "D_overfit": "tokens that prevent overfitting",
    "N_eff": "effective parameters", "D_eff": "effective tokens", "floor": "irreducible loss",
}  # fmt: skip


def _spoken(relation: str) -> str:
    target = relation.partition("|")[0].strip()
    given = " and ".join(_SPOKEN.get(name, name) for name in _given(relation) if name)
    return f"{_SPOKEN.get(target, target)} from {given}"


def solve(law: ScalingLaw, relation: str, **given: float) -> float:
    """The value of `relation` for what is given: `solve(law, "N | L", L=2.5)`.

    Inverses are closed forms: putting the result back gives what was given to 1e-9 relative.
    Raises `LLMSizeError` for a value that is not positive and finite, a loss that cannot be
    reached, or a law without that formula.
    """
    compute: Callable[..., float | complex] = function(law, relation)
    values = [given[name] for name in _given(relation)]
    for name, value in zip(_given(relation), values, strict=True):
        if not (value > 0 and math.isfinite(value)):
            raise LLMSizeError(
                f"{_SPOKEN.get(name, name)} must be positive and finite, not {value}",
                hint="write a number above zero",
            )
    try:
        result = compute(*values)
    except (ZeroDivisionError, OverflowError):
        result = math.nan
    if isinstance(result, complex) or not (result > 0 and math.isfinite(result)):
        raise _out_of_reach(law, relation, given)
    return result


def _out_of_reach(law: ScalingLaw, relation: str, given: Mapping[str, float]) -> LLMSizeError:
    if "L" not in given:
        return LLMSizeError(
            f"{_spoken(relation)} is outside the range of floating point for `{law.name}`",
            hint="use values nearer to the range that the law was fitted to",
        )
    others = [name for name in _given(relation) if name != "L"]
    lowest = floor(law, **{name: given[name] for name in others})
    if given["L"] > lowest:
        return LLMSizeError(
            f"`{law.name}` says nothing about a loss of {given['L']:g} {law.loss_unit}",
            hint="any model is better than that; ask for a lower loss",
        )
    limit = f"with that many {_SPOKEN[others[0]]} it" if others else "it"
    return LLMSizeError(
        f"`{law.name}` cannot reach a loss of {given['L']:g} {law.loss_unit}",
        hint=f"{limit} tends to {lowest:.4g} and never below; ask for a higher loss",
    )


def floor(law: ScalingLaw, **given: float) -> float:
    """The loss that the law tends to but does not reach, alone or with N or D fixed."""
    if given:
        (name,) = given
        fixed = {"N": "L | N, D", "D": "L | N, D", "S_min": "L | N, S_min"}[name]
        return float(function(law, fixed)(*(given.get(each, math.inf) for each in _given(fixed))))
    if "floor" not in FORMULAS.get(law.form, {}):
        return 0.0
    return float(eval(_inlined(law, "floor"), {"exp": math.exp, **law.constants}))  # noqa: S307


def answer(law: ScalingLaw, relation: str, name: str = "", **given: float) -> Term:
    """`solve` as a Term: the formula that ran, its constants, its source and its warnings."""
    value = solve(law, relation, **given)
    formula = _inlined(law, relation)
    known = {"PF_day": PF_DAY, **law.constants, **given}
    target = relation.partition("|")[0].strip()
    return term(
        name or _SPOKEN.get(target, target).removeprefix("the "),
        formula,
        unit=_unit(law, target),
        source=law.source,
        grade="assumed" if law.experimental else "fitted",
        note=OUTSIDE if extrapolations(law, **{**given, target: value}) else "",
        **_pick(formula, known),
    )


def _unit(law: ScalingLaw, target: str) -> str:
    units = {"L": law.loss_unit, "N": "parameters", "S": "steps", "S_min": "steps", "lr": "",
             "M": "FLOP/token"}  # fmt: skip
    if target.startswith("N_"):
        return "parameters"
    return units.get(target, "FLOP" if target.startswith("C") else "tokens")


def extrapolations(law: ScalingLaw, **values: float) -> list[str]:
    """One sentence for each value outside the range that the law was fitted to."""
    found = []
    for name, (low, high) in law.fitted.items():
        value = values.get(name)
        if value is not None and not low <= value <= high:
            side = f"above {high:.3g}" if value > high else f"below {low:.3g}"
            found.append(f"{_SPOKEN.get(name, name)} {value:.3g} is {side}, where the fit ends")
    return found


@overload
def loss(law: ScalingLaw, n: float, d: float) -> float: ...
@overload
def loss(law: ScalingLaw, n: Sequence[float], d: Sequence[float] | float) -> list[float]: ...
@overload
def loss(law: ScalingLaw, n: float, d: Sequence[float]) -> list[float]: ...
def loss(
    law: ScalingLaw, n: Sequence[float] | float, d: Sequence[float] | float
) -> list[float] | float:
    """The loss of N parameters after D tokens, in the law's unit; sequences give a list.

    Raises `LLMSizeError` for anything but positive finite numbers.
    """
    if isinstance(n, int | float) and isinstance(d, int | float):
        if 0 < n < math.inf and 0 < d < math.inf:
            result = function(law, "L | N, D")(n, d)
            if 0 < result < math.inf:
                return result
        return solve(law, "L | N, D", N=n, D=d)
    return _mapped(function(law, "L | N, D"), n, d)


def losses(law: ScalingLaw, relation: str, *columns: Sequence[float] | float) -> list[float]:
    """Any relation over whole sequences; plain numbers are repeated."""
    return _mapped(function(law, relation), *columns)


def _mapped(compute: Callable[..., float], *columns: Sequence[float] | float) -> list[float]:
    for column in columns:
        smallest = column if isinstance(column, int | float) else min(column, default=1.0)
        if not smallest > 0:
            raise LLMSizeError(
                f"a law has no value at {smallest}", hint="give numbers above zero only"
            )
    try:
        result = list(map(compute, *_repeated(columns)))
        sound = math.isfinite(sum(result))
    except (ZeroDivisionError, OverflowError, TypeError):
        sound = False
    if not sound:
        raise LLMSizeError("a value in the sequence is outside the law", hint="check the extremes")
    return result


def _repeated(columns: Sequence[Sequence[float] | float]) -> Iterator[Any]:
    for column in columns:
        yield repeat(column) if isinstance(column, int | float) else column


PEARCE_SONG = 47_491
"""N_total = N + 47491 N^(1/3), a fit over the Chinchilla models (arXiv:2406.12907)."""


def total_parameters(non_embedding: float) -> float:
    """Total parameters of a typical model with that many outside its embeddings.

    Pearce & Song 2024, arXiv:2406.12907; a model's own count comes from its anatomy.
    """
    return non_embedding + PEARCE_SONG * math.cbrt(non_embedding)


def non_embedding_parameters(total: float) -> float:
    """The inverse of `total_parameters`: the real root of x³ + 47491 x = total, cubed."""
    half = total / 2
    root = math.sqrt(half**2 + (PEARCE_SONG / 3) ** 3)
    x = math.cbrt(half + root) - math.cbrt(root - half)
    for _ in range(4):  # Newton's steps restore the digits that Cardano's difference loses
        x -= (x**3 + PEARCE_SONG * x - total) / (3 * x**2 + PEARCE_SONG)
    return x**3
