"""Memory, compute, time and loss of large language models, before anything is rented.

Every command that computes is a function with the same words and the same answer:

>>> import llmsize
>>> llmsize.estimate("llama-2-7b", dtype="fp16").headline[:33]
'llama-2-7b: 6.74B parameters in fp'
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

COMMANDS = (
    "advise", "curve", "estimate", "fits", "infer", "inspect", "loss", "optimal", "time", "train",
)  # fmt: skip
"""The commands that are functions of this package."""


def __getattr__(name: str) -> Callable[..., Any]:
    """A command, imported when it is first asked for: the package itself starts fast."""
    if name not in COMMANDS:
        raise AttributeError(f"module `llmsize` has no attribute `{name}`")
    command: Callable[..., Any] = import_module("llmsize.cli.asking").function(name)
    return command


def __dir__() -> list[str]:
    return sorted((*globals(), *COMMANDS))
