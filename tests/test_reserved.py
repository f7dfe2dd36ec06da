"""What quantizing on the device leaves: a replay of PyTorch's caching allocator."""

import pytest

from llmsize.errors import LLMSizeError
from llmsize.memory.reserved import beyond_tensors, gaps_of_quantizing
from llmsize.units import GIB

MIB = 2**20


def test_segments_that_hold_nothing_go_back() -> None:
    """A matrix in a segment of its own leaves nothing once its result is in another one."""
    assert gaps_of_quantizing([(32 * MIB, 64 * MIB)], "+result:1") == 0


def test_a_result_in_the_segment_of_a_matrix_keeps_it() -> None:
    """The second result lies in the first matrix's segment: half of that is a gap."""
    matrices = [(32 * MIB, 64 * MIB)] * 2
    assert gaps_of_quantizing(matrices, "+result:1") == 32 * MIB


def test_small_blocks_are_left_out() -> None:
    """Blocks up to 1 MiB live in a pool of their own."""
    assert gaps_of_quantizing([(MIB // 4, MIB // 2)] * 3, "+a:2 +b:1 -a") == 0


@pytest.mark.parametrize(("mib", "beyond"), [(43, 1), (26.25, 0), (129.5, 0.5), (0.75, 0)])
def test_no_remainder_of_a_mebibyte_is_cut_off(mib: float, beyond: float) -> None:
    """Segments are whole pairs of MiB; what is left is free if more than 1 MiB (kSmallSize)."""
    assert beyond_tensors([(int(mib * MIB),)]) == beyond * MIB


@pytest.mark.parametrize(
    ("mib", "beyond"), [((9.5, 9.5), 1), ((9, 9), 0), ((10, 9.5), 0), ((9.5, 3, 7), 0.5)]
)
def test_blocks_below_ten_mebibytes_share_twenty(mib: tuple[float, ...], beyond: float) -> None:
    """kMinLargeAlloc and kLargeBuffer of CUDACachingAllocator.h: 9.5 of the 20 leave 10.5, which
    the next 9.5 has whole, as 1 is not cut off; 10 has a segment of its own."""
    assert beyond_tensors([[int(size * MIB) for size in mib]]) == beyond * MIB


@pytest.mark.parametrize("steps", ["+a:1 +b:1 -a -b", "+a:1 +b:1 -b -a", "+a:3 -a +b:2 -b"])
def test_what_frees_all_that_it_allocated_leaves_no_gap(steps: str) -> None:
    """Free neighbours are joined, and a segment in which nothing is left goes back."""
    assert gaps_of_quantizing([(4 * MIB, 8 * MIB)] * 2, steps) == 0


def test_int8_of_llama_2_7b_leaves_more_than_a_gibibyte() -> None:
    """torchao's README: 8.335 GiB reserved, 6.409 of them tensors (A100, `int8wo`)."""
    layer = [12288 * 4096, 4096 * 4096, *[11008 * 4096] * 3]
    elements = layer * 32 + [32000 * 4096]
    steps = "+1:2 +2:2 -1 +3:2 -2 +4:2 -3 +q:1 -4"
    gap = gaps_of_quantizing([(n, 2 * n) for n in elements], steps) / GIB
    assert 1.1 < gap < 8.335 - 6.409


@pytest.mark.parametrize("steps", ["-a", "+a:x", "+a"])
def test_steps_that_cannot_be_read_are_refused(steps: str) -> None:
    """A preset of the user's own may say anything."""
    with pytest.raises(LLMSizeError, match="step"):
        gaps_of_quantizing([(4 * MIB, 8 * MIB)], steps)
