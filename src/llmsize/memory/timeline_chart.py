"""The timeline of a training step as a chart."""

from __future__ import annotations

from itertools import groupby

from llmsize.chart import Axis, Chart, Mark, Series
from llmsize.memory.training import Point, TrainingStep

PASSED = Axis("layers passed, forward and backward", log=False)
MEMORY = Axis("allocated", "bytes", log=False)


def timeline_chart(step: TrainingStep, title: str) -> Chart:
    """What is alive along the step, one curve a phase; the peak is marked.

    Bytes over layers; what is outside of the layers is as wide as one of them. Each stretch has
    its highest and what it leaves.
    """
    at, live, curves, base = 0, int(step.static.value), [], float(step.static.value)
    for phase, points in groupby(step.timeline, lambda point: point.phase):
        curve = [(float(at), float(live))]
        for point in points:
            curve += _outline(point, at, live)
            at, live = at + point.layers, point.after
        curves.append(Series(phase, tuple(curve)))
    static = Series("lives through the step", ((0.0, base), (float(at), base)))
    x, y, top = max(
        ((x, y, each.name) for each in curves for x, y in each.points), key=lambda found: found[1]
    )
    return Chart(title, PASSED, MEMORY, (static, *curves), (Mark(f"peak: {top}", x, y),))


def _outline(point: Point, at: int, before: int) -> list[tuple[float, float]]:
    """A stretch that begins after so many layers, with so much alive: its highest and its end.

    The highest is in the last layer where layers leave more than they found, else in the first.
    """
    middle = at + (point.layers - 0.5 if point.after > before else 0.5)
    return [(middle, float(point.highest)), (float(at + point.layers), float(point.after))]
