"""Where llama.cpp computes a node: on the device or on the host.

Expected are the rules of its sources: ggml/src/ggml-cuda/fattn.cu
(`ggml_cuda_get_best_fattn_kernel`) and ggml-cuda.cu (`get_op_batch_size`,
`ggml_backend_cuda_device_offload_op`).
"""

import pytest

from llmsize.formats import FP16, FP32, INT32
from llmsize.memory.llamacpp.cache import CUDA, HOST
from llmsize.memory.llamacpp.scheduler import Scheduler
from llmsize.memory.llamacpp.tensors import (
    Graph,
    Tensor,
    flash_attention,
    get_rows,
    given,
    matmul,
    matmul_experts,
    stored,
)

DEVICE, HOSTED = 0, 1


def place_of(node: Tensor) -> int:
    """Which of one device and the host computes the last node of a graph."""
    graph = Graph()
    graph.expand(node)
    scheduler = Scheduler([CUDA, HOST])
    scheduler.buffers(graph)
    return scheduler.device[id(node)]


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
