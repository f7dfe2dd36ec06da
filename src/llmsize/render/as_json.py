"""One JSON document, described by `llmsize schema`."""

from __future__ import annotations

import json

from llmsize.answer import Estimate, document
from llmsize.render import Style


def render(estimate: Estimate, style: Style) -> str:
    """The whole estimate, every formula and source included; bytes are whole numbers."""
    return json.dumps(document(estimate), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
