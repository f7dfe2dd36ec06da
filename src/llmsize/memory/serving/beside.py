"""What an engine holds beside the tensors of a checkpoint: tables of rotations, whole blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import chain
from operator import add

from llmsize.anatomy.config import Config
from llmsize.architecture import Architecture
from llmsize.engine import Engine
from llmsize.formats import FP16, FP32
from llmsize.memory.reserved import beyond_tensors
from llmsize.memory.serving.parts import Shard, matrix_of, shards
from llmsize.memory.serving.question import Serving
from llmsize.memory.weights import Stored, stored_tensors, weight_bytes
from llmsize.term import Term, fact, term

ROPE = "vLLM v0.19.0, model_executor/layers/rotary_embedding/__init__.py (get_rope)"
ABSORBED = (
    "vLLM v0.19.0, model_executor/layers/attention/mla_attention.py (W_UV, W_UK_T); "
    "SGLang v0.5.7, models/deepseek_v2.py (w_kc, w_vc)"
)


def beside_weights(question: Serving, stored: Stored, layers: int) -> Iterator[Term]:
    """On a device with the tensors `stored` of so many `layers`."""
    if tables := _rotary_tables(question, layers):
        yield tables
    if absorbed := _absorbed(question, stored):
        yield fact("absorbed matrices", absorbed, unit="bytes", source=ABSORBED)
    if question.engine.caching_allocator:
        yield fact(
            "blocks beyond tensors", beyond_tensors(_tensors(question, stored)), unit="bytes",
            source="PyTorch's caching allocator, simulated", grade="formula",
        )  # fmt: skip


def _absorbed(question: Serving, stored: Stored) -> int:
    """A second matrix of every layer that makes keys and values of a latent."""
    held, size = question.engine.absorbed, 0
    if not held or question.engine.latent != "latent":
        return size
    expanding = tuple(pair for pair in stored if pair[0].role == "kv_b")
    for weight, format, cut in shards(question, expanding):
        each = weight_bytes(weight, format)
        if held == "views":
            plain = format.block_elements == 1 and format.block_bytes >= FP16.block_bytes
            each = 0 if plain else weight_bytes(weight, FP16)
        size += weight.copies * -(-each // cut)
    return size


def _tensors(question: Serving, stored: Stored) -> Iterator[Sequence[int]]:
    """Bytes of each matrix on one device, layer by layer, as one where the engine joins them."""
    matrices = tuple(pair for pair in stored if len(pair[0].shape) > 1)
    cut = list(shards(question, matrices))
    in_layer: dict[int, list[int]] = {}
    for number, shard in enumerate(cut):
        for layer in shard.weight.layers or (shard.weight.layer,):
            in_layer.setdefault(layer, []).append(number)

    @cache  # layers are mostly alike
    def sizes(*numbers: int) -> Sequence[int]:
        return _joined(question.engine, [cut[number] for number in numbers])

    return (sizes(*in_layer[layer]) for layer in sorted(in_layer))


def _joined(engine: Engine, matrices: Iterable[Shard]) -> Sequence[int]:
    """Bytes of each tensor of one layer's matrices."""
    found: dict[tuple[str, ...], list[int]] = {}
    for weight, format, cut in matrices:
        matrix = (*matrix_of(engine, weight), format.name)
        sizes = [-(-size // cut) for size in stored_tensors(weight.shape, format)]
        same = found.setdefault(matrix, sizes)
        if same is not sizes:
            same[:] = map(add, same, sizes)
    return tuple(chain.from_iterable(found.values()))


def _rotary_tables(question: Serving, layers: int) -> Term | None:
    """A cosine and a sine for every position that the model can have."""
    engine, architecture = question.engine, question.architecture
    rotated = question.trace.rotated
    if not rotated or not engine.rotary_tables:
        return None
    if engine.rotary_tables == "layer":
        if engine.rotary_families and not architecture.family.startswith(engine.rotary_families):
            return None
        return term(
            "rotary tables", "2 * layers * positions * channels * element", unit="bytes",
            layers=layers, positions=_longest(architecture), channels=rotated[0],
            element=question.format.block_bytes, source=engine.source,
        )  # fmt: skip
    scaled, *others = rotated
    return term(
        "rotary tables", "element * (positions * channels + longest * others)", unit="bytes",
        element=FP32.block_bytes if engine.rotary_tables == "fp32" else question.format.block_bytes,
        positions=scaled_positions(architecture), channels=scaled,
        longest=_longest(architecture), others=sum(others), source=ROPE,
    )  # fmt: skip


def _longest(architecture: Architecture) -> int:
    config = Config(architecture.config, architecture.name)
    return config.count(
        "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"
    )


def scaled_positions(architecture: Architecture) -> int:
    """Positions in a table of layers that see every token, whose angles may be stretched.

    Raises `LLMSizeError` for a configuration that is no configuration.
    """
    config, longest = Config(architecture.config, architecture.name), _longest(architecture)
    given = config.value("rope_parameters", "rope_scaling")
    given = given if isinstance(given, dict) else {}
    given = given.get("full_attention", given)
    scaling = Config(given, architecture.name)
    original = scaling.count(
        "original_max_position_embeddings",
        default=config.count("original_max_position_embeddings", default=longest),
    )
    factor = scaling.number("factor", default=1.0)
    match scaling.text("rope_type", "type", default="default"):
        case "linear" | "dynamic":
            return int(longest * factor)
        case "yarn" | "deepseek_yarn":
            return int(original * factor)
        case "longrope" | "su":
            return longest + original
        case _ if scaling.value("mrope_section"):
            return 4 * longest  # room for videos
        case _:
            return longest
