#!/usr/bin/env python3
"""Measure the memory of one training step or one generation step, byte by byte, without a GPU.

A Hugging Face model is built from its configuration on *fake* CUDA tensors: shapes, dtypes, views
and lifetimes are real, data and GPU are not. Every storage is counted from its creation to its
release, so a figure is what `torch.cuda.memory_allocated` would report. Not counted: the CUDA
context, cuBLAS workspaces, rounding to 512 B, caching and fragmentation, and temporaries inside
kernels except the two that `kernel_workspace` knows by rule.

Needs CPU builds of torch and transformers (and peft for LoRA) and a C++ compiler: a CPU build has
no CUDA device guard, without which autograd refuses CUDA tensors, so a stub is compiled once.

    python measure_trace.py config.json --batch 2 --seq 1024 --dtype bf16
    python measure_trace.py config.json --mode lora --lora-targets all-linear --ops ops.txt
    python measure_trace.py config.json --inference --logits-to-keep 1
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import logging
import math
import re
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
MLP_WIDTHS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LORA_MODES = ("lora", "rslora", "dora", "lora-fa")
WHOLE_RANK = {"hira": "HiraConfig", "vera": "VeraConfig", "loha": "LoHaConfig",
              "lokr": "LoKrConfig", "miss": "MissConfig"}  # fmt: skip
"""Methods of peft that are told their rank and targets, by the names of their configurations."""
OTHER_MODES = {"ia3": "IA3Config", "prompt": "PromptTuningConfig",
               "p-tuning": "PromptEncoderConfig", "prefix": "PrefixTuningConfig",
               "adaption-prompt": "AdaptionPromptConfig", "boft": "BOFTConfig",
               "trainable-tokens": "TrainableTokensConfig"}  # fmt: skip
"""Methods that are told something else, by the same."""
MODES = ("full", *LORA_MODES, *WHOLE_RANK, *OTHER_MODES)
QV_TARGETS = ("q_proj", "v_proj")
FUSED_QKV_TARGETS = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")
CHECKPOINTING = {"use_reentrant": False, "preserve_rng_state": False}
ENGINE_TENSOR_COUNT, ENGINE_STORAGE_COUNT = 4, 2
CUDA_KERNELS = torch.library.Library("aten", "IMPL")
LAYER_INDEX = re.compile(r"\.(\d+)(?:\.|$)")

# --- A CUDA device that does nothing -------------------------------------------------------------

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
    masking_utils._ignore_bidirectional_mask_sdpa = lambda mask, *_: mask is None or not padded
    adam: Any = importlib.import_module("torch.optim.adam")
    adam._get_value = lambda _: 1.0


# --- Scaled dot-product attention as a CUDA device would run it ----------------------------------


def choose_sdpa_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    causal: bool,
    gqa: bool,
) -> str:
    """Name the kernel that CUDA's `_fused_sdp_choice` would take on an Ampere or newer card."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    dims = {query.size(-1), key.size(-1), value.size(-1)}
    same_heads = query.size(1) == key.size(1) == value.size(1)
    same_batch = query.size(0) == key.size(0) == value.size(0)
    square = not causal or query.size(2) == key.size(2)
    flash = half and mask is None and len(dims) == 1 and max(dims) <= 256 and square
    if flash and same_batch and (same_heads or gqa):
        return "flash"
    alignment = 8 if half else 4
    aligned = query.size(-1) == key.size(-1) and all(d % alignment == 0 for d in dims)
    return "efficient" if aligned and same_heads and same_batch else "math"


