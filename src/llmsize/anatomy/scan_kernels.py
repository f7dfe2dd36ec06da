"""Kernels for recurrent layers: those of causal-conv1d, mamba-ssm and flash-linear-attention.

transformers v5.23 runs them in place of its own operations wherever the packages are installed
(integrations/hub_kernels.py, `use_kernel_func_from_hub_with_fallback`). Each is one autograd
function; what it saves, and what it holds until it returns, is read from its source:
Dao-AILab/causal-conv1d v1.5, causal_conv1d_interface.py; state-spaces/mamba v2.2,
ops/selective_scan_interface.py and ops/triton/ssd_combined.py; fla-org/flash-linear-attention
v0.4, ops/gated_delta_rule/chunk.py and ops/kda/chunk.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.layout import Strides
from llmsize.anatomy.operations import GradList, first, keep_output
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Shape, Tensor
from llmsize.formats import FP32, Format

Block = tuple[Shape, Format]
"""A tensor that a kernel makes."""

SCANNED = 2048
"""Tokens between two states that the selective scan keeps
(csrc/selective_scan/selective_scan.cpp, `n_chunks`)."""

CHUNK = 64
"""Tokens of a chunk in the delta rules."""


class Workspace(NamedTuple):
    """What a kernel makes and lets go of: until it returns, or before the `late` part is made."""

    held: Sequence[Block] = ()
    early: Sequence[Block] = ()
    late: Sequence[Block] = ()

    def make(self, t: Tape, name: str) -> list[Tensor]:
        """The tensors that stay until the kernel returns."""
        held = [t.new(name, *block) for block in self.held]
        early = [t.new(name, *block) for block in self.early]
        del early
        return [*held, *[t.new(name, *block) for block in self.late]]


NOTHING = Workspace()


def kernel(
    t: Tape,
    name: str,
    inputs: Sequence[Tensor],
    out: Block,
    *,
    saved: Sequence[Tensor] = (),
    kept: Sequence[Block] = (),
    work: Workspace = NOTHING,
    back: Workspace = NOTHING,
) -> Tensor:
    """One autograd function.

    It saves tensors that are there (`saved`) and some that it makes (`kept`); its backward pass
    makes a gradient for each of the `inputs`.
    """
    node = t.record(_kernel_backward, inputs, saved, (name, back, [x.strides for x in inputs]))
    held = work.make(t, name)
    for block in kept:
        keep_output(t, node, t.new(name, *block))
    result = t.new(name, *out, node)
    del held
    return result


def _kernel_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    name, back, layouts = node.context
    name = f"{name}_backward"
    grad = first(grads)
    held = back.make(t, name)
    made: list[Tensor | None] = []
    for edge, strides in zip(node.edges, layouts, strict=True):
        made.append(laid_out_as(t.new(name, edge[2], edge[3]), strides) if edge else None)
    del held, grad
    return made


def laid_out_as(x: Tensor, strides: Strides) -> Tensor:
    """`x` with those strides."""
    x.strides = strides
    return x


def convolution(t: Tape, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`CausalConv1dFn` with its SiLU: saves its input; batch, channels, tokens."""
    given = [x, weight, *([] if bias is None else [bias])]
    whole = [(part.shape, FP32) for part in given[1:]]  # gradients of weights are summed in fp32
    out = kernel(t, "causal_conv1d", given, (x.shape, x.format), saved=(x,), back=Workspace(whole))
    out.strides = x.strides
    return out


