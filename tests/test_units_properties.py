"""What is printed reads back, and what is refused is refused for good."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmsize.errors import LLMSizeError
from llmsize.units import (
    MAX_COUNT,
    format_bytes,
    format_count,
    format_duration,
    in_binary,
    parse_bytes,
    parse_count,
    parse_duration,
    parse_flop,
    write_bytes,
)


@given(st.integers(1, MAX_COUNT))
def test_whole_counts_read_back(count: int) -> None:
    """Every digit of a count survives, with and without separators."""
    assert parse_count(str(count)) == count
    assert parse_count(f"{count:_}") == count


@given(st.integers(10**6, 10**15))
def test_printed_counts_read_back_to_three_digits(count: int) -> None:
    """Three significant digits are within half a per cent."""
    assert parse_count(format_count(count).replace(",", "")) == pytest.approx(count, rel=0.006)


@given(st.integers(1, 10**6), st.sampled_from((1, 10**6, 10**9, 2**20, 2**30)))
def test_written_memory_is_the_same_to_the_byte(count: int, unit: int) -> None:
    """What is written into a command line loses nothing."""
    assert parse_bytes(write_bytes(count * unit)) == count * unit


@given(st.integers(1000, 10**15), st.booleans())
def test_printed_memory_reads_back(size: int, binary: bool) -> None:
    """Two decimals in the largest unit are within half a per cent, in GB and in GiB."""
    with in_binary(binary):
        shown = format_bytes(size).replace(",", "")
    assert parse_bytes(shown) == pytest.approx(size, rel=0.006)


@given(st.floats(60, 10**9))
def test_printed_durations_read_back(seconds: float) -> None:
    """One decimal in a unit that people use."""
    shown = format_duration(seconds).replace(",", "")
    assert parse_duration(shown) == pytest.approx(seconds, rel=0.06)


@given(st.text(max_size=40))
def test_no_text_crashes_a_parser(text: str) -> None:
    """A parser gives a number above zero or an `LLMSizeError` that can be printed."""
    for parse in (parse_count, parse_bytes, parse_flop, parse_duration):
        try:
            assert parse(text) > 0
        except LLMSizeError as refused:
            assert refused.message.isprintable()
            assert refused.hint


@pytest.mark.parametrize("text", ["16", "16g", "1e400GB", "-16GB", "16,000 MB", "16 G B", "infGB"])
def test_memory_without_a_clear_unit_is_refused(text: str) -> None:
    """A bare number could be GB, GiB or MB, so it is none of them."""
    with pytest.raises(LLMSizeError):
        parse_bytes(text)
