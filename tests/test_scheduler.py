"""Where llama.cpp computes a node, on the device or on the host, and what it copies there.

Expected are the rules of its sources: ggml/src/ggml-cuda/fattn.cu
(`ggml_cuda_get_best_fattn_kernel`), ggml-cuda.cu (`get_op_batch_size`,
`ggml_backend_cuda_device_offload_op`) and ggml-backend.cpp (`ggml_backend_sched_split_graph`).
"""

import pytest

from llmsize.formats import FP16, FP32, INT32
from llmsize.memory.llamacpp.cache import CUDA, HOST
from llmsize.memory.llamacpp.scheduler import Scheduler
from llmsize.memory.llamacpp.tensors import (
    Graph,
    Tensor,
    apply,
    flash_attention,
    get_rows,
    given,
    matmul,
    matmul_experts,
    stored,
    view,
)

DEVICE, HOSTED = 0, 1


def scheduled(*ends: Tensor, devices: int = 1, copies: int = 1) -> tuple[Scheduler, list[int]]:
    """The graph that ends in these nodes on some devices and the host, and its buffers."""
    graph = Graph()
    for node in ends:
        graph.expand(node)
    scheduler = Scheduler([*[CUDA] * devices, HOST], copies)
    return scheduler, scheduler.buffers(graph)


def place_of(node: Tensor, devices: int = 1) -> int:
    """Which of some devices and the host computes the last node of a graph."""
    return scheduled(node, devices=devices)[0].device[id(node)]


def product(x: Tensor, place: int, outputs: int = 8) -> Tensor:
    """`x` times a weight that is there."""
    return matmul(stored(FP16, (x.shape[0], outputs), place, weight=True), x)


def attended(keys: int, values: int) -> Tensor:
    """Attention on a device over 16 cached tokens of two heads, queries from a product there."""
    q = matmul(stored(FP16, (8, keys), DEVICE, weight=True), given(FP32, 8, 1, 4))
    k, v = (stored(FP16, (each, 16, 2), DEVICE, weight=False) for each in (keys, values))
    return flash_attention(q, k, v, given(FP16, 16, 1), None)


@pytest.mark.parametrize("channels", [40, 64, 72, 80, 96, 112, 128, 256])
def test_heads_that_a_kernel_takes_stay_on_the_device(channels: int) -> None:
    """Each size has a case of its own, keys as wide as values."""
    assert place_of(attended(channels, channels)) == DEVICE
    assert place_of(attended(channels, channels + 8)) == HOSTED


@pytest.mark.parametrize("channels", [48, 63, 65, 160, 576])
def test_heads_of_another_size_go_to_the_host(channels: int) -> None:
    """What falls through to the default has no kernel; latent keys have none with values alike."""
    assert place_of(attended(channels, channels)) == HOSTED


def test_latent_keys_have_narrower_values() -> None:
    """DeepSeek's 512 latent channels, and the 64 that are rotated, which only keys have."""
    assert place_of(attended(576, 512)) == DEVICE
    assert place_of(attended(576, 256)) == HOSTED


@pytest.mark.parametrize(("tokens", "place"), [(31, HOSTED), (32, DEVICE)])
def test_a_product_with_a_weight_of_the_host_is_brought_from_32_tokens_on(
    tokens: int, place: int
) -> None:
    """`GGML_OP_MUL_MAT` counts rows; experts count tokens, however many of them are chosen."""
    weight = stored(FP16, (8, 16), HOSTED, weight=True)
    assert place_of(matmul(weight, given(FP32, 8, tokens))) == place
    experts = stored(FP16, (8, 16, 4), HOSTED, weight=True)
    tokens_in, chosen = given(FP32, 8, 1, tokens), given(INT32, 2, tokens)
    assert place_of(matmul_experts(experts, tokens_in, chosen)) == place


def test_rows_of_a_table_of_the_host_are_looked_up_there() -> None:
    """`GGML_OP_GET_ROWS` counts as no batch at all: the embedding stays where it is."""
    table = stored(FP16, (8, 100), HOSTED, weight=True)
    assert place_of(get_rows(table, given(INT32, 512))) == HOSTED


