"""The devices of this computer, asked of whatever knows them.

NVML, `nvidia-smi`, the Linux AMD driver and macOS are asked in that order, each within a time
limit; one that is missing, hangs, fails or prints nonsense knows no devices. Nothing is changed
and nothing is installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from llmsize.errors import UndeterminedError, printable
from llmsize.hardware import Accelerator, Machine, slug, visible_memory
from llmsize.quick_dataclasses import dataclass, field
from llmsize.term import fact
from llmsize.units import GIB, MIB

T = TypeVar("T")

TIME_LIMIT = 3.0
"""Seconds for each source; `nvidia-smi` needs about one when the driver has to wake up."""
MAX_OUTPUT = 64 * 1024
MAX_DEVICES = 1024
MAX_MEMORY = 2**50
AMD_VENDOR = "0x1002"

QUERY = (
    "nvidia-smi",
    "--query-gpu=index,uuid,memory.total,memory.free,name",
    "--format=csv,noheader,nounits",
)
SYSCTL = ("sysctl", "-n", "hw.memsize", "machdep.cpu.brand_string", "iogpu.wired_limit_mb")


@dataclass(frozen=True, slots=True)
class Device:
    """One device as its driver describes it."""

    title: str
    total: int | None
    """Bytes; unknown where the memory belongs to the host and the driver does not say."""
    free: int | None
    """Bytes that nothing holds now."""
    via: str
    """Who said so."""
    uuid: str = ""


def run(command: tuple[str, ...], limit: float = TIME_LIMIT) -> str:
    """The first 64 KiB that `command` prints within `limit` seconds; empty if it cannot run."""
    try:
        process = subprocess.Popen(  # noqa: S603 - fixed commands, no shell
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return ""
    output = _within(limit, lambda: process.stdout.read(MAX_OUTPUT) if process.stdout else b"", b"")
    process.kill()
    with suppress(subprocess.TimeoutExpired):
        process.wait(1)
    return output.decode("utf-8", "replace")


@dataclass(frozen=True)
class Outside:
    """What detection may ask; a test hands in its own."""

    run: Callable[[tuple[str, ...]], str] = run
    import_module: Callable[[str], Any] = import_module
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    drm: Path = Path("/sys/class/drm")
    platform: str = sys.platform
    limit: float = TIME_LIMIT + 1
    """Seconds for each source, so that `run` reaches its own limit first and cleans up."""


def devices(outside: Outside | None = None) -> list[Device]:
    """The devices that a job started here would see; an empty list if none is found."""
    outside = outside or Outside()
    for ask in (_nvml, _nvidia_smi, _amd, _macos):
        found: list[Device] = _within(outside.limit, partial(ask, outside), [])
        if found:
            return found[:MAX_DEVICES]
    return []


def _within(limit: float, ask: Callable[[], T], otherwise: T) -> T:
    """What `ask` returns within `limit` seconds; `otherwise` if it fails or takes longer.

    A thread, because a driver that hangs cannot be interrupted.
    """
    answers: list[T] = []

    def work() -> None:
        with suppress(Exception):
            answers.append(ask())

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit)
    return answers[0] if answers else otherwise


def _nvml(outside: Outside) -> list[Device]:
    """NVIDIA's management library through `nvidia-ml-py`, if that is installed."""
    nvml = outside.import_module("pynvml")
    nvml.nvmlInit()
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        found = [_nvml_device(nvml, handle) for handle in handles]
    finally:
        nvml.nvmlShutdown()
    return _visible(found, outside.environ.get("CUDA_VISIBLE_DEVICES"))


def _nvml_device(nvml: Any, handle: Any) -> Device:
    name, uuid = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
    total = free = None
    with suppress(nvml.NVMLError):  # unified memory is not reported
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    return Device(printable(_text(name)), total, free, "NVML", _text(uuid))


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _nvidia_smi(outside: Outside) -> list[Device]:
    found = []
    for line in outside.run(QUERY).splitlines():
        match = re.fullmatch(r"\s*\d{1,6}, *(GPU-[\w-]+), *([^,]+), *([^,]+), *(.+)", line)
        if match:
            uuid, total, free, name = match.groups()
            found.append(Device(printable(name), _mib(total), _mib(free), "nvidia-smi", uuid))
    return _visible(found, outside.environ.get("CUDA_VISIBLE_DEVICES"))


