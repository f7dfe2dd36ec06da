"""A model on the fake device with what trains it, and the parts of its steps."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.tracing.adapters import add_adapter
from benchmarks.tracing.freezing import OWN_WEIGHTS, freeze
from benchmarks.tracing.kernels import AttentionKernels
from benchmarks.tracing.models import DTYPES, Settings, classifies, instantiate, make_config
from benchmarks.tracing.optimizers import OPTIMIZERS
from benchmarks.tracing.quantized import quantize
from benchmarks.tracing.recomputing import recompute
from benchmarks.tracing.tracker import Peak, Tracker


@dataclass
class Run:
    """A model on the fake device with what trains it."""

    settings: Settings
    model: Any
    tracker: Tracker
    kernels: AttentionKernels
    optimizer: torch.optim.Optimizer | None = None
    masters: list[torch.Tensor] = field(default_factory=list)
    main_gradients: dict[torch.nn.Parameter, torch.Tensor] = field(default_factory=dict)
    """Buffers in fp32 that gradients are summed in, as Megatron-LM has them."""
    total_parameters: int = 0

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """Parameters that get gradients."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def receive(self, parameter: torch.nn.Parameter) -> None:
        """Take up a finished gradient."""
        self.tracker.mark_gradient(parameter)
        if (main := self.main_gradients.get(parameter)) is not None and parameter.grad is not None:
            main.add_(parameter.grad)
            parameter.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """What the backward pass has left."""
        own = [p.grad for p in self.trainable if p.grad is not None]
        return [*self.main_gradients.values()] or own


def build(settings: Settings) -> Run:
    """Put the model, adapters and gradient checkpointing in place."""
    config = make_config(settings.config)
    model = instantiate(config, dtype=DTYPES[settings.dtype], attn=settings.attn)
    total = sum(p.numel() for p in model.parameters())
    if settings.base:
        quantize(model, settings.base, computes_in(settings), upcast=settings.upcast)
    if settings.mode in OWN_WEIGHTS:
        freeze(model, settings.mode, settings.frozen_layers)
    else:
        model = add_adapter(model, settings)
    if settings.checkpoint:
        recompute(model, settings)
    kernels = AttentionKernels()
    torch.nn.functional.scaled_dot_product_attention = kernels
    tracker = Tracker(model, log=settings.log_ops)
    return Run(settings, model, tracker, kernels, total_parameters=total)


def computes_in(settings: Settings) -> torch.dtype:
    """What quantized layers multiply in."""
    return DTYPES[settings.dtype if settings.autocast == "none" else settings.autocast]


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """The optimizer with its states already there, on the weights or on fp32 copies of them."""
    parameters: list[torch.Tensor] = list(run.trainable)
    if run.settings.main_gradients:
        run.main_gradients = {p: torch.zeros_like(p, dtype=torch.float32) for p in run.trainable}
    if run.settings.master:
        parameters = run.masters = [p.detach().float().requires_grad_() for p in parameters]
    with torch.device("cpu"):  # where counters are unless they are asked for elsewhere
        optimizer = OPTIMIZERS[run.settings.optimizer](parameters)
    for p in parameters:
        p.grad = torch.empty_like(p)
    step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def make_batch(settings: Settings) -> dict[str, torch.Tensor]:
    """Token ids and labels, with a mask when padded; a classifier has one label a sequence."""
    shape = (settings.batch, settings.seq)
    names = ["input_ids", "labels"] + (["attention_mask"] if settings.padded else [])
    batch = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
    if classifies(settings.config):
        batch["labels"] = torch.zeros(settings.batch, dtype=torch.int64)
    return batch


def forward(run: Run, batch: dict[str, torch.Tensor]) -> Any:
    """The model's output with its loss, under autocast if asked."""
    enabled = run.settings.autocast != "none"
    dtype = DTYPES[run.settings.autocast] if enabled else torch.bfloat16
    with torch.autocast("cuda", dtype=dtype, enabled=enabled):
        return run.model(**batch, use_cache=False)


def saving(run: Run) -> contextlib.AbstractContextManager[Any]:
    """Log what autograd keeps, if an op log is wanted."""
    if run.tracker.log is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(run.tracker.pack, lambda x: x)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor among the optimizer's states."""
    return [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]


def step(optimizer: torch.optim.Optimizer) -> None:
    """Step, where new tensors are on the host unless they are asked for elsewhere."""
    with torch.device("cpu"):
        optimizer.step()


def optimizer_step(run: Run) -> None:
    """Step the weights, or their fp32 copies: gradients to fp32, step, copy back."""
    assert run.optimizer is not None
    pairs = list(zip(run.masters, run.trainable, strict=True)) if run.masters else []
    for master, parameter in pairs:
        main = run.main_gradients.get(parameter, parameter.grad)
        assert main is not None
        master.grad = main.float()
    step(run.optimizer)
    with torch.no_grad():
        for master, parameter in pairs:
            parameter.copy_(master)


def place(peak: Peak) -> str:
    """The op of a peak at the module it ran in."""
    return f"{peak.op}@{peak.module or '<root>'}"


def kernel_name(run: Run) -> str:
    """The attention kernels that ran."""
    return "+".join(sorted(run.kernels.used)) or run.settings.attn