def additive_mask(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Turn a boolean mask into an additive one, as `convert_boolean_attn_mask` does."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.scalar_tensor(0.0, dtype=dtype, device=mask.device)
    minus_inf = torch.scalar_tensor(-math.inf, dtype=dtype, device=mask.device)
    return torch.where(mask, zero, minus_inf)


def expand_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Broadcast the mask to all heads, padding its last dimension to 16 elements if need be."""
    last = mask.size(-1)
    if last % 16:
        mask = F.pad(mask, (0, 16 - last % 16))[..., :last]
    return mask.expand(query.size(0), query.size(1), query.size(2), key.size(2))


def sdpa_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> torch.Tensor:
    """Run the flash kernel, with head dimensions padded to a multiple of 8."""
    size = query.size(-1)
    options["scale"] = options["scale"] or 1 / math.sqrt(size)
    if size % 8:
        query, key, value = (F.pad(x, (0, 8 - size % 8)) for x in (query, key, value))
    out: torch.Tensor = aten._scaled_dot_product_flash_attention(query, key, value, **options)[0]
    return out[..., :size] if size % 8 else out


class AttentionKernels:
    """Stands in for `scaled_dot_product_attention` and remembers which kernels ran."""

    def __init__(self) -> None:
        self.used: Counter[str] = Counter()

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled("cuda"):
            query, key, value, attn_mask = autocast_arguments([query, key, value, attn_mask])
            with torch.autocast("cuda", enabled=False):
                return self(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        kernel = choose_sdpa_kernel(query, key, value, attn_mask, causal=is_causal, gqa=enable_gqa)
        self.used[kernel] += 1
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        if kernel == "flash":
            return sdpa_flash(query, key, value, **options)
        mask = additive_mask(attn_mask, query.dtype)
        if kernel == "math":
            result: torch.Tensor = aten._scaled_dot_product_attention_math(
                query, key, value, mask, **options, enable_gqa=enable_gqa
            )[0]
            return result
        mask = None if mask is None else expand_mask(mask, query, key)
        grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        out: torch.Tensor = aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, grad, **options
        )[0]
        return out


def autocast_arguments(tensors: list[Any]) -> list[Any]:
    """Cast fp32 tensors to autocast's dtype, as its rule for attention does."""
    dtype = torch.get_autocast_dtype("cuda")
    return [x.to(dtype) if x is not None and x.dtype == torch.float32 else x for x in tensors]


def kernel_workspace(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a kernel allocates and frees within one call, where a rule is known.

    Flash backward: an fp32 accumulator of dq over the sequence and head size rounded up, row
    sums, and dk and dv over all query heads when KV heads are shared. Safe softmax: the plain
    softmax and a boolean mask beside its result.
    """
    if func is aten._scaled_dot_product_flash_attention_backward.default:
        return flash_backward_workspace(*args[1:4])
    if func is aten._safe_softmax.default:
        scores: torch.Tensor = args[0]
        return scores.numel() * (scores.element_size() + 1)
    return 0


def flash_backward_workspace(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """Workspace of flash-attention 2's backward (csrc/flash_attn/flash_api.cpp, `mha_bwd`)."""
    batch, heads, seq, size = query.shape
    rows = -(-seq // 128) * 128
    columns = -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64
    accumulator = batch * heads * rows * (columns + 1) * 4
    if key.size(1) == heads:
        return accumulator
    return accumulator + 2 * batch * key.size(2) * heads * size * query.element_size()


# --- Tracking storages ---------------------------------------------------------------------------


@dataclass(slots=True)
class Block:
    """One storage on the fake device."""

    number: int
    nbytes: int
    module: str
    kind: str = "temp"
    amp_copy: bool = False
    label: str = ""
    reference: Any = None


@dataclass(slots=True)
class Peak:
    """The highest total of one phase and where it was."""

    total: int = 0
    op: str = ""
    module: str = ""
    grads: int = 0
    workspace: int = 0


@dataclass(slots=True)
class OpRecord:
    """One line of the op log."""

    phase: str
    module: str
    name: str
    new: list[str]
    freed: list[int]
    freed_bytes: int
    live: int
    workspace: int
    sequence: int


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    """The storage that backs a tensor."""
    return tensor.untyped_storage()


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in an operator's result."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def describe(tensor: torch.Tensor) -> str:
    """Short dtype and shape, like `bf16[2, 1024]`."""
    name = str(tensor.dtype).removeprefix("torch.")
    short = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "int64": "i64"}
    return f"{short.get(name, name)}{list(tensor.shape)}"


def accumulates_in_place(first: Any, second: Any) -> bool:
    """Tell whether autograd would sum two gradients into the first of them.

    Real tensors are reused when the engine holds the last reference to a dense one that is no
    view (torch/csrc/autograd/input_buffer.cpp, `accumulate`); it never reuses fake ones. The
    counts are those of a tensor which, apart from this call, only the engine refers to.
    """
    if torch.is_grad_enabled() or not torch.is_tensor(second) or first.shape != second.shape:
        return False
    storage_count = torch._C._storage_Use_Count(storage_of(first)._cdata)
    sole = first._use_count() == ENGINE_TENSOR_COUNT and storage_count == ENGINE_STORAGE_COUNT
    stock = sole and not first._is_view()
    return stock and bool(is_non_overlapping_and_dense_or_false(first))


class Tracker(TorchDispatchMode):
    """Counts every storage on the fake device from its first appearance to its release."""

    def __init__(self, model: torch.nn.Module, *, log: bool = False) -> None:
        super().__init__()
        self.live = 0
        self.grad_bytes = 0
        self.phase = "setup"
        self.peaks: dict[str, Peak] = {}
        self.blocks: dict[int, Block] = {}
        self.log: list[OpRecord] | None = [] if log else None
        self.saved: dict[int, list[str]] = {}
        self.saved_blocks: set[int] = set()
        self.count = 0
        self.freed: list[tuple[int, int]] = []
        self.stack: list[str] = []
        self.sequence_modules: dict[int, str] = {}
        self.names = {id(module): name for name, module in model.named_modules()}

    # Module paths

    def hooks(self) -> contextlib.ExitStack:
        """Follow which module is running, for as long as the returned stack is open."""
        stack = contextlib.ExitStack()
        stack.callback(register_module_forward_pre_hook(self._enter).remove)
        stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
        return stack

    def _enter(self, module: torch.nn.Module, _: Any) -> None:
        if self.phase == "bwd":  # recomputing on autograd's thread, which has its own flag
            torch._C._set_only_lift_cpu_tensors(True)
        self.stack.append(self.names.get(id(module), self.stack[-1] if self.stack else ""))

    def _leave(self, _module: torch.nn.Module, _args: Any, _result: Any) -> None:
        self.stack.pop()

    def _where(self) -> tuple[str, int]:
        """The running module and, in the forward, the autograd sequence number."""
        sequence = -1
        if self.phase == "fwd":
            sequence = torch._C._autograd._get_sequence_nr() - 1
            module = self.stack[-1] if self.stack else ""
            self.sequence_modules.setdefault(sequence, module)
            return module, sequence
        if self.stack:
            return self.stack[-1], sequence
        node = torch._C._current_autograd_node()
        if node is None:
            return "", sequence
        number = node._sequence_nr()
        return self.sequence_modules.get(number, node.name()), number

    # Blocks

    def add(self, tensor: torch.Tensor, kind: str, module: str = "") -> Block | None:
        """Count the tensor's storage unless it is known or not on the device."""
        if tensor.device.type != "cuda":
            return None
        storage = storage_of(tensor)
        key = storage._cdata
        if key in self.blocks:
            return None
        block = Block(self.count, storage.nbytes(), module, kind, label=describe(tensor))
        self.count += 1

        def release(_: Any) -> None:
            self._release(key)

        block.reference = weakref.ref(storage, release)
        self.blocks[key] = block
        self.live += block.nbytes
        return block

    def _release(self, key: int) -> None:
        block = self.blocks.pop(key)
        self.live -= block.nbytes
        if block.kind == "grad":
            self.grad_bytes -= block.nbytes
        if self.log is not None:
            self.freed.append((block.number, block.nbytes))

    def add_all(self, tensors: Iterable[torch.Tensor], kind: str) -> int:
        """Count existing tensors as static and return the bytes they take, each storage once."""
        before = self.live
        for tensor in tensors:
            self.add(tensor, kind)
        return self.live - before

    def mark_gradient(self, parameter: torch.nn.Parameter) -> None:
        """Call a parameter's finished gradient by its name from now on."""
        if parameter.grad is None:
            return
        self.add(parameter.grad, "temp")
        block = self.blocks[storage_of(parameter.grad)._cdata]
        if block.kind != "grad":
            block.kind = "grad"
            self.grad_bytes += block.nbytes

    # Phases and peaks

    def start(self, phase: str) -> None:
        """Begin a phase; what is alive now is its first peak."""
        self.phase = phase
        self.peaks[phase] = Peak(self.live, grads=self.grad_bytes)

    def _note_peak(self, name: str, module: str, workspace: int) -> None:
        peak = self.peaks.get(self.phase)
        if peak is None or self.live + workspace <= peak.total:
            return
        peak.total = self.live + workspace
        peak.op, peak.module = name, module
        peak.grads, peak.workspace = self.grad_bytes, workspace

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        module, sequence = self._where()
        workspace = kernel_workspace(func, args)
        in_place = self.phase == "bwd" and func is aten.add.Tensor and accumulates_in_place(*args)
        out = args[0] if in_place else func(*args, **(kwargs or {}))
        new = [b for t in tensors_in(out) if (b := self.add(t, "temp", module)) is not None]
        name = str(func).removeprefix("aten.")
        if new and func is aten._to_copy.default:
            source = self.blocks.get(storage_of(args[0])._cdata)
            new[0].amp_copy = source is not None and source.kind == "param"
        self._note_peak(name, module, workspace)
        if self.log is not None and not name.startswith("prim."):
            self._write(name, module, new, workspace, sequence)
        return out

    def _write(
        self, name: str, module: str, new: list[Block], workspace: int, sequence: int
    ) -> None:
        assert self.log is not None
        freed, self.freed = self.freed, []
        self.log.append(
            OpRecord(
                phase=self.phase,
                module=module,
                name=name,
                new=[f"#{b.number} {b.label} {b.nbytes}" for b in new],
                freed=[number for number, _ in freed],
                freed_bytes=sum(size for _, size in freed),
                live=self.live,
                workspace=workspace,
                sequence=sequence,
            )
        )

    # Tensors saved for backward, for the op log

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that autograd keeps, each storage once."""
        sequence = torch._C._autograd._get_sequence_nr() - 1
        block = self.blocks.get(storage_of(tensor)._cdata)
        number = block.number if block is not None else self.count
        known = block is not None and (block.kind != "temp" or number in self.saved_blocks)
        self.saved_blocks.add(number)
        kind = "" if block is None or block.kind == "temp" else f" {block.kind}"
        mark = "" if not known else (kind or " again")
        text = f"#{number} {describe(tensor)}{mark}"
        self.saved.setdefault(sequence, []).append(text)
        return tensor

    def log_text(self) -> str:
        """The op log: one line per op, with what autograd keeps after the op it is kept for."""
        assert self.log is not None
        first_op: dict[int, int] = {}
        for i, r in enumerate(self.log):
            if r.phase == "fwd":
                first_op.setdefault(r.sequence, i)
        lines = ["phase module op new[#id dtype[shape] bytes] freed-before[ids = bytes] live"]
        for i, r in enumerate(self.log):
            parts = [r.phase, r.module or "-", r.name]
            parts.append("new[" + "; ".join(r.new) + "]")
            if r.freed:
                ids = " ".join(f"#{n}" for n in r.freed)
                parts.append(f"freed[{ids} = {r.freed_bytes}]")
            if r.workspace:
                parts.append(f"workspace={r.workspace}")
            parts.append(f"live={r.live}")
            lines.append("  ".join(parts))
            if r.phase == "fwd" and first_op[r.sequence] == i and r.sequence in self.saved:
                lines.append("        saves " + "; ".join(self.saved[r.sequence]))
        return "\n".join(lines) + "\n"


# --- The run -------------------------------------------------------------------------------------


@dataclass
class Settings:
    """What to measure; field names follow the columns of the result."""

    config: dict[str, Any]
    mode: str = "full"
    batch: int = 2
    seq: int = 1024
    dtype: str = "bf16"
    autocast: str = "none"
    attn: str = "sdpa"
    checkpoint: bool = False
    padded: bool = False
    grad_accum: int = 1
    keep_outputs: bool = False
    lora_r: int = 16
    lora_targets: str = "all-linear"
    lora_dropout: float = 0.0
    modules_to_save: list[str] = field(default_factory=list)
    virtual_tokens: int = 20
    optimizer: str = "adamw_fused"
    master: bool = False
    logits_to_keep: int = 0
    log_ops: bool = False


@dataclass
class Run:
    """A model on the fake device with what trains it."""

    settings: Settings
    model: Any
    tracker: Tracker
    kernels: AttentionKernels
    optimizer: torch.optim.Optimizer | None = None
    masters: list[torch.Tensor] = field(default_factory=list)
    total_parameters: int = 0

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        """Parameters that get gradients."""
        return [p for p in self.model.parameters() if p.requires_grad]


def make_config(values: dict[str, Any]) -> Any:
    """A transformers configuration from its published fields."""
    from transformers import AutoConfig

    rest = {k: v for k, v in values.items() if k != "model_type"}
    return AutoConfig.for_model(values["model_type"], **rest)


ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert")
"""Types that the masked-language-model head is for, unless `architectures` names a classifier."""


def classifies(config: dict[str, Any]) -> bool:
    """Whether a configuration asks for a classifier's head."""
    return (config.get("architectures") or [""])[0].endswith("ForSequenceClassification")


def model_class(config: Any) -> Any:
    """The Auto class with the head that the configuration asks for."""
    import transformers

    if classifies({"architectures": config.architectures}):
        return transformers.AutoModelForSequenceClassification
    if config.model_type in ENCODERS:
        return transformers.AutoModelForMaskedLM
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def instantiate(config: Any, *, dtype: torch.dtype, attn: str) -> Any:
    """Build the model class with uninitialised weights, tied as configured."""
    from transformers.initialization import no_init_weights

    factory = model_class(config)
    with no_init_weights():
        model = factory.from_config(config, dtype=dtype, attn_implementation=attn)
    model.tie_weights()
    return model


def lora_target_modules(model: Any, targets: str) -> str | list[str]:
    """Names for peft: q and v, or the fused projection; or every linear but the head."""
    if targets == "all-linear":
        return targets
    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    if names.issuperset(QV_TARGETS):
        return list(QV_TARGETS)
    return [name for name in FUSED_QKV_TARGETS if name in names]


def adapter_config(model: Any, settings: Settings) -> Any:
    """The peft configuration of a method, with the method's own defaults."""
    import peft

    mode, task = settings.mode, task_type(model.config, settings)
    targets = lora_target_modules(model, settings.lora_targets)
    if mode in LORA_MODES:
        return peft.LoraConfig(
            r=settings.lora_r,
            lora_alpha=2 * settings.lora_r,
            lora_dropout=settings.lora_dropout,
            target_modules=targets,
            modules_to_save=settings.modules_to_save or None,
            use_dora=mode == "dora",
            use_rslora=mode == "rslora",
            task_type=task,
        )
    if mode in WHOLE_RANK:
        kind = getattr(peft, WHOLE_RANK[mode])
        return kind(task_type=task, r=settings.lora_r, target_modules=targets)
    tokens = settings.virtual_tokens
    virtual = {"num_virtual_tokens": tokens}
    width, layers = first(model.config, "hidden_size"), layer_count(model.config)
    told: dict[str, dict[str, Any]] = {
        "ia3": {}, "prompt": virtual, "prefix": virtual, "boft": {"target_modules": targets},
        "p-tuning": virtual | {"encoder_hidden_size": width},
        "adaption-prompt": {"adapter_len": tokens, "adapter_layers": layers},
        "trainable-tokens": {"token_indices": list(range(tokens))},
    }  # fmt: skip
    return getattr(peft, OTHER_MODES[mode])(task_type=task, **told[mode])


def task_type(config: Any, settings: Settings) -> str:
    """What peft calls the job of the model's head."""
    if classifies(settings.config):
        return "SEQ_CLS"
    if config.model_type in ENCODERS:
        return "FEATURE_EXTRACTION"  # which peft wraps without asking for more
    return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"


def answer_peft() -> None:
    """Answer the questions peft asks of tensor values, which fake tensors do not have."""
    from peft.tuners.boft.layer import BOFTLayer
    from peft.tuners.loha import layer as loha

    cast("Any", BOFTLayer).perm2mat = lambda _, indices: torch.zeros(len(indices), len(indices))
    loha.make_weight = lambda *factors, scale: loha.HadaWeight.apply(*factors, scale.cpu())


def train_for_certain(model: Any) -> None:
    """Training mode without the dice that LoHa and LoKr throw for each layer."""
    from peft.tuners.lycoris_utils import LycorisLayer

    for module in model.modules():
        if isinstance(module, LycorisLayer):
            module.training = False


def add_adapter(model: Any, settings: Settings) -> Any:
    """Wrap the model with peft adapters, in fp32 as peft makes them over 16-bit weights."""
    from peft import get_peft_model

    config = adapter_config(model, settings)
    answer_peft()
    # Everything is on the device already, and fake parameters cannot be moved in place.
    with mock.patch.object(torch.nn.Module, "to", lambda self, *_, **__: self):
        adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if settings.mode == "lora-fa" and "lora_A" in name:  # as `create_lorafa_optimizer` does
            parameter.requires_grad_(False)
    return adapted


def build(settings: Settings) -> Run:
    """Put the model, adapters and gradient checkpointing in place."""
    config = make_config(settings.config)
    model = instantiate(config, dtype=DTYPES[settings.dtype], attn=settings.attn)
    total = sum(p.numel() for p in model.parameters())
    if settings.mode != "full":
        model = add_adapter(model, settings)
    if settings.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
    kernels = AttentionKernels()
    torch.nn.functional.scaled_dot_product_attention = kernels
    tracker = Tracker(model, log=settings.log_ops)
    return Run(settings, model, tracker, kernels, total_parameters=total)


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """AdamW with its states already there, on the weights or on fp32 copies of them."""
    parameters: list[torch.Tensor] = list(run.trainable)
    if run.settings.master:
        parameters = run.masters = [p.detach().float().requires_grad_() for p in parameters]
    fused = run.settings.optimizer == "adamw_fused"
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=fused, foreach=not fused)
    for p in parameters:
        p.grad = torch.empty_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def make_batch(settings: Settings) -> dict[str, torch.Tensor]:
    """Token ids and labels, with a mask when padded; a classifier has one label a sequence."""
    shape = (settings.batch, settings.seq)
    names = ["input_ids", "labels"] + (["attention_mask"] if settings.padded else [])
    batch = {name: torch.zeros(shape, dtype=torch.int64) for name in names}
    if classifies(settings.config):
        batch["labels"] = torch.zeros(settings.batch, dtype=torch.int64)
    return batch


def forward(run: Run, batch: dict[str, torch.Tensor]) -> Any:
    """The model's output with its loss, under autocast if asked."""
    enabled = run.settings.autocast != "none"
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=enabled):
        return run.model(**batch, use_cache=False)


