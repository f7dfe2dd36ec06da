"""What fewer bits do to a loss, by Kumar et al. 2024: ratios only, and only inside its domain.

The law was fitted to models of 30M to 220M parameters; its constants do not transfer, its authors
say, and Frantar et al. 2025 contradict it at 4 bits (law `frantar`): nothing here returns a loss.
"""

from __future__ import annotations

import math

from llmsize.errors import LLMSizeError
from llmsize.scaling.forms import FORMULAS
from llmsize.scaling.laws import ScalingLaw
from llmsize.scaling.solve import root
from llmsize.term import Term, term

MOST_BITS = 16.0
"""Above this the fit has no runs."""

_PARTS = ("weights", "activations", "kv")


def effective_fraction(
    law: ScalingLaw,
    *,
    weights: float | None = None,
    activations: float | None = None,
    kv: float | None = None,
) -> Term:
    """The share of parameters that count when trained at that many bits; absent parts are exact.

    Product of 1 - exp(n - bits / gamma) over what is quantized (Equation 3, Table 2). Raises
    `LLMSizeError` outside 3 to 16 bits, or where the factor would not be positive.
    """
    given = {"weights": weights, "activations": activations, "kv": kv}
    inputs: dict[str, float] = {}
    factors = []
    for part in _PARTS:
        bits = given[part]
        if bits is None:
            continue
        _in_domain(law, part, bits)
        factors.append(f"({FORMULAS['precision'][f'share | bits_{part}']})")
        inputs |= {f"bits_{part}": bits, f"n_{part}": law.constants[f"n_{part}"],
                   f"gamma_{part}": law.constants[f"gamma_{part}"]}  # fmt: skip
    return term(
        "effective share of parameters", " * ".join(factors) or "1", unit="", source=law.source,
        grade="assumed", note="experimental: " + law.note, **inputs,
    )  # fmt: skip


def _in_domain(law: ScalingLaw, part: str, bits: float) -> None:
    lowest = max(law.fitted["P"][0], law.constants[f"n_{part}"] * law.constants[f"gamma_{part}"])
    if not lowest <= bits <= MOST_BITS:
        raise LLMSizeError(
            f"`{law.name}` says nothing about {part} of {bits:g} bits",
            hint=f"its domain for {part} is {lowest:.3g} to {MOST_BITS:g} bits",
        )


def best_bits(law: ScalingLaw) -> float:
    """The bits at which a fixed compute, which shrinks with them, trains best: 7 to 8 published.

    Where sum of (P / gamma) · e / (1 - e) = 1 with e = exp(n - P / gamma); a bracketed root.
    """
    k = law.constants

    def surplus(bits: float) -> float:
        return sum(
            bits / k[f"gamma_{part}"] / math.expm1(bits / k[f"gamma_{part}"] - k[f"n_{part}"])
            for part in _PARTS
        ) - 1  # fmt: skip

    lowest = max(k[f"n_{part}"] * k[f"gamma_{part}"] for part in _PARTS)
    return root(surplus, lowest * 1.0001, 64.0)
