"""`llmsize hardware`: the devices of this computer, and the preset that describes each."""

from __future__ import annotations

from llmsize import presets
from llmsize.answer import Absent, Cell, Estimate, Row, Table
from llmsize.errors import LLMSizeError
from llmsize.hardware import Accelerator
from llmsize.sources.detect import Device, devices, preset_name
from llmsize.term import fact

EXAMPLES = ("llmsize hardware", "llmsize hardware --format json")

COLUMNS = ("memory", "free now", "preset", "found by")


def hardware() -> Estimate:
    """The GPUs of this computer, as `--gpu auto` sees them. Finding none is an answer, too."""
    found = devices()
    rows = [Row(f"{number}: {d.title}", _cells(d)) for number, d in enumerate(found)]
    table = Table("devices", COLUMNS, tuple(rows), heading="device")
    return Estimate(
        "hardware",
        {},
        f"{len(found)} GPU{'s' if len(found) > 1 else ''} found" if found else "no GPU found",
        (table,) if found else (),
        notes=() if found else ("Name one with `--gpu rtx-4090`, or memory with `--vram 16GB`.",),
    )


def _cells(device: Device) -> dict[str, Cell]:
    return {
        "memory": _bytes("memory", device.total, device.via),
        "free now": _bytes("free", device.free, device.via),
        "preset": _preset(device),
        "found by": device.via,
    }


def _bytes(name: str, value: int | None, via: str) -> Cell:
    if value is None:
        return Absent("the driver does not say")
    return fact(name, value, unit="bytes", source=via)


def _preset(device: Device) -> Cell:
    try:
        return presets.get(Accelerator, preset_name(device)).name
    except LLMSizeError:
        return Absent("no preset has this name; its rates are unknown")
