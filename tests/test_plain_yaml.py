"""The plain part of YAML is read as PyYAML reads it, or left to PyYAML."""

import random
from pathlib import Path

import pytest

from llmsize import plain_yaml, presets
from llmsize.errors import LLMSizeError

SHIPPED = {
    str(file): file.read_text(encoding="utf-8")
    for folder in Path(presets.shipped()).iterdir()
    for file in folder.iterdir()
    if file.name.endswith(".yaml")
}

LEFT_TO_PYYAML = [
    "", "# only a comment", "a: &x 1", "a: *x", "a: !!str 1", "a: 'b'", "a: yes", "a: ~",
    "a: 0x1F", "a: 017", "a: 1e9", "a: 2026-01-31", "a: 12:30", "a: .5", "a: |\n  b", "a: 1\na: 2",
    "a:\n- b", "a: {b}", "a: [b", "a: b: c", "? a\n: b", "a:\tb", "a: b\n\nc: d", "--- a", "a: @b",
    'a: "\\n"', "a: [b #c\n d]", "a: b # c\n  d", "a: [b, {c: d}, e:f]",
]  # fmt: skip

DAMAGE = [*" \n#:\"',[]{}-10e\\&*!|>?_.~", "", "", "", " #", ": ", "- ", "\n  ", "\n- ", "yes"]


def read_by_pyyaml(text: str) -> object:
    """What PyYAML makes of it; an error stands for itself."""
    try:
        return presets.parse_yaml(text.encode(), "preset")
    except LLMSizeError as refused:
        return refused


@pytest.mark.parametrize("folder", sorted({path.rsplit("/", 2)[1] for path in SHIPPED}))
def test_shipped_presets_are_read_alike(folder: str) -> None:
    """Each has the value that PyYAML gives it, and hardly one needs PyYAML."""
    texts = {path: text for path, text in SHIPPED.items() if f"/{folder}/" in path}
    plain = {path: value for path, text in texts.items() if (value := plain_yaml.read(text))}
    for path, value in plain.items():
        assert repr(value) == repr(read_by_pyyaml(texts[path])), path
    assert len(plain) >= 0.95 * len(texts)


@pytest.mark.parametrize("text", LEFT_TO_PYYAML)
def test_the_rest_is_left(text: str) -> None:
    """Whatever has another meaning in YAML, or none, is not guessed."""
    assert plain_yaml.read(text) is None


def test_damaged_presets_are_read_alike_or_left() -> None:
    """A preset with a few characters changed has PyYAML's value, or is left to PyYAML."""
    draw = random.Random(20)  # noqa: S311
    small = sorted(text for text in SHIPPED.values() if len(text) < 1000)
    read = 0
    for _ in range(1500):
        text = draw.choice(small)
        for _ in range(draw.randint(1, 3)):
            start = draw.randrange(len(text))
            end = start + draw.choice((0, 0, 1, 1, 2, 5, 20))
            text = text[:start] + draw.choice(DAMAGE) + text[end:]
        if (plain := plain_yaml.read(text)) is not None:
            read += 1
            assert repr(plain) == repr(read_by_pyyaml(text)), text
    assert read > 300
