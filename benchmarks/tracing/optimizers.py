"""Optimizers by the names that the measurements give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Made = Callable[[Sequence[torch.Tensor]], torch.optim.Optimizer]


def _torch(name: str, **options: Any) -> Made:
    return lambda parameters: getattr(torch.optim, name)(parameters, lr=1e-4, **options)


def _transformers_adafactor(parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    """As the Trainer asks for it."""
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-4, scale_parameter=False, relative_step=False)


def _lion(parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
    from lion_pytorch import Lion

    return Lion(parameters, lr=1e-4)


def _bitsandbytes(name: str) -> Made:
    def made(parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        import bitsandbytes

        bitsandbytes.functional.create_dynamic_map = lambda **_: torch.zeros(256)  # of values
        return getattr(bitsandbytes.optim, name)(parameters, lr=1e-4)

    return made


OPTIMIZERS: dict[str, Made] = {
    "adamw_fused": _torch("AdamW", fused=True, foreach=False),
    "adamw_foreach": _torch("AdamW", foreach=True),
    "adamw_for-loop": _torch("AdamW", foreach=False),
    "amsgrad_foreach": _torch("AdamW", foreach=True, amsgrad=True),
    "sgd_foreach": _torch("SGD", foreach=True),
    "sgd-momentum_foreach": _torch("SGD", foreach=True, momentum=0.9),
    "adagrad_foreach": _torch("Adagrad", foreach=True),
    "rmsprop_foreach": _torch("RMSprop", foreach=True),
    "adafactor": _transformers_adafactor,
    "lion": _lion,
    "adamw-8bit": _bitsandbytes("AdamW8bit"),
    "lion-8bit": _bitsandbytes("Lion8bit"),
}
"""On CUDA, torch takes the foreach kind where none is asked for, and the Trainer fused AdamW."""