def _mib(text: str) -> int | None:
    """Bytes from a whole number of MiB; `[N/A]` is unknown."""
    return _bytes(text, MIB)


def _bytes(text: str, unit: int = 1) -> int | None:
    if not re.fullmatch(r"\d{1,18}", text.strip(), re.ASCII):
        return None
    value = int(text) * unit
    return value if value <= MAX_MEMORY else None


def _amd(outside: Outside) -> list[Device]:
    """The amdgpu driver's own files; no library is needed."""
    numbered = [(int(m[1]), place) for place in outside.drm.iterdir()
                if (m := re.fullmatch(r"card(\d{1,4})", place.name))]  # fmt: skip
    found = []
    for _, place in sorted(numbered):
        total = _bytes(_first_line(place / "device" / "mem_info_vram_total"))
        if total and _first_line(place / "device" / "vendor") == AMD_VENDOR:
            used = _bytes(_first_line(place / "device" / "mem_info_vram_used"))
            name = _first_line(place / "device" / "product_name") or "AMD GPU"
            free = None if used is None else max(total - used, 0)
            found.append(Device(printable(name), total, free, "amdgpu"))
    environ = outside.environ
    return _visible(found, environ.get("HIP_VISIBLE_DEVICES", environ.get("CUDA_VISIBLE_DEVICES")))


def _first_line(file: Path) -> str:
    with suppress(OSError), file.open("rb") as opened:
        return opened.readline(256).decode("utf-8", "replace").strip()
    return ""


def _macos(outside: Outside) -> list[Device]:
    """Apple silicon, whose GPU shares the memory; a raised wired limit is respected."""
    if outside.platform != "darwin":
        return []
    memory, brand, *rest = outside.run(SYSCTL).splitlines()
    installed = _bytes(memory)
    if not installed or not brand.startswith("Apple"):
        return []
    limit = _mib(rest[0]) if rest else None
    return [Device(printable(brand), limit or gpu_share(installed), None, "macOS")]


def gpu_share(installed: int) -> int:
    """Bytes of a Mac's memory that its GPU may use by default: 2/3 up to 36 GiB, 3/4 above."""
    return installed * 2 // 3 if installed <= 36 * GIB else installed * 3 // 4


def _visible(found: list[Device], wanted: str | None) -> list[Device]:
    """The devices that the variable leaves, by CUDA's rule: the first unknown one ends the list.

    https://docs.nvidia.com/cuda/cuda-c-programming-guide/#env-vars
    """
    if wanted is None:
        return found
    chosen: list[Device] = []
    for entry in (part.strip() for part in wanted.split(",")):
        if re.fullmatch(r"\d{1,6}", entry, re.ASCII):
            matches = found[int(entry) : int(entry) + 1]
        else:
            matches = [d for d in found if entry and d.uuid.startswith(entry)]
        if len(matches) != 1 or matches[0] in chosen:
            break
        chosen += matches
    return chosen


def as_machine(found: list[Device], accelerator: Accelerator | None) -> Machine:
    """The machine that the devices make; `accelerator` is the preset for them, if there is one.

    The driver's own total counts, and what others hold now is not taken off: `--reserve` does.
    Raises `UndeterminedError` for no devices and for devices that differ.
    """
    if not found:
        raise UndeterminedError(
            "no GPU was found on this computer",
            hint="name one with `--gpu rtx-4090`, or give its memory with `--vram 16GB`",
        )
    first = found[0]
    if any((device.title, device.total) != (first.title, first.total) for device in found):
        raise UndeterminedError(
            "this computer has different GPUs: " + ", ".join(device.title for device in found),
            hint="choose with `CUDA_VISIBLE_DEVICES=0`, or name one with `--gpu`",
        )
    if first.total is not None:
        memory = fact("visible memory", first.total, unit="bytes", source=first.via)
    elif accelerator is not None:
        memory = visible_memory(accelerator)
    else:
        raise UndeterminedError(
            f"the driver does not say how much memory `{first.title}` has",
            hint="give it with `--vram`",
        )
    return Machine(memory, len(found), accelerator)


def preset_name(device: Device) -> str:
    """The name under which a preset of this device would be found."""
    return slug(device.title)
