"""An estimate as text, in every format."""

import json
import textwrap

import pytest
from test_estimate import example

from llmsize.answer import Estimate, Row, Table
from llmsize.render import OUTPUT_FORMATS, Style, render
from llmsize.term import Term, fact, term

HOSTILE = "evil\x1b[31m[bold]name[/bold]\u202e"


def test_plain_text_shows_the_answer_first() -> None:
    """Headline, table, reasons, legend, assumptions, in this order."""
    assert render(example(), "plain") == textwrap.dedent("""\
        14 GB

        memory
                      inference  training
        weights      14.00 GB    14.00 GB
        KV cache      1.00 GB ?         –
        verdict   fits [bold]       tight
        – KV cache, training: training keeps no cache

        both  15.00 GB ?

        ? assumed

        assumed: batch 1
        """)


@pytest.mark.parametrize("format", OUTPUT_FORMATS)
def test_names_from_outside_are_shown_and_not_obeyed(format: str) -> None:
    """Neither escape sequences nor rich's own markup reach the terminal."""
    hostile = fact(HOSTILE, 1, unit="bytes", source=HOSTILE)
    estimate = Estimate("estimate", {}, HOSTILE, (hostile,), (HOSTILE,), (HOSTILE,))
    text = render(estimate, format, Style(explain=True, width=80))  # type: ignore[arg-type]
    if format == "json":
        assert json.loads(text)["headline"] == HOSTILE
        assert "\x1b" not in text
    else:
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "bold" in text


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_terminal_keeps_its_width(width: int) -> None:
    """No line is wider than the terminal, in the table and in the explanation."""
    text = render(example(), "table", Style(explain=True, width=width))
    assert max(map(len, text.splitlines())) <= width


def test_headings_and_words_go_below_before_a_number_is_broken() -> None:
    """In 40 columns the heading has three lines, the name goes on behind a hyphen, numbers stay."""
    rows = (
        Row("a-model-of-some-size", {"needs": bytes_of(15), "reading speed": speed(1234.5)}),
        Row("another", {"needs": bytes_of(7), "reading speed": speed(98_765.4)}),
    )
    table = Table("", ("needs", "reading speed"), rows, heading="model")
    text = render(Estimate("fits", {}, "two models", (table,)), "table", Style(width=40))
    assert text == textwrap.dedent("""\
        two models

         model                   needs   reading
                                          speed,
                                        tokens/s
        ────────────────────────────────────────
         a-model-of-some-     15.00 GB   1,234.5
         size
         another               7.00 GB    98,765
        """)


@pytest.mark.parametrize("width", [1, 10, 20, 30, 40, 50])
def test_more_numbers_than_a_terminal_is_wide_for_are_broken(width: int) -> None:
    """Six columns of numbers in any width: nothing fails, and from 20 on no line is too long."""
    columns = tuple("abcdef")
    row = Row("a-name", {name: bytes_of(15) for name in columns})
    estimate = Estimate("fits", {}, "many", (Table("", columns, (row,), heading="model"),))
    longest = max(map(len, render(estimate, "table", Style(width=width)).splitlines()))
    assert longest <= max(width, 20)


def test_long_words_at_the_end_go_below_their_rows_where_there_is_no_room() -> None:
    """The columns that stay are whole; the others are named, and an empty one is left out."""
    command = "llmsize fits some-model --job inference --dtype q4_k_m"
    rows = (
        Row("first", {"memory": bytes_of(21), "on its own": command}),
        Row("second", {"memory": bytes_of(7), "on its own": ""}),
    )
    asked = Estimate("fits", {}, "", (Table("", ("memory", "on its own"), rows),))
    wide = render(asked, "table", Style(width=120)).splitlines()
    assert any("first" in line and command in line for line in wide)
    lines = render(asked, "table", Style(width=70)).splitlines()
    first = next(number for number, line in enumerate(lines) if "first" in line)
    assert lines[first].split() == ["first", "21.00", "GB"]
    assert lines[first + 1].strip() == f"on its own: {command}"
    assert lines[first + 2].split() == ["second", "7.00", "GB"]


def test_what_a_row_says_first_stays_beside_its_name() -> None:
    """A table of names and long words is a table in a narrow terminal, too."""
    rows = (Row("vendor", {"value": "NVIDIA"}), Row("note", {"value": "long words " * 12}))
    facts = Estimate("show", {}, "", (Table("", ("value",), rows, heading="field"),))
    lines = render(facts, "table", Style(width=60)).splitlines()
    assert any(line.split() == ["vendor", "NVIDIA"] for line in lines)
    assert any(line.split()[:2] == ["note", "long"] for line in lines)


def bytes_of(gigabytes: int) -> Term:
    return fact("needs", gigabytes * 10**9, unit="bytes", source="x")


def speed(value: float) -> Term:
    return fact("speed", value, unit="tokens/s", source="x")


def test_units_stand_in_the_heading_where_all_numbers_have_one() -> None:
    """FLOP stay readable beside PF-days: 8.64e19 FLOP are one petaFLOP/s for a day."""
    cells = [fact("compute", days * 8.64e19, unit="FLOP", source="x") for days in (1, 20)]
    rows = tuple(Row(str(n), {"compute": cell}) for n, cell in enumerate(cells))
    table = Table("", ("compute",), rows, heading="run")
    assert render(Estimate("optimal", {}, "two runs", (table,)), "markdown").splitlines()[2:6] == [
        "| run | compute, FLOP (PF-days) |",
        "| :--- | ---: |",
        "| 0 | 8.64e+19 (1.00) |",
        "| 1 | 1.73e+21 (20.0) |",
    ]


def test_nothing_is_cut_where_there_is_no_terminal() -> None:
    """A pipe gets every character of a long name."""
    name = "a-model-name-that-is-very-long-" * 8
    estimate = Estimate("estimate", {}, name, (fact(name, 1, unit="bytes", source="x"),))
    for format in OUTPUT_FORMATS:
        assert name.strip() in render(estimate, format)


def test_color_only_when_asked() -> None:
    """Escape sequences appear with `color` and never without."""
    assert "\x1b[" in render(example(), "table", Style(width=80, color=True))
    assert "\x1b[" not in render(example(), "table", Style(width=80))


def test_explain_shows_formula_values_source_and_grade() -> None:
    """The text that ran, the same with its values, and where it comes from."""
    cache = term(
        "KV cache", "2 * layers * width", unit="bytes", layers=32, width=4096, source="arXiv:1"
    )
    text = render(Estimate("x", {}, "h", (cache,)), "plain", Style(explain=True))
    assert text.endswith(
        textwrap.dedent("""\
        KV cache: 262.14 KB (262,144) · exact
          = 2 × layers × width
          = 2 × 32 × 4,096
          source: arXiv:1
        """)
    )


def test_csv_cannot_start_a_formula() -> None:
    """A spreadsheet opens a name such as `=cmd` as text."""
    estimate = Estimate("x", {}, "h", (fact("=cmd|'calc'", 5, unit="bytes", source="s"),))
    assert "'=cmd" in render(estimate, "csv")