def saving(run: Run) -> contextlib.AbstractContextManager[Any]:
    """Log what autograd keeps, if an op log is wanted."""
    if run.tracker.log is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(run.tracker.pack, lambda x: x)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor among the optimizer's states."""
    return [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]


def optimizer_step(run: Run) -> None:
    """Step the weights, or their fp32 copies: gradients to fp32, step, copy back."""
    assert run.optimizer is not None
    pairs = list(zip(run.masters, run.trainable, strict=True)) if run.masters else []
    for master, parameter in pairs:
        assert parameter.grad is not None
        master.grad = parameter.grad.float()
    run.optimizer.step()
    with torch.no_grad():
        for master, parameter in pairs:
            parameter.copy_(master)


def register_static(run: Run, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Count what is there before the step."""
    add = run.tracker.add_all
    assert run.optimizer is not None
    return {
        "param_bytes": add(run.model.parameters(), "param"),
        "master_bytes": add(run.masters, "master"),
        "buffer_bytes": add(run.model.buffers(), "buffer"),
        "optim_bytes": static_optimizer_bytes(run),
        "input_bytes": add(batch.values(), "input"),
    }


def static_optimizer_bytes(run: Run) -> int:
    """Count the optimizer states (foreach AdamW keeps its step counters on the CPU)."""
    assert run.optimizer is not None
    return run.tracker.add_all(optimizer_tensors(run.optimizer), "optim")


def forward_figures(tracker: Tracker, layers: int) -> dict[str, int]:
    """What is alive at the end of the forward, and which part each layer has."""
    per_layer: Counter[int] = Counter()
    total = copies = 0
    for block in tracker.blocks.values():
        if block.kind != "temp":
            continue
        total += block.nbytes
        if block.amp_copy:
            copies += block.nbytes
        elif match := LAYER_INDEX.search(block.module):
            per_layer[int(match[1])] += block.nbytes
    inside = sum(per_layer.values())
    return {
        "act_end_fwd_bytes": total,
        "amp_weight_cast_bytes": copies,
        "act_per_layer_bytes": per_layer[layers // 2],
        "act_layers_bytes": inside,
        "act_nonlayer_bytes": total - copies - inside,
    }


def training_step(run: Run, batch: dict[str, torch.Tensor], layers: int) -> dict[str, int]:
    """Forward, backward and optimizer step with everything counted."""
    tracker = run.tracker
    tracker.start("fwd")
    with saving(run):
        outputs = forward(run, batch)
    loss = outputs.loss
    if not run.settings.keep_outputs:
        del outputs
    figures = forward_figures(tracker, layers)
    tracker.start("bwd")
    loss.backward()
    figures["grad_bytes"] = sum(
        p.grad.numel() * p.grad.element_size() for p in run.trainable if p.grad is not None
    )
    outputs = None  # a kept output goes when the next step begins
    tracker.start("step")
    optimizer_step(run)
    return figures


def earlier_micro_batches(run: Run, batch: dict[str, torch.Tensor]) -> None:
    """Leave the gradients of all micro-batches but the last."""
    for _ in range(run.settings.grad_accum - 1):
        run.tracker.start("earlier")
        forward(run, batch).loss.backward()


def measure_training(settings: Settings) -> tuple[dict[str, Any], Tracker]:
    """One steady-state training step."""
    run = build(settings)
    run.model.train()
    if settings.mode != "full":
        train_for_certain(run.model)
    run.optimizer = make_optimizer(run)
    batch = make_batch(settings)
    tracker = run.tracker
    static = register_static(run, batch)
    static_total = tracker.live
    for p in run.trainable:
        p.register_post_accumulate_grad_hook(tracker.mark_gradient)
    layers = layer_count(run.model.config)
    with tracker.hooks(), tracker:
        earlier_micro_batches(run, batch)
        figures = training_step(run, batch, layers)
    counts = {
        "params_total": run.total_parameters,
        "params_trainable": sum(p.numel() for p in run.trainable),
        "sdpa_kernel": kernel_name(run),
    }
    peaks = peak_figures(tracker.peaks, static_total)
    return architecture(run.model.config) | counts | static | figures | peaks, tracker


def peak_figures(peaks: dict[str, Peak], static: int) -> dict[str, Any]:
    """The peaks per phase, and what the higher of forward and backward holds."""
    phase = max("fwd", "bwd", key=lambda name: peaks[name].total)
    peak = peaks[phase]
    return {
        "peak_fwd_bytes": peaks["fwd"].total,
        "peak_bwd_bytes": peaks["bwd"].total,
        "peak_fwd_bwd_bytes": peak.total,
        "peak_step_bytes": peaks["step"].total,
        "peak_total_bytes": max(peak.total, peaks["step"].total),
        "peak_phase": phase if peak.total >= peaks["step"].total else "step",
        "peak_fb_op": place(peak) if phase == "fwd" else peak.op,
        "peak_fb_module": peak.module,
        "peak_fb_grad_bytes": peak.grads,
        "peak_fb_act_temp_bytes": peak.total - static - peak.grads,
        "peak_fb_kernel_ws_bytes": peak.workspace,
    }


def place(peak: Peak) -> str:
    """The op of a peak at the module it ran in."""
    return f"{peak.op}@{peak.module or '<root>'}"


def kernel_name(run: Run) -> str:
    """The attention kernels that ran."""
    return "+".join(sorted(run.kernels.used)) or run.settings.attn


def first(config: Any, *names: str, default: Any = 0) -> Any:
    """The first of several configuration fields that is set."""
    for name in names:
        with contextlib.suppress(AttributeError, RuntimeError):  # differs from layer to layer
            if (value := getattr(config, name)) is not None:
                return value
    return default


def layer_count(config: Any) -> int:
    """Number of layers under any of its names."""
    return int(first(config, *LAYER_COUNTS))


def kv_heads(config: Any, heads: int) -> int:
    """Number of key and value heads; Falcon and GPT-BigCode call one head multi-query."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", 0):
        return 1
    return int(first(config, "num_key_value_heads", "num_kv_heads", default=heads))


