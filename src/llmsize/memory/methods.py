"""Ways to train a model, each a setting of the pass: what is trained, and what is frozen how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

from llmsize.anatomy.adalora import AdaLoRA
from llmsize.anatomy.adapters import ALL_LINEAR, IA3, Adapter, Bottleneck, Gate, LoRA, Ranked
from llmsize.anatomy.prompts import (
    AdaptionPrompt,
    LlamaAdapter,
    LlamaAdapterV2,
    Prefix,
    PromptTuning,
    PTuning,
    TrainedTokens,
)
from llmsize.anatomy.rotations import BOFT, OFT
from llmsize.anatomy.weight_changes import HiRA, LoHa, LoKr, MiSS, VeRA
from llmsize.errors import LLMSizeError, did_you_mean, printable
from llmsize.formats import BF16, Format
from llmsize.memory.objectives import Reference
from llmsize.memory.training import Offload
from llmsize.quick_dataclasses import dataclass

Biases = Literal["none", "all", "adapted"]
"""Which biases of the model are trained beside adapters: none, all, or those of adapted layers."""

Recompute = Literal["none", "full", "selective"]
"""Nothing; every block; every block but attention and every second matrix product."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What a user chooses for a step, in the field's words."""

    method: str = "full"
    """One of `METHODS`."""
    batch: int = 1
    """Sequences of a micro-batch."""
    sequence: int = 2048
    """Tokens of each."""
    format: Format = BF16
    """The 16-bit format, or fp32."""
    rank: int = 16
    """Of low-rank adapters, or of GaLore's projections."""
    targets: tuple[str, ...] = ()
    """Names of the adapted layers; empty for the method's own."""
    adapter_dropout: float = 0.0
    adapter_format: Format | None = None
    """Absent for what the stack does."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules that are trained whole, as copies beside the frozen ones."""
    bias: Biases = "none"
    """Of those of the model."""
    width: int = 0
    """Of bottlenecks; 0 for a sixteenth of the layer's."""
    factor: int = 0
    """Rows and columns of LoKr's small matrix; 0 for about the square root of the layer's."""
    tokens: int = 0
    """Virtual or trained tokens; 0 for as many as are usual."""
    base: Format | None = None
    """Format of a quantized base."""
    upcast: bool = False
    """Whether what is not quantized is kept in fp32 (`prepare_model_for_kbit_training`)."""
    frozen_layers: int = 0
    recompute: Recompute = "none"
    recompute_every: int = 1
    """Every how many layers one is recomputed."""
    offload_checkpoints: bool = False
    attention: Literal["sdpa", "eager"] = "sdpa"
    padded: bool = False
    accumulation: int = 1
    fused_backward: bool = False
    objective: str = "sft"
    """One of `OBJECTIVES`."""
    reference: Reference | None = None
    """Absent for the objective's own: the model without its adapters, where it has some."""
    completion: int = 0
    """Tokens that a rollout writes, 0 for half of the sequence; without rollouts those that have a
    label, 0 for all."""
    rollouts: int = 0
    """Sequences that are written at once; 0 for those of one optimizer step."""
    engine: int = 0
    """Bytes of an inference engine on the same device that writes them."""
    engine_sleeps: bool = False
    offload: Offload = "none"
    replicas: int = 1
    """Devices that train the same model on different batches."""
    bucket_views: bool = False
    """DDP's `gradient_as_bucket_view`."""
    compiled: bool = False
    """Whether `torch.compile` fuses norms, rotary embedding, gates and the loss."""


