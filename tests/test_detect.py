"""Detection with stand-ins for drivers: it finds, it respects limits, and it never fails."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmsize import presets
from llmsize.errors import UndeterminedError
from llmsize.hardware import Accelerator
from llmsize.sources.detect import Device, Outside, as_machine, devices, gpu_share, run

MIB, GIB = 2**20, 2**30

TWO_CARDS = """\
0, GPU-aaaa1111-0000, 24564, 23000, NVIDIA GeForce RTX 4090
1, GPU-bbbb2222-0000, 24564, 24100, NVIDIA GeForce RTX 4090
"""


def outside(output: str = "", **more: Any) -> Outside:
    """A computer without NVML and without an AMD card, where every command prints `output`."""
    settings = {
        "run": lambda command: output, "import_module": missing, "environ": {},
        "drm": Path("/nonexistent"), "platform": "linux",
    }  # fmt: skip
    return Outside(**{**settings, **more})


def missing(name: str) -> Any:
    raise ImportError(name)


class FakeNVML:
    """Two devices of `nvidia-ml-py`, one of them without a memory report."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return [b"Tesla T4", "NVIDIA GB10"][handle]

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if handle == 1:
            raise self.NVMLError
        return SimpleNamespace(total=15360 * MIB, free=15000 * MIB)


def test_nvml_is_asked_first() -> None:
    """The library's answer is taken before `nvidia-smi` is run; unreported memory is unknown."""
    found = devices(outside(TWO_CARDS, import_module=lambda name: FakeNVML()))
    assert [(d.title, d.total, d.free, d.via) for d in found] == [
        ("Tesla T4", 15360 * MIB, 15000 * MIB, "NVML"),
        ("NVIDIA GB10", None, None, "NVML"),
    ]


def test_nvidia_smi_gives_total_and_free() -> None:
    """Each line is a device, its memory in MiB."""
    found = devices(outside(TWO_CARDS))
    assert [(d.total, d.free) for d in found] == [
        (24564 * MIB, 23000 * MIB), (24564 * MIB, 24100 * MIB)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "seen"),
    [("0", ["GPU-aaaa1111-0000"]), ("1,0", ["GPU-bbbb2222-0000", "GPU-aaaa1111-0000"]),
     ("", []), ("-1", []), ("1,7,0", ["GPU-bbbb2222-0000"]), ("GPU-bbbb", ["GPU-bbbb2222-0000"]),
     ("0,0", ["GPU-aaaa1111-0000"]), ("GPU-", []), ("nonsense", [])],
)  # fmt: skip
def test_cuda_visible_devices_decides(wanted: str, seen: list[str]) -> None:
    """Indices and UUID prefixes choose, in order; the first one unknown ends the list."""
    found = devices(outside(TWO_CARDS, environ={"CUDA_VISIBLE_DEVICES": wanted}))
    assert [d.uuid for d in found] == seen


def amd_card(drm: Path, number: int, vendor: str = "0x1002") -> None:
    place = drm / f"card{number}" / "device"
    place.mkdir(parents=True)
    (place / "vendor").write_text(f"{vendor}\n")
    (place / "mem_info_vram_total").write_text(f"{24560 * MIB}\n")
    (place / "mem_info_vram_used").write_text(f"{560 * MIB}\n")
    (place / "product_name").write_text("Radeon RX 7900 XTX\n")


def test_amd_cards_are_read_from_the_driver(tmp_path: Path) -> None:
    """Cards of the AMD driver count; connectors and other vendors do not."""
    amd_card(tmp_path, 1)
    amd_card(tmp_path, 0, vendor="0x8086")
    (tmp_path / "card1-DP-1").mkdir()
    found = devices(outside(drm=tmp_path))
    assert found == [Device("Radeon RX 7900 XTX", 24560 * MIB, 24000 * MIB, "amdgpu")]


