"""Tables of cosines and sines that engines hold for every position of a model."""

from dataclasses import replace
from typing import Any

import pytest

from llmsize import presets
from llmsize.architecture import Architecture
from llmsize.memory.serving.beside import scaled_positions

LONG = {"original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({}, 8192),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LONG}}, 8192),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 32_768),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 16_384),
        ({"rope_scaling": {"type": "yarn", "factor": 40, **LONG}}, 163_840),
        ({"rope_scaling": {"type": "longrope", **LONG}}, 12_288),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, 32_768),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8}}}, 65_536),
    ],
)  # fmt: skip
def test_stretched_angles_have_positions_of_their_own(
    config: dict[str, Any], positions: int
) -> None:
    """Each kind of scaling as get_rope of vLLM v0.19.0 makes its `cos_sin_cache`."""
    llama = presets.get(Architecture, "llama-3-8b")
    assert scaled_positions(replace(llama, config={**llama.config, **config})) == positions
