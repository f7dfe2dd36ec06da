"""From resources to a plan: what to load, tune or train on these machines, and what it reaches.

The path: memory gives the range of parameters for every way of using a model; time gives compute;
compute gives a size and a number of tokens; the tokens at hand say how often they repeat; that
gives a loss, a time and a price. What models need is asked of callables, and laws are handed in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from llmsize.errors import LLMSizeError
from llmsize.hardware import Machine
from llmsize.planning.catalogue import Choice
from llmsize.planning.finetuning import Method, run_seconds, step_seconds
from llmsize.planning.fits import Verdict
from llmsize.planning.needs import Way
from llmsize.quick_dataclasses import dataclass
from llmsize.scaling.allocation import Allocation, allocate, at_most
from llmsize.scaling.laws import (
    ScalingLaw,
    loss,
    non_embedding_parameters,
    relations,
    solve,
)
from llmsize.term import Term, term
from llmsize.throughput import affordable_flop, cost, device_hours, training_flop, training_time

Task = Literal["chatbot", "pretrain", "finetune", "serve"]
Plan = Way | Literal["scratch"]

TITLES: dict[Plan, str] = {
    "serve": "inference only", "lora": "LoRA", "qlora": "QLoRA", "full": "full fine-tuning",
    "scratch": "from scratch",
}  # fmt: skip

WAYS: dict[Task, tuple[Plan, ...]] = {
    "chatbot": ("full", "lora", "qlora", "serve", "scratch"),
    "finetune": ("full", "lora", "qlora"),
    "serve": ("serve",),
    "pretrain": ("scratch", "full", "lora", "qlora"),
}
"""The ways that answer a task, the one that changes most of the model first."""

BYTES_PER_TOKEN = 4.19
"""English text under GPT-2's tokenizer: WebText2, 96 GB for 2.29e10 tokens (arXiv:2001.08361)."""

REPEATABLE_EPOCHS = 4
"""Epochs up to which repeated tokens are worth almost as much as new ones (arXiv:2305.16264)."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What there is: machines, time, data, and what an hour costs."""

    machine: Machine
    seconds: float
    """For which the machines are there."""
    peak: Term
    """FLOP/s of one device in the format one trains in."""
    utilization: Term
    """Share of the peak that long training runs reach."""
    bandwidth: float
    """Bytes per second of one device's memory."""
    tokens: float | None = None
    """At hand; for fine-tuning, those of one epoch."""
    samples: float | None = None
    """That the tokens come in; absent if they are packed into full sequences."""
    epochs: float = 1
    context: int = 4096
    price: Term | None = None
    """Of one device for an hour, in a currency."""


@dataclass(frozen=True, slots=True)
class Pretraining:
    """What training from scratch with these resources comes to."""

    compute: Term
    optimum: Allocation
    """The best size and tokens for the compute, whatever fits."""
    plan: Allocation
    """The same with no more parameters than can be trained and served here."""
    limit: int | None
    """Those parameters, if they are fewer than the optimum's."""
    epochs: float | None
    """How often the tokens at hand would repeat; absent if none were given."""
    losses: dict[str, float]
    """By law, at the plan's size and tokens, in each law's unit and on its corpus."""
    repeated_loss: float | None
    """By the law of repeated data, if tokens are at hand."""
    time: Term
    cost: Term | None


@dataclass(frozen=True, slots=True)
class Option:
    """One thing to do with the machines."""

    way: Plan
    subject: str
    """The base model, or the size of a new one."""
    parameters: float
    format: str
    need: int | None
    """Bytes on the fullest device."""
    verdict: Verdict
    seconds: Term | None
    cost: Term | None
    in_time: bool
    why: str


def training_compute(have: Resources) -> Term:
    """FLOP that the machines do in the time."""
    return affordable_flop(
        devices=have.machine.devices, seconds=have.seconds, peak=have.peak,
        efficiency=have.utilization,
    )  # fmt: skip


def pretraining(
    have: Resources,
    law: ScalingLaw,
    laws: Iterable[ScalingLaw],
    repeated: ScalingLaw,
    limit: int | None,
) -> Pretraining:
    """The size, tokens, loss, time and cost of a model trained from scratch.

    `law` allocates, `laws` give the spread of losses, `repeated` counts tokens seen before; `limit`
    is the most parameters that can be trained and served. Raises `LLMSizeError` where a law cannot
    answer.
    """
    compute = training_compute(have)
    optimum = allocate(law, compute.value)
    plan = optimum if limit is None else at_most(law, compute.value, limit)
    flop = training_flop(plan.parameters, plan.tokens)
    time = training_time(
        flop, devices=have.machine.devices, peak=have.peak, efficiency=have.utilization
    )
    epochs = plan.tokens / have.tokens if have.tokens else None
    return Pretraining(
        compute, optimum, plan, limit if plan.parameters < optimum.parameters else None, epochs,
        {each.name: _loss(each, plan) for each in laws if "L | N, D" in relations(each)},
        _repeated_loss(repeated, plan, have.tokens), time, _cost(have, time),
    )  # fmt: skip


