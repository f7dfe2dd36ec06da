"""What the forward pass of a training step keeps, by where it was made: columns of the traces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import NamedTuple

from llmsize.anatomy import Setting, Trace, run_forward
from llmsize.anatomy.tape import Segment
from llmsize.anatomy.tensor import OUTSIDE, Event
from llmsize.anatomy.trace import HIDDEN_STATES
from llmsize.architecture import Architecture
from llmsize.memory.timeline import level, stretches


class Kept(NamedTuple):
    """Bytes alive at the end of the forward pass, beside what lives through the step."""

    casts: int
    """Autocast's 16-bit copies of weights."""
    per_layer: int
    """What one layer in the middle keeps, without those copies."""
    in_layers: int
    outside: int
    """Embedding, final norm, head, loss."""


def kept_by_place(architecture: Architecture, setting: Setting) -> Kept:
    """Run the forward pass and tell apart what it leaves alive."""
    trace, _loss = run_forward(architecture, setting)
    trace.leave_autocast()
    casts = in_layers = 0
    parts = list(stretches(trace))
    passed: set[int] = set()
    for part in parts:
        again = part.turn in passed  # by the loss that balances experts
        passed |= {part.turn} if part.turn >= 0 else set()
        for change, (role, _, layer, *_) in part.lasting():
            if role == "cast":
                casts += change * part.times
            elif layer >= 0 and not again:
                in_layers += change * part.times
    return Kept(casts, _middle_layer(trace), in_layers, level(parts) - casts - in_layers)


def _middle_layer(trace: Trace) -> int:
    """What the layer in the middle of the model keeps, without casts of weights.

    Its successor, which may be the head, frees some of what it makes. An encoder
    and a decoder have one each.
    """
    layers = 1 + max(turn.indices[-1] for turn in trace.course)
    made, taken = (_changes(trace, index) for index in (layers // 2, layers // 2 + 1))
    return made[0] + taken[1]


def _changes(trace: Trace, index: int) -> tuple[int, int]:
    """What a layer keeps of its own and frees of its predecessor's."""
    turns = [turn for turn in trace.course if index in turn.indices]
    layers = {part for turn in turns for part in turn.parts} or {OUTSIDE}
    passed: set[int] = set()
    own = before = 0
    for segment, after in pairwise([*trace.segments, Segment("end", -1, len(trace.events))]):
        events = trace.events[segment.start : after.start]
        before_all = segment.layer == OUTSIDE and not passed  # which is not what follows the last
        if segment.layer in layers - passed and not before_all:
            for change, (role, _, layer, *_) in events:
                if layer == segment.layer and role != "cast":
                    own += change
                elif layer != OUTSIDE and role != "cast":
                    before += change
        elif segment.layer == OUTSIDE and index + 1 < trace.depth:
            own += _let_go(trace, events, layers)
        passed |= {segment.layer} - {OUTSIDE}  # the loss that balances experts passes it again
    return own, before


def _let_go(trace: Trace, events: Sequence[Event], layers: set[int]) -> int:
    """What each of these layers has no more when the model has run: the logits of its router.

    They go for all layers alike at once; what a layer hands on goes by itself.
    """
    freed = 0
    for change, (_, operation, layer, shape, format) in events:
        if layer in layers and layer != OUTSIDE and operation != HIDDEN_STATES:
            size = prod(shape) * format.block_bytes
            freed -= size if change == -len(trace.places[layer].indices) * size else 0
    return freed