def mamba_inner(
    t: Tape,
    both: Tensor,
    weights: Sequence[Tensor],
    decay: Tensor,
    vectors: Sequence[Tensor],
    rank: int,
) -> Tensor:
    """`MambaInnerFn`: all of a Mamba mixer between its input projection and its output.

    `both` is batch, input and gate, tokens; `weights` are those of the convolution, of the
    selection, of the time steps, and last of the output. It saves `both`, what is selected, the
    states every 2048 tokens and the scan's output, and computes the rest again.
    """
    both = ops.contiguous(t, both)
    batch, _, tokens = both.shape
    inner, state = decay.shape
    width = weights[-1].shape[0]
    format = both.format
    by_channel = ((batch, inner, tokens), format)
    selected = ((batch * tokens, rank + 2 * state), format)
    entering = ((batch, 1, state, tokens), format)
    states = ((batch, inner, -(-tokens // SCANNED), 2 * state), FP32)
    return kernel(
        t, "mamba_inner", [both, *weights, decay, *vectors], ((batch, tokens, width), format),
        saved=(both, decay, *vectors[:2]),
        kept=(selected, entering, entering, states, by_channel),
        work=Workspace([by_channel] * 4),
        back=Workspace([
            *[by_channel] * 6, ((width, batch * tokens), format), selected,
            *[((batch, 1, state, tokens), FP32)] * 2,
        ]),
    )  # fmt: skip


def selective_scan(
    t: Tape, x: Tensor, steps: Tensor, decay: Tensor, selected: Sequence[Tensor], gate: Tensor,
    vectors: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """`SelectiveScanFn` of x as batch, channels, tokens: saves all that it is given.

    Beside that it keeps its output before the gate, and the states every 2048 tokens.
    """
    x, steps, gate = (ops.contiguous(t, part) for part in (x, steps, gate))
    into, out_of = (ops.contiguous(t, ops.transpose(t, part, 1, 2)) for part in selected)
    batch, inner, tokens = x.shape
    state = decay.shape[1]
    states = ((batch, inner, -(-tokens // SCANNED), 2 * state), FP32)
    given = [x, steps, decay, into, out_of, gate, *vectors]
    summed = [((batch, 1, state, tokens), FP32)] * 2
    return kernel(
        t, "selective_scan", given, (x.shape, x.format), saved=given,
        kept=(states, (x.shape, x.format)), back=Workspace(summed),
    )  # fmt: skip


class Chunks(NamedTuple):
    """What Mamba-2's scan makes of batch, tokens, heads, channels."""

    steps: Block
    """Also the shape of decays, by chunks."""
    pairs: Block
    """Products of all pairs of tokens of a chunk."""
    states: Block
    """Those of all chunks in fp32."""
    passed: Block
    """The same in the format of the input."""
    last: Block
    """The state behind the last token, in fp32, whether it is asked for or not."""
    shared: Block
    """Gradients of what heads of a group share."""

    def forward(self) -> Workspace:
        """Beside the output."""
        return Workspace(
            held=(self.steps, self.steps),
            early=(self.states, self.passed, self.last),
            late=(self.passed, self.last, self.pairs),
        )

    def backward(self, *before: Block) -> Workspace:
        """Beside the gradients, and what the caller has made `before`."""
        return Workspace(
            held=(*before, *[self.steps] * 4, self.last),
            early=(self.pairs, *[self.states] * 2, *[self.passed] * 2),
            late=(*[self.pairs] * 2, *[self.passed] * 2, *[self.shared] * 2),
        )


def in_chunks(x: Shape, groups: int, state: int, chunk: int, format: Format) -> Chunks:
    """The dimensions of the scan of `x`."""
    batch, tokens, heads, channels = x
    chunks = -(-tokens // chunk)
    states = (batch, chunks, heads, channels, state)
    return Chunks(
        steps=((batch, heads, chunks, chunk), FP32),
        pairs=((batch, chunks, groups, chunk, chunk), FP32),
        states=(states, FP32),
        passed=(states, format),
        last=((batch, heads, channels, state), FP32),
        shared=((batch, tokens, groups, state), FP32),
    )


def mamba2_combined(
    t: Tape,
    both: Tensor,
    weights: Sequence[Tensor],
    decay: Tensor,
    x: Shape,
    groups: int,
    state: int,
    chunk: int,
    *,
    normed: bool,
) -> Tensor:
    """`MambaSplitConv1dScanCombinedFn`: all of a Mamba-2 mixer behind its input projection.

    It saves what that gave (`both`), the scan's output, a number a token for the norm, and
    computes the rest again; the last of `weights` is that of the output, `x` the shape by heads.
    """
    batch, tokens, heads, channels = x
    format, width = both.format, weights[-1].shape[0]
    inner = heads * channels
    convolved = ((batch, tokens, inner + 2 * groups * state), format)
    scanned = ((batch, tokens, inner), format)
    chunks = in_chunks(x, groups, state, chunk, format)
    forward = chunks.forward()
    deviation = [((groups, batch * tokens), FP32)] if normed else []
    return kernel(
        t, "mamba2_combined", [both, decay, *weights], ((batch, tokens, width), format),
        saved=(both, decay), kept=(scanned, *deviation),
        work=forward._replace(held=(convolved, scanned, *forward.held)),
        back=chunks.backward(convolved, convolved, *[scanned] * 3),
    )  # fmt: skip


def chunk_scan(
    t: Tape, parts: Sequence[Tensor], x: Shape, groups: int, state: int, chunk: int
) -> Tensor:
    """`MambaChunkScanCombinedFn`: Mamba-2's scan alone, which saves what it is given (`parts`)."""
    format = parts[0].format
    chunks = in_chunks(x, groups, state, chunk, format)
    return kernel(
        t, "chunk_scan", parts, (x, format), saved=parts,
        kept=((x, format), chunks.steps, chunks.steps),
        work=chunks.forward()._replace(held=()), back=chunks.backward(),
    )  # fmt: skip


def gated_delta_rule(
    t: Tape, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor
) -> Tensor:
    """`ChunkGatedDeltaRuleFunction` of batch, tokens, heads, channels.

    It saves normalised q and k, a copy of v if it is a view, the summed decay, beta and the
    inverted pairs of each chunk, and computes the rest again.
    """
    v = ops.contiguous(t, v)
    pairs = (*v.shape[:3], CHUNK)
    made = delta_blocks(q, v)
    return kernel(
        t, "gated_delta_rule", [q, k, v, decay, beta], (v.shape, v.format), saved=(v, beta),
        kept=(*normalised(q, k), (decay.shape, FP32), (pairs, v.format)),
        work=Workspace(early=[(pairs, FP32)], late=made.forward), back=made.backward(q.format),
    )  # fmt: skip


def kimi_delta(t: Tape, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """`ChunkKDAFunction`: the same, whose decay every channel has; it saves it as given, too."""
    v = ops.contiguous(t, v)
    pairs = (*v.shape[:3], CHUNK)
    made = delta_blocks(q, v)
    return kernel(
        t, "kimi_delta", [q, k, v, decay, beta], (v.shape, v.format), saved=(v, decay, beta),
        kept=(*normalised(q, k), (decay.shape, FP32), *[(pairs, v.format)] * 2),
        work=Workspace(late=made.forward), back=made.backward(FP32, *[(decay.shape, FP32)] * 3),
    )  # fmt: skip


def normalised(q: Tensor, k: Tensor) -> list[Block]:
    """q and k over their lengths, and one over these in fp32."""
    return [block for x in (q, k) for block in ((x.shape, x.format), (x.shape[:3], FP32))]


class DeltaBlocks(NamedTuple):
    """What a delta rule makes: keys and values that each chunk adds, and all chunks' states."""

    keys: Block
    values: Block
    states: Block

    @property
    def forward(self) -> tuple[Block, ...]:
        """Beside the output."""
        return (self.keys, self.values, self.values, self.states)

    def backward(self, summed: Format, *more: Block) -> Workspace:
        """The same again and their gradients, before those of q and k are made of the first.

        Gradients of q and k are `summed` in that format.
        """
        keys = (self.keys[0], summed)
        gradients = (self.values, self.values, self.states, self.keys, keys)
        return Workspace((keys, keys), (*self.forward, *gradients, *more))


def delta_blocks(q: Tensor, v: Tensor) -> DeltaBlocks:
    """Its dimensions, from batch, tokens, heads, channels of q and v."""
    batch, tokens, heads, channels = v.shape
    width = q.shape[3]
    states = (batch, -(-tokens // CHUNK), heads, width, channels)
    return DeltaBlocks(
        ((batch, tokens, heads, width), q.format), (v.shape, v.format), (states, v.format)
    )
