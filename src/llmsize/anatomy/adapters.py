"""Adapters: what is trained beside frozen weights, and where it joins the forward pass.

An adapter is a record with hooks; each kind overrides those that it needs. LoRA, DoRA and IA3 go
around linear layers as peft v0.21 has them, local variables included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Literal

from llmsize.anatomy import operations as ops
from llmsize.anatomy.linear import Linear
from llmsize.anatomy.tape import Parameter
from llmsize.anatomy.tensor import Tensor
from llmsize.errors import LLMSizeError
from llmsize.formats import FP32, Format
from llmsize.quick_dataclasses import dataclass

if TYPE_CHECKING:
    from llmsize.anatomy.blocks import Step
    from llmsize.anatomy.config import Config
    from llmsize.anatomy.trace import Trace

ALL_LINEAR = "all-linear"
"""In place of names: all linear layers but the head. Most routers are none."""

Gate = Literal["swish", "relu"]
"""What is between the two layers of a bottleneck."""

FEED_FORWARD = frozenset(("gate", "up", "down", "gate_up"))
"""Roles of the linear layers of a feed-forward layer."""

NARROW = 128
"""As many features or fewer may be a number for each head, which the rank of all layers may be
above."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """Something that is trained beside frozen weights; on its own it changes nothing."""

    targets: tuple[str, ...] = ()
    """Last parts of the names of the linear layers it goes around, or `all-linear`."""
    format: Format = FP32
    """Format of what is trained; peft keeps it in fp32 over 16-bit weights."""
    tokens: int = 0
    """Virtual tokens that it puts in front."""
    first: int = 0
    """The first layer whose attention it changes."""

    @property
    def longer(self) -> int:
        """Tokens that it adds to every sequence that the layers see."""
        return 0

    @property
    def remembered(self) -> int:
        """Tokens whose keys and values it gives to every layer."""
        return 0

    def adapts(
        self, module: str, role: str, family: str = "", *, once_linear: bool = False
    ) -> bool:
        """Whether it goes around the linear layer `module` of a model of this `model_type`."""
        if ALL_LINEAR in self.targets:
            return role not in ("head", "score")
        return module.rsplit(".", 1)[-1] in self.targets

    def begin(self, t: Trace, c: Config) -> None:
        """What it makes before the model runs."""

    def table(self, t: Trace, weight: Tensor) -> Tensor:
        """The rows that tokens are looked up in, and that a tied head multiplies with."""
        return weight

    def embedded(self, t: Trace, x: Tensor) -> Tensor:
        """What the layers get for the tokens' embeddings `x`."""
        return x

    def adapts_embedding(self, module: str) -> bool:
        """Whether it goes around the embedding `module`, which only a name of its own asks for."""
        return ALL_LINEAR not in self.targets and module.rsplit(".", 1)[-1] in self.targets

    def around_embedding(self, t: Trace, x: Tensor, name: str, rows: int, own: Step) -> Tensor:
        """What an embedding of so many `rows` that it goes around gives, which alone gives `x`.

        `own` is what the embedding's own layer does to what it looks up. Raises `LLMSizeError` for
        a method that adapts linear layers alone.
        """
        raise LLMSizeError(
            f"`{name}` is an embedding, which this method does not adapt",
            hint="`lora` does, or train it whole with `--modules-to-save`",
        )

    def around(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        """What a linear layer that it goes around gives for `x`."""
        return layer.run(t, x)

    def around_parts(self, t: Trace, x: Tensor, layer: Linear, widths: Sequence[int]) -> Tensor:
        """What a layer gives for `x` of whose output it adapts parts of these widths.

        Raises `LLMSizeError` for a method that adapts whole layers.
        """
        raise LLMSizeError(
            f"`{layer.name}` is one projection, of which this method cannot adapt a part",
            hint="only lora and qlora can; or train with `--stack transformers`",
        )

    def cached(self, t: Trace, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values by heads that attention sees."""
        return k, v

    def attended(self, t: Trace, q: Tensor, out: Tensor) -> Tensor:
        """What attention gives for queries `q`, both by heads."""
        return out

    def beside(self, t: Trace, x: Tensor, out: Tensor, queries: Callable[[], Tensor]) -> Tensor:
        """What the whole of attention gives for `x`, whose `queries` can be had once more."""
        return out

    def concluded(self, t: Trace, loss: Tensor) -> Tensor:
        """What it makes of the model's loss."""
        return loss

    def parts(self, t: Trace, name: str, width: int, out: int) -> Sequence[Parameter]:
        """What it has beside a linear layer from `width` to `out`; beside one whose weight is used
        without the layer that is all, and never gets a gradient."""
        return ()

    def merger(self, t: Trace, weight: Tensor, name: str, fused: int) -> Callable[[], Tensor]:
        """What gives a parameter that is no linear layer as it is used; it has `fused` layers."""
        return lambda: weight

    def beside_experts(
        self, t: Trace, x: Tensor, out: Tensor, name: str, ends: Tensor, fused: int
    ) -> Tensor:
        """What experts of `fused` linear layers each give for their rows of `x`.

        Without adapters that is `out`; the rows of every expert end at its entry of `ends`.
        """
        return out


@dataclass(frozen=True, slots=True)
class Ranked(Adapter):
    """An adapter of a rank."""

    rank: int = 8
    dropout: float = 0.0

    def check_rank(self, name: str, role: str, *dimensions: int) -> None:
        """Raise `LLMSizeError` for a rank above those of a layer."""
        if self.rank > max(NARROW, min(dimensions)) and role != "router":
            raise LLMSizeError(
                f"rank {self.rank:,} is above the dimensions of `{name}` "
                f"({' to '.join(f'{size:,}' for size in dimensions)})",
                hint=f"a rank above {min(dimensions):,} adds nothing",
            )


@dataclass(frozen=True, slots=True)
class LoRA(Ranked):
    """Low-rank products beside linear layers (Hu et al. 2021, arXiv:2106.09685).

    rsLoRA scales them by another number and is the same in memory.
    """

    dora: bool = False
    """Whether the norm of each output channel's weights is trained, too (Liu et al. 2024)."""
    fixed_down: bool = False
    """Whether the factor next to the input is frozen (Zhang et al. 2023, arXiv:2308.03303)."""

    def adapts(
        self, module: str, role: str, family: str = "", *, once_linear: bool = False
    ) -> bool:
        """`all-linear` leaves some out where the experts beside them were linear once."""
        fused = once_linear and ALL_LINEAR in self.targets
        left_out = fused and module.rsplit(".", 1)[-1] in FUSED_NAMES
        return not left_out and Adapter.adapts(self, module, role)

    def around(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        """peft/tuners/lora/layer.py, `Linear.forward`."""
        self.check_rank(layer.name, layer.role, x.shape[-1], layer.out)
        down, up = self.parts(t, layer.name, x.shape[-1], layer.out)
        result = layer.run(t, x)
        if layer.in_4_bit(t):
            result = ops.copy(t, result)
        format = result.format
        if layer.by_bitsandbytes(t):
            return self._around_quantized(t, x, result, layer, down, up)
        x = ops.to(t, x, self.format)
        if self.dora:
            result = ops.add(t, result, self._with_magnitude(t, x, result, layer, down, up))
        else:
            result = ops.add(t, result, ops.scale(t, self._low_rank(t, x, down, up)))
        return ops.to(t, result, format)

    def around_embedding(self, t: Trace, x: Tensor, name: str, rows: int, own: Step) -> Tensor:
        """peft/tuners/lora/layer.py, `Embedding.forward`; both factors are used transposed."""
        if self.dora:
            return Adapter.around_embedding(self, t, x, name, rows, own)
        batch, sequence, width = x.shape
        self.check_rank(name, "embedding", rows, width)
        down = t.adapter(f"{name}.lora_embedding_A.default", (self.rank, rows))
        up = t.adapter(f"{name}.lora_embedding_B.default", (width, self.rank))
        up.viewed = True
        table = ops.transpose(t, down, 0, 1)
        after = ops.embedding(t, table, batch, sequence)
        change = ops.scale(t, ops.linear(t, after, up))
        change = own(t, change)
        return ops.to(t, ops.add(t, x, change), x.format)

    def _around_quantized(
        self, t: Trace, x: Tensor, result: Tensor, layer: Linear, down: Parameter, up: Parameter
    ) -> Tensor:
        """peft/tuners/lora/bnb.py: `Linear4bit`, which has cloned the result, and `Linear8bitLt`.

        Autocast is left to choose formats; without it, what is added has that of the result.
        """
        format = result.format
        if t.autocast is None:
            x = ops.to(t, x, self.format)
        if self.dora:
            result = ops.add(t, result, self._with_magnitude(t, x, result, layer, down, up))
            return ops.to(t, result, format) if t.autocast is None else result
        change = ops.scale(t, self._low_rank(t, x, down, up))
        if t.autocast is None:
            change = ops.to(t, change, format)
        return ops.add(t, result, change)

    def around_parts(self, t: Trace, x: Tensor, layer: Linear, widths: Sequence[int]) -> Tensor:
        """litgpt/lora.py (v0.5.11), `LoRAQKVLinear.forward`.

        One dropout and one A serve all parts; a grouped convolution is their B, and what it gives
        is copied among zeros in the place of what is not adapted.
        """
        if self.dora:
            return Adapter.around_parts(self, t, x, layer, widths)
        down = t.adapter(f"{layer.name}.lora_A", (self.rank * len(widths), x.shape[-1]))
        up = t.adapter(f"{layer.name}.lora_B", (sum(widths), self.rank))
        result = layer.run(t, x)
        change = ops.linear(t, ops.linear(t, ops.dropout(t, x, self.dropout), down), up)
        if sum(widths) < layer.out:
            change = ops.index_copy(t, change, layer.out)
        change = ops.scale(t, change)
        return ops.add(t, result, change)

    def parts(self, t: Trace, name: str, width: int, out: int) -> Sequence[Parameter]:
        """The factor next to the input, which may be frozen, and the other."""
        down = f"{name}.lora_A.default.weight"
        return (
            t.adapter(down, (self.rank, width), trained=not self.fixed_down),
            t.adapter(f"{name}.lora_B.default.weight", (out, self.rank)),
        )

    def _low_rank(self, t: Trace, x: Tensor, down: Parameter, up: Parameter) -> Tensor:
        dropped = ops.dropout(t, x, self.dropout)  # held until it is multiplied, cast or not
        low = ops.linear(t, dropped, down)
        del dropped
        return ops.linear(t, low, up)

    def _with_magnitude(
        self, t: Trace, x: Tensor, result: Tensor, layer: Linear, down: Parameter, up: Parameter
    ) -> Tensor:
        """peft/tuners/lora/dora.py, `DoraLinearLayer.forward`: what DoRA adds.

        The low-rank product is made whole to take the norms of the weights that it changes.
        """
        magnitude = t.adapter(f"{layer.name}.lora_magnitude_vector.default.weight", (layer.out,))
        dropped = ops.dropout(t, x, self.dropout)
        change, held = self._product(t, x, down, up)
        grad, t.grad = t.grad, False
        weight = ops.to(t, layer.whole(t), x.format)
        norms = self._norms(t, weight, change)
        t.grad = grad
        scale = ops.divide(t, magnitude, norms)
        added = ops.linear(t, ops.linear(t, dropped, down), up)
        if self.dropout and t.grad:
            result = ops.linear(t, dropped, weight, out=layer.out)
        elif layer.bias is not None:
            result = ops.sub(t, result, layer.bias)
        base = ops.mul(t, ops.shift(t, scale), result)
        total = ops.add(t, base, ops.scale(t, ops.mul(t, scale, added)))
        del change, held
        return total

    def _product(
        self, t: Trace, x: Tensor, down: Parameter, up: Parameter
    ) -> tuple[Tensor, list[Tensor]]:
        """`get_lora_weight`, and what the graph keeps that it has and nobody goes back through.

        A checkpoint keeps nothing on its first run.
        """
        kept = t.grad and (t.checkpoint is None or t.replaying)
        eye = t.new("eye", (x.shape[-1], x.shape[-1]), self.format)
        down_cast = ops.cast(t, down)
        held = [ops.to(t, eye, down_cast.format)]
        held.append(_untracked_linear(t, held[0], down_cast))
        if not kept:
            del held[0]
        product = _untracked_linear(t, held[-1], ops.cast(t, up))
        if not kept:
            held.clear()
        del eye
        return ops.to(t, product, x.format), held

    def _norms(self, t: Trace, weight: Tensor, change: Tensor) -> Tensor:
        whole = ops.add(t, weight, ops.scale(t, change))
        return t.new("linalg_vector_norm", (change.shape[-1],), whole.format)

    def merger(self, t: Trace, weight: Tensor, name: str, fused: int) -> Callable[[], Tensor]:
        """Experts are adapted one by one, with `fused` times the rank where several are in one.

        peft/tuners/lora/layer.py, `ParamWrapper`: the product is added into a copy of the weight,
        once to try it out (torch.nn.utils.parametrize) and then for every use.
        """
        beside = len(weight.shape) > 2 and t.setting.quantizes_experts
        if beside or not (t.once_linear and ALL_LINEAR in self.targets):
            return lambda: weight
        *stack, out, width = weight.shape
        rank, count = fused * self.rank, prod(stack)
        trained = not self.fixed_down
        down = t.adapter(f"{name}.lora_A.default.weight", (count * rank, width), trained=trained)
        up = t.adapter(f"{name}.lora_B.default.weight", (out, count * rank))
        if len(weight.shape) == 2:
            return partial(ops.merged_adapter, t, weight, up, down)
        by_expert = ops.transpose(t, ops.reshape(t, up, out, rank, count), 1, 2)
        by_expert = ops.transpose(t, by_expert, 0, 1)  # whose gradient is copied into rows again
        up_cast, down_cast = ops.to(t, by_expert, weight.format), ops.to(t, down, weight.format)
        t.new("baddbmm", weight.shape, weight.format)
        return partial(ops.add_product, t, weight, up_cast, down_cast)

    def beside_experts(
        self, t: Trace, x: Tensor, out: Tensor, name: str, ends: Tensor, fused: int
    ) -> Tensor:
        """Low-rank products beside each linear layer of every expert, as beside any other."""
        linear = t.once_linear and t.setting.quantizes_experts
        if not (linear and ALL_LINEAR in self.targets):
            return out
        count, width, part = ends.shape[0], x.shape[-1], out.shape[-1] // fused
        changes = []
        for index in range(fused):
            to = f"{name}.{index}"
            down = t.adapter(f"{to}.lora_A", (count, self.rank, width), trained=not self.fixed_down)
            up = t.adapter(f"{to}.lora_B", (count, part, self.rank))
            dropped = ops.dropout(t, ops.to(t, x, self.format), self.dropout)
            low = ops.grouped_linear(t, dropped, ops.cast(t, down), ends, self.rank)
            changes.append(ops.scale(t, ops.grouped_linear(t, low, ops.cast(t, up), ends, part)))
            del dropped, low
        change = changes[0] if fused == 1 else ops.cat(t, changes)
        del changes
        return ops.to(t, ops.add(t, out, change), out.format)


def _untracked_linear(t: Trace, x: Tensor, weight: Tensor) -> Tensor:
    """A linear layer that nobody goes back through."""
    grad, t.grad = t.grad, False
    made = ops.linear(t, x, weight)
    t.grad = grad
    return made


FUSED_NAMES = ("gate_proj", "up_proj", "down_proj")
"""What `all-linear` leaves out of models whose routed experts it adapts, since they were linear
layers once (peft v0.21, utils/transformers_weight_conversion.py)."""


QUERY_NOT_KEY = frozenset(
    (*("gemma", "gemma2", "gemma3_text", "gptj", "gpt_neo", "llama4", "opt", "phi"),
     *("qwen2", "qwen3"))
)  # fmt: skip
"""Types whose queries IA3 scales in place of keys (peft v0.21, utils/constants.py)."""


ENCODER_OUTPUT = "output.dense"
"""How BERT calls the last layers of attention and of feed-forward, which peft takes for one."""


class IA3(Adapter):
    """A trained factor for each channel (Liu et al. 2022, arXiv:2205.05638).

    Of a feed-forward layer the input is scaled, of others the output. Without `targets` those are
    keys, values and the last layer of the feed-forward, as peft has it.
    """

    __slots__ = ()

    def adapts(
        self, module: str, role: str, family: str = "", *, once_linear: bool = False
    ) -> bool:
        """Whether it scales the linear layer `module`."""
        if self.targets:
            return Adapter.adapts(self, module, role)
        scaled = "q" if family in QUERY_NOT_KEY else "k"
        return role in (scaled, "v", "qkv", "down") or module.endswith(ENCODER_OUTPUT)

    def around(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        """peft/tuners/ia3/layer.py, `Linear.forward`."""
        before = layer.role in FEED_FORWARD or layer.name.endswith(ENCODER_OUTPUT)
        size = x.shape[-1] if before else layer.out
        factors = t.adapter(f"{layer.name}.ia3_l.default", (1, size) if before else (size, 1))
        factor = ops.scale(t, factors.view(size))
        if before:
            format = x.format
            x = ops.to(t, x, self.format)
            return layer.run(t, ops.to(t, ops.mul(t, x, factor), format))
        result = layer.run(t, x)
        return ops.to(t, ops.mul(t, result, factor), result.format)


@dataclass(frozen=True, slots=True)
class Bottleneck(Adapter):
    """Two small layers in a row behind a linear layer (Houlsby et al. 2019, arXiv:1902.00751).

    Behind attention and feed-forward there, behind feed-forward alone in Pfeiffer et al. 2020
    (arXiv:2005.00247).
    """

    width: int = 0
    """Of the bottleneck; 0 for a sixteenth of the layer's output."""
    roles: tuple[str, ...] = ("o", "down")
    """Roles of the linear layers that have one, unless there are `targets`."""
    activation: Gate = "relu"

    def adapts(
        self, module: str, role: str, family: str = "", *, once_linear: bool = False
    ) -> bool:
        """Whether there is a bottleneck behind the linear layer `module`."""
        return Adapter.adapts(self, module, role) if self.targets else role in self.roles

    def around(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        """adapters v1.3, methods/modeling.py, `Adapter.forward`."""
        hidden = layer.run(t, x)
        width = self.width or max(layer.out // 16, 1)
        if width > layer.out:
            raise LLMSizeError(
                f"a bottleneck of {width:,} is wider than `{layer.name}` ({layer.out:,})",
                hint=f"choose a width of at most {layer.out:,}",
            )
        activate = ops.relu if self.activation == "relu" else ops.silu
        down = activate(t, trained_linear(t, hidden, f"{layer.name}.adapter_down", width))
        up = ops.scale(t, trained_linear(t, down, f"{layer.name}.adapter_up", layer.out))
        return ops.add(t, up, hidden)


def trained_linear(t: Trace, x: Tensor, name: str, out: int) -> Tensor:
    """A linear layer of an adapter itself, with its bias."""
    weight = t.adapter(f"{name}.weight", (out, x.shape[-1]))
    return ops.linear(t, x, weight, t.adapter(f"{name}.bias", (out,)))