def architecture(config: Any) -> dict[str, Any]:
    """The configuration's main dimensions under common names."""
    heads = first(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    hidden = first(config, "hidden_size", "n_embd", "d_model")
    experts = first(config, "num_local_experts", "num_experts", "n_routed_experts")
    return {
        "model_type": config.model_type,
        "hidden_size": hidden,
        "num_layers": layer_count(config),
        "num_heads": heads,
        "num_kv_heads": kv_heads(config, heads),
        "head_dim": first(config, "head_dim", default=hidden // heads if heads else 0),
        "intermediate_size": first(config, *MLP_WIDTHS, default=4 * hidden),
        "moe_intermediate_size": first(config, "moe_intermediate_size"),
        "vocab_size": config.vocab_size,
        "tied": bool(first(config, "tie_word_embeddings")),
        "num_experts": experts,
        "top_k": first(config, "num_experts_per_tok", "moe_topk") if experts else 0,
    }


# --- Inference -----------------------------------------------------------------------------------


def cache_layers(cache: Any) -> list[Any]:
    """What each layer keeps; of an encoder with a decoder, its own keys and the encoder's apart."""
    from transformers import EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache.layers + cache.cross_attention_cache.layers
    return getattr(cache, "layers", [])


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors in a cache, as their shapes say.

    A sliding-window layer keeps the whole prefill storage alive behind its shorter view; that
    shows in `live_after_prefill_bytes`, not here.
    """
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache_layers(cache)
        for value in vars(layer).values()
        for tensor in tensors_in(list(value.values()) if isinstance(value, dict) else value)
        if tensor.device.type == "cuda" and tensor.is_floating_point()
    )


def generation_step(run: Run, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """Logits and cache after the given tokens."""
    options: dict[str, Any] = {"use_cache": True, "logits_to_keep": run.settings.logits_to_keep}
    if cache is not None:
        options["past_key_values"] = cache
    outputs = run.model(tokens, **options)
    return outputs.logits, first(outputs, "past_key_values", "cache_params", default=None)


def prefill_and_decode(run: Run, tokens: torch.Tensor, one: torch.Tensor) -> dict[str, Any]:
    """A prefill with a cache, its logits dropped, then one decoded token."""
    tracker = run.tracker
    tracker.start("prefill")
    logits, cache = generation_step(run, tokens, None)
    figures: dict[str, Any] = {
        "logits_dtype": str(logits.dtype).removeprefix("torch."),
        "logits_shape": "x".join(str(n) for n in logits.shape),
        "logits_bytes": logits.numel() * logits.element_size(),
    }
    del logits
    figures["kv_cache_bytes"] = cache_bytes(cache)
    figures["live_after_prefill_bytes"] = tracker.live
    tracker.add(one, "input")
    tracker.start("decode")
    _, cache = generation_step(run, one, cache)
    figures["kv_cache_after_decode_bytes"] = cache_bytes(cache)
    return figures


def measure_inference(settings: Settings) -> tuple[dict[str, Any], Tracker]:
    """A prefill of `batch` by `seq` tokens and one decoded token, without gradients."""
    run = build(settings)
    run.model.eval()
    tracker = run.tracker
    tokens = make_batch(settings)["input_ids"]
    one = torch.zeros((settings.batch, 1), dtype=torch.int64)
    weights = tracker.add_all(run.model.parameters(), "param")
    buffers = tracker.add_all(run.model.buffers(), "buffer")
    tracker.add(tokens, "input")
    with torch.no_grad(), tracker.hooks(), tracker:
        figures = prefill_and_decode(run, tokens, one)
    prefill, decode = tracker.peaks["prefill"], tracker.peaks["decode"]
    counts = {"params_total": run.total_parameters, "sdpa_kernel": kernel_name(run)}
    static = weights + buffers
    figures |= {
        "param_bytes": weights,
        "buffer_bytes": buffers,
        "peak_prefill_bytes": prefill.total,
        "peak_prefill_op": place(prefill),
        "prefill_over_weights_kv_bytes": prefill.total - static - figures["kv_cache_bytes"],
        "peak_decode_bytes": decode.total,
        "decode_over_weights_kv_bytes": decode.total
        - static
        - figures["kv_cache_after_decode_bytes"],
    }
    return architecture(run.model.config) | counts | figures, tracker


@contextlib.contextmanager
def faked(settings: Settings) -> Iterator[None]:
    """Everything within is on the fake device."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    patch_data_dependence(padded=settings.padded)
    original = torch.nn.functional.scaled_dot_product_attention
    if settings.mode != "full":
        importlib.import_module("peft")  # its import makes real tensors
    try:
        with FakeCudaMode(allow_non_fake_inputs=True), torch.device("cuda"):
            yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


def measure(settings: Settings, *, inference: bool = False) -> tuple[dict[str, Any], Tracker]:
    """Measure on the fake device; the result has the columns of the reference tables."""
    with faked(settings):
        return (measure_inference if inference else measure_training)(settings)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("config", type=Path, help="config.json with Hugging Face field names")
    p.add_argument("--inference", action="store_true")
    p.add_argument("--logits-to-keep", type=int, default=0)
    p.add_argument("--mode", choices=MODES, default="full")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--seq", type=int, default=1024)
    p.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    p.add_argument("--autocast", choices=["none", "bf16"], default="none")
    p.add_argument("--attn", choices=["sdpa", "eager"], default="sdpa")
    p.add_argument("--checkpoint", action="store_true")
    p.add_argument("--padded", action="store_true")
    p.add_argument("--keep-outputs", action="store_true")
    p.add_argument("--grad-accum", type=int, default=1)
    p.add_argument("--lora-r", type=int, default=16)
    p.add_argument("--lora-targets", choices=["qv", "all-linear"], default="all-linear")
    p.add_argument("--lora-dropout", type=float, default=0.0)
    p.add_argument("--modules-to-save", nargs="*", default=[], help="trained whole, as copies")
    p.add_argument("--virtual-tokens", type=int, default=20)
    optimizers = ["adamw_fused", "adamw_foreach"]
    p.add_argument("--optimizer", choices=optimizers, default="adamw_fused")
    p.add_argument("--master", action="store_true", help="fp32 copies of the weights for AdamW")
    p.add_argument("--layers", type=int, help="override the number of layers")
    p.add_argument("--ops", type=Path, help="write the log of all ops to this file")
    return p


def set_layers(config: dict[str, Any], layers: int) -> None:
    """Replace the number of layers under the name the configuration uses."""
    names = LAYER_COUNTS
    config[next((name for name in names if name in config), names[0])] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]


def main(arguments: list[str] | None = None) -> int:
    """Measure one case and print it as JSON."""
    options = vars(parser().parse_args(arguments))
    config = json.loads(options.pop("config").read_text())
    inference, ops, layers = (options.pop(k) for k in ("inference", "ops", "layers"))
    if layers is not None:
        set_layers(config, layers)
    install_fake_cuda()
    settings = Settings(config=config, log_ops=ops is not None, **options)
    result, tracker = measure(settings, inference=inference)
    asked = {k: v for k, v in options.items() if k not in result}
    json.dump(asked | result, sys.stdout, indent=1)
    print()
    if ops is not None:
        ops.write_text(tracker.log_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
