"""What PyTorch's allocator holds in a run: its segments, and the order of the step's tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import tried
from training_runs import run_of

from llmsize import presets
from llmsize.anatomy import trace
from llmsize.anatomy.course import Turn
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError
from llmsize.formats import Format
from llmsize.memory import replay
from llmsize.memory.methods import Choices
from llmsize.memory.objectives import OBJECTIVES
from llmsize.memory.peak import device_memory, least_memory
from llmsize.memory.reserved import Block, Expandable, OutOfMemory, Segments
from llmsize.memory.script import written
from llmsize.memory.timeline import level
from llmsize.memory.training import Offload, TrainingRun, critic, training_step
from llmsize.stack import Stack

MIB = 2**20


@pytest.mark.parametrize(("asked", "segment"), [(2, 20), (9.5, 20), (10, 10), (43, 44), (44, 44)])
def test_a_segment_is_as_large_as_the_source_says(asked: float, segment: int) -> None:
    """CUDACachingAllocator.cpp, get_allocation_size: 20 MiB below 10 MiB, then pairs of MiB."""
    pool = Segments()
    pool.take(int(asked * MIB))
    assert pool.reserved == segment * MIB


def test_free_blocks_of_two_segments_are_not_joined() -> None:
    """24 MiB are free, and 16 MiB need a segment of their own: fragmentation, as its notes say."""
    pool = Segments()
    blocks = [pool.take(12 * MIB) for _ in range(2)]
    for block in blocks:
        pool.give(block)
    pool.take(16 * MIB)
    assert pool.reserved == (12 + 12 + 16) * MIB


def test_an_expandable_segment_grows_by_what_is_missing() -> None:
    """The same with `expandable_segments:True`: what is free at its end is enough."""
    pool = Expandable()
    blocks = [pool.take(12 * MIB) for _ in range(2)]
    for block in blocks:
        pool.give(block)
    pool.take(16 * MIB)
    assert pool.reserved == 40 * MIB  # two pages of 20 MiB, of which 24 were taken before
    pool.take(30 * MIB)
    assert pool.reserved == 60 * MIB  # 24 MiB of the second page were free


def test_free_segments_go_back_before_a_run_fails() -> None:
    """`malloc`: what `alloc_block` has no room for it gets after `release_cached_blocks`."""
    pool = Segments(room=40 * MIB)
    for block in [pool.take(12 * MIB) for _ in range(2)]:
        pool.give(block)
    pool.take(30 * MIB)
    assert (pool.reserved, pool.most, pool.asked) == (30 * MIB, 30 * MIB, (12 + 12 + 30) * MIB)


def _with_a_gap(pool: Segments) -> None:
    """12 MiB used between 12 and 6 that are free, all of one segment of 30."""
    pool.give(pool.take(30 * MIB))
    first = pool.take(12 * MIB)
    pool.take(12 * MIB)
    pool.give(first)


def test_a_segment_with_one_used_block_does_not_go_back() -> None:
    """12 and 16 of 40 MiB are wanted, 18 of a segment's 30 are free, in two pieces: that fails."""
    pool = Segments(room=40 * MIB)
    _with_a_gap(pool)
    with pytest.raises(OutOfMemory) as failure:
        pool.take(16 * MIB)
    assert failure.value.reserved == (30 + 16) * MIB


def test_an_expandable_segment_has_room_where_others_have_gaps() -> None:
    """The same with two pages of 20 MiB: the last 16 are in one piece."""
    pool = Expandable(room=40 * MIB)
    _with_a_gap(pool)
    assert pool.take(16 * MIB) == (24 * MIB, 16 * MIB)
    assert pool.most == 40 * MIB


def test_pages_that_are_free_altogether_go_back() -> None:
    """`unmap_block`: of 50 free MiB the first two pages of 20 go, and 10 stay; 70 MiB in a row are
    found behind the used block only, where four pages are too many, but 40 in the pages' place.
    """
    pool = Expandable(room=80 * MIB)
    large, _ = pool.take(50 * MIB), pool.take(5 * MIB)
    pool.give(large)
    with pytest.raises(OutOfMemory) as failure:
        pool.take(70 * MIB)
    assert pool.reserved == 20 * MIB
    assert failure.value.reserved == (20 + 80) * MIB
    assert pool.take(40 * MIB) == (0, 40 * MIB)
    assert pool.reserved == 60 * MIB


def test_what_is_left_of_free_pages_stays_free() -> None:
    """`unmap_block`: of 50 free MiB from 5 on, pages are whole from 20 to 40; 15 stay before them
    and 15 behind, and a block of 20 begins with the first 15 and has one page mapped again.
    """
    pool = Expandable(room=80 * MIB)
    _, large, _ = (pool.take(size * MIB) for size in (5, 50, 5))
    pool.give(large)
    with pytest.raises(OutOfMemory):
        pool.take(55 * MIB)
    assert pool.sizes() == [15 * MIB, 15 * MIB]
    assert pool.take(20 * MIB) == (5 * MIB, 20 * MIB)
    assert pool.reserved == 60 * MIB
    assert pool.sizes() == [30 * MIB]  # of the page mapped again 15, and those behind it


