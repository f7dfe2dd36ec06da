"""What libraries call their storage formats, and what llmsize does."""

from __future__ import annotations

import re

_TORCHAO = {
    "bnb llm.int8": "llm-int8",
    "torchao int8weightonly": "torchao-int8",
    "torchao float8weightonly": "torchao-float8",
    "torchao intxweightonly int4 g32": "torchao-intx-int4",
}


def preset_of(row: str) -> str:
    """The preset of a format, by the name that its library has for it."""
    name = row.lower().removeprefix("gguf tensor type ").removeprefix("torch.")
    if match := re.fullmatch(r"bnb (nf4|fp4) double_quant=(true|false)", name):
        return match[1] + ("-dq" if match[2] == "true" else "")
    if match := re.fullmatch(r"(gptq|awq|hqq) (\d)-bit (g\d+)( axis1)?", name):
        return f"{match[1]}-int{match[2]}-{match[3]}"
    if match := re.fullmatch(r"compressed-tensors (.*)", name):
        return "ct-" + match[1].replace("_", "-")
    return _TORCHAO.get(name, name.removeprefix("torchao "))
