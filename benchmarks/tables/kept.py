"""What the forward pass of a training step keeps, by where it was made: columns of the traces."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from llmsize.anatomy import Setting, Trace, run_forward
from llmsize.anatomy.tape import Segment
from llmsize.anatomy.tensor import OUTSIDE, Label
from llmsize.architecture import Architecture


class Kept(NamedTuple):
    """Bytes alive at the end of the forward pass, beside what lives through the step."""

    casts: int
    """Autocast's 16-bit copies of weights."""
    per_layer: int
    """What the layer of the asked index keeps, without those copies."""
    in_layers: int
    outside: int
    """Embedding, final norm, head, loss."""


def kept_by_place(architecture: Architecture, setting: Setting, index: int) -> Kept:
    """Run the forward pass layer by layer and tell apart what it leaves alive.

    An encoder and a decoder have a layer each of that index.
    """
    trace, _loss = run_forward(architecture, setting, unrolled=True)
    trace.leave_autocast()
    turns = [turn for turn in trace.course if index in turn.indices]
    asked = {part for turn in turns for part in turn.parts}
    casts = per_layer = in_layers = outside = 0
    for change, (role, _, layer, *_), once_more in _changes(trace):
        if role == "cast":
            casts += change
        elif layer < 0 or once_more:
            outside += change
        else:
            in_layers += change
            per_layer += change * (layer in asked)
    return Kept(casts, per_layer, in_layers, outside)


def _changes(trace: Trace) -> Iterator[tuple[int, Label, bool]]:
    """What comes and goes, and whether its layer has been passed before.

    The loss that balances experts passes all layers once more, and is itself outside of them.
    """
    passed: set[int] = set()
    for segment, after in pairwise([*trace.segments, Segment("end", OUTSIDE, len(trace.events))]):
        once_more = segment.layer in passed
        for change, label in trace.events[segment.start : after.start]:
            yield change, label, once_more
        passed |= {segment.layer} - {OUTSIDE}
