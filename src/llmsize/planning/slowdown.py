"""What a change of a training step costs in time, by the mechanism behind it.

Recomputing is FLOP, offloading is bytes over the bus, a quantized base is bytes moved in memory.
How much of it hides behind other work depends on the machine, so each is told for itself: FLOP as a
ratio, the bus at its fastest.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmsize.anatomy import Trace, outlined
from llmsize.anatomy.flops import forward_flop_per_token, training_flop_per_token
from llmsize.anatomy.parameters import count, hidden_size, vocabulary
from llmsize.hardware import BUS
from llmsize.memory.host import bus_traffic
from llmsize.planning.finetuning import DEQUANTIZED_BYTES
from llmsize.planning.training import Question, run_of
from llmsize.term import Term, term
from llmsize.units import format_bytes, format_duration, format_share

SELECTIVE = (
    "pytorch/torchtitan b5bcd76, activation_checkpoint.py: every second product is kept, and "
    "attention"
)


def slowdown(before: Question, after: Question) -> Iterator[str]:
    """What takes longer in the step `after` a change, in words with numbers."""
    more = flop_of_token(after).value / flop_of_token(before).value - 1
    if more >= 0.005:
        yield f"{format_share(more)} more FLOP"
    crossing = over_the_bus(after).value - over_the_bus(before).value
    if crossing > 0:
        least = format_duration(crossing / BUS.value)
        yield f"{format_bytes(crossing)} over the bus in a step, {least} or more"
    moved = dequantized(after).value - dequantized(before).value
    if moved > 0:
        yield f"{format_bytes(moved)} moved to dequantize in a step"


def flop_of_token(question: Question) -> Term:
    """FLOP that a token costs in a step, those of what is recomputed included."""
    trace = _outline(question)
    tokens = question.choices.sequence
    again = _again(question, trace, tokens)
    return term(
        "FLOP of a token", "training + again", unit="FLOP", source=again.source, grade="formula",
        training=training_flop_per_token(trace, tokens).value, again=again.value,
    )  # fmt: skip


def _again(question: Question, trace: Trace, tokens: int) -> Term:
    """The forward pass of the layers, once more where they are recomputed; never the head's."""
    choices = question.choices
    forward = forward_flop_per_token(trace, tokens)
    head = 2 * vocabulary(trace) * hidden_size(trace)
    if choices.recompute == "selective":
        products = forward.value - _attention(forward)
        return term("FLOP again", "(products - head) / (2 * every)", unit="FLOP", source=SELECTIVE,
                    products=products, head=head, every=choices.recompute_every)  # fmt: skip
    return term(
        "FLOP again", "times * (forward - head) / every", unit="FLOP",
        source="Chen et al. 2016, arXiv:1604.06174", times=int(choices.recompute == "full"),
        forward=forward.value, head=head, every=choices.recompute_every,
    )  # fmt: skip


def _attention(forward: Term) -> float:
    return sum(part.value for part in forward.parts if part.name == "attention")


def over_the_bus(question: Question) -> Term:
    """Bytes that cross the bus between host and device in a step."""
    return bus_traffic(question.architecture, run_of(question))


def dequantized(question: Question) -> Term:
    """Bytes moved in the device's memory to dequantize a quantized base, once for each pass."""
    trace, choices = _outline(question), question.choices
    return term(
        "dequantizing", "quantized * bytes_each * parameters * micro_batches", unit="bytes",
        source="llmsize.planning.finetuning: 51 published runs", grade="fitted",
        quantized=int(choices.base is not None), bytes_each=DEQUANTIZED_BYTES,
        parameters=count(trace.weights.values()).total, micro_batches=choices.accumulation,
    )  # fmt: skip


def _outline(question: Question) -> Trace:
    return outlined(question.architecture, run_of(question).setting)
