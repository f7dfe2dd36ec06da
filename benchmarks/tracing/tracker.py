"""Follow every storage on the fake device from its creation to its release."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._prims_common import is_non_overlapping_and_dense_or_false
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.tracing.kernels import kernel_workspace

aten = torch.ops.aten
ENGINE_TENSOR_COUNT, ENGINE_STORAGE_COUNT = 4, 2


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
