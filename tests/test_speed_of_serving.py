"""Bounds of speed by hand: bytes over bandwidth, FLOP over the rate of the card, and the bus.

Counts are those of the published models; bandwidth and rates those of the data sheet of the A100
SXM with 80 GB: 2,039 GB/s and 312 TFLOP/s in bf16.
"""

import pytest
from test_serving import served

from llmsize import presets
from llmsize.hardware import BUS, Accelerator
from llmsize.memory.serving import Serving
from llmsize.planning.serving import (
    Budget,
    bits_per_weight,
    bus_bytes,
    changes,
    first_token,
    fits,
    largest_that_fits,
    least_on_host,
    tokens_per_second,
)
from llmsize.quick_dataclasses import replace
from llmsize.units import GIB

A100 = presets.get(Accelerator, "a100-sxm-80gb")
BANDWIDTH, PEAK = 2039e9, 312e12

PARAMETERS, TABLE = 8_030_261_248, 128_256 * 4096
"""Llama 3.1 8B, whose embedding and head are two such tables."""
LAYER = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336 + 2 * 4096
READ = 2 * (PARAMETERS - TABLE)
"""Bytes in bf16 of all but the embedding, of which rows are looked up."""
CACHED = 2 * 32 * 8 * 128 * 2
"""Bytes of a token's keys and values."""
NORMS = (2 * 32 + 1) * 4096


def flop(context: int) -> int:
    """Two for each number that a token is multiplied with: of matrices, keys and values."""
    return 2 * (PARAMETERS - TABLE - NORMS) + 2 * 2 * 32 * 4096 * context


def llama(engine: str = "transformers", **knobs: int) -> Serving:
    return served("llama-3.1-8b", engine, **knobs)


def speed(question: Serving) -> float:
    return float(tokens_per_second(question, A100).value)


def test_one_sequence_reads_weights_and_cache_for_every_token() -> None:
    """The arithmetic takes a hundredth of that."""
    assert speed(llama(context=1024)) == pytest.approx(BANDWIDTH / (READ + 1024 * CACHED))


def test_many_short_sequences_are_bound_by_arithmetic() -> None:
    """512 of 64 tokens: the FLOP of each at the full rate of the card."""
    assert speed(llama(context=64, batch=512)) == pytest.approx(PEAK / flop(64))


def test_devices_that_divide_matrices_read_at_once() -> None:
    """Each of two has half of the weights and half of the heads' cache."""
    one, two = (speed(llama("vllm", context=1024, devices=n)) for n in (1, 2))
    assert two == pytest.approx(2 * one) == pytest.approx(2 * BANDWIDTH / (READ + 1024 * CACHED))


def test_beams_are_computed_side_by_side_and_give_one_sequence() -> None:
    """Four beams read the weights once and four caches; one of them is kept."""
    beams = served("llama-3.1-8b", context=1024, rows=4, reordered=True)
    free = served("llama-3.1-8b", context=1024, rows=4)
    assert speed(free) == pytest.approx(4 * BANDWIDTH / (READ + 4 * 1024 * CACHED))
    assert speed(beams) == pytest.approx(speed(free) / 4)


MIXTRAL_EXPERTS = 32 * 8 * 3 * 4096 * 14336
"""Parameters of 32 layers of 8 experts, which have 3 matrices each."""


def mixtral_read(share: float) -> float:
    """Bytes in bf16 of that share of the experts and of all else but the embedding."""
    others = 46_702_792_704 - 32_000 * 4096 - MIXTRAL_EXPERTS
    return 2 * (others + share * MIXTRAL_EXPERTS)


@pytest.mark.parametrize(("batch", "share"), [(1, 1 / 4), (2, 7 / 16)])
def test_of_experts_those_are_read_that_are_chosen(batch: int, share: float) -> None:
    """A token goes to two of eight experts: a second one meets the others with three quarters."""
    question = served("mixtral-8x7b", context=64, batch=batch)
    cached = batch * 64 * CACHED
    assert speed(question) == pytest.approx(batch * BANDWIDTH / (mixtral_read(share) + cached))


@pytest.mark.parametrize(
    ("batch", "shared", "share"), [(1, 0, 7 / 16), (2, 0, 175 / 256), (2, 1, 37 / 64)]
)
def test_of_experts_a_prompt_reads_those_of_all_its_tokens(
    batch: int, shared: int, share: float
) -> None:
    """Two tokens, two prompts of two, and two whose first token is the same: three."""
    question = served("mixtral-8x7b", "vllm", context=64, batch=batch, prompt=2, shared=shared)
    assert first_token(question, A100).value == pytest.approx(mixtral_read(share) / BANDWIDTH)


