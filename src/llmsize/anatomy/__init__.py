"""What a model is made of and does: its forward pass over symbolic tensors, and folds over it."""

from __future__ import annotations

from functools import lru_cache

from llmsize.anatomy.adapters import LoRA
from llmsize.anatomy.config import Config
from llmsize.anatomy.families import forward_of
from llmsize.anatomy.setting import Setting
from llmsize.anatomy.tape import Parameter
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError

__all__ = ["LoRA", "Parameter", "Setting", "Tensor", "Trace", "outlined", "run_forward", "traced"]


def run_forward(
    architecture: Architecture, setting: Setting, *, outline: bool = False, unrolled: bool = False
) -> tuple[Trace, Tensor]:
    """Run the model's forward pass once; the tape of it, and the loss or the logits.

    An `outline` runs one layer of each kind, which is enough for weights and caches; `unrolled`,
    every layer is run, which tells them apart.
    Raises `LLMSizeError` for a configuration that does not describe a model, and for a format that
    nothing is computed in.
    """
    _check_formats(setting)
    setting = _with_own_head(architecture, setting)
    adapter = setting.adapter
    trace = Trace(
        grad=setting.training,
        autocast=setting.autocast,
        checkpoint_saves=setting.checkpoint_saves,
        softmax_keeps_input=setting.softmax_keeps_input,
        family=architecture.family,
        setting=setting,
        outline=outline,
        unrolled=unrolled,
        batch=Dim(setting.batch, "batch"),
        sequence=Dim(setting.sequence + (adapter.longer if adapter else 0), "sequence"),
    )
    forward = forward_of(architecture.family)
    trace.enter(-1, "forward")
    if setting.keeps_graph and setting.training:
        trace.hold_previous()
    config = Config({"model_type": architecture.family, **architecture.config}, architecture.name)
    if adapter is not None:
        adapter.begin(trace, config)
    result = forward(trace, config)
    if adapter is not None and setting.training and setting.objective == "tokens":
        result = adapter.concluded(trace, result)
    if trace.prefixes is not None:
        trace.outputs = (*(trace.outputs or ()), *trace.prefixes.handed_out())
    trace.let_go(trace.held)
    return trace, result


def _with_own_head(architecture: Architecture, setting: Setting) -> Setting:
    """The setting for a head trained alone: a classifier's, or the embedding it is tied to."""
    trained = setting.trained or frozenset()
    if "head" not in trained or setting.separate_head:
        return setting
    roles = {weight.role for weight in traced(architecture).weights.values()}
    if setting.objective == "score" or "score" in roles:
        return setting._replace(trained=trained | {"score"})
    return setting if "head" in roles else setting._replace(trained=trained | {"embedding"})


def _check_formats(setting: Setting) -> None:
    """Raise `LLMSizeError` for tensors in a format of blocks: each is taken for elements alone."""
    adapted = setting.adapter.format if setting.adapter else None
    for format in (setting.format, setting.autocast, adapted):
        if format is not None and format.block_elements != 1:
            raise LLMSizeError(
                f"nothing is computed in `{format.name}`",
                hint="choose bf16, fp16 or fp32; frozen weights may be `quantized`",
            )


@lru_cache(maxsize=64)
def outlined(architecture: Architecture, setting: Setting) -> Trace:
    """One layer of each kind: enough for weights. Nothing may be changed in it.

    Raises `LLMSizeError` as `run_forward` does.
    """
    return run_forward(architecture, setting, outline=True)[0]


@lru_cache(maxsize=1024)  # more than there are presets: who goes through them asks twice
def traced(architecture: Architecture) -> Trace:
    """The model's weights and layers, from a pass of one token. Nothing may be changed in it."""
    return run_forward(architecture, Setting(), outline=True)[0]
