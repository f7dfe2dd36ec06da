"""The path from resources to a plan, on the examples that people start from."""

import pytest

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.hardware import Accelerator, bandwidth, machine, peak, training_format
from llmsize.planning.advise import (
    Option,
    Pretraining,
    Resources,
    Way,
    adapt,
    pretraining,
    ranked,
    tokens_in,
)
from llmsize.planning.catalogue import Choice
from llmsize.scaling.laws import ScalingLaw
from llmsize.term import fact
from llmsize.throughput import Utilization, efficiency, measured_utilization

DAY = 86_400
LAWS = presets.every(ScalingLaw)


def resources(gpu: str, *, count: int = 1, days: float, **more: float) -> Resources:
    accelerator = presets.get(Accelerator, gpu)
    format = training_format(accelerator)
    known = presets.every(Utilization).values()
    return Resources(
        machine(accelerator, count=count), days * DAY, peak(accelerator, format),
        efficiency(measured_utilization(known, accelerator, format)),
        bandwidth(accelerator).value, **more,
    )  # fmt: skip


def scratch(have: Resources, limit: int | None = None) -> Pretraining:
    laws = [LAWS[name] for name in ("chinchilla", "hoffmann", "kaplan")]
    return pretraining(have, LAWS["chinchilla"], laws, LAWS["muennighoff"], limit)


def test_a_month_of_one_h100_trains_a_small_model() -> None:
    """30 days at 40 % of 989 TFLOP/s are 1.0e21 FLOP: a few billion parameters."""
    found = scratch(resources("h100", days=30))
    assert found.compute.value == pytest.approx(989e12 * 0.40 * 30 * DAY)
    assert 2e9 < found.plan.parameters < 4e9
    assert found.plan.parameters * found.plan.tokens * 6 == pytest.approx(found.compute.value)
    assert found.time.value == pytest.approx(30 * DAY)


def test_a_thousand_h100_train_a_large_model() -> None:
    """1,024 H100 for 60 days are 2.1e24 FLOP, four times Chinchilla's own 5.76e23 for 70B."""
    found = scratch(resources("h100", count=1024, days=60))
    assert 1e11 < found.plan.parameters < 2e11
    assert 1e12 < found.plan.tokens < 5e12


def test_what_does_not_fit_is_trained_smaller_and_longer() -> None:
    """The same compute on fewer parameters sees more tokens and ends at a higher loss."""
    have = resources("rtx-4090", days=30)
    free, bound = scratch(have), scratch(have, limit=300_000_000)
    assert bound.plan.parameters == bound.limit == 300_000_000
    assert bound.plan.tokens > free.plan.tokens
    assert bound.losses["chinchilla"] > free.losses["chinchilla"]


def test_short_data_repeat_and_are_worth_less() -> None:
    """2 GB of text are half a billion tokens, which a month of an H100 reads a hundred times."""
    have = resources("h100", days=30)
    tokens = tokens_in(2 * 10**9).value
    short = scratch(resources("h100", days=30, tokens=tokens))
    assert 4e8 < tokens < 6e8
    assert short.epochs and 50 < short.epochs < 200
    plenty = scratch(resources("h100", days=30, tokens=scratch(have).plan.tokens))
    assert short.repeated_loss and plenty.repeated_loss
    assert short.repeated_loss > plenty.repeated_loss


def option(way: Way, name: str, have: Resources, parameters: int = 6_738_415_616) -> Option:
    model = Architecture(name, "llama", {}, "made up", published_parameters=parameters)
    return adapt(have, way, Choice(model, parameters, "bf16", 10**9, "fits", 10**9), 32, parameters)


def test_alpaca_takes_three_hours_and_a_hundred_dollars() -> None:
    """52,002 short samples, 3 epochs, full tuning of a 7B on 8 A100 (tatsu-lab/stanford_alpaca)."""
    have = resources(
        "a100",
        count=8,
        days=1,
        tokens=52_002 * 130,
        samples=52_002,
        epochs=3,
        price=fact("price", 4.0, unit="$/GPU-hour", source="given"),
    )
    found = option("full", "7b", have)
    assert found.seconds and 2 < found.seconds.value / 3600 < 4
    assert found.cost and 60 < found.cost.value < 130


def test_a_chatbot_starts_from_an_existing_model() -> None:
    """Tuning a larger base comes before a smaller one, and a new model comes last."""
    have = resources("rtx-4090", days=14, tokens=10**7)
    found = [
        option("qlora", "large", have, 30 * 10**9), option("lora", "small", have, 8 * 10**9),
        option("full", "small", have, 8 * 10**9), option("serve", "large", have, 40 * 10**9),
    ]  # fmt: skip
    order = [(o.way, o.subject) for o in ranked(found, "chatbot", data=True)]
    assert order == [("qlora", "large"), ("full", "small"), ("lora", "small"), ("serve", "large")]
    assert ranked(found, "chatbot", data=False)[0].way == "serve"


def test_a_mixture_of_experts_takes_the_time_of_what_a_token_meets() -> None:
    """Half of the parameters are active: long samples take half of the time."""
    have = resources("a100", days=1, tokens=10**9)
    dense = option("lora", "dense", have, 10**11)
    model = Architecture("moe", "mixtral", {}, "made up", published_parameters=10**11)
    experts = adapt(
        have, "lora", Choice(model, 10**11, "bf16", 10**9, "fits", 10**9), 32, 5 * 10**10
    )
    assert dense.seconds and experts.seconds
    assert experts.seconds.value == pytest.approx(dense.seconds.value / 2, rel=0.01)
    assert experts.parameters == 10**11


def test_what_takes_too_long_comes_last() -> None:
    """An option that does not end in the time is not recommended first."""
    have = resources("t4", days=0.1, tokens=10**8)
    found = ranked(
        [option("qlora", "large", have, 8 * 10**9), option("lora", "small", have, 10**8)],
        "finetune",
        data=True,
    )
    assert [o.in_time for o in found] == [True, False]
