"""The forward pass of every family, one module each; a `model_type` names its module here."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from llmsize.anatomy.config import Config
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.errors import LLMSizeError, did_you_mean, printable

Forward = Callable[[Trace, Config], Tensor]

TYPES = {
    "afmoe": ("afmoe",),
    "albert": ("albert",),
    "apertus": ("apertus",),
    "arcee": ("arcee", "jais2"),
    "aria": ("aria_text",),
    "axk2": ("axk2",),
    "baichuan": ("baichuan",),
    "bailing_hybrid": ("bailing_hybrid",),
    "bamba": ("bamba",),
    "bart": (
        "bart", "mbart", "pegasus", "plbart", "marian", "m2m_100", "blenderbot", "blenderbot-small",
    ),
    "beam": ("beam",),
    "big_bird": ("big_bird",),
    "biogpt": ("biogpt",),
    "bitnet": ("bitnet",),
    "bert": (
        "bert", "roberta", "xlm-roberta", "camembert", "data2vec-text", "distilbert", "electra",
        "ernie", "roberta-prelayernorm", "xlm-roberta-xl",
    ),
    "bloom": ("bloom",),
    "cohere": ("cohere", "cohere2", "cohere2_moe", "cohere_compass_text"),
    "ctrl": ("ctrl",),
    "dbrx": ("dbrx",),
    "deberta_v2": ("deberta-v2",),
    "deepseek": (
        "deepseek", "deepseek_v2", "deepseek_ocr2_text", "deepseek_v3", "deepseek_v32", "kimi_k2",
        "kimi_k25",
        "glm_moe_dsa", "glm4_moe_lite", "axk1", "youtu", "mistral4",
    ),
    "deepseek_v4": ("deepseek_v4",),
    "diffllama": ("diffllama",),
    "doge": ("doge",),
    "ernie4_5_moe": ("ernie4_5_moe",),
    "esm": ("esm",),
    "esmc": ("esmc",),
    "eurobert": ("eurobert",),
    "exaone": ("exaone",),
    "exaone4": ("exaone4", "exaone4_5", "exaone4_5_text"),
    "falcon": ("falcon", "RefinedWeb", "RefinedWebModel"),
    "falcon_h1": ("falcon_h1",),
    "flint": ("flint",),
    "gemma": ("gemma", "gemma2", "gemma3", "gemma3_text", "vaultgemma"),
    "gemma3n": ("gemma3n", "gemma3n_text"),
    "gemma4": ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
    "glm": ("glm", "glm4", "glm4v_text", "glm_ocr_text"),
    "glm4_moe": ("glm4_moe", "glm4v_moe_text", "solar_open", "dots1", "exaone_moe", "hy_v3"),
    "gpt2": ("gpt2", "gpt-sw3"),
    "gpt_bigcode": ("gpt_bigcode",),
    "gpt_neo": ("gpt_neo",),
    "gpt_neox": ("gpt_neox",),
    "gpt_neox_japanese": ("gpt_neox_japanese",),
    "gpt_oss": ("gpt_oss",),
    "gptj": ("gptj", "codegen"),
    "granite": ("granite", "hyperclovax"),
    "granite_hybrid": ("granitemoehybrid", "granitemoeshared"),
    "granite_swa": ("granite_swa", "granitemoe_swa"),
    "granitemoe": ("granitemoe",),
    "grok": ("grok-1",),
    "hunyuan_moe": ("hunyuan_v1_moe", "hunyuan_v1_dense", "hunyuan_vl_text"),
    "hy_v4": ("hy_v4",),
    "inkling": ("inkling_text",),
    "internlm2": ("internlm2",),
    "jamba": ("jamba",),
    "kimi_linear": ("kimi_linear",),
    "kolibri1": ("kolibri1",),
    "laguna": ("laguna",),
    "lfm3": ("lfm2", "lfm2_moe", "lfm3"),
    "llama": (
        "llama", "mistral", "mistral3", "ministral", "ministral3", "qwen2", "smollm3", "seed_oss",
        "cwm", "ernie4_5", "iquestcoder", "internlm3", "mimo", "qwen2_vl", "qwen2_vl_text",
        "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_omni_text", "helium", "paddleocr_vl_text",
    ),
    "llama4": ("llama4", "llama4_text"),
    "mamba": ("mamba", "falcon_mamba", "mamba2"),
    "mimo_v2": ("mimo_v2_flash",),
    "minicpm3": ("minicpm3",),
    "minimax": ("minimax",),
    "minimax_m3": ("minimax_m3", "minimax_m3_vl_text"),
    "mixtral": (
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "minimax_m2", "mellum",
        "qwen3_vl_moe_text", "qwen3_omni_moe_text",
    ),
    "mllama": ("mllama_text_model",),
    "mobilebert": ("mobilebert",),
    "modernbert": ("modernbert",),
    "modernbert_decoder": ("modernbert-decoder",),
    "mpnet": ("mpnet",),
    "mpt": ("mpt",),
    "muse_glimmer": ("muse_glimmer_text",),
    "nanochat": ("nanochat",),
    "nemotron": ("nemotron",),
    "nemotron_h": ("nemotron_h",),
    "nomic_bert": ("nomic_bert", "gte", "jina_embeddings_v3"),
    "olmo": ("olmo", "olmo2", "olmo3", "flex_olmo"),
    "olmo_hybrid": ("olmo_hybrid",),
    "openai_gpt": ("openai-gpt",),
    "opt": ("opt",),
    "persimmon": ("persimmon",),
    "phi": ("phi",),
    "phi3": ("phi3", "phi4_multimodal"),
    "qwen3": ("qwen3", "qwen3_vl_text"),
    "qwen3_next": ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    "recurrent_gemma": ("recurrent_gemma",),
    "rembert": ("rembert", "megatron-bert", "roformer"),
    "rwkv": ("rwkv",),
    "stablelm": ("stablelm",),
    "starcoder2": ("starcoder2",),
    "step3p5": ("step3p5",),
    "t5": ("t5", "mt5", "umt5"),
    "t5gemma": ("t5gemma",),
    "xglm": ("xglm",),
    "zamba": ("zamba",),
    "zamba2": ("zamba2",),
    "zaya": ("zaya",),
}  # fmt: skip
"""Module in this package → each `model_type` of a `config.json` whose forward pass it holds."""

MODULES = {family: module for module, families in TYPES.items() for family in families}
"""`model_type` of a `config.json` → module in this package with its `forward`."""

BY_DATA = {
    "blt": "", "jetmoe": "mixtral", "led": "bart", "longcat_flash": "", "longformer": "roberta",
    "nllb-moe": "", "switch_transformers": "", "t5gemma2": "", "xmod": "xlm-roberta",
}  # fmt: skip
"""`model_type`s whose modules in transformers v5.23 ask the tokens what to run (one expert after
another on the tokens that chose it, a language's adapter, tokens that see all others, patches,
ends of images), with the nearest one that runs the same for all, if one is near."""


def forward_of(family: str) -> Forward:
    """The forward pass of a family. Raises `LLMSizeError` for one that is not known."""
    forward: Forward = _module_of(family).forward
    return forward


def has_encoder(family: str) -> bool:
    """Whether an encoder is beside the family's decoder, as its module says by `HAS_ENCODER`."""
    return bool(getattr(_module_of(family), "HAS_ENCODER", False))


def _module_of(family: str) -> ModuleType:
    module = MODULES.get(family)
    if module is None:
        raise _unknown(family)
    return import_module(f"{__name__}.{module}")


def _unknown(family: str) -> LLMSizeError:
    """What is wrong with a family that has no module."""
    if family in BY_DATA:
        near = BY_DATA[family]
        return LLMSizeError(
            f"`{family}` runs what its tokens ask for, so its memory depends on them",
            hint=f"take it for one that runs the same for all: `--assume-family {near}`"
            if near
            else "no family that llmsize knows is near enough to take it for",
        )
    alike = did_you_mean(family, MODULES, otherwise="`llmsize show models` names known families")
    return LLMSizeError(
        f"unknown architecture `{printable(family)}`",
        hint=f"{alike}; if its block is that of a known one, say so: `--assume-family llama`",
    )