def test_other_operations_with_a_weight_of_the_host_count_all_rows() -> None:
    """Sixteen heads of two tokens are 32 rows: a norm's weight is brought for them."""
    weight = stored(FP32, (8,), HOSTED, weight=True)

    def scaled(heads: int) -> Tensor:
        x = given(FP32, 8, heads, 2)
        return Tensor("mul", FP32, x.shape, (x, weight))

    assert place_of(scaled(16)) == DEVICE
    assert place_of(scaled(15)) == HOSTED


def test_what_has_no_weight_joins_a_device_before_the_host() -> None:
    """Pass 2: devices are carried down and then up the graph, and only then the host."""
    on_device = product(given(FP32, 8, 4), DEVICE)
    after_device = apply("unary", on_device)
    on_host = product(after_device, HOSTED)
    before_device = apply("unary", on_host)
    again = product(before_device, DEVICE)
    last_host = product(again, HOSTED)
    after_host = apply("unary", last_host)
    nodes = (on_device, after_device, on_host, before_device, again, last_host, after_host)
    places = scheduled(after_host)[0].device
    expected = [DEVICE, DEVICE, HOSTED, DEVICE, DEVICE, HOSTED, HOSTED]
    assert [places[id(node)] for node in nodes] == expected


def test_of_two_devices_the_one_before_is_joined() -> None:
    """Down comes before up."""
    between = apply("unary", product(given(FP32, 8, 4), 0))
    second = product(between, 1)
    places = scheduled(second, devices=2)[0].device
    assert (places[id(between)], places[id(second)]) == (0, 1)


def test_a_weight_of_the_host_is_brought_to_the_first_device() -> None:
    """The backends are asked in their order."""
    assert place_of(product(given(FP32, 8, 32), 2), devices=2) == 0


@pytest.mark.parametrize(("inputs", "place"), [(0, DEVICE), (1, DEVICE), (2, DEVICE), (3, HOSTED)])
def test_what_no_neighbour_claims_goes_where_most_of_its_inputs_are(
    inputs: int, place: int
) -> None:
    """Pass 3, of two views of a cache on the device and some inputs; the first of equals wins."""
    cache = stored(FP32, (8, 4), DEVICE, weight=False)
    seen = [view(cache, 8, 4, span=cache.bytes) for _ in range(2)]
    told = [given(FP32, 8, 4) for _ in range(inputs)]
    assert place_of(Tensor("add", FP32, seen[0].shape, (*seen, *told))) == place


def test_an_input_is_copied_once_to_where_it_is_read() -> None:
    """128 bytes beside two results of 512 on the device, and on the host."""
    x = given(FP32, 8, 4)
    _, sizes = scheduled(product(x, DEVICE, 32), product(x, DEVICE, 32))
    assert sizes == [128 + 2 * 512, 128]


def test_what_was_copied_leaves_its_place_to_what_comes_after() -> None:
    """The host has the input's 128 bytes, then what comes back, 512, and its product of 128."""
    back = product(product(given(FP32, 8, 4), DEVICE, 32), HOSTED)
    assert scheduled(back)[1] == [128 + 512, 512 + 128]


def test_a_pipeline_has_every_input_and_copy_twice() -> None:
    """They are leaves that stay: 128 bytes on both sides, and 512 that come back."""
    back = product(product(given(FP32, 8, 4), DEVICE, 32), HOSTED)
    assert scheduled(back, copies=2)[1] == [2 * 128 + 512, 2 * 128 + 2 * 512 + 128]


def test_a_weight_that_is_brought_begins_a_run_of_its_own() -> None:
    """Of two brought one after the other the second takes the place of the first, and of the input:
    256 and 1,024 bytes, where 512 fit; each product has 16 outputs for 32 tokens."""
    first = product(given(FP32, 8, 32), HOSTED, 16)
    _, (device, _) = scheduled(product(first, HOSTED, 16))
    assert device == 256 + 1024 + 2 * (4 * 16 * 32)
