"""Adapters of peft around a model on the fake device."""

from __future__ import annotations

from typing import Any, cast
from unittest import mock

import torch

from benchmarks.tracing.freezing import OWN_WEIGHTS
from benchmarks.tracing.models import DTYPES, Settings, classifies, first, layer_count, unmasks

LORA_MODES = ("lora", "rslora", "dora", "lora-fa")
WHOLE_RANK = {"hira": "HiraConfig", "vera": "VeraConfig", "loha": "LoHaConfig",
              "lokr": "LoKrConfig", "miss": "MissConfig"}  # fmt: skip
"""Methods of peft that are told their rank and targets, by the names of their configurations."""
OTHER_MODES = {"ia3": "IA3Config", "prompt": "PromptTuningConfig",
               "p-tuning": "PromptEncoderConfig", "prefix": "PrefixTuningConfig",
               "adaption-prompt": "AdaptionPromptConfig", "boft": "BOFTConfig", "oft": "OFTConfig",
               "trainable-tokens": "TrainableTokensConfig"}  # fmt: skip
"""Methods that are told something else, by the same."""
BEHIND_ATTENTION = ("o_proj", "attn.c_proj", "attention.dense", "self_attn.dense",
                    "attention.output.dense", "SelfAttention.o", "EncDecAttention.o",
                    "self_attn.out_proj")  # fmt: skip
BEHIND_FEED_FORWARD = ("mlp.down_proj", "mlp.c_proj", "dense_4h_to_h", "fc2", "output.dense", "wo")
"""Ends of the names of layers that have a bottleneck behind them."""
BOTTLENECKS = {"houlsby": "swish", "pfeiffer": "relu"}
"""Activations of bottlenecks; of the second kind there are none behind attention."""
MODES = (*OWN_WEIGHTS, *LORA_MODES, "adalora", *WHOLE_RANK, *OTHER_MODES, *BOTTLENECKS)
QV_TARGETS = ("q_proj", "v_proj")
FUSED_QKV_TARGETS = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")


def lora_target_modules(model: Any, targets: str) -> str | list[str]:
    """Names for peft: q and v, or the fused projection; every linear but the head; or as given."""
    if targets == "all-linear":
        return targets
    if targets != "qv":
        return targets.split(",")
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if names.issuperset(QV_TARGETS):
        return list(QV_TARGETS)
    return [name for name in FUSED_QKV_TARGETS if name in names]


def adapter_config(model: Any, settings: Settings) -> Any:
    """The peft configuration of a method, with the method's own defaults."""
    import peft

    mode, task = settings.mode, task_type(model.config, settings)
    saved = settings.modules_to_save or None
    targets = lora_target_modules(model, settings.lora_targets)
    if mode in LORA_MODES:
        return peft.LoraConfig(
            r=settings.lora_r, lora_alpha=2 * settings.lora_r, lora_dropout=settings.lora_dropout,
            target_modules=targets, modules_to_save=saved, bias=settings.lora_bias,
            use_dora=mode == "dora", use_rslora=mode == "rslora", task_type=task,
        )  # fmt: skip
    if mode in WHOLE_RANK:
        kind = getattr(peft, WHOLE_RANK[mode])
        dropped = {f"{mode}_dropout": settings.lora_dropout} if settings.lora_dropout else {}
        return kind(
            task_type=task, r=settings.lora_r, target_modules=targets, modules_to_save=saved,
            **dropped,
        )  # fmt: skip
    if mode == "adalora":
        return peft.AdaLoraConfig(
            init_r=settings.lora_r, target_r=settings.lora_r, total_step=1000,
            lora_dropout=settings.lora_dropout, target_modules=targets, task_type=task,
        )  # fmt: skip
    tokens = settings.virtual_tokens
    virtual = {"num_virtual_tokens": tokens}
    width, layers = first(model.config, "hidden_size"), layer_count(model.config)
    told: dict[str, dict[str, Any]] = {
        "ia3": {}, "prompt": virtual, "prefix": virtual, "boft": {"target_modules": targets},
        "oft": {"target_modules": targets},
        "p-tuning": virtual | {"encoder_hidden_size": width},
        "adaption-prompt": {"adapter_len": tokens, "adapter_layers": layers},
        "trainable-tokens": {"token_indices": list(range(tokens))},
    }  # fmt: skip
    return getattr(peft, OTHER_MODES[mode])(task_type=task, **told[mode])