def test_a_free_block_without_a_whole_page_is_not_cut() -> None:
    """25 free MiB from 5 on have no page of 20 of their own: nothing goes, and they are one."""
    pool = Expandable(room=40 * MIB)
    _, middle, _ = (pool.take(size * MIB) for size in (5, 25, 5))
    pool.give(middle)
    with pytest.raises(OutOfMemory):
        pool.take(30 * MIB)
    assert pool.sizes() == [5 * MIB, 25 * MIB]


def test_an_expandable_segment_keeps_remainders_of_a_block() -> None:
    """`should_split`: with `expandable_segments` 512 bytes are cut off; without, no whole MiB."""
    assert Expandable().take(20 * MIB - 512) == (0, 20 * MIB - 512)
    assert Segments().take(19 * MIB) == (0, 20 * MIB)


def test_the_block_that_may_grow_is_taken_last() -> None:
    """`get_free_block`: 3 MiB that pages may follow count as many more than 12 between blocks."""
    pool = Expandable()
    first, _ = pool.take(12 * MIB), pool.take(5 * MIB)
    pool.give(first)
    assert pool.take(2 * MIB) == (0, 2 * MIB)


class Tally(Segments):
    """Has every byte that is asked for, and no more; remembers the most that was there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0

    def place(self, size: int) -> Block:
        self.now += size
        self.most = max(self.most, self.now)
        return 0, size

    def give(self, block: Block) -> None:
        self.now -= block[1]


class Ledger(Tally):
    """Writes down which sizes are taken and given, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def place(self, size: int) -> Block:
        self.sizes.append(size)
        return super().place(size)

    def give(self, block: Block) -> None:
        self.sizes.append(-block[1])
        super().give(block)


def _one_by_one(kinds: Sequence[object]) -> tuple[Turn, ...]:
    return tuple(Turn(kind, range(n, n + 1), n, n) for n, kind in enumerate(kinds))


@pytest.fixture
def unfolded() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def _played(model: Architecture, run: TrainingRun) -> list[int]:
    ledger = Ledger()
    left = replay.passed(ledger, replay.pass_of(model, run))
    return [*ledger.sizes, sum(size for _, size in left)]