@pytest.mark.parametrize(
    ("limit", "usable"), [("0\n", 64 * GIB * 3 // 4), ("61440\n", 60 * GIB), ("", 48 * GIB)]
)
def test_macs_share_their_memory(limit: str, usable: int) -> None:
    """The default share counts unless `iogpu.wired_limit_mb` was raised."""
    printed = f"{64 * GIB}\nApple M4 Pro\n{limit}"
    found = devices(outside(printed, platform="darwin"))
    assert found == [Device("Apple M4 Pro", usable, None, "macOS")]


def test_an_intel_mac_has_no_gpu_of_this_kind() -> None:
    """Only Apple silicon shares its memory with the GPU."""
    printed = f"{64 * GIB}\nIntel(R) Core(TM) i7\n"
    assert devices(outside(printed, platform="darwin")) == []


def test_the_share_is_the_one_in_the_presets() -> None:
    """Detection and presets divide a Mac's memory by the same rule."""
    macs = [record for record in presets.every(Accelerator).values() if record.usable_share]
    assert macs
    for record in macs:
        part, whole = record.usable_share
        installed = record.memory_gb_label * GIB
        assert gpu_share(installed) == installed * part // whole


@pytest.mark.parametrize(
    "output",
    ["", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver",
     "\x00\xff garbage" * 1000, "0, GPU-1, -5, 3, x\n" * 3 + "a, b, c", "1\n2\n3",
     "0, GPU-1, " + "9" * 5000 + ", 1, x"],
)  # fmt: skip
def test_nonsense_is_no_memory(output: str) -> None:
    """Whatever a tool prints, no memory is made up and nothing is raised."""
    for platform in ("linux", "darwin"):
        assert all(d.total is None for d in devices(outside(output, platform=platform)))


def test_control_characters_of_a_driver_are_not_printed() -> None:
    """A device name from outside is shown escaped."""
    found = devices(outside("0, GPU-1, 1024, 1000, Evil\x1b[2J"))
    assert found[0].title == r"Evil\x1b[2J"


def test_a_driver_that_fails_is_silent() -> None:
    """An exception inside a driver's library means that it knows nothing."""

    def broken(name: str) -> Any:
        raise RuntimeError("driver/library version mismatch")

    assert devices(outside(import_module=broken)) == []


def test_a_driver_that_hangs_is_left_behind() -> None:
    """The time limit holds for a library call that never returns."""
    started = time.monotonic()
    hanging = outside(import_module=lambda name: time.sleep(5), limit=0.1)
    assert devices(hanging) == []
    assert time.monotonic() - started < 2


def script(tmp_path: Path, body: str) -> tuple[str, ...]:
    file = tmp_path / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return (str(file),)


def test_a_command_that_hangs_is_stopped(tmp_path: Path) -> None:
    """A tool that never ends, or whose child holds its output, costs the time limit only."""
    started = time.monotonic()
    assert run(script(tmp_path, "sleep 20"), limit=0.2) == ""
    assert time.monotonic() - started < 3


def test_a_command_that_floods_is_cut(tmp_path: Path) -> None:
    """At most 64 KiB of a tool's output are read."""
    assert len(run(script(tmp_path, "yes"))) == 64 * 1024


def test_a_missing_command_prints_nothing() -> None:
    """A tool that is not installed is no error."""
    assert run(("/nonexistent/nvidia-smi",)) == ""


def test_equal_devices_are_a_machine() -> None:
    """The driver's total counts, and the preset adds the rates."""
    found = devices(outside(TWO_CARDS))
    made = as_machine(found, presets.get(Accelerator, "rtx-4090"))
    assert (made.devices, made.usable.value) == (2, 24564 * MIB)


def test_a_preset_knows_what_the_driver_does_not_say() -> None:
    """Unreported unified memory comes from the preset, and is unknown without one."""
    spark = [Device("NVIDIA GB10", None, None, "NVML")]
    assert as_machine(spark, presets.get(Accelerator, "gb10")).usable.value == 128 * GIB
    with pytest.raises(UndeterminedError, match="does not say"):
        as_machine(spark, None)


@pytest.mark.parametrize(
    "found",
    [[], [Device("A", GIB, None, "x"), Device("B", GIB, None, "x")]],
)
def test_none_and_mixed_devices_are_not_guessed(found: list[Device]) -> None:
    """Without a device, or with different ones, the user says which to count with."""
    with pytest.raises(UndeterminedError):
        as_machine(found, None)