Adapting = Callable[[Choices, Format], Adapter]
"""An adapter from the choices and the format of what it trains."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train: which weights, and what beside them."""

    name: str
    title: str
    source: str
    takes: tuple[str, ...] = ()
    """The fields of `Choices`, of those in `OPTIONS`, that mean something for it."""
    trained: frozenset[str] | None = frozenset()
    """Roles of the model's own weights that are trained; `None` for all."""
    adapter: Adapting | None = None
    like_weights: bool = False
    """Whether what is beside the weights has the format in which a recipe keeps trained ones."""
    projected: bool = False
    """Whether the optimizer keeps its states of matrices in a subspace of low rank."""
    fused_backward: bool = False
    """Whether each weight is stepped as soon as its gradient is there."""
    rank: int = 0
    """Its library's own, where that is far from what adapters usually have."""
    optimizer: str = ""
    """The only one it steps with."""
    plain: str = ""
    """Of a method that is nothing without a quantized base: its name beside plain weights."""
    freezes: bool = False
    """Whether it is nothing without frozen layers."""
    recomputable: bool = True
    """Whether its library lets blocks be recomputed."""
    aliases: tuple[str, ...] = ()
    note: str = ""


UNDROPPED = ("rank", "targets", "adapter_format", "modules_to_save")
DROPPED = (*UNDROPPED, "adapter_dropout")
LOW_RANK = (*DROPPED, "bias")
QUANTIZED_BASE = ("base", "upcast")
OPTIONS = frozenset((*LOW_RANK, *QUANTIZED_BASE, "width", "factor", "tokens", "frozen_layers"))
"""Choices that mean something for some methods only."""
WORDS = {
    "base": "quantized base",
    "tokens": "virtual tokens",
    "upcast": "quantized base to upcast beside",
}
"""What such a choice is called, where its field says less."""


def _lora(c: Choices, format: Format, *, dora: bool = False, fixed: bool = False) -> LoRA:
    return LoRA(
        c.targets or (ALL_LINEAR,), format, rank=c.rank, dropout=c.adapter_dropout, dora=dora,
        fixed_down=fixed,
    )  # fmt: skip


def _ranked(c: Choices, format: Format, *, kind: type[Ranked]) -> Ranked:
    return kind(c.targets or (ALL_LINEAR,), format, rank=c.rank, dropout=c.adapter_dropout)


def _lokr(c: Choices, format: Format) -> LoKr:
    return LoKr(c.targets or (ALL_LINEAR,), format, rank=c.rank, factor=c.factor)


def _adaption_prompt(c: Choices, format: Format) -> AdaptionPrompt:
    return AdaptionPrompt(format=c.adapter_format or c.format, tokens=c.tokens or 10)


def _bottleneck(
    c: Choices, format: Format, *, roles: tuple[str, ...], activation: Gate
) -> Bottleneck:
    return Bottleneck(c.targets, format, width=c.width, roles=roles, activation=activation)


def _prompt(
    c: Choices, format: Format, *, kind: type[Adapter], tokens: int = 20, first: int = 0
) -> Adapter:
    return kind(format=format, tokens=c.tokens or tokens, first=first)