def test_a_tied_embedding_is_read_as_the_head() -> None:
    """All of SmolLM's 134,515,008 parameters; 30 layers cache 3 heads of 64 channels."""
    read = 2 * 134_515_008 + 2 * 30 * 3 * 64 * 2 * 128
    assert speed(served("smollm-135m", context=128)) == pytest.approx(BANDWIDTH / read)


def test_a_prompt_takes_its_arithmetic() -> None:
    """Each token attends to half of the prompt on average; the last one alone has logits."""
    head = 2 * TABLE
    least = (1024 * (flop(512) - head) + head) / PEAK
    assert first_token(llama(context=1024), A100).value == pytest.approx(least)
    measured = first_token(llama(context=1024), A100, measured=True)
    assert measured.value == pytest.approx(least * 312 / 271.2)  # TFLOP/s, as the preset says


@pytest.mark.parametrize(("engine", "faster"), [("vllm", 2), ("transformers", 1)])
def test_devices_that_divide_matrices_compute_at_once(engine: str, faster: int) -> None:
    """Two devices that each have half of the layers work one after the other."""
    one, two = (first_token(llama(engine, context=1024, devices=n), A100).value for n in (1, 2))
    assert one == pytest.approx(faster * two)


def test_what_prompts_begin_with_is_computed_once() -> None:
    """Of four prompts the first 512 of 1,024 tokens are the same."""
    head = 2 * TABLE
    least = ((512 + 4 * 512) * (flop(512) - head) + 4 * head) / PEAK
    question = llama("vllm", context=1024, batch=4, shared=512)
    assert first_token(question, A100).value == pytest.approx(least)


def test_a_prompt_of_one_token_takes_as_long_as_the_weights_do() -> None:
    """No pass is faster than reading what it multiplies with."""
    assert first_token(llama(context=100, prompt=1), A100).value == pytest.approx(READ / BANDWIDTH)


def test_layers_of_the_host_come_over_the_bus_with_transformers() -> None:
    """What comes after the layers that are kept, for every token; the device computes it all.

    Accelerate fills devices in the order of modules (utils/modeling.py, `infer_auto_device_map`):
    sixteen layers, the final norm and the head are left over.
    """
    question = llama(context=1024, gpu_layers=16)
    crossing = 2 * (16 * LAYER + 4096 + TABLE)
    assert bus_bytes(question).value == crossing
    seconds = (READ + 1024 * CACHED) / BANDWIDTH + crossing / BUS.value
    assert speed(question) == pytest.approx(1 / seconds)


def test_a_hidden_state_goes_to_layers_of_the_host_with_llama_cpp() -> None:
    """4,096 channels in fp32 for each of three sequences; without such layers nothing does."""
    assert bus_bytes(llama("llama.cpp", batch=3, gpu_layers=16)).value == 3 * 4096 * 4
    assert bus_bytes(llama("llama.cpp", batch=3)).value == 0
    assert bus_bytes(llama()).value == 0


def test_kernels_of_vllm_read_what_the_host_has() -> None:
    """Whole matrices of at least 1 GiB, once for every pass."""
    kept = bus_bytes(llama("vllm", host_bytes=GIB)).value
    assert GIB <= kept < GIB + 2 * 4096 * 2 * 14336


def test_of_experts_on_the_host_those_are_read_that_are_chosen() -> None:
    """Mixtral: two of eight for one token, at most four for two, all for four and for more."""
    once, twice, all_, more = (
        bus_bytes(served("mixtral-8x7b", "vllm", host_bytes=90 * GIB, batch=n)).value
        for n in (1, 2, 4, 8)
    )
    experts = 2 * 32 * 8 * 3 * 4096 * 14336
    assert twice - once == experts / 4
    assert all_ - twice == experts / 2
    assert more == all_


@pytest.mark.parametrize(
    ("recipe", "lost"),
    [
        ("q8_0", "hardly any quality"),
        ("q4_k_m", "a little quality"),
        ("q3_k_m", "some quality"),
        ("q2_k", "much quality"),
    ],
)
def test_fewer_bits_cost_quality(recipe: str, lost: str) -> None:
    """LLaMA 7B's perplexity rises by 0.0004, 0.05, 0.24 and 0.87 (llama.cpp, pull request 1684)."""
    asked = llama("llama.cpp")
    smaller = served("llama-2-7b", "llama.cpp", recipe)
    found = changes(asked, Budget(GIB), smaller_cache=None, requantized=[(recipe, smaller)])
    stored = next(change for change in found if change.name == f"store the weights in {recipe}")
    assert stored.costs == lost


