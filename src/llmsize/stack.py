"""How a training framework behaves: which kernels it runs and what it holds besides tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from llmsize.quick_dataclasses import dataclass, field

Loss = Literal["eager", "softmax", "chunked", "fp32_chunks", "fused_linear", "tiled"]
"""All logits at once; the same by fp32 probabilities that become the gradient in place; some tokens
at a time; the same of logits that were all made fp32 before, and
are held until the backward pass has run; head and loss together, some tokens at a time, with
gradients made in the forward pass; or the same in tiles that the backward pass makes again."""

WEIGHT = "weight"
"""In place of a format: the format of the weights."""


@dataclass(frozen=True, slots=True)
class Stack:
    """One framework, in its default configuration for one device."""

    name: str
    source: str
    title: str = ""
    vendors: tuple[str, ...] = ()
    """Makers of the accelerators that it runs on; empty for any."""
    capability: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Least compute capability of an NVIDIA card: `any` to run at all, and for a format that
    weights are computed or stored in, by the beginning of its name."""
    fused_norm: bool = False
    """Norms in one kernel."""
    scales_in_fp32: bool = False
    """Whether Llama's norm is scaled before it is cast back from fp32, and kept so if trained."""
    fused_rotary: bool = False
    """Rotary embedding in place."""
    fused_gate: bool = False
    """Activation and product of a gated MLP in one kernel."""
    fused_activation: bool = False
    """Activations in one kernel also where others write them out."""
    fused_qkv: bool = False
    """One projection for queries, keys and values, of which the values stay a view."""
    joins_rotated: bool = False
    """Whether rotated channels are joined to the rest of a head, also to none: queries come out
    head by head, and the results of attention are copied to be those of tokens again."""
    fused_recurrence: bool = False
    """Recurrent layers by the kernels of causal-conv1d, mamba-ssm and flash-linear-attention."""
    softmax_keeps_input: bool = False
    """Whether softmax and its logarithm keep their input, too (PyTorch before 1.11)."""
    keeps_quantized_inputs: bool = False
    """Whether quantized linear layers keep their inputs (bitsandbytes before v0.43.2, which
    pull request 1270 mended)."""
    keeps_graph: bool = False
    """Whether its loop holds the logits of a micro-batch, and with them what the nodes of their
    graph hold themselves, until it has those of the next."""
    quantizes_head: bool = False
    """Whether a quantized base includes the head."""
    quantizes_experts: bool = False
    """Whether it includes routed experts, because each has linear layers of its own."""
    quantizes_from_half: bool = False
    """Whether weights are quantized from fp16, which they come back in before they are cast."""
    keeps_gptq_weights: bool = False
    """Whether GPTQ's layers bring their weights back in 16 bit before they multiply, which autograd
    keeps, and not within a function of their own, forward and backward."""
    separate_gate: bool = False
    """Whether gate and up are two projections also where the model has them in one."""
    separate_head: bool = False
    """Whether the head has a weight of its own also where the model ties it to the embedding."""
    repeats_keys: bool = False
    """Whether shared keys and values are repeated for their queries before attention."""
    fp32_logits: bool = False
    """Whether the model itself hands out fp32 logits where the loss takes all at once."""
    loss_in_fp32: bool = True
    """Whether the loss takes an fp32 copy of 16-bit logits, and not the logits themselves."""
    shifts_logits: bool = False
    """Whether the loss takes a copy of all logits but the last, instead of shifting the labels."""
    loss: Loss = "eager"
    compiled_loss: bool = False
    """Whether the loss keeps the logits as they are and no fp32 copy of them."""
    adapters: str = "fp32"
    """Format of LoRA adapters over 16-bit weights; `weight` for that of the weights."""
    quantized_adapters: str = ""
    """The same over quantized weights, if another."""
    optimizer: str = "adamw"
    """What steps where neither the user nor the method names one."""
    keep_outputs: bool = False
    """Whether its loop holds the logits until the backward pass has run."""
    keeps_gradients: bool = False
    """Whether gradients are set to zero and stay (`zero_grad` before PyTorch 2.0)."""
    loads_whole: bool = False
    """Whether each of several devices holds all weights once while they are loaded and divided."""
    patches: tuple[str, ...] = ()
    """Stacks whose models its kernels are put into, with one line more in a script."""
    allocator_slack: float = 0.0
    """What the caching allocator reserves above the allocated peak, as a share of it: for what is
    not followed tensor by tensor, such as a step that several devices divide."""
    slack_low: float = 0.0
    slack_high: float = 0.0
    """The spread of that share over published pairs."""
    expandable_segments: bool = False
    """Whether it sets that option of the caching allocator, whose segments then grow."""
    context: int = 0
    """Bytes of the device context and libraries beside the allocator, where the card is not known
    or every kernel is loaded."""
    loads_all_kernels: bool = False
    """Whether every kernel is loaded into the context, as before CUDA 11.7, not those in use."""
    aliases: tuple[str, ...] = ()
    note: str = ""
