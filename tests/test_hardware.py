"""Accelerators and instances: every preset against the data table, and what a job can have."""

import csv
from pathlib import Path

import pytest

from llmsize import presets
from llmsize.errors import LLMSizeError, UndeterminedError
from llmsize.hardware import (
    Accelerator,
    Instance,
    bandwidth,
    machine,
    peak,
    plain_machine,
    rented,
    reserving,
    slug,
    supports,
    training_format,
    visible_memory,
)

REFERENCE = Path(__file__).parent / "reference"
ACCELERATORS = presets.every(Accelerator)
INSTANCES = presets.every(Instance)

COLUMNS = {
    "name": "title", "vendor": "vendor", "arch": "generation", "interconnect": "interconnect",
    "released": "released", "aws": "aws", "source": "source", "note": "note",
}  # fmt: skip
NUMBERS = {
    "memory_gb_label": "memory_gb_label", "visible_mib": "visible_mib",
    "bandwidth_gb_s": "bandwidth_gb_s", "interconnect_gb_s_per_gpu_total": "interconnect_gb_s",
    "tdp_w": "tdp_watts", "mamf_bf16_tflops": "measured_matmul_tflops",
}  # fmt: skip
PEAKS = {
    "fp32_tflops": "fp32", "fp16_dense_tflops": "fp16", "bf16_dense_tflops": "bf16",
    "fp8_dense_tflops": "fp8", "int8_dense_tops": "int8", "fp4_dense_tflops": "fp4",
    "int4_dense_tops": "int4",
}  # fmt: skip


def table(name: str) -> list[dict[str, str]]:
    with (REFERENCE / name).open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", table("accelerators.csv"), ids=lambda row: row["id"])
def test_an_accelerator_equals_its_row(row: dict[str, str]) -> None:
    """Every value is the data table's, and what the table leaves out is absent."""
    record = ACCELERATORS[row["id"]]
    for column, field in COLUMNS.items():
        assert getattr(record, field) == row[column]
    for column, field in NUMBERS.items():
        assert getattr(record, field) == (float(row[column]) if row[column] else None)
    assert record.unified == (row["unified"] == "yes")
    listed = {name: float(row[column]) for column, name in PEAKS.items() if row[column]}
    assert record.peak_tflops == listed


def test_every_accelerator_is_in_the_table() -> None:
    """The presets hold the table's rows and no others."""
    assert sorted(ACCELERATORS) == sorted(row["id"] for row in table("accelerators.csv"))


@pytest.mark.parametrize("kind", [Accelerator, Instance])
def test_a_name_means_one_thing(kind: type[Accelerator] | type[Instance]) -> None:
    """No alias is a name or another's alias."""
    records = presets.every(kind).values()
    said = [name for record in records for name in (record.name, *record.aliases)]
    assert len(said) == len(set(said))


@pytest.mark.parametrize("row", table("aws_instances.csv"), ids=lambda row: row["instance"])
def test_an_instance_equals_its_row(row: dict[str, str]) -> None:
    """The accelerator and the count are the data table's."""
    record = INSTANCES[row["instance"]]
    assert (record.accelerator, record.count) == (row["gpu_id"], int(row["count"]))


@pytest.mark.parametrize("name", INSTANCES)
def test_an_instance_has_memory(name: str) -> None:
    """An instance names an accelerator that exists, or says what memory its card has."""
    record = INSTANCES[name]
    accelerator = ACCELERATORS[record.accelerator] if record.accelerator else None
    assert rented(record, accelerator).usable.value > 0


@pytest.mark.parametrize(
    ("said", "meant"),
    [("4090", "rtx-4090"), ("rtx4090", "rtx-4090"), ("a100-80gb", "a100-sxm-80gb"),
     ("h100", "h100-sxm-80gb"), ("T4", "t4"), ("m2-max", "apple-m2-max-96gb"),
     ("4070-ti-super", "rtx-4070-ti-super")],
)  # fmt: skip
def test_people_say_it_shorter(said: str, meant: str) -> None:
    """The names people use are aliases."""
    assert presets.get(Accelerator, said).name == meant


