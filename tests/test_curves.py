"""Charts: in the terminal, as Vega-Lite, and as numbers."""

from __future__ import annotations

import csv
import json
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from asking import refused

from llmsize.chart import Axis, Chart, Mark, Series, spaced
from llmsize.cli import run
from llmsize.errors import LLMSizeError
from llmsize.render.chart import draw
from llmsize.render.picture import picture, specification

SLOPES = Chart(
    "Two slopes",
    Axis("parameters", "parameters"),
    Axis("loss", "nats/token"),
    (
        Series("down", ((1e6, 4.0), (1e7, 2.83), (1e8, 2.0), (1e9, 1.41))),
        Series("flat", ((1e6, 2.0), (1e7, 2.0), (1e8, 2.0), (1e9, 2.0))),
    ),
    (Mark("<model\x1b[31m>", 1e9, 4.0),),
    (1e6, 3e7),
)


def test_a_chart_reads_without_colour() -> None:
    """A letter on each curve, a number on each mark, and the fitted range doubled on the axis."""
    expected = """\
Two slopes
      4 ┤a⠢⣀                          1
        │   ⠑⠢⣀
      3 ┤      ⠉⠢⢄
        │         ⠉a⢄
    2.5 ┤            ⠉⠢⢄
        │               ⠑⠢⣀
      2 ┤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤b⠤⠤⠤⠤⠤⠤⠤⠵a⣤⠤⠤⠤⠤⠤⠤⠤⠤b
        │                     ⠑⠢⣀
        │                        ⠑⠢⢄
    1.5 ┤                           ⠉⠢⢄
        └═══════════════───────────────
        1M        10M     100M       1B
              parameters
loss (nats/token): a down   b flat
1 <model\\x1b[31m>
═ fitted range of down
"""
    assert draw(SLOPES, 40, 10) == expected


def test_a_chart_stays_within_eighty_columns() -> None:
    """Without a terminal's width it is 80 columns; a wider one is used."""
    for width, most in ((None, 80), (120, 120), (10, 40)):
        assert max(map(len, draw(SLOPES, width).splitlines())) <= most


def test_points_are_spaced_by_a_constant_factor() -> None:
    """The ends are exact; an impossible range is an error."""
    points = spaced(1e6, 1e9, 4)
    assert points == pytest.approx([1e6, 1e7, 1e8, 1e9])
    assert (points[0], points[-1]) == (1e6, 1e9)
    for low, high in ((0, 1), (2, 1), (1, float("inf")), (-1, 1)):
        with pytest.raises(LLMSizeError):
            spaced(low, high)


def test_vega_lite_holds_every_curve_mark_and_range() -> None:
    """One panel for a chart, panels side by side for several, and no address but its schema."""
    (shade, lines, dots, words) = specification([SLOPES])["layer"]
    assert shade["data"]["values"] == [{"low": 1e6, "high": 3e7}]
    assert {point["curve"] for point in lines["data"]["values"]} == {"down", "flat"}
    assert lines["encoding"]["x"]["scale"]["type"] == "log"
    assert dots["data"] == words["data"]
    text = json.dumps(specification([SLOPES, SLOPES]))
    assert text.count("http") == 1
    assert len(json.loads(text)["hconcat"]) == 2


def test_numbers_are_written_as_csv() -> None:
    """Every point of every curve, and the marks."""
    rows = list(csv.reader(StringIO(picture([SLOPES], "a.CSV").decode())))
    assert len(rows) == 1 + 8 + 1
    assert rows[1] == ["Two slopes", "down", "1000000.0", "4.0", "parameters", "nats/token"]


@pytest.mark.parametrize(("ending", "start"), [("svg", b"<svg"), ("png", b"\x89PNG")])
def test_pictures_are_drawn_with_the_extra(ending: str, start: bytes) -> None:
    """vl-convert turns the specification into the file; without it there is a hint."""
    pytest.importorskip("vl_convert")
    assert picture([SLOPES], f"a.{ending}").startswith(start)


