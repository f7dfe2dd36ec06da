"""Counts, memory, compute and time as people write them."""

import pytest

from llmsize.errors import LLMSizeError
from llmsize.units import format_bytes, format_count, in_binary, parse_bytes, parse_count


@pytest.mark.parametrize(
    ("text", "count"),
    [("7B", 7 * 10**9), ("1.3b", 13 * 10**8), ("124M", 124 * 10**6), ("15T", 15 * 10**12),
     ("6_738_415_616", 6738415616), ("1e9", 10**9)],
)  # fmt: skip
def test_counts_read_as_people_write_them(text: str, count: int) -> None:
    """A suffix is a power of ten and nothing is rounded."""
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["0", "-1", "abc", "7X", "1e400", "", "nan", "7 B B"])
def test_bad_counts_are_refused(text: str) -> None:
    """Zero, negative, unknown and absurd counts are errors, not guesses."""
    with pytest.raises(LLMSizeError):
        parse_count(text)


def test_gb_is_decimal_and_gib_is_binary() -> None:
    """GB is 10⁹ and GiB is 2³⁰, and a bare number is refused."""
    assert parse_bytes("16GB") == 16 * 10**9
    assert parse_bytes("16GiB") == 16 * 2**30
    with pytest.raises(LLMSizeError):
        parse_bytes("16")


def test_bytes_beyond_every_machine_are_a_power_of_ten() -> None:
    """Digits that nobody reads, and that a float does not have, are left out."""
    assert format_bytes(1.5e15) == "1.50 PB"
    with in_binary(True):
        assert format_bytes(2 * 2**60) == "2.00 EiB"
    assert format_bytes(1.12e43) == "1.12e+25 EB"


def test_what_nobody_counts_has_an_exponent() -> None:
    """A law turned round far outside its range gives numbers that no suffix makes readable."""
    assert format_count(2.32e132) == "2.32e+132"
    assert format_count(10**18) == "1,000,000T"
