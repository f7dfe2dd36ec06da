"""Which of the GGUF models in a folder or repository is meant: often one, quantized many ways."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
"""A file of a model that is split."""
_SEPARATORS = "-."


def stem(name: str) -> str:
    """The name of a file's model: without the suffix and the number of the part."""
    match = PART.fullmatch(name)
    return match[1] if match else name.removesuffix(".gguf")


def gguf_models(names: Sequence[str]) -> dict[str, str]:
    """The first file of each model in GGUF, by its stem; projectors and calibration are none."""
    found = [n for n in sorted(names, reverse=True) if n.endswith(".gguf")]
    return {stem(n): n for n in found if "mmproj" not in n and "imatrix" not in n}


def among(models: Mapping[str, str], wanted: str) -> str:
    """The file that `wanted` means; the only one if nothing is wanted, empty if it is not clear."""
    if not wanted:
        return next(iter(models.values())) if len(models) == 1 else ""
    wanted = stem(wanted.lower().removesuffix(".gguf") + ".gguf")
    short = labels(models)
    ends = tuple(mark + wanted for mark in (*_SEPARATORS, "/"))
    found = [name for name in models if wanted in (short[name].lower(), name.lower())]
    found = found or [name for name in models if name.lower().endswith(ends)]
    return models[found[0]] if len(found) == 1 else ""


def labels(models: Mapping[str, str]) -> dict[str, str]:
    """What tells each model from the others: its name without folder and common beginning."""
    names = {model: model.rpartition("/")[2] for model in models}
    common = commonprefix(list(names.values()))  # noqa: RUF071 - of letters, as meant
    cut = max(common.rfind(mark) for mark in _SEPARATORS) + 1 if len(names) > 1 else 0
    return {model: name[cut:] for model, name in names.items()}