def test_html_needs_no_network() -> None:
    """The page has the library in it and loads nothing."""
    pytest.importorskip("vl_convert")
    page = picture([SLOPES], "a.html")
    assert b"<script src=" not in page and len(page) > 10**5


@pytest.mark.parametrize(
    "words",
    [
        "kaplan",
        "loss-vs-params gpt2 llama-2-7b --law chinchilla --law kaplan",
        "loss-vs-data --from 1B --to 10T",
        "loss-vs-compute --law gpt3 --to 1e24",
        "isoflop --compute 1e21 --compute 100PF-days",
        "isoloss --compute 1e21",
        "memory-vs-context llama-2-7b --to 1M",
        "memory-vs-batch llama-2-7b --context 2K",
    ],
)
def test_every_picture_fits_a_terminal_and_has_numbers(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is at most 80 columns wide, and `--format json` holds the points that it draws."""
    assert run(["curve", *words.split(), "--format", "plain"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert run(["curve", *words.split(), "--format", "json"]) == 0
    tables = json.loads(capsys.readouterr().out)["answer"]
    assert len(tables) == (3 if words == "kaplan" else 1)
    assert all(len(table["rows"]) > 10 for table in tables)


def test_the_cache_grows_by_its_bytes_per_token(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 2 7B caches 2 × 32 × 4096 × 2 = 524,288 bytes per token in 16 bits."""
    assert run(["curve", "memory-vs-context", "llama-2-7b", "--format", "json"]) == 0
    (table,) = json.loads(capsys.readouterr().out)["answer"]
    points = {int(row["name"]): row["cells"]["llama-2-7b"]["value"] for row in table["rows"]}
    (first, at_first), *_, (last, at_last) = points.items()
    assert (at_last - at_first) / (last - first) == 524_288


def test_a_picture_is_written_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file's name is all that is printed."""
    path = tmp_path / "loss.vl.json"
    assert run(["curve", "kaplan", "-o", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert len(json.loads(path.read_text())["hconcat"]) == 3


def test_bytes_along_a_step_are_drawn_from_nothing(tmp_path: Path) -> None:
    """Heights compare as the bytes do, and a phase begins where the one before it ended."""
    path = tmp_path / "step.vl.json"
    assert run(["train", "smollm-135m", "--timeline", "-o", str(path)]) == 0
    (curves, *_) = json.loads(path.read_text())["layer"]
    assert curves["encoding"]["y"]["scale"]["domain"][0] == 0
    points = [(point["curve"], point["x"], point["y"]) for point in curves["data"]["values"]]
    ended = next(at for at, after in pairwise(points)
                 if (at[0], after[0]) == ("forward", "backward"))  # fmt: skip
    assert ("backward", *ended[1:]) in points


@pytest.mark.parametrize(
    "words",
    [
        "",
        "loss-vs-nothing",
        "loss-vs-data gpt2",
        "loss-vs-params --law gpt3",
        "loss-vs-params --law no-such-law",
        "loss-vs-params --from 1T --to 1B",
        "loss-vs-params --from 0",
        "isoflop --law gpt3",
        "isoloss --law twenty",
        "isoflop --compute abc",
        "memory-vs-context",
        "memory-vs-context no-such-model",
        "kaplan -o picture.gif",
        "kaplan -o /no/such/folder/a.csv",
    ],
)
def test_a_mistake_is_one_error_and_one_hint(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be drawn exits with 2, says why, and writes nothing to stdout."""
    refused(capsys, "curve", *words.split())


def test_words_of_a_chart_stay_within_a_narrow_terminal() -> None:
    """Its longest line is as wide as the terminal at most, title and legend among them."""
    axis = Axis("parameters", "parameters")
    title = "Equal loss, by a law with a name that is too long"
    chart = Chart(title, axis, axis, (Series("a curve with a name of its own", ((1, 1), (9, 2))),))
    assert max(map(len, draw(chart, 40).splitlines())) <= 40
