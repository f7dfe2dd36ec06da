"""How long fine-tuning takes: short samples keep a device waiting, so 6ND alone is too hopeful.

A step on one sample of a few hundred tokens takes as long as one of a thousand: the host cannot
launch the layers' kernels faster, and a quantized base is dequantized once per pass whatever the
length. Packing samples into full sequences, or larger micro-batches, removes that.
"""

from __future__ import annotations

from typing import Literal

from llmsize.term import Term, term

Method = Literal["full", "lora", "qlora"]

SOURCE = (
    "QwenLM/Qwen README.md at 03cd81f, Profiling of Memory and Speed: 51 runs on A100-SXM4-80G, "
    "batch 1, PyTorch 2.0, FlashAttention 2, DeepSpeed"
)
LAUNCH_SECONDS: dict[Method, float] = {"full": 0.0156, "lora": 0.005, "qlora": 0.0075}
"""Least seconds a layer takes forward and backward, however few the tokens: the flat part of the
table at 256 tokens. With full training ZeRO-3 gathers each layer, too."""
DEQUANTIZED_BYTES = 77
"""Bytes moved per parameter and step to dequantize a 4-bit base: 38 ps at 2039 GB/s."""


def step_seconds(
    method: Method,
    *,
    parameters: float,
    layers: int,
    tokens: float,
    rate: float,
    bandwidth: float,
) -> Term:
    """Seconds of one micro-batch of `tokens`, forward and backward, with recompute.

    `rate` is the FLOP/s one device reaches on long sequences, `bandwidth` its bytes/s. Recomputing
    the forward pass makes full training 8N a token, and 6N where the base is frozen. The optimizer
    is not counted: it runs once for many micro-batches.
    """
    flop = 8 if method == "full" else 6
    dequantized = DEQUANTIZED_BYTES if method == "qlora" else 0
    return term(
        "step",
        "max(layers * launch, flop * N * tokens / rate + dequantized * N / bandwidth)",
        unit="seconds", source=SOURCE, grade="fitted", layers=layers,
        launch=LAUNCH_SECONDS[method], flop=flop, N=parameters, tokens=tokens, rate=rate,
        dequantized=dequantized, bandwidth=bandwidth,
    )  # fmt: skip


def run_seconds(step: Term, *, samples: float, epochs: float, devices: int, batch: int = 1) -> Term:
    """Seconds for `epochs` over `samples`, each device taking `batch` of them in a `step`."""
    return term(
        "time", "ceil(samples * epochs / (devices * batch)) * step", unit="seconds",
        source=step.source, grade=step.grade,
        samples=samples, epochs=epochs, devices=devices, batch=batch, step=step.value,
    )  # fmt: skip
