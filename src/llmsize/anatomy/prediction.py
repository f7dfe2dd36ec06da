"""Layers that predict the tokens after the next one, which a checkpoint has behind its own.

transformers skips them, and vLLM and SGLang load them only to draft with.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from llmsize.anatomy.config import MOST
from llmsize.anatomy.parameters import hidden_size
from llmsize.anatomy.towers import Part
from llmsize.anatomy.trace import Trace

FIELDS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""Fields with the number of such layers."""

COPYING = ("deepseek_v3", "deepseek_v32", "glm4_moe")
"""Families whose prediction layers have an embedding and an output matrix of their own."""
SHARING = ("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")
"""Those that use the model's."""


def prediction_layers(config: Mapping[str, Any], family: str, trace: Trace) -> tuple[Part, ...]:
    """Each is a layer like the last one, a matrix that joins two hidden states, and three norms.

    DeepSeek-V3 technical report, arXiv:2412.19437, section 2.2; vLLM v0.19.0,
    model_executor/models/{deepseek_mtp,glm4_moe_mtp,qwen3_next_mtp}.py.
    """
    counts = [config.get(field) for field in FIELDS]
    layers = max((n for n in counts if type(n) is int and 0 < n <= MOST), default=0)
    if not layers:
        return ()
    name = f"{layers} multi-token-prediction layer{'s' if layers > 1 else ''}"
    if family not in (*COPYING, *SHARING):
        return (Part(name, None),)
    weights = trace.weights.values()
    last = max(index for weight in weights for index in weight.indices)
    hidden = hidden_size(trace)
    each = sum(prod(weight.shape) for weight in weights if last in weight.indices)
    each += 2 * hidden * hidden + 3 * hidden
    if family in COPYING:
        each += sum(prod(w.shape) for w in weights if w.role in ("embedding", "head"))
    return (Part(name, layers * each),)
