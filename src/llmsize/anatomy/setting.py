"""The circumstances of a pass: what goes in, in which formats, by which kernels, what is trained.

Facts of a stack and the knobs of a run become one of these; every operation asks it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from llmsize.anatomy.adapters import Adapter
from llmsize.formats import BF16, Format
from llmsize.stack import Loss

Attention = Literal["sdpa", "eager"]

Objective = Literal["tokens", "log-probabilities", "policy", "score"]
"""The loss of the next token; log-probabilities of tokens from tiles of logits, or from all logits
at once; or one number for each sequence."""


class Setting(NamedTuple):
    """The circumstances of one pass: how much goes in, in which formats, by which kernels."""

    batch: int = 1
    sequence: int = 1
    """Tokens of each sequence in this pass."""
    past: int = 0
    """Tokens of each sequence already in the cache."""
    format: Format = BF16
    """Format of the weights."""
    autocast: Format | None = None
    attention: Attention = "sdpa"
    fused_norm: bool = False
    """Norms in one kernel that keeps its input and one number a token."""
    scales_in_fp32: bool = False
    """Whether Llama's norm is scaled in the fp32 that it is computed in."""
    fused_rotary: bool = False
    """Rotary embedding in place."""
    fused_gate: bool = False
    """Activation and product of a gated MLP in one kernel that keeps gate and up only."""
    fused_activation: bool = False
    """Activations in one kernel also where the reference implementation writes them out."""
    fused_qkv: bool = False
    """One projection for q, k and v; the values stay a view of what it gives."""
    joins_rotated: bool = False
    """Whether rotated channels are joined to the rest of a head, also to none."""
    fused_recurrence: bool = False
    """Recurrent layers by kernels of their own, not by the reference's operations."""
    repeats_keys: bool = False
    """Whether shared keys and values are repeated for their queries whatever the kernel takes."""
    fp32_logits: bool = False
    """Whether the head hands out fp32 logits where the loss takes all at once."""
    loss_in_fp32: bool = True
    """Whether the loss takes an fp32 copy of 16-bit logits."""
    shifts_logits: bool = False
    """Whether all logits but the last are copied for the loss."""
    loss: Loss = "eager"
    compiled_loss: bool = False
    """Whether the loss is one kernel that keeps the logits as they are, not an fp32 copy."""
    objective: Objective = "tokens"
    """What is made of the last hidden states."""
    scored: int = 0
    """Tokens of each sequence whose log-probabilities are wanted; 0 for all but the first."""
    loss_chunks: int = 8
    """Chunks of a chunked loss."""
    padded: bool = False
    """Whether an attention mask with padding is given."""
    training: bool = False
    """Whether labels are given and tensors are kept for a backward pass."""
    trained: frozenset[str] | None = None
    """Roles of the model's own weights that are trained; `None` for all."""
    modules_to_save: tuple[str, ...] = ()
    """Last parts of the names of modules that are trained as copies beside the frozen ones."""
    adapted_biases: bool = False
    """Whether the biases of the linear layers that have an adapter are trained."""
    frozen_layers: int = 0
    """The first layers, whose weights are frozen, and with them the embeddings."""
    adapter: Adapter | None = None
    """What is trained beside the weights."""
    quantized: Format | None = None
    """Format of the frozen linear weights, which are dequantized as they are used."""
    softmax_keeps_input: bool = False
    """Whether softmax keeps its input beside its output (PyTorch before 1.11)."""
    keeps_quantized_inputs: bool = False
    """Whether their inputs are kept although nothing needs them (bitsandbytes before v0.43.2)."""
    keeps_graph: bool = False
    """Whether the loop holds the logits, and with them their graph, until it has the next ones."""
    quantizes_head: bool = False
    """Whether the head is quantized too."""
    quantizes_experts: bool = False
    """Whether the experts are, too, each of which is then called for itself."""
    quantizes_from_half: bool = False
    """Whether they come back in fp16, whatever they are used in."""
    keeps_gptq_weights: bool = False
    """Whether GPTQ's layers bring their weights back in 16 bit where autograd keeps them."""
    separate_gate: bool = False
    """Whether no gate shares a projection with what it gates."""
    separate_head: bool = False
    """Whether no head shares the embedding's weight."""
    upcast: bool = False
    """Whether what is not quantized is kept in fp32 (peft's `prepare_model_for_kbit_training`)."""
    checkpoint_every: int = 0
    """Every how many layers one is recomputed in the backward pass; 0 for none, 1 for all."""
    checkpoint_saves: tuple[tuple[str, int], ...] = ()
    """Operations whose results a checkpoint keeps instead of computing them again, and every how
    manieth of each."""
    offload_checkpoints: bool = False
    """Whether the inputs of recomputed layers wait in host memory."""
    input_gradients: bool = False
    """Whether the embeddings want a gradient though nothing below them is trained: peft and
    transformers 5 ask for one when a model is checkpointed."""
    keep_outputs: bool = False
    """Whether the logits are held until the backward pass has run."""
    cache: bool = False
    """Whether keys and values are kept for the next token."""
    last_logits: bool = False
    """Whether only the last token's logits are asked for."""
