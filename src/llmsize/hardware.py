"""Accelerators, rented instances, and what of their memory a job can have."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llmsize.errors import LLMSizeError, UndeterminedError
from llmsize.formats import Format
from llmsize.quick_dataclasses import dataclass, field, replace
from llmsize.term import Term, fact, term, total
from llmsize.units import format_bytes

MAX_DEVICES = 1_000_000
RESIDENT_THREADS = {
    6.0: 2048, 6.1: 2048, 7.0: 2048, 7.5: 1024, 8.0: 2048, 8.6: 1536, 8.9: 1536, 9.0: 2048,
    12.0: 1536,
}  # fmt: skip
"""Compute capability → threads that a multiprocessor has room for at once (CUDA programming guide,
appendix on compute capabilities)."""
BUS = fact(
    "bus", 63 * 10**9, unit="B/s", source="PCI Express 5.0, 16 lanes, one direction",
    grade="formula",
)  # fmt: skip
"""The fastest bus between host and device that a card has today: a bound needs no slower one."""


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One product as its maker describes it; an absent number is unknown or not supported."""

    name: str
    title: str
    vendor: str
    generation: str
    """The chip's architecture, such as `Ada`."""
    memory_gb_label: int
    """The memory on the label, for searching and showing: neither exactly GB nor GiB."""
    source: str
    compute_capability: float | None = None
    """Of NVIDIA's chips: the version of their instructions, such as 8.9
    (https://developer.nvidia.com/cuda-gpus)."""
    multiprocessors: int | None = None
    """Of NVIDIA's chips: streaming multiprocessors of one device."""
    visible_mib: int | None = None
    """MiB that the driver reports, which is what a job can have."""
    bandwidth_gb_s: float | None = None
    """Memory bandwidth in 10⁹ bytes per second."""
    peak_tflops: Mapping[str, float] = field(default_factory=dict)
    """Dense peak by format in 10¹² operations per second, accumulated in fp32 or int32."""
    measured_matmul_tflops: float | None = None
    """The fastest 16-bit matrix product that was measured, in TFLOP/s (stas00/ml-engineering)."""
    interconnect: str = ""
    interconnect_gb_s: float | None = None
    """Both directions of one device together, in 10⁹ bytes per second."""
    tdp_watts: float | None = None
    released: str = ""
    """Year and month."""
    unified: bool = False
    """Whether the memory is shared with the host."""
    usable_share: tuple[int, int] | None = None
    """The part of a unified memory that the GPU may use by default: numerator, denominator."""
    devices: int = 1
    """Devices that software sees on one of these; its memory is divided evenly among them."""
    aws: str = ""
    """Amazon instances that have it, with the count."""
    aliases: tuple[str, ...] = ()
    """Other names, the driver's own among them (see `slug`)."""
    note: str = ""

    @property
    def resident_threads(self) -> int | None:
        """Threads that a device has room for at once, where its multiprocessors are known."""
        each, count = RESIDENT_THREADS.get(self.compute_capability or 0.0), self.multiprocessors
        return None if each is None or count is None else each * count


