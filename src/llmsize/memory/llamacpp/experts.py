"""Experts as llama.cpp builds their graph: routing, the chosen ones, and those of every token.

llama.cpp 0c1e57098, src/llama-graph.cpp (`build_moe_ffn`).
"""

from __future__ import annotations

from typing import Literal

from llmsize.memory.llamacpp import tensors as ops
from llmsize.memory.llamacpp.builder import Builder
from llmsize.memory.llamacpp.tensors import Tensor, view
from llmsize.quick_dataclasses import dataclass

Routing = Literal["softmax", "softmax of chosen", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Experts:
    """What the graph needs to know of a mixture of experts beside its tensors."""

    used: int = 0
    """Experts of each token."""
    routing: Routing = "softmax"
    """What turns router logits into weights of experts."""
    normalized: bool = True
    """Whether the weights of the chosen experts are divided by their sum."""
    groups: int = 1
    groups_used: int = 1
    weighed_first: bool = False
    """Whether an expert's input is weighed, not its output (Llama 4)."""


def mixture(b: Builder, e: Experts, x: Tensor, logits: Tensor | None = None) -> Tensor:
    """The chosen experts, and those that every token uses.

    The router's `logits` are given where it does not see the same input.
    """
    given = x
    if b.has("ffn_latent_down"):
        x = ops.matmul(b.needed("ffn_latent_down"), x)
    logits = b.linear(given, "ffn_gate_inp") if logits is None else logits
    weights, chosen = _route(b, e, logits)
    b.graph.expand(weights)
    total = _sum(b, _outputs(b, e, x, weights, chosen))
    if b.has("ffn_latent_up"):
        total = ops.matmul(b.needed("ffn_latent_up"), total)
    if b.has("ffn_up_shexp"):
        total = ops.apply("add", total, _shared(b, given))
    return total


def mlp(b: Builder, x: Tensor, suffix: str = "") -> Tensor:
    """An MLP, gated if it has a gate or the activation halves its width."""
    up = b.linear(x, f"ffn_up{suffix}")
    if b.has(f"ffn_gate{suffix}"):
        hidden = ops.gated(b.linear(x, f"ffn_gate{suffix}"), up)
    elif b.needed(f"ffn_down{suffix}").shape[0] * 2 == up.shape[0]:
        hidden = ops.gated(up)
    else:
        hidden = ops.apply("unary", up)
    return b.linear(hidden, f"ffn_down{suffix}")


def _outputs(b: Builder, e: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """What every chosen expert makes of its token, weighed."""
    hidden, tokens, _, _ = x.shape
    each = ops.reshape(x, hidden, 1, tokens)
    if e.weighed_first:
        each = ops.made("repeat", each.format, (hidden, chosen.shape[0], tokens), each)
        each = ops.apply("mul", each, weights)
    up = _chosen(b, each, "ffn_up_exps", chosen)
    if b.has("ffn_gate_exps"):
        wide = ops.gated(_chosen(b, each, "ffn_gate_exps", chosen), up)
    else:
        wide = ops.apply("unary", up)
    out = _chosen(b, wide, "ffn_down_exps", chosen)
    return b.graph.expand(out if e.weighed_first else ops.apply("mul", out, weights))


def _sum(b: Builder, out: Tensor) -> Tensor:
    """The outputs of a token's experts, added up one by one."""
    hidden, used, tokens, _ = out.shape
    span = 4 * (hidden * used * (tokens - 1) + hidden)
    parts = [b.graph.expand(view(out, hidden, tokens, span=span)) for _ in range(used)]
    total = parts[0]
    for part in parts[1:]:
        total = b.graph.expand(ops.apply("add", total, part))
    return ops.contiguous(total) if used == 1 else total


def _shared(b: Builder, x: Tensor) -> Tensor:
    """The experts that every token uses, with a score of their own in Qwen's models."""
    out = mlp(b, x, "_shexp")
    if not b.has("ffn_gate_inp_shexp"):
        return out
    score = ops.apply("unary", ops.matmul(b.needed("ffn_gate_inp_shexp"), x))
    return ops.apply("mul", out, score)


def _chosen(b: Builder, x: Tensor, name: str, chosen: Tensor) -> Tensor:
    x = ops.matmul_experts(b.needed(name), x, chosen)
    bias = b.weight(name, "bias")
    return x if bias is None else ops.apply("add_id", x, bias, chosen)


def _route(b: Builder, e: Experts, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the chosen experts, and which they are."""
    experts, tokens, _, _ = logits.shape
    how = {"softmax": "softmax", "sigmoid": "unary"}.get(e.routing)
    scores = ops.apply(how, logits) if how else logits
    bias = b.weight("exp_probs_b", "bias")
    ranked = logits if e.weighed_first else scores
    if bias is not None:
        ranked = ops.apply("add", scores, bias)
    if e.groups > 1:
        ranked = _best_groups(e, ranked)
    chosen = ops.top_k(ranked, e.used)
    weights = ops.get_rows(ops.reshape(scores, 1, experts, tokens), chosen)
    if e.routing == "softmax of chosen":
        weights = ops.apply("softmax", ops.reshape(weights, e.used, tokens))
        weights = ops.reshape(weights, 1, e.used, tokens)
    elif e.normalized:
        weights = ops.reshape(weights, e.used, tokens)
        weights = ops.apply("div", weights, ops.apply("unary", ops.sum_rows(weights)))
        weights = ops.reshape(weights, 1, e.used, tokens)
    return weights, chosen


def _best_groups(e: Experts, scores: Tensor) -> Tensor:
    """Scores of the experts outside of the best groups masked out (DeepSeek-V3)."""
    experts, tokens, _, _ = scores.shape
    groups = ops.reshape(scores, experts // e.groups, e.groups, tokens)
    best = ops.top_k(groups, 2)
    columns = ops.reshape(groups, 1, *groups.shape[:3])
    best = ops.get_rows(columns, best)
    best = ops.sum_rows(ops.reshape(best, *best.shape[1:]))
    best = ops.top_k(ops.reshape(best, e.groups, tokens), e.groups_used)
    kept = ops.get_rows(groups, best)
    masked = ops.set_rows(ops.apply("fill", groups), kept, best)
    return ops.reshape(masked, experts, tokens)