PEFT = "peft v0.21, "
ADAPTERS = "adapters v1.3, adapters/configuration/adapter_config.py, "
_KNOWN = (
    Method("full", "all weights", "every weight has a gradient and optimizer states",
           takes=("frozen_layers",), trained=None),
    Method("frozen", "all but the first layers", "the first layers and the embeddings are frozen",
           takes=("frozen_layers",), trained=None, freezes=True),
    Method("bitfit", "biases alone", "Zaken et al. 2022, arXiv:2106.10199",
           takes=("frozen_layers",), trained=frozenset(("bias",))),
    Method("norms", "norms alone", "Zhao et al. 2023, arXiv:2312.11420; peft's LN tuning",
           takes=("frozen_layers",), trained=frozenset(("norm",)), aliases=("ln-tuning",)),
    Method("head", "the head alone", "linear probing", trained=frozenset(("head",))),
    Method("lomo", "all weights, each stepped by SGD as its gradient comes",
           "Lv et al. 2023, arXiv:2306.09782", takes=("frozen_layers",), trained=None,
           fused_backward=True, optimizer="sgd",
           note="two gradients of the largest weights live at a time"),
    Method("galore", "all weights, optimizer states in a subspace",
           "Zhao et al. 2024, arXiv:2403.03507; https://github.com/jiaweizzhao/GaLore",
           takes=("rank", "frozen_layers"), trained=None, projected=True, rank=128,
           note="gradients stay whole: add `--fused-backward` for the update layer by layer"),
    Method("lora", "low-rank adapters",
           "Hu et al. 2021, arXiv:2106.09685; " + PEFT + "lora/layer.py",
           takes=LOW_RANK, adapter=_lora, aliases=("rslora",),
           note="rsLoRA scales by another number: the same bytes"),
    Method("lora-fa", "low-rank adapters whose first factor is frozen",
           "Zhang et al. 2023, arXiv:2308.03303", takes=LOW_RANK,
           adapter=partial(_lora, fixed=True), aliases=("lorafa",)),
    Method("dora", "low-rank adapters and trained magnitudes",
           "Liu et al. 2024, arXiv:2402.09353; " + PEFT + "lora/dora.py", takes=LOW_RANK,
           adapter=partial(_lora, dora=True)),
    Method("adalora", "low-rank adapters whose ranks are pruned",
           "Zhang et al. 2023, arXiv:2303.10512; " + PEFT + "adalora/layer.py",
           takes=DROPPED, adapter=partial(_ranked, kind=AdaLoRA),
           note="at its first rank; `update_and_allocate` keeps three more copies of the adapters"),
    Method("hira", "low-rank products that the weights are multiplied with",
           "Huang et al. 2025, ICLR; " + PEFT + "hira/layer.py",
           takes=DROPPED, adapter=partial(_ranked, kind=HiRA)),
    Method("loha", "elementwise products of two low-rank products",
           "Hyeon-Woo et al. 2022, arXiv:2108.06098; " + PEFT + "loha/layer.py",
           takes=UNDROPPED, adapter=partial(_ranked, kind=LoHa)),
    Method("lokr", "Kronecker products of a small and a low-rank matrix",
           "Yeh et al. 2024, arXiv:2309.14859; " + PEFT + "lokr/layer.py",
           takes=(*UNDROPPED, "factor"), adapter=_lokr),
    Method("vera", "scales of random matrices that all layers share",
           "Kopiczko et al. 2024, arXiv:2310.11454; " + PEFT + "vera/layer.py",
           takes=LOW_RANK, adapter=partial(_ranked, kind=VeRA)),
    Method("miss", "one matrix for the sum of the input's parts",
           "Kang and Yin 2024, arXiv:2409.15371; " + PEFT + "miss/layer.py",
           takes=LOW_RANK, adapter=partial(_ranked, kind=MiSS), aliases=("bone",)),
    Method("oft", "rotations of blocks of the layers' inputs",
           "Qiu et al. 2023, arXiv:2306.07280; " + PEFT + "oft/layer.py",
           takes=("targets", "adapter_format", "modules_to_save", "bias"),
           adapter=lambda c, format: OFT(c.targets or (ALL_LINEAR,), format)),
    Method("boft", "rotations of the layers' inputs",
           "Liu et al. 2024, arXiv:2311.06243; " + PEFT + "boft/layer.py",
           takes=("targets", "adapter_format", "modules_to_save", "bias"),
           adapter=lambda c, format: BOFT(c.targets or (ALL_LINEAR,), format)),
    Method("qlora", "low-rank adapters beside quantized weights",
           "Dettmers et al. 2023, arXiv:2305.14314", takes=(*LOW_RANK, *QUANTIZED_BASE),
           adapter=_lora, plain="lora"),
    Method("qdora", "DoRA beside quantized weights", "Liu et al. 2024, arXiv:2402.09353",
           takes=(*LOW_RANK, *QUANTIZED_BASE), adapter=partial(_lora, dora=True),
           plain="dora"),
    Method("ia3", "a factor for each channel",
           "Liu et al. 2022, arXiv:2205.05638; " + PEFT + "ia3/layer.py",
           takes=("targets", "adapter_format", "modules_to_save", *QUANTIZED_BASE),
           adapter=lambda c, format: IA3(c.targets, format)),
    Method("houlsby", "bottlenecks behind attention and feed-forward",
           "Houlsby et al. 2019, arXiv:1902.00751; " + ADAPTERS + "DoubleSeqBnConfig",
           takes=("width", "targets", "adapter_format"), like_weights=True,
           adapter=partial(_bottleneck, roles=("o", "down"), activation="swish"),
           aliases=("bottleneck", "adapter")),
    Method("pfeiffer", "bottlenecks behind feed-forward",
           "Pfeiffer et al. 2020, arXiv:2005.00247; " + ADAPTERS + "SeqBnConfig",
           takes=("width", "targets", "adapter_format"), like_weights=True,
           adapter=partial(_bottleneck, roles=("down",), activation="relu")),
    Method("prompt-tuning", "embeddings of virtual tokens",
           "Lester et al. 2021, arXiv:2104.08691; " + PEFT + "prompt_tuning/model.py",
           takes=("tokens", *QUANTIZED_BASE), adapter=partial(_prompt, kind=PromptTuning),
           aliases=("prompt", "prompt_tuning")),
    Method("p-tuning", "virtual tokens through an encoder",
           "Liu et al. 2021, arXiv:2103.10385; " + PEFT + "p_tuning/model.py",
           takes=("tokens", *QUANTIZED_BASE), adapter=partial(_prompt, kind=PTuning),
           aliases=("ptuning", "p_tuning")),
    Method("prefix-tuning", "keys and values of virtual tokens in every layer",
           "Li and Liang 2021, arXiv:2101.00190; " + PEFT + "prefix_tuning/model.py",
           takes=("tokens", *QUANTIZED_BASE), adapter=partial(_prompt, kind=Prefix),
           recomputable=False, aliases=("prefix", "prefix_tuning")),
    Method("trainable-tokens", "some rows of the embedding",
           PEFT + "trainable_tokens/layer.py", takes=("tokens", "adapter_format"),
           adapter=partial(_prompt, kind=TrainedTokens, tokens=2),
           aliases=("trainable_tokens", "trained-tokens"),
           note="--virtual-tokens says how many; 2 unless told"),
    Method("adaption-prompt", "gated prompts beside the whole of attention",
           "Zhang et al. 2023, arXiv:2303.16199; " + PEFT + "adaption_prompt/layer.py",
           takes=("tokens", "adapter_format"), adapter=_adaption_prompt,
           aliases=("adaptionprompt", "adaption_prompt"),
           note="in all layers; `llama-adapter` is litgpt's"),
    Method("llama-adapter", "gated prompts in all layers but the first two",
           "Zhang et al. 2023, arXiv:2303.16199; litgpt v0.5, litgpt/adapter.py",
           takes=("tokens", "adapter_format", *QUANTIZED_BASE),
           adapter=partial(_prompt, kind=LlamaAdapter, tokens=10, first=2)),
    Method("llama-adapter-v2", "gated prompts, scales, biases and norms",
           "Gao et al. 2023, arXiv:2304.15010; litgpt v0.5, litgpt/adapter_v2.py",
           takes=("tokens", "adapter_format", *QUANTIZED_BASE), trained=frozenset(("norm",)),
           adapter=partial(_prompt, kind=LlamaAdapterV2, tokens=10, first=2)),
)  # fmt: skip

QUANTIZED = tuple(method.name for method in _KNOWN if method.plain)
"""Methods that are nothing without a quantized base."""

METHODS = {method.name: method for method in _KNOWN}
"""Every method by its name: a new one is a line here, a new kind of adapter a class beside LoRA."""


def method_named(name: str) -> Method:
    """The method of that name or alias. Raises `LLMSizeError` with close names."""
    wanted = name.strip().lower()
    for method in METHODS.values():
        if wanted == method.name or wanted in method.aliases:
            return method
    raise LLMSizeError(
        f"unknown method `{printable(name)}`",
        hint=did_you_mean(name, METHODS, otherwise=f"known: {', '.join(METHODS)}"),
    )


def check_options(method: Method, given: Iterable[str]) -> None:
    """Raise `LLMSizeError` for options, by their fields of `Choices`, that `method` has not."""
    for option in given:
        if option in OPTIONS and option not in method.takes:
            having = ", ".join(name for name, known in METHODS.items() if option in known.takes)
            what = WORDS.get(option, option.replace("_", " "))
            raise LLMSizeError(
                f"`{method.name}` has no {what}", hint=f"methods that have: {having}"
            )