def test_half_a_context_is_one_of_the_changes() -> None:
    """It is applied to what is asked, and named by its tokens."""
    asked = llama(context=1000, batch=3)
    found = {
        change.name: change
        for change in changes(asked, Budget(GIB), smaller_cache=None, requantized=[])
    }
    assert found["halve the context to 500 tokens"].apply(asked).context == 500
    assert found["serve one sequence at a time"].apply(asked).batch == 1
    several = llama("vllm")
    names = [c.name for c in changes(several, Budget(GIB), smaller_cache=None, requantized=[])]
    assert "use 2 devices" in names


def test_as_many_layers_are_kept_as_there_is_room_for() -> None:
    """A file of 4.9 GB fits 10 GiB whole, 32 layers and the output; 3 GiB take no layer more."""
    asked = served("llama-3.1-8b", "llama.cpp", "q4_k_m", context=512)
    whole, part = (largest_that_fits(asked, "gpu-layers", Budget(n * GIB)) for n in (10, 3))
    assert whole is not None
    assert whole.gpu_layers == 33
    assert part is not None
    assert part.gpu_layers
    assert fits(part, Budget(3 * GIB))
    assert not fits(replace(part, gpu_layers=part.gpu_layers + 1), Budget(3 * GIB))


def test_the_fewest_layers_of_experts_go_to_the_host() -> None:
    """Mixtral's 93 GB in bf16 on a card of 80: one layer fewer would not do, a dense model has none
    to leave there."""
    budget = Budget(80 * GIB)

    def left(question: Serving) -> list[Serving]:
        found = changes(question, budget, smaller_cache=None, requantized=[])
        return [change.apply(question) for change in found if "--cpu-moe" in change.name]

    asked = served("mixtral-8x7b", "vllm", context=512)
    (spared,) = left(asked)
    assert fits(spared, budget)
    assert not fits(replace(asked, host_experts=spared.host_experts - 1), budget)
    assert left(llama("vllm", context=512, batch=4096)) == []


def test_bits_of_plain_weights_are_sixteen() -> None:
    """And those of a Q4_0 file 4.5, but for norms in fp32 and a head in Q6_K (18 bytes for 32)."""
    assert bits_per_weight(llama()) == 16
    assert 4.5 < bits_per_weight(served("llama-3.1-8b", "llama.cpp", "q4_0")) < 4.7


@pytest.mark.parametrize("what", ["context", "batch"])
def test_the_largest_that_fits_is_the_last_that_does(what: str) -> None:
    """One token or sequence more does not fit any more."""
    budget = Budget(24 * GIB)
    found = largest_that_fits(llama(context=256), what, budget)
    assert found is not None
    value = getattr(found, what)
    assert fits(llama(**{"context": 256, what: value}), budget)
    assert not fits(llama(**{"context": 256, what: value + 1}), budget)


def test_a_prompt_is_no_longer_than_the_context_that_is_tried() -> None:
    """Of 100,000 tokens less than a quarter fit beside 16 GB of weights, prompt included."""
    asked = llama(context=100_000, prompt=100_000)
    found = largest_that_fits(asked, "context", Budget(18 * GIB))
    assert found is not None
    assert found.context == found.prompt < 25_000


def test_no_context_fits_where_the_weights_do_not() -> None:
    """16 GB of weights are more than 8 GiB."""
    assert largest_that_fits(llama(), "context", Budget(8 * GIB)) is None


def test_a_pool_fits_where_all_sequences_have_their_cache() -> None:
    """Of 24 GiB vLLM takes nine tenths: about 5 GiB are left for 2,048 tokens of 256 MiB each."""
    budget = Budget(24 * GIB, 0.9)
    few, many = (llama("vllm", context=2048, batch=n) for n in (8, 32))
    assert fits(few, budget)
    assert not fits(many, budget)


def test_the_fewest_gib_that_are_left_to_the_host_are_enough() -> None:
    """A GiB less would not do."""
    budget = Budget(16 * GIB)
    question = llama("vllm", context=2048)
    spared = least_on_host(question, budget)
    assert spared is not None
    assert fits(spared, budget)
    assert spared.host_bytes % GIB == 0
    less = llama("vllm", context=2048, host_bytes=spared.host_bytes - GIB)
    assert spared.host_bytes > 0
    assert not fits(less, budget)
