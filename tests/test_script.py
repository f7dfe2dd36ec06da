"""What happens to large and to small tensors of a pass, by stretches that are made by hand."""

import pytest

from llmsize.anatomy.tensor import HIDDEN_STATES, OUTSIDE, Event, Label
from llmsize.formats import BF16
from llmsize.memory.replay import Indistinct, passed
from llmsize.memory.reserved import Segments
from llmsize.memory.script import written
from llmsize.memory.timeline import Passage, Stretch, outside, passages

KIB, MIB = 2**10, 2**20


def _label(kib: int, operation: str = "made", layer: int = OUTSIDE) -> Label:
    """One storage's own, of a tensor of so many KiB."""
    return "temporary", operation, layer, (kib * KIB // 2,), BF16


def _born(label: Label) -> Event:
    return 2 * label[3][0], label


def _gone(label: Label, tensors: int = 1) -> Event:
    return -2 * label[3][0] * tensors, label


def _layers(times: int, *happening: Passage, phase: str = "forward") -> Stretch:
    """Layers in a row in which that happens; sums that are not read are left out."""
    return Stretch(phase, 0, times, happening, 0, 0, 0, times)


def _within(layer: int, *events: Event) -> Passage:
    return passages(events, layer)[0]


def test_small_tensors_are_summed_over_the_layers() -> None:
    """300 KiB stay and 200 come and go; then three layers keep 100 each, in two passages of which
    the second has 50 more for a while: 300 + 2 × 100 + 150 at most, and 600 at the end.
    """
    first, second = _label(300), _label(200)
    kept, short = _label(100, layer=0), _label(50, layer=1)
    before = outside("forward", [_born(first), _born(second), _gone(second)])
    layers = _layers(3, _within(0, _born(kept)), _within(1, _born(short), _gone(short)))
    one = written([before, layers])
    assert [*one.scripts[0].moves, *one.scripts[1].moves] == []
    assert one.small(0) == (600 * KIB, 650 * KIB)
    assert one.small(70 * KIB) == (670 * KIB, 720 * KIB)


def test_small_tensors_of_many_layers_may_be_released_at_once() -> None:
    """Eleven times 252 KiB are more than a MiB together, and none of them is in a large segment."""
    made = _label(252, layer=1)
    layers = _layers(11, _within(1, _born(made)))
    one = written([layers, outside("backward", [_gone(made, 11)])])
    assert one.small(0) == (0, 11 * 252 * KIB)
    assert one.scripts[-1].moves == []


def test_large_tensors_of_many_layers_may_be_released_at_once() -> None:
    """All eleven of 3 MiB go: as much is free as was ever reserved, six in each of two segments."""
    made = _label(3 * KIB, layer=1)
    layers = _layers(11, _within(1, _born(made)))
    one = written([layers, outside("backward", [_gone(made, 11)])])
    pool = Segments()
    assert passed(pool, one) == []
    assert pool.sizes() == [20 * MIB, 20 * MIB]
    assert one.small(0) == (0, 0)


def test_what_is_released_without_having_been_made_is_not_told_apart() -> None:
    """A layer that releases what another operation made leaves the replay without an answer."""
    made, other = _label(3 * KIB, layer=0), _label(3 * KIB, "sum", layer=0)
    layers = _layers(2, _within(1, _born(made)), phase="backward")
    with pytest.raises(Indistinct):
        passed(Segments(), written([layers, outside("backward", [_gone(other)])]))


def test_what_lives_on_for_another_reason_stays_where_it_is() -> None:
    """A temporary of 3 MiB that becomes kept is one block from its birth to its end."""
    role, operation, layer, shape, format = made = _label(3 * KIB, layer=0)
    kept: Label = "kept", operation, layer, shape, format
    happening = _within(0, _born(made), _gone(made), _born(kept))
    one = written([_layers(1, happening)])
    assert role == "temporary"
    assert [size for size, _, _ in one.scripts[0].moves] == [3 * MIB]


@pytest.mark.parametrize(
    ("after", "moves"), [(HIDDEN_STATES, [3 * MIB]), ("another", [3 * MIB, -1, 3 * MIB])]
)
def test_only_what_is_handed_on_gets_another_operation(after: str, moves: list[int]) -> None:
    """What layers hand each other is the tensor that was released; of another operation's, which
    happens to be as large, the block comes after that one went.
    """
    made, handed = _label(3 * KIB, layer=0), _label(3 * KIB, after, layer=0)
    one = written([_layers(1, _within(0, _born(made), _gone(made), _born(handed)))])
    assert [size for size, _, _ in one.scripts[0].moves] == moves
