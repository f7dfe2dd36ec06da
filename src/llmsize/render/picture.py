"""A chart as a file: Vega-Lite as a plain dictionary, and what vl-convert makes of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from importlib import import_module
from io import StringIO
from typing import Any

from llmsize.chart import Axis, Chart, extent
from llmsize.errors import LLMSizeError, printable
from llmsize.render.values import safe

SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
WIDTH, HEIGHT = 420, 320


def specification(charts: Sequence[Chart]) -> dict[str, Any]:
    """The Vega-Lite specification of charts side by side. It refers to nothing on a network.

    Names are made safe: a control character in one would abort the converter, and Python with it.
    """
    panels = [_panel(chart) for chart in charts]
    body = panels[0] if len(panels) == 1 else {"hconcat": panels}
    return {"$schema": SCHEMA, "background": "white", **body}


def _panel(chart: Chart) -> dict[str, Any]:
    low_x, high_x, low_y, high_y = extent(chart)
    place = {"x": _axis("x", chart.x, low_x, high_x), "y": _axis("y", chart.y, low_y, high_y)}
    layers = []
    if chart.fitted is not None:
        low, high = chart.fitted
        layers.append(_layer(
            [{"low": low, "high": high}],
            {"type": "rect", "color": "#888", "opacity": 0.12, "clip": True},
            {"x": {**place["x"], "field": "low"}, "x2": {"field": "high"}},
        ))  # fmt: skip
    points = [
        {"x": x, "y": y, "curve": safe(each.name)} for each in chart.series for x, y in each.points
    ]
    color = {"color": {"field": "curve", "type": "nominal", "title": None, "sort": None}}
    layers.append(_layer(points, {"type": "line", "clip": True}, {**place, **color}))
    if chart.marks:
        named = [{"x": mark.x, "y": mark.y, "name": safe(mark.name)} for mark in chart.marks]
        layers.append(_layer(named, {"type": "point", "filled": True, "color": "black"}, place))
        words = {"type": "text", "align": "left", "dx": 6, "dy": -6}
        text = {"text": {"field": "name", "type": "nominal"}}
        layers.append(_layer(named, words, {**place, **text}))
    return {"title": safe(chart.title), "width": WIDTH, "height": HEIGHT, "layer": layers}


def _layer(
    values: list[dict[str, Any]], mark: dict[str, Any], encoding: dict[str, Any]
) -> dict[str, Any]:
    return {"data": {"values": values}, "mark": mark, "encoding": encoding}


def _axis(name: str, axis: Axis, low: float, high: float) -> dict[str, Any]:
    kind, low = ("log", low) if axis.log else ("linear", 0)
    shown = {"format": "~s", "labelExpr": "replace(datum.label, 'G', 'B')"}
    labels = (
        shown
        if axis.unit in ("parameters", "tokens")
        else {"format": _FORMATS.get(axis.unit, "~g")}
    )
    return {"field": name, "type": "quantitative", "title": axis.label, "axis": labels,
            "scale": {"type": kind, "domain": [low, high], "nice": False}}  # fmt: skip


_FORMATS = {"bytes": "~s", "FLOP": ".0e"}


def picture(charts: Sequence[Chart], name: str) -> bytes:
    """The charts in the format that the end of a file's name asks for.

    `.csv` and `.vl.json` need nothing; `.svg`, `.png` and `.html` (self-contained) need the extra
    `plot`. Raises `LLMSizeError` for another ending, or without the extra.
    """
    lowered = name.lower()
    if lowered.endswith(".csv"):
        return _table(charts).encode()
    if lowered.endswith(".json"):
        return (json.dumps(specification(charts), indent=2) + "\n").encode()
    made: dict[str, Callable[[Any, dict[str, Any]], bytes]] = {
        ".svg": lambda vl, spec: vl.vegalite_to_svg(spec).encode(),
        ".png": lambda vl, spec: bytes(vl.vegalite_to_png(spec, scale=2)),
        ".html": lambda vl, spec: vl.vegalite_to_html(spec, bundle=True).encode(),
    }
    for ending, make in made.items():
        if lowered.endswith(ending):
            return make(_converter(), specification(charts))
    raise LLMSizeError(
        f"cannot draw into `{printable(name)}`",
        hint="end the name in .svg, .png, .html, .csv or .vl.json",
    )


def _converter() -> Any:
    try:
        return import_module("vl_convert")
    except ImportError:
        raise LLMSizeError(
            "drawing svg, png and html needs the extra `plot`",
            hint="pip install 'llmsize[plot]', or write .csv or .vl.json",
        ) from None


def _table(charts: Sequence[Chart]) -> str:
    written = StringIO()
    rows = csv.writer(written, lineterminator="\n")
    rows.writerow(("chart", "curve", "x", "y", "x unit", "y unit"))
    for chart in charts:
        ends = (chart.x.unit, chart.y.unit)
        for each in chart.series:
            rows.writerows((chart.title, each.name, x, y, *ends) for x, y in each.points)
        rows.writerows((chart.title, mark.name, mark.x, mark.y, *ends) for mark in chart.marks)
    return written.getvalue()
