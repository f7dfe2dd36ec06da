"""`llmsize schema`: what the JSON documents look like."""

from __future__ import annotations

EXAMPLES = ("llmsize schema > llmsize.schema.json",)


def schema() -> str:
    """Print the JSON Schema of what every command writes with `--format json`."""
    import json

    from llmsize.answer import schema as of_documents

    return json.dumps(of_documents(), indent=2) + "\n"
