"""What every part of a llama.cpp graph is built with: weights by name, norms, linear layers."""

from __future__ import annotations

from collections.abc import Mapping

from llmsize.formats import INT32
from llmsize.memory.llamacpp import tensors as ops
from llmsize.memory.llamacpp.cache import Server, aligned
from llmsize.memory.llamacpp.tensors import Graph, Tensor, view


class Builder:
    """The graph of one batch so far, and the layer that is being built."""

    def __init__(
        self,
        server: Server,
        weights: Mapping[str, Tensor],
        states: Mapping[int, tuple[Tensor, ...]],
        *,
        layer_norm: bool = False,
        plain_norms: frozenset[str] = frozenset(),
    ) -> None:
        """`weights` by their GGUF names; `states` are the recurrent caches by layer.

        `plain_norms` are those that have no weight and are there all the same.
        """
        self.server = server
        self.weights = weights
        self.states = states
        self.layer_norm = layer_norm
        self.plain_norms = plain_norms
        batch = min(server.ubatch, server.cells * server.streams)
        self.tokens = aligned(batch, server.sequences)
        self.graph = Graph()
        self.layer = -1
        copied = ops.given(INT32, server.sequences)
        self.cells = view(copied, server.sequences, span=copied.bytes)
        """Which recurrent cell every sequence goes on from."""
        self.other_cells = view(copied, 0, span=0)
        """Cells that no sequence of the batch goes on from: none."""

    @property
    def by_sequence(self) -> tuple[int, int]:
        """Tokens of each sequence in the batch, and sequences."""
        return self.tokens // self.server.sequences, self.server.sequences

    def name(self, name: str) -> str:
        """The name of the current layer's tensor."""
        return name if self.layer < 0 else f"blk.{self.layer}.{name}"

    def has(self, name: str) -> bool:
        """Whether the current layer has it."""
        return f"{self.name(name)}.weight" in self.weights

    def weight(self, name: str, kind: str = "weight") -> Tensor | None:
        """A weight, bias or scale of the current layer, if it has one."""
        return self.weights.get(f"{self.name(name)}.{kind}")

    def needed(self, name: str) -> Tensor:
        """A weight that the current layer has."""
        return self.weights[f"{self.name(name)}.weight"]

    def named(self, name: str) -> Tensor:
        """A tensor whose name has no suffix."""
        return self.weights[self.name(name)]

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm or layer norm; `x` itself without a weight, unless norms have none."""
        weight, bias = self.weight(name), self.weight(name, "bias")
        if weight is None and name not in self.plain_norms:
            return x
        x = ops.apply("layer_norm" if self.layer_norm else "norm", x)
        x = x if weight is None else ops.apply("mul", x, weight)
        return x if bias is None else ops.apply("add", x, bias)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """A linear layer, with its bias if it has one."""
        x = ops.matmul(self.needed(name), x)
        bias = self.weight(name, "bias")
        return x if bias is None else ops.apply("add", x, bias)