@pytest.mark.parametrize(
    ("driver", "meant"),
    [("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Tesla T4", "t4"), ("NVIDIA A10G", "a10g"),
     ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"), ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
     ("NVIDIA H100 80GB HBM3", "h100-sxm-80gb"), ("NVIDIA H200", "h200-sxm-141gb"),
     ("Tesla V100-SXM2-16GB", "v100-sxm2-16gb"), ("NVIDIA RTX A6000", "rtx-a6000"),
     ("NVIDIA GeForce RTX 3080 Ti", "rtx-3080-ti"), ("AMD Instinct MI300X", "mi300x"),
     ("Apple M2 Max", "apple-m2-max-96gb")],
)  # fmt: skip
def test_drivers_say_it_longer(driver: str, meant: str) -> None:
    """The name that nvidia-smi or the system prints finds the preset."""
    assert presets.get(Accelerator, slug(driver)).name == meant


def test_visible_memory_is_what_the_driver_shows() -> None:
    """A T4 sold as 16 GB shows 15360 MiB, and a 24 GB RTX 4090 shows 24564 (nvidia-smi)."""
    assert visible_memory(ACCELERATORS["t4"]).value == 15360 * 2**20
    assert visible_memory(ACCELERATORS["rtx-4090"]).value == 24564 * 2**20


def test_a_label_alone_counts_in_gib_and_says_so() -> None:
    """Where no driver's figure is known, the label is taken in GiB, graded as an assumption."""
    memory = visible_memory(ACCELERATORS["gaudi3"])
    assert (memory.value, memory.grade, memory.name) == (128 * 2**30, "assumed", "label × GiB")


def test_apple_gives_the_gpu_a_part() -> None:
    """Two thirds of a unified memory up to 36 GB, three quarters above."""
    assert visible_memory(ACCELERATORS["apple-m3-pro-36gb"]).value == 24 * 2**30
    assert visible_memory(ACCELERATORS["apple-m3-max-128gb"]).value == 96 * 2**30


def test_a_board_of_two_is_two_devices() -> None:
    """An MI250 appears as two GPUs, each with half its memory and half its rates."""
    board = machine(ACCELERATORS["mi250"])
    assert (board.devices, board.usable.value) == (2, 65520 * 2**20)
    assert peak(ACCELERATORS["mi250"], "bf16").value == 181 * 10**12
    assert bandwidth(ACCELERATORS["mi250"]).value == 3277 * 10**9 / 2


@pytest.mark.parametrize(
    ("name", "format"), [("t4", "bf16"), ("v100", "bf16"), ("a100", "fp8"), ("tpu-v5e", "fp16")]
)
def test_an_unsupported_format_is_refused(name: str, format: str) -> None:
    """A format without a rate is an error that names the formats there are."""
    accelerator = presets.get(Accelerator, name)
    assert not supports(accelerator, format)
    with pytest.raises(LLMSizeError, match=f"does not support {format}") as refusal:
        peak(accelerator, format)
    assert "fp32" in refusal.value.hint or "bf16" in refusal.value.hint


def test_an_unpublished_rate_is_not_unsupported() -> None:
    """No rate of the M5 is known, so the question cannot be answered."""
    with pytest.raises(UndeterminedError, match="no peak rate"):
        peak(ACCELERATORS["apple-m5-32gb"], "fp16")


def test_training_uses_bf16_where_there_is_one() -> None:
    """A T4 trains in fp16, a TPU and an Ampere card in bf16."""
    formats = [training_format(ACCELERATORS[name]) for name in ("t4", "tpu-v4", "rtx-3090", "k80")]
    assert formats == ["fp16", "bf16", "bf16", "fp32"]


def test_reserved_memory_is_not_usable() -> None:
    """What a desktop holds is taken from every device, and no device is left empty."""
    gib = 2**30
    left = reserving(machine(ACCELERATORS["t4"], count=2), gib)
    assert (left.devices, left.usable.value) == (2, 14 * gib)
    with pytest.raises(LLMSizeError, match="nothing is left"):
        reserving(plain_machine(gib), gib)


@pytest.mark.parametrize("count", [0, -1, 10**9])
def test_a_machine_has_devices(count: int) -> None:
    """Zero, negative and absurd counts are refused."""
    with pytest.raises(LLMSizeError, match="devices"):
        plain_machine(2**30, devices=count)
