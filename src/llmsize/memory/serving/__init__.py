"""What serving a model takes on every device, by the rules of the engine that runs it.

Engines come in three kinds. transformers and MLX let the cache grow and hold what a pass needs
while it runs: both are simulated tensor by tensor. vLLM, SGLang and TensorRT-LLM give a pool what
weights and a warm-up leave: the warm-up follows constants fitted to logs. llama.cpp allocates
buffers whose sizes its own allocator decides: those are simulated in `memory/llamacpp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from llmsize.anatomy import LoRA
from llmsize.anatomy.config import Config
from llmsize.anatomy.parameters import hidden_size
from llmsize.anatomy.towers import towers
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError
from llmsize.memory.kv_cache import paged_sequences, pool_tokens
from llmsize.memory.serving.parts import apart, cache_of, kv_heads_of, weights_of
from llmsize.memory.serving.question import PLAIN_SERVER, Serving, has_encoder, serving
from llmsize.memory.weights import one_by_one, query_heads
from llmsize.quick_dataclasses import dataclass, replace
from llmsize.term import Term, term, total

__all__ = [
    "ELSEWHERE", "PLAIN_SERVER", "Pool", "Serving", "adapters", "apart", "cache_of", "fullest",
    "has_encoder", "need", "outside_share", "pool", "serving", "shared_out",
]  # fmt: skip

ELSEWHERE = ("host", "disk")
"""Places that are no device."""

PREDICTION = "arXiv:2412.19437, section 2.2; vLLM v0.19.0, model_executor/models/deepseek_mtp.py"
TRANSFORMERS = "transformers v5.23.0, src/transformers/models"

LEFT = {
    "layers": (
        "every layer", "`--gpu-layers` is for llama.cpp, Ollama and transformers; vLLM and SGLang "
        "leave parameters to the host: `--cpu-offload-gb`",
    ),
    "parameters": (
        "every parameter", "`--cpu-offload-gb` is for vLLM and SGLang; llama.cpp, Ollama and "
        "transformers leave layers to the host: `--gpu-layers`",
    ),
    "experts": (
        "all experts", "`--cpu-moe` is for llama.cpp, vLLM since 0.17 and transformers; SGLang "
        "places experts one by one with ktransformers, which llmsize does not know",
    ),
}  # fmt: skip
"""What an engine keeps that leaves nothing of the kind to the host, and who does."""


@lru_cache(maxsize=32)  # an answer asks for it again and again
def need(question: Serving) -> tuple[Term, ...]:
    """Bytes in every place: a sum of parts for each device, and for the host if it holds some.

    Raises `LLMSizeError` for a question that makes no sense for the engine.
    """
    _check(question)
    _check_host(question)
    first, *others = _places(question)
    beside = (*_towers(question), *question.beside, *_draft(question))
    return (total(first.name, *first.parts, *beside), *others)


def _places(question: Serving) -> tuple[Term, ...]:
    """The same without what is beside the model; only the kind that was asked for is imported."""
    match question.engine.allocation:
        case "buffers":
            from llmsize.memory.serving import buffers

            return buffers.places(question)
        case "pool":
            from llmsize.memory.serving import pooled

            return pooled.places(question)
        case "grown":
            from llmsize.memory.serving import grown

            return grown.places(question)


def _towers(question: Serving) -> Iterator[Term]:
    """Towers and projectors of the checkpoint, in 16 bit; llama.cpp has them in a file apart.

    Devices that share matrices share those of towers and projectors, too.
    """
    architecture, engine = question.architecture, question.engine
    whole = engine.split != "tensor" or architecture.family.startswith(engine.whole_towers or "?")
    for name, parameters in towers(architecture.config, architecture.name):
        if parameters and engine.allocation != "buffers":
            yield term(
                name, "ceil(parameters * element / devices)", unit="bytes", parameters=parameters,
                element=question.format.block_bytes,
                devices=1 if whole else question.devices,
                source=f"configuration of the checkpoint; {TRANSFORMERS}",
            )  # fmt: skip


def adapters(question: Serving, count: int, lora: LoRA) -> Term:
    """`count` LoRA adapters that are held at once, in the format that is computed in."""
    size = 0
    for weight, _ in question.weights:
        name = weight.name.removesuffix(".weight")
        linear = len(weight.shape) == 2 and weight.role not in ("embedding", "position")
        if linear and lora.adapts(name, weight.role):
            lora.check_rank(name, weight.role, *weight.shape)
            size += sum(weight.shape) * weight.copies
    return term(
        "LoRA adapters", "adapters * rank * channels * element", unit="bytes",
        source="Hu et al. 2021, arXiv:2106.09685", adapters=count, rank=lora.rank, channels=size,
        element=question.format.block_bytes, 
        note="inputs and outputs of every adapted layer; whole on every device",
    )  # fmt: skip


def _draft(question: Serving) -> Iterator[Term]:
    """What drafts for the model; where matrices are divided, those of a draft model are, too."""
    parts: list[Term] = []
    if question.drafting is not None:
        ways = question.devices if question.engine.split == "tensor" else 1
        place = need(replace(
            question.drafting, context=question.context, batch=question.batch, devices=ways,
        ))[0]  # fmt: skip
        common = ["context and libraries", "CUDA graphs"]
        if question.engine.allocation != "buffers":
            common.append("activations")
        parts += (part for part in place.parts if part.name not in common)
    if question.predicting:
        parts += _prediction(question)
    if parts:
        yield total("draft model", *(replace(part, name=f"draft {part.name}") for part in parts))


def _prediction(question: Serving) -> tuple[Term, ...]:
    """The layer for multi-token prediction, like the last; embedding and head are the model's."""
    last, hidden = len(question.layers) - 1, hidden_size(question.trace)
    stored = tuple(pair for pair in one_by_one(question.weights) if pair[0].layer == last)
    joining = term(
        "matrix that joins, and norms", "element * (2 * hidden**2 + 3 * hidden)", unit="bytes",
        element=question.format.block_bytes, hidden=hidden, source=PREDICTION,
    )  # fmt: skip
    return (weights_of(question, stored), joining, *cache_of(question, question.layers[last:]))


