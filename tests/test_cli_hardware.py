"""`llmsize hardware`, and the options that say which machine is meant."""

import pytest

from llmsize.cli import run
from llmsize.cli.machines import Hardware, machine
from llmsize.errors import LLMSizeError, UndeterminedError
from llmsize.sources.detect import Device

MIB, GIB = 2**20, 2**30
TWO = [
    Device("NVIDIA GeForce RTX 4090", 24564 * MIB, 23000 * MIB, "NVML", "GPU-a"),
    Device("NVIDIA GeForce RTX 4090", 24564 * MIB, None, "NVML", "GPU-b"),
]


def test_devices_are_listed_with_their_presets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Total and free memory, the preset that knows the rates, and who said so."""
    unknown = Device("Radical 9000", GIB, None, "amdgpu")
    monkeypatch.setattr("llmsize.cli.hardware.devices", lambda: [TWO[0], unknown])
    assert run(["hardware", "--format", "csv"]) == 0
    out = capsys.readouterr().out
    assert "0: NVIDIA GeForce RTX 4090" in out
    assert str(24564 * MIB) in out
    assert "rtx-4090" in out
    assert "1: Radical 9000" in out


def test_no_gpu_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A computer without a GPU is told what to do instead, and nothing fails."""
    monkeypatch.setattr("llmsize.cli.hardware.devices", list)
    assert run(["hardware"]) == 0
    assert "no GPU found" in capsys.readouterr().out


def test_vram_means_what_it_says() -> None:
    """16GB is 16·10⁹ bytes; of a named card it is what the driver shows."""
    plain, card = machine(Hardware(vram=16 * 10**9, gpus=2)), machine(Hardware(gpu="t4"))
    assert plain and card
    assert (plain.usable.value, plain.devices) == (16 * 10**9, 2)
    assert card.usable.value == 15360 * MIB


def test_vram_corrects_the_memory_of_a_card() -> None:
    """A card that comes in several sizes keeps its rates."""
    found = machine(Hardware(gpu="rtx-3080", vram=12 * GIB))
    assert found and found.accelerator
    assert (found.usable.value, found.accelerator.name) == (12 * GIB, "rtx-3080-10gb")


def test_an_instance_is_its_accelerators() -> None:
    """A g5.12xlarge has four A10G (AWS)."""
    found = machine(Hardware(instance="g5.12xlarge", reserve=GIB))
    assert found and found.accelerator
    assert (found.devices, found.accelerator.name) == (4, "a10g")
    assert found.usable.value == 23028 * MIB - GIB


def test_no_option_is_no_machine() -> None:
    """Nothing is assumed where nothing is said."""
    assert machine(Hardware()) is None


def test_auto_takes_the_devices_of_this_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, or the first so many; more than there are is not answered."""
    monkeypatch.setattr("llmsize.sources.detect.devices", lambda: TWO)
    found = machine(Hardware(gpu="auto"))
    assert found and found.accelerator
    assert (found.devices, found.accelerator.name) == (2, "rtx-4090")
    one = machine(Hardware(gpu="auto", gpus=1))
    assert one and one.devices == 1
    with pytest.raises(UndeterminedError, match="2 found"):
        machine(Hardware(gpu="auto", gpus=3))


def test_auto_without_a_gpu_is_undetermined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 3: the question is sound, this computer cannot answer it."""
    monkeypatch.setattr("llmsize.sources.detect.devices", list)
    with pytest.raises(UndeterminedError, match="no GPU"):
        machine(Hardware(gpu="auto"))


@pytest.mark.parametrize(
    ("words", "hint"),
    [({"gpu": "rtx4091"}, "4090"), ({"instance": "g5.12xlrge"}, "g5.12xlarge"),
     ({"instance": "g5.xlarge", "gpus": 2}, "leave out"), ({"gpu": "\x1b[2J"}, "show")],
)  # fmt: skip
def test_mistakes_get_a_hint(words: dict[str, object], hint: str) -> None:
    """Unknown names get close ones, contradictions what to leave out."""
    with pytest.raises(LLMSizeError) as mistake:
        machine(Hardware(**words))  # type: ignore[arg-type]
    assert hint in mistake.value.hint
