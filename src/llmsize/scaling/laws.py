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
from functools import lru_cache
from itertools import repeat
from typing import Any, Literal, overload

from llmsize.errors import LLMSizeError, did_you_mean
from llmsize.quick_dataclasses import dataclass, field, replace
from llmsize.scaling.forms import FORMULAS, REDUCTIONS, Form
from llmsize.term import Term, evaluate, term
from llmsize.units import PF_DAY

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


def additive(law: ScalingLaw, **settings: float) -> ScalingLaw:
    """The law E + A/N^alpha + B/D^beta that `law` is at those settings, or `law` itself.

    `over-training` (Gadre et al.) is one by algebra, with M = D/N and C = 6ND; a law of experts is
    one at a given number or granularity of them. Raises `LLMSizeError` for a missing setting.
    """
    missing = [name for name in law.settings if name not in settings]
    if missing:
        raise LLMSizeError(
            f"`{law.name}` needs the setting `{missing[0]}`",
            hint=f"give {' and '.join(law.settings)}, such as `--experts 8`",
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


def _inlined(law: ScalingLaw, relation: str) -> str:
    """The formula of `relation` with its abbreviations written out."""
    return _written_out(law.form, relation, frozenset(law.constants))


@lru_cache(maxsize=512)
def _written_out(form: Form, relation: str, constants: frozenset[str]) -> str:
    """The same for every law of a form with constants of those names: a calibration makes many."""
    formulas = FORMULAS.get(form, {})
    given = {*_given(relation), *constants}

    class Inline(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.AST:
            if node.id in given or node.id not in formulas:
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