def fullest(places: Iterable[Term]) -> Term:
    """The device that needs the most; the host is no device."""
    devices = (place for place in places if place.name not in ELSEWHERE)
    return max(devices, key=lambda place: place.value)


def _check(question: Serving) -> None:
    layers, engine = question.trace.depth, question.engine
    if question.devices > 1 and engine.split == "none":
        raise LLMSizeError(f"{engine.title} runs on one device", hint="leave out `--gpus`")
    if question.rows > 1 and engine.allocation != "grown":
        raise LLMSizeError(
            f"{engine.title} keeps no beams", hint="give them as sequences: `--batch`"
        )
    if question.stages > 1 and engine.allocation != "pool":
        raise LLMSizeError(
            f"{engine.title} has no stages of its own", hint="it splits layers by `--gpus` alone"
        )
    if question.offload == "disk" and engine.allocation != "grown":
        raise LLMSizeError(
            f"{engine.title} reads no layers from disk while it runs", hint="`--offload cpu`"
        )
    parts = question.devices if engine.split == "layers" else question.stages
    if parts > max(layers, 1):
        raise LLMSizeError(
            f"{parts} devices for {layers} layers", hint="a layer is the least that one can hold"
        )
    if question.shared and (engine.allocation != "pool" or question.shared > question.context):
        raise LLMSizeError(
            f"{engine.title} shares no prefix of {question.shared:,} tokens",
            hint="vLLM, SGLang and TensorRT-LLM share one that is no longer than the context",
        )
    if engine.split == "tensor":
        _check_heads(question)


def _check_host(question: Serving) -> None:
    """Raise `LLMSizeError` for something in host memory that the engine keeps on the devices."""
    asked = {
        "layers": question.gpu_layers is not None,
        "parameters": question.host_bytes > 0,
        "experts": question.host_experts > 0,
    }
    for what, wanted in asked.items():
        if wanted and what not in question.engine.to_host:
            kept, hint = LEFT[what]
            raise LLMSizeError(f"{question.engine.title} keeps {kept} on the devices", hint=hint)
    if question.host_bytes > 0 and question.host_experts > 0:
        raise LLMSizeError(
            "experts and other parameters are both sent to the host",
            hint="give `--cpu-moe` or `--cpu-offload-gb`",
        )