def task_type(config: Any, settings: Settings) -> str:
    """What peft calls the job of the model's head."""
    if classifies(settings.config):
        return "SEQ_CLS"
    if unmasks(config):
        return "FEATURE_EXTRACTION"  # which peft wraps without asking for more
    return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"


def answer_peft() -> None:
    """Answer the questions peft asks of tensor values, which fake tensors do not have."""
    from peft.tuners.boft.layer import BOFTLayer
    from peft.tuners.loha import layer as loha

    cast("Any", BOFTLayer).perm2mat = lambda _, indices: torch.zeros(len(indices), len(indices))
    loha.make_weight = lambda *factors, scale: loha.HadaWeight.apply(*factors, scale.cpu())


class Bottleneck(torch.nn.Module):
    """A linear layer and what adapters 1.3 puts behind it (methods/modeling.py, `Adapter`)."""

    def __init__(self, linear: Any, width: int, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers.activations import get_activation

        out = linear.nf if hasattr(linear, "nf") else linear.out_features
        self.linear = linear.requires_grad_(requires_grad=False)
        down = torch.nn.Linear(out, width, dtype=dtype)
        self.adapter_down = torch.nn.Sequential(down, get_activation(activation))
        self.adapter_up = torch.nn.Linear(width, out, dtype=dtype)
        self.scaling = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`Adapter.forward`, whose caller holds the layer's own result."""
        residual = self.linear(x)
        down = self.adapter_down(residual)
        up = self.adapter_up(down)
        up = up * self.scaling
        output = up
        return output + residual


def has_bottleneck(name: str, module: Any, mode: str) -> bool:
    """Whether a bottleneck goes behind the module."""
    if type(module).__name__ not in ("Linear", "Conv1D"):
        return False
    if name.endswith(tuple(f".{end}" for end in BEHIND_ATTENTION)):
        return mode == "houlsby"
    return name.endswith(tuple(f".{end}" for end in BEHIND_FEED_FORWARD))


def add_bottlenecks(model: Any, settings: Settings) -> Any:
    """The model with bottlenecks in fp32 under autocast, in the weights' format without."""
    model.requires_grad_(requires_grad=False)
    whole = settings.autocast != "none"
    for name, parent in list(model.named_modules()):
        for own, child in list(parent.named_children()):
            if has_bottleneck(f".{name}.{own}", child, settings.mode):
                out = child.weight.shape[1 if type(child).__name__ == "Conv1D" else 0]
                dtype = torch.float32 if whole else child.weight.dtype
                activation = BOTTLENECKS[settings.mode]
                setattr(parent, own, Bottleneck(child, max(out // 16, 1), activation, dtype))
    return model


def train_for_certain(model: Any) -> None:
    """Training mode without the dice that LoHa and LoKr throw for each layer."""
    from peft.tuners.lycoris_utils import LycorisLayer

    for module in model.modules():
        if isinstance(module, LycorisLayer):
            module.training = False


def make_again(adapted: Any, own: set[int], dtype: torch.dtype | None) -> None:
    """Make what is beside the model's own weights once more, all but copies in `dtype` if given.

    That is peft's `autocast_adapter_dtype=False`. Deep copies of fake tensors have storages that
    change.
    """
    for name, module in adapted.named_modules():
        for key, p in list(module.named_parameters(recurse=False)):
            copied = "modules_to_save" in name
            if id(p) not in own and (copied or dtype is not None):
                again = torch.empty_like(p, dtype=p.dtype if copied else dtype)
                module.register_parameter(key, torch.nn.Parameter(again, p.requires_grad))


def add_adapter(model: Any, settings: Settings) -> Any:
    """Wrap the model with peft adapters, in fp32 as peft makes them over 16-bit weights."""
    from peft import get_peft_model

    if settings.mode in BOTTLENECKS:
        return add_bottlenecks(model, settings)
    config, own = adapter_config(model, settings), {id(p) for p in model.parameters()}
    answer_peft()
    # Everything is on the device already, and fake parameters cannot be moved in place.
    with mock.patch.object(torch.nn.Module, "to", lambda self, *_, **__: self):
        adapted = get_peft_model(model, config)
    for name, tokens in getattr(adapted, "prompt_tokens", {}).items():  # plain attributes
        adapted.prompt_tokens[name] = tokens.cpu()
    make_again(adapted, own, DTYPES[settings.dtype] if settings.adapter_dtype else None)
    for name, parameter in adapted.named_parameters():
        if settings.mode == "lora-fa" and "lora_A" in name:  # as `create_lorafa_optimizer` does
            parameter.requires_grad_(False)
    return adapted