@pytest.mark.parametrize("model", ["gpt2", "smollm-135m", "gemma-2-2b", "qwen3-0.6b"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_folded_layers_are_replayed_as_if_each_were_traced(
    model: str, method: str, recompute: str, unfolded: pytest.MonkeyPatch
) -> None:
    """Every block that is taken and given, in order, is that of a trace of every single layer."""
    architecture = presets.get(Architecture, model)
    choices = Choices(method, batch=4, sequence=1024)
    run = run_of(replace(choices, recompute=recompute))
    folded = _played(architecture, run)
    unfolded.setattr(trace, "course", _one_by_one)
    unfolded.setattr(trace.Trace, "_is_settled", lambda *_, **__: False)
    training_step.cache_clear()
    assert folded == _played(architecture, run)
    training_step.cache_clear()


UNFOLDED_OTHERWISE = ("zamba", "zamba2")
"""Families in some of whose steps layers hand each other what replaying cannot tell apart."""

FAMILIES = {model.family: model for model in presets.every(Architecture).values()}


@tried(25)
@given(
    st.sampled_from(sorted(FAMILIES)), st.sampled_from(["full", "lora"]),
    st.sampled_from(["none", "full"]),
)  # fmt: skip
def test_every_family_is_replayed_to_its_peak(family: str, method: str, recompute: str) -> None:
    """The tensors that are alive at once are those of the step: large ones one by one, of which
    each is rounded up by less than a block, and small ones together; what is left, too.
    """
    choices = Choices(method, batch=2, sequence=512, recompute=recompute)
    run = run_of(choices)
    try:
        step = training_step(FAMILIES[family], run)
    except LLMSizeError:
        return  # a model that is not trained so
    tally, one = Tally(), replay.pass_of(FAMILIES[family], run)
    try:
        left = replay.passed(tally, one)
    except replay.Indistinct:
        assert family in UNFOLDED_OTHERWISE
        return
    peak = step.moment.bytes + step.within
    after, most_small = one.small(0)
    rounded = 0.001 * peak
    assert tally.most - rounded <= peak <= tally.most + most_small
    held = sum(size for _, size in left)
    assert held - rounded <= level(step.as_run) - after <= held


runs = st.builds(
    Choices,
    method=st.sampled_from(["full", "lora", "norms"]),
    batch=st.integers(1, 4),
    sequence=st.sampled_from([64, 512, 2048]),
    recompute=st.sampled_from(["none", "full"]),
    accumulation=st.sampled_from([1, 2]),
)
models = st.sampled_from(["gpt2", "smollm-135m", "qwen3-0.6b"])
optimizers = st.sampled_from(["adamw", "adamw-foreach", "adafactor", "adamw-8bit", "sgd"])
stacks = st.sampled_from(["transformers", "torchtune", "transformers-4-torch-1"])


@tried(20)
@given(models, runs, optimizers, stacks, st.floats(0.5, 2))
def test_a_run_fits_by_its_tensors_or_by_its_gaps(
    model: str, choices: Choices, optimizer: str, stack: str, share: float
) -> None:
    """Where there is room for all that would be cached, nothing is short; with less room than the
    tensors and the context take, nothing fits.
    """
    architecture, kept = presets.get(Architecture, model), presets.get(Stack, stack)
    run = run_of(choices, optimizer=optimizer, stack=stack)
    least = int(least_memory(architecture, run, kept).value)
    room = int(share * least)
    with_room = device_memory(architecture, run, kept).value
    here = device_memory(architecture, run, kept, room).value
    assert least <= here
    if with_room <= room:
        assert here == with_room
    if least > room:
        assert here == least


@tried(20)
@given(models, runs, optimizers)
def test_expandable_segments_hold_every_tensor(
    model: str, choices: Choices, optimizer: str
) -> None:
    """A segment that grows has room for all that is alive at once."""
    architecture = presets.get(Architecture, model)
    run = run_of(choices, optimizer=optimizer)
    grown = replay.reserved(architecture, run, expandable=True)
    assert grown is not None
    assert training_step(architecture, run).total <= grown + 2 * MIB


FROZEN = ("rollouts", "scoring", "reference")
"""Moments at which only other models are at work, which are not replayed."""


@tried(40)
@given(
    models, st.builds(
        Choices,
        method=st.sampled_from(["full", "lora", "qlora", "prefix-tuning", "galore", "norms"]),
        batch=st.integers(1, 4),
        sequence=st.sampled_from([64, 512]),
        recompute=st.sampled_from(["none", "full"]),
        accumulation=st.sampled_from([1, 2]),
        objective=st.sampled_from(sorted(OBJECTIVES)),
        offload=st.sampled_from(get_args(Offload)),
        replicas=st.sampled_from([1, 2]),
        bucket_views=st.booleans(),
        base=st.sampled_from([None, presets.get(Format, "nf4")]),
    ),
    st.sampled_from(["adamw", "adamw-foreach", "adamw-paged", "adafactor", "muon", "sgd"]),
    st.sampled_from(["pure-16bit", "mixed", "amp"]), stacks, st.booleans(),
)  # fmt: skip
def test_no_less_is_reserved_than_is_allocated(
    model: str, choices: Choices, optimizer: str, recipe: str, stack: str, expandable: bool
) -> None:
    """Whatever is trained how: tensors lie in segments, and segments on the device."""
    architecture, kept = presets.get(Architecture, model), presets.get(Stack, stack)
    try:
        run = run_of(choices, recipe, optimizer, stack)
        step = training_step(architecture, run)
    except LLMSizeError:
        return  # choices that do not go together
    held = replay.reserved(architecture, run, expandable=expandable)
    assert held is not None
    assert step.phase in FROZEN or step.total + step.within_kernels <= held
    kept = replace(kept, expandable_segments=expandable)
    whole = device_memory(architecture, run, kept)
    assert whole.value >= held + whole.part("device context").value


def test_a_value_model_reads_first_and_learns_last() -> None:
    """TRL v0.29, trl/experimental/ppo: its wrapper calls the critic before the policy, and backward
    goes the other way.
    """
    architecture = presets.get(Architecture, "smollm-135m")
    run = run_of(Choices("full", objective="ppo", sequence=512))
    both, critics, policys = Ledger(), Ledger(), Ledger()
    replay.passed(both, replay.pass_of(architecture, run))
    replay.passed(critics, replay.pass_of(architecture, critic(run)))
    replay.passed(policys, written(training_step(architecture, run).as_run))
    parts = training_step(architecture, critic(run)).as_run
    forward = Ledger()
    replay.passed(forward, written([part for part in parts if part.phase == "forward"]))
    read = len(forward.sizes)
    learnt = len(critics.sizes) - read
    assert both.sizes[:read] == critics.sizes[:read]
    assert both.sizes[read:-learnt] == policys.sizes
    assert both.sizes[-learnt:] == critics.sizes[read:]


def test_states_in_unified_memory_are_beside_the_segments() -> None:
    """bitsandbytes 0.43.1, `get_paged`: states of 100,000 numbers and more are given by
    `cudaMallocManaged`. Those are GPT-2's embeddings and the matrices of its 12 layers.
    """
    architecture = presets.get(Architecture, "gpt2")
    run = run_of(Choices("full", sequence=64), optimizer="adamw-paged")
    plain = run._replace(optimizer=replace(run.optimizer, pageable=False))
    numbers = (50_257 + 1_024) * 768 + 12 * (3 + 1 + 4 + 4) * 768 * 768
    paged, whole = replay.play_of(architecture, run), replay.play_of(architecture, plain)
    assert paged.beside - whole.beside == sum(whole.made) - sum(paged.made) == 8 * numbers