def _loss(law: ScalingLaw, plan: Allocation) -> float:
    """The law's loss of the plan, whose parameters count the embeddings."""
    counted = law.counts in ("non-embedding", "all but embedding")
    n = non_embedding_parameters(plan.parameters) if counted else plan.parameters
    return loss(law, n, plan.tokens)


def _repeated_loss(law: ScalingLaw, plan: Allocation, tokens: float | None) -> float | None:
    if tokens is None:
        return None
    return solve(law, "L | N, D, U", N=plan.parameters, D=plan.tokens, U=min(tokens, plan.tokens))


def adapt(
    have: Resources, way: Way, choice: Choice, layers: int, active: float, named: bool = False
) -> Option:
    """The option of using one model of the catalogue, or the one that was named, in one way.

    `active` are the parameters that one token meets, which a mixture of experts has fewer of.
    """
    model = choice.model
    seconds = None
    if way != "serve" and have.tokens:
        seconds = tuning_time(have, way, active, layers)
    why = "the model that was named"
    if not named:
        known = ", ".join(filter(None, (model.released, model.licence)))
        why = f"of the largest class that fits ({known or 'of unknown date and licence'})"
    if way != "serve" and not have.tokens:
        why += ", once there is text to train on"
    return Option(
        way, model.name, choice.parameters, choice.format, choice.need, choice.verdict, seconds,
        _cost(have, seconds) if seconds else None,
        seconds is None or seconds.value <= have.seconds,
        why,
    )  # fmt: skip


def tuning_time(have: Resources, method: Method, parameters: float, layers: int) -> Term:
    """Seconds for the epochs over the tokens, one sample a step or packed into full sequences.

    Raises `LLMSizeError` where there are no tokens.
    """
    if have.tokens is None:
        raise LLMSizeError("tuning on what?", hint="give `--tokens` or `--data`")
    samples = have.samples or max(have.tokens / have.context, 1)
    step = step_seconds(
        method, parameters=parameters, layers=layers, tokens=have.tokens / samples,
        rate=have.peak.value * have.utilization.value, bandwidth=have.bandwidth,
    )  # fmt: skip
    return run_seconds(step, samples=samples, epochs=have.epochs, devices=have.machine.devices)


def scratch(found: Pretraining) -> Option:
    """The option of training a new model, as `pretraining` planned it."""
    why = "what the compute is best spent on"
    if found.limit is not None:
        why = "as large as can be trained and served here, trained longer"
    if found.epochs and found.epochs > REPEATABLE_EPOCHS:
        why += f"; the tokens at hand would repeat {found.epochs:,.0f} times"
    return Option(
        "scratch", "a new model", found.plan.parameters, "16-bit", None, "fits", found.time,
        found.cost, True, why,
    )  # fmt: skip


def ranked(options: Iterable[Option], task: Task, *, data: bool) -> list[Option]:
    """The options for a task: feasible in time first, then the way that has the larger model.

    Between ways with the same size, the one that changes more of the model comes first; within a
    way its options keep their order. A chatbot starts from an existing model, and without `data` to
    tune it with uses it as it is; only pretraining puts a new one first.
    """
    order = WAYS[task]
    known = [option for option in options if option.way in order]
    largest = {
        way: max((option.parameters for option in known if option.way == way), default=0)
        for way in order
    }

    def key(option: Option) -> tuple[bool, bool, bool, float, int]:
        resorts = ("serve", "scratch") if data else ("lora", "qlora", "full", "scratch")
        last_resort = option.way in resorts and task == "chatbot"
        new = option.way == "scratch" and task == "pretrain"
        return (
            not option.in_time, not new, last_resort, -largest[option.way],
            order.index(option.way),
        )  # fmt: skip

    return sorted(known, key=key)


def _cost(have: Resources, seconds: Term) -> Term | None:
    if have.price is None:
        return None
    return cost(device_hours(seconds, have.machine.devices), have.price)


def tokens_in(data_bytes: int) -> Term:
    """Tokens in that much text: about four bytes of English each; other languages differ."""
    return term(
        "tokens", "bytes / bytes_per_token", unit="tokens", grade="assumed",
        source="arXiv:2001.08361: WebText2", note="English text",
        bytes=data_bytes, bytes_per_token=BYTES_PER_TOKEN,
    )  # fmt: skip