def _check_heads(question: Serving) -> None:
    """Raise `LLMSizeError` for heads that tensor parallelism does not divide evenly.

    Those of queries by the devices, and KV heads by them or they by KV heads: vLLM v0.19.0,
    config/model.py (`verify_with_parallel_config`) and model_executor/models/llama.py.
    """
    kv_heads = kv_heads_of(question)
    config = Config(question.architecture.config, question.architecture.name)
    heads = query_heads(config) if kv_heads else 0

    def divided(devices: int) -> bool:
        fewer, more = sorted((max(kv_heads, 1), devices))
        return heads % devices == 0 and (kv_heads < 2 or more % fewer == 0)

    if divided(question.devices):
        return
    most = max(filter(divided, range(1, question.devices)))
    raise LLMSizeError(
        f"{heads} heads and {kv_heads} KV heads are not divided by {question.devices} devices",
        hint=f"{question.engine.title} divides them evenly: take {most}, or `--stages`",
    )


def outside_share(place: Term, engine: Engine) -> int:
    """Bytes on a device that come on top of an engine's share of it.

    Its context, and CUDA graphs unless they are estimated before the pool is made; where the share
    is one of free memory, activations and libraries, too.
    """
    outside = {"context"} if engine.graphs_in_share else {"context", "CUDA graphs"}
    if engine.share_of == "free":
        outside |= {"activations", "libraries"}
    of_runtime = place.part("context and libraries").parts
    return sum(int(p.value) for p in (*place.parts, *of_runtime) if p.name in outside)


def shared_out(place: Term, engine: Engine, memory: int) -> int:
    """Of the `memory` of a device, what the engine's share is a share of."""
    if engine.share_of == "card":
        return memory
    return memory - int(place.part("context and libraries").part("context").value)


@dataclass(frozen=True, slots=True)
class Pool:
    """What a card leaves to the cache."""

    bytes: int
    """On each device; negative where weights and activations do not fit."""
    tokens: int
    sequences: float
    """How many sequences of the asked length there is room for, by what grows with them."""


def pool(question: Serving, memory: int, utilization: float | None = None) -> Pool:
    """The KV pool on a device of `memory` bytes: the engine's share less what is needed first.

    What is outside of that share, `outside_share` says. Raises `LLMSizeError` for an engine without
    a pool and for an impossible share.
    """
    engine = question.engine
    share = engine.utilization if utilization is None else utilization
    if engine.allocation != "pool":
        raise LLMSizeError(f"{engine.title} has no pool", hint="`--engine vllm` allocates ahead")
    if not 0 < share <= 1:
        raise LLMSizeError(
            f"a share of {share:g} is impossible", hint="give one above 0 and up to 1"
        )
    place = fullest(need(question))
    cache = sum(int(part.value) for part in place.walk() if part.name == "KV cache")
    budget = int(shared_out(place, engine, memory) * share)
    left = budget - (int(place.value) - outside_share(place, engine) - cache)
    layers = question.caches(0, -(-question.trace.depth // question.stages))
    state = sum(int(part.value) for part in place.parts if part.name == "recurrent state")
    if all(layer.kind in ("recurrent", "none") for layer in layers):
        return Pool(left, 0, max(0, left + state) * question.batch / state if state else 0.0)
    if state and left > 0 and engine.state_pages:
        sequences = paged_sequences(
            layers, left + state, context=question.context, keys=question.keys,
            values=question.values, policy=question.policy, tensor_parallel=question.devices,
            state_pages=engine.state_pages + (question.shared > 0),
        )  # fmt: skip
        return Pool(left, int(sequences * question.context), sequences)
    tokens = 0
    if left > 0:
        tokens = pool_tokens(
            layers, left, keys=question.keys, values=question.values, policy=question.policy,
            tensor_parallel=question.devices,
        )  # fmt: skip
    return Pool(left, tokens, tokens / question.context)
