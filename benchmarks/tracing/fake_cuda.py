"""A CUDA device that does nothing, and what torch and transformers must not ask of fake tensors.

A CPU build of torch has no CUDA device guard, without which autograd refuses CUDA tensors, so a
stub is compiled once.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

CUDA_KERNELS = torch.library.Library("aten", "IMPL")

FAKE_CUDA_CPP = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>
using namespace c10;
struct FakeGuard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return Device(DeviceType::CUDA, 0); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0));
  }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
struct FakeHooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
static FakeGuard guard;
static impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);
extern "C" void install_fake_cuda() {
  static FakeHooks hooks;  // torch has made its own hooks object by now: swap its method table
  std::memcpy((void*)&at::detail::getCUDAHooks(), (void*)&hooks, sizeof(void*));
}
"""


def compile_fake_cuda() -> Path:
    """Compile the device stub for this torch version, once per machine."""
    library = Path(tempfile.gettempdir()) / f"fake_cuda_{torch.__version__}.so"
    if library.exists():
        return library
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "fake_cuda.cpp"
        source.write_text(FAKE_CUDA_CPP)
        target = source.with_suffix(".so")
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib"]
        command = ["g++", *flags, str(source), "-o", str(target), "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True, capture_output=True)
        target.replace(library)
    return library


def keep_cuda_kernels_whole() -> None:
    """Stop a CPU build from splitting ops that have a kernel of their own on CUDA.

    Such an op is composite where no kernel is registered for the device. The registered function
    is never run: fake tensors take over before it.
    """
    for name in ("silu_backward", "mish_backward", "_fused_rms_norm"):
        CUDA_KERNELS.impl(name, lambda *_: None, "CUDA")


def install_fake_cuda() -> None:
    """Make torch and transformers believe in one H100-like CUDA device."""
    if torch.version.cuda is not None:
        raise SystemExit("this script needs a CPU build of torch; use the real allocator instead")
    ctypes.CDLL(str(compile_fake_cuda())).install_fake_cuda()
    keep_cuda_kernels_whole()
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda._lazy_init = lambda: None
    cuda.is_bf16_supported = lambda *_, **__: True
    cuda.current_device = lambda: 0
    cuda.synchronize = lambda *_: None
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.is_current_stream_capturing = lambda: False


class FakeCudaMode(FakeTensorMode):
    """Fake tensors that never touch the device, although it claims to be available."""

    @property
    def avoid_device_init(self) -> bool:
        """Keep `torch.tensor(..., device="cuda")` and list indices off the device."""
        return True


def patch_data_dependence(*, padded: bool) -> None:
    """Answer the questions transformers asks of tensor values, which fake tensors do not have."""
    masking_utils: Any = importlib.import_module("transformers.masking_utils")
    import_utils: Any = importlib.import_module("transformers.utils.import_utils")
    import_utils.is_fake_tensor = lambda _: False
    masking_utils.find_packed_sequence_indices = lambda _: None
    masking_utils.fast_all = lambda _: not padded
    masking_utils._ignore_bidirectional_mask_sdpa = lambda mask, tokens, window=None: (
        (mask is None or not padded) and (window is None or tokens < window)
    )
    modeling_utils: Any = importlib.import_module("transformers.modeling_utils")
    modeling_utils.PreTrainedModel.warn_if_padding_and_no_attention_mask = lambda *_: None
    for name in ("adam", "adagrad"):
        optimizer: Any = importlib.import_module(f"torch.optim.{name}")
        optimizer._get_value = lambda _: 1.0


@contextlib.contextmanager
def faked(*, padded: bool, adapted: bool) -> Iterator[None]:
    """Everything within is on the fake device; its batches may be padded, its models adapted."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    patch_data_dependence(padded=padded)
    original = torch.nn.functional.scaled_dot_product_attention
    if adapted:
        importlib.import_module("peft")  # its import makes real tensors
    try:
        with FakeCudaMode(allow_non_fake_inputs=True), torch.device("cuda"):
            yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
