"""How tensors lie in memory, against PyTorch."""

import pytest

from llmsize.anatomy.layout import looks_channels_last

COPIED = {
    ((1, 1, 32, 128), (262144, 1, 8192, 64)): True,
    ((1, 5, 32, 128), (262144, 1, 8192, 64)): True,
    ((2, 3, 4, 5), (60, 1, 15, 3)): True,
    ((2, 3, 4, 5), (60, 20, 5, 1)): False,
    ((1, 5, 32, 128), (262144, 128, 8192, 1)): False,
    ((4, 1, 1, 1), (1, 1, 1, 1)): False,
    ((2, 1, 4, 5), (20, 0, 5, 1)): False,
    ((1, 8, 1, 6), (48, 6, 6, 1)): False,
}
"""Whether torch 2.13 copies an fp32 tensor of that shape and those strides that is asked for fp32
in `torch.contiguous_format`: it does what looks like an image with its channels last."""


@pytest.mark.parametrize(("shape", "strides"), COPIED)
def test_what_looks_like_an_image_is_told_by_its_strides(
    shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    """A view in rows is not copied, whatever its order, unless its second dimension is closest."""
    assert looks_channels_last(shape, strides) is COPIED[shape, strides]


def test_only_four_dimensions_look_like_an_image() -> None:
    """A sequence of vectors has no channels, and what lies row by row is in order already."""
    assert not looks_channels_last((2, 3, 4), (12, 1, 3))
    assert not looks_channels_last((2, 3, 4, 5), None)
