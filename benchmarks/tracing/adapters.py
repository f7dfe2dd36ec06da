"""Adapters of peft around a model on the fake device."""

from __future__ import annotations

from typing import Any, cast
from unittest import mock

import torch

from benchmarks.tracing.models import ENCODERS, Settings, classifies, first, layer_count

LORA_MODES = ("lora", "rslora", "dora", "lora-fa")
WHOLE_RANK = {"hira": "HiraConfig", "vera": "VeraConfig", "loha": "LoHaConfig",
              "lokr": "LoKrConfig", "miss": "MissConfig"}  # fmt: skip
"""Methods of peft that are told their rank and targets, by the names of their configurations."""
OTHER_MODES = {"ia3": "IA3Config", "prompt": "PromptTuningConfig",
               "p-tuning": "PromptEncoderConfig", "prefix": "PrefixTuningConfig",
               "adaption-prompt": "AdaptionPromptConfig", "boft": "BOFTConfig",
               "trainable-tokens": "TrainableTokensConfig"}  # fmt: skip
"""Methods that are told something else, by the same."""
MODES = ("full", *LORA_MODES, *WHOLE_RANK, *OTHER_MODES)
QV_TARGETS = ("q_proj", "v_proj")
FUSED_QKV_TARGETS = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")


def lora_target_modules(model: Any, targets: str) -> str | list[str]:
    """Names for peft: q and v, or the fused projection; or every linear but the head."""
    if targets == "all-linear":
        return targets
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if names.issuperset(QV_TARGETS):
        return list(QV_TARGETS)
    return [name for name in FUSED_QKV_TARGETS if name in names]


def adapter_config(model: Any, settings: Settings) -> Any:
    """The peft configuration of a method, with the method's own defaults."""
    import peft

    mode, task = settings.mode, task_type(model.config, settings)
    targets = lora_target_modules(model, settings.lora_targets)
    if mode in LORA_MODES:
        return peft.LoraConfig(
            r=settings.lora_r,
            lora_alpha=2 * settings.lora_r,
            lora_dropout=settings.lora_dropout,
            target_modules=targets,
            modules_to_save=settings.modules_to_save or None,
            use_dora=mode == "dora",
            use_rslora=mode == "rslora",
            task_type=task,
        )
    if mode in WHOLE_RANK:
        kind = getattr(peft, WHOLE_RANK[mode])
        return kind(task_type=task, r=settings.lora_r, target_modules=targets)
    tokens = settings.virtual_tokens
    virtual = {"num_virtual_tokens": tokens}
    width, layers = first(model.config, "hidden_size"), layer_count(model.config)
    told: dict[str, dict[str, Any]] = {
        "ia3": {}, "prompt": virtual, "prefix": virtual, "boft": {"target_modules": targets},
        "p-tuning": virtual | {"encoder_hidden_size": width},
        "adaption-prompt": {"adapter_len": tokens, "adapter_layers": layers},
        "trainable-tokens": {"token_indices": list(range(tokens))},
    }  # fmt: skip
    return getattr(peft, OTHER_MODES[mode])(task_type=task, **told[mode])


def task_type(config: Any, settings: Settings) -> str:
    """What peft calls the job of the model's head."""
    if classifies(settings.config):
        return "SEQ_CLS"
    if config.model_type in ENCODERS:
        return "FEATURE_EXTRACTION"  # which peft wraps without asking for more
    return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"


def answer_peft() -> None:
    """Answer the questions peft asks of tensor values, which fake tensors do not have."""
    from peft.tuners.boft.layer import BOFTLayer
    from peft.tuners.loha import layer as loha

    cast("Any", BOFTLayer).perm2mat = lambda _, indices: torch.zeros(len(indices), len(indices))
    loha.make_weight = lambda *factors, scale: loha.HadaWeight.apply(*factors, scale.cpu())


def train_for_certain(model: Any) -> None:
    """Training mode without the dice that LoHa and LoKr throw for each layer."""
    from peft.tuners.lycoris_utils import LycorisLayer

    for module in model.modules():
        if isinstance(module, LycorisLayer):
            module.training = False


def add_adapter(model: Any, settings: Settings) -> Any:
    """Wrap the model with peft adapters, in fp32 as peft makes them over 16-bit weights."""
    from peft import get_peft_model

    config = adapter_config(model, settings)
    answer_peft()
    # Everything is on the device already, and fake parameters cannot be moved in place.
    with mock.patch.object(torch.nn.Module, "to", lambda self, *_, **__: self):
        adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if settings.mode == "lora-fa" and "lora_A" in name:  # as `create_lorafa_optimizer` does
            parameter.requires_grad_(False)
    return adapted
