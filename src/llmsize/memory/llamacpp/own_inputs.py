"""Layers with an embedding of their own beside what the layer before gives (Gemma 3n and 4).

llama.cpp 0c1e57098, src/models/{gemma4,gemma3n}.cpp.
"""

from __future__ import annotations

from llmsize.formats import INT32
from llmsize.memory.llamacpp import tensors as ops
from llmsize.memory.llamacpp.builder import Builder
from llmsize.memory.llamacpp.tensors import Tensor, view


def own_inputs(b: Builder, x: Tensor) -> Tensor:
    """The inputs of all layers, (channels, tokens, layers), from tokens and embeddings `x`."""
    channels = b.needed("per_layer_proj_norm").shape[0]
    tokens = ops.given(INT32, b.tokens)
    looked_up = ops.get_rows(b.needed("per_layer_token_embd"), tokens)
    layers = looked_up.shape[0] // channels
    # the scale decides where it is read from: on the device, if the embedding is in host memory
    looked_up = ops.apply("scale", ops.reshape(looked_up, channels, layers, b.tokens))
    looked_up = b.graph.expand(looked_up)
    projected = ops.matmul(b.needed("per_layer_model_proj"), x)
    projected = ops.reshape(projected, channels, layers, b.tokens)
    both = ops.apply("add", b.norm(projected, "per_layer_proj_norm"), looked_up)
    return ops.contiguous(ops.swap_heads(both), channels, b.tokens, layers)


def own_input(b: Builder, inputs: Tensor, x: Tensor) -> Tensor:
    """What the current layer makes of its own input, gated by its result `x`."""
    channels = inputs.shape[0]
    x = ops.apply("unary", ops.matmul(b.needed("inp_gate"), x))
    x = ops.apply("mul", x, view(inputs, channels, b.tokens, span=4 * channels * b.tokens))
    return b.norm(ops.matmul(b.needed("proj"), x), "post_norm")