@dataclass(frozen=True, slots=True)
class Instance:
    """A machine to rent: which accelerator, and how many. Prices change, so none is kept."""

    name: str
    cloud: str
    count: int
    source: str
    accelerator: str = ""
    """The preset's name; empty for a card that has none."""
    memory_gb_label: int | None = None
    """Of a card without a preset."""
    title: str = ""
    aliases: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a job may use: equal devices and the bytes that each can give."""

    usable: Term
    """Bytes per device, after what is reserved."""
    devices: int = 1
    accelerator: Accelerator | None = None
    instance: Instance | None = None

    @property
    def title(self) -> str:
        """The machine in words: `2 × GeForce RTX 4090`."""
        memory = format_bytes(self.usable.value)
        what = self.accelerator.title if self.accelerator else memory
        if self.accelerator and self.usable.value != visible_memory(self.accelerator).value:
            what += f" with {memory}"
        if self.instance and not self.accelerator:
            what = self.instance.title
        name = f"{self.devices:,} × {what}" if self.devices > 1 else what
        return f"{self.instance.name} ({name})" if self.instance else name

    @property
    def total_bytes(self) -> int:
        """Bytes of all devices together."""
        return self.devices * int(self.usable.value)


def slug(device_name: str) -> str:
    """A driver's name for a device as presets spell it: `Tesla T4` → `t4`.

    `NVIDIA A100-SXM4-80GB` becomes `a100-sxm4-80gb`, which is an alias of a preset.
    """
    plain = re.sub(r"[^a-z0-9.+]+", "-", device_name.lower()).strip("-")
    return re.sub(r"^(nvidia-|amd-|intel-r-|intel-|geforce-|tesla-)+", "", plain)


def visible_memory(accelerator: Accelerator) -> Term:
    """Bytes of one device that a driver shows, and by which rule that is known."""
    if accelerator.visible_mib is not None:
        return term(
            "visible memory", "visible_mib * 2**20 // devices", unit="bytes",
            source=accelerator.source,
            visible_mib=accelerator.visible_mib, devices=accelerator.devices,
        )  # fmt: skip
    if accelerator.usable_share is not None:
        part, whole = accelerator.usable_share
        return term(
            "GPU share of unified memory", "label * 2**30 * part // whole", unit="bytes",
            source=accelerator.source, grade="assumed", note="the system's default limit",
            label=accelerator.memory_gb_label, part=part, whole=whole,
        )  # fmt: skip
    return term(
        "label × GiB", "label * 2**30 // devices", unit="bytes", source=accelerator.source,
        grade="assumed", note="only the label is known; cards are within 7 % of it",
        label=accelerator.memory_gb_label, devices=accelerator.devices,
    )  # fmt: skip


def machine(accelerator: Accelerator, *, count: int = 1) -> Machine:
    """`count` of one accelerator."""
    devices = _devices(count) * accelerator.devices
    return Machine(visible_memory(accelerator), devices, accelerator)


def plain_machine(memory: int, *, devices: int = 1) -> Machine:
    """Devices of which only the memory in bytes is known."""
    return Machine(fact("memory", memory, unit="bytes", source="given"), _devices(devices))


def rented(instance: Instance, accelerator: Accelerator | None) -> Machine:
    """The machine behind an instance; `accelerator` is the preset that the instance names."""
    if accelerator is not None:
        return replace(machine(accelerator, count=instance.count), instance=instance)
    if instance.memory_gb_label is None:
        raise UndeterminedError(
            f"the memory of `{instance.name}` is not known", hint="give it with `--vram`"
        )
    label = term(
        "label × GiB", "label * 2**30", unit="bytes", source=instance.source, grade="assumed",
        note="only the label is known", label=instance.memory_gb_label,
    )  # fmt: skip
    return Machine(label, instance.count, None, instance)


def reserving(machine: Machine, reserve: int) -> Machine:
    """The machine with `reserve` bytes of every device left to a desktop or to other processes.

    Raises `LLMSizeError` if nothing would be left.
    """
    if not reserve:
        return machine
    memory = machine.usable
    if reserve >= memory.value:
        raise LLMSizeError(
            f"nothing is left: {format_bytes(reserve)} reserved of {format_bytes(memory.value)}",
            hint="reserve less, or name a larger device",
        )
    kept = fact("reserved", -reserve, unit="bytes", source="given")
    return replace(machine, usable=total("usable memory", memory, kept))


def _devices(count: int) -> int:
    if not 1 <= count <= MAX_DEVICES:
        raise LLMSizeError(
            f"{count} devices", hint=f"the number of GPUs is from 1 to {MAX_DEVICES:,}"
        )
    return count


_RATED_AS = {"float32": "fp32", "fp8_e4m3": "fp8", "fp8_e5m2": "fp8", "uint8": "int8"}
"""Formats that share the rate of another."""

RATES = {"fp8": "fp8", "ct-fp8": "fp8", "torchao-float8": "fp8", "ct-w8a8": "int8",
         "llm-int8": "int8", "ct-nvfp4": "fp4", "nvfp4": "fp4"}  # fmt: skip
"""Beginning of a storage format's name → the rate its products run at where the card has it."""


def supports(accelerator: Accelerator, format: Format | str) -> bool:
    """Whether the accelerator has a published rate for products in this format."""
    return _rated(format) in accelerator.peak_tflops


def peak(accelerator: Accelerator, format: Format | str) -> Term:
    """Dense peak of one device for products in `format`, in FLOP/s.

    Raises `LLMSizeError` for a format that the accelerator has no rate for.
    """
    rated = _rated(format)
    tflops = accelerator.peak_tflops.get(rated)
    if tflops is not None:
        return _per_device(accelerator, f"dense {rated} peak", tflops, 10**12, "FLOP/s")
    if not accelerator.peak_tflops:
        raise UndeterminedError(
            f"no peak rate of `{accelerator.title}` is published",
            hint="name another accelerator, or give the rate yourself",
        )
    raise LLMSizeError(
        f"`{accelerator.title}` does not support {rated}: its {accelerator.generation} chip "
        f"has no published {rated} rate",
        hint=f"formats it multiplies: {', '.join(accelerator.peak_tflops)}",
    )


def bandwidth(accelerator: Accelerator) -> Term:
    """Memory bandwidth of one device in bytes/s. Raises `UndeterminedError` if unpublished."""
    if accelerator.bandwidth_gb_s is None:
        raise UndeterminedError(
            f"no memory bandwidth of `{accelerator.title}` is published",
            hint="name another accelerator",
        )
    return _per_device(accelerator, "memory bandwidth", accelerator.bandwidth_gb_s, 10**9, "B/s")


def _per_device(accelerator: Accelerator, name: str, rate: float, scale: int, unit: str) -> Term:
    return term(
        name, "rate * scale / devices", unit=unit, source=accelerator.source,
        rate=rate, scale=scale, devices=accelerator.devices,
    )  # fmt: skip


def training_format(accelerator: Accelerator) -> str:
    """The format one trains in: bf16 where there is one, else fp16, else fp32.

    Raises `LLMSizeError` for an accelerator that has none of them.
    """
    for name in ("bf16", "fp16", "fp32"):
        if supports(accelerator, name):
            return name
    raise UndeterminedError(
        f"no floating-point rate of `{accelerator.title}` is published",
        hint="name another accelerator",
    )


def _rated(format: Format | str) -> str:
    name = format if isinstance(format, str) else format.name
    return _RATED_AS.get(name, name)
