"""Which of a model's own weights are trained, where no adapter is."""

from __future__ import annotations

import re
from typing import Any

OWN_WEIGHTS = ("full", "bitfit", "norms", "head")
"""Ways to train weights of the model itself."""

LAYER = re.compile(r"\.(\d+)\.")


def freeze(model: Any, mode: str, layers: int) -> None:
    """Freeze all but what `mode` trains, and the first layers with the embeddings below them.

    What the model itself never trains (corrections of routers) stays as it is.
    """
    head = {id(p) for p in model.get_output_embeddings().parameters()} if mode == "head" else set()
    norms = {id(p) for m in model.modules() if "Norm" in type(m).__name__ for p in m.parameters()}
    below = {id(p) for m in embeddings(model) for p in m.parameters()} if layers else set()
    for name, parameter in model.named_parameters():
        trained = {
            "full": True,
            "bitfit": name.endswith("bias"),
            "norms": id(parameter) in norms,
            "head": id(parameter) in head,
        }[mode]
        index = LAYER.search(name)
        frozen = id(parameter) in below or (index is not None and int(index[1]) < layers)
        parameter.requires_grad_(parameter.requires_grad and trained and not frozen)


def embeddings(model: Any) -> list[Any]:
    """The embeddings of tokens and of positions."""
    import torch

    return [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
