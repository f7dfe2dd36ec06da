"""Trained prompts: virtual tokens in front of the input, or keys and values in front of a layer's.

peft v0.21, `PeftModelForCausalLM.forward` and its prompt encoders, local variables included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING

from llmsize.anatomy import attention
from llmsize.anatomy import operations as ops
from llmsize.anatomy.adapters import Adapter, trained_linear
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.linear import Linear
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Dim, Label, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.errors import LLMSizeError
from llmsize.formats import BOOL, FP32, INT64, stored_bytes
from llmsize.quick_dataclasses import dataclass

if TYPE_CHECKING:
    from llmsize.anatomy.config import Config

ENCODER = "prompt_encoder.default"


def looked_up(t: Trace, name: str, width: int, tokens: int, sequences: int) -> Tensor:
    """Trained embeddings of the virtual tokens, for some sequences.

    Indices come from the host for all sequences, of which a prompt's encoder takes the first.
    """
    indices = t.new("to", (t.batch, tokens), INT64)
    table = t.adapter(f"{ENCODER}.{name}.weight", (Dim(tokens, "virtual_tokens"), width))
    return ops.embedding(t, table, sequences, tokens, indices=indices)


def _only_decoder(t: Trace, c: Config) -> None:
    from llmsize.anatomy.families import has_encoder

    if has_encoder(t.family):
        raise c.error(
            "has an encoder, whose prompt is not modelled", "use adapters, such as `lora`"
        )


def lengthen_mask(t: Trace, virtual: int, tokens: int) -> None:
    """Put ones for `virtual` tokens before a mask: peft holds one of all `tokens` in fp32."""
    if t.setting.padded:
        t.held += [t.new("ones", (t.batch, virtual), FP32), t.new("cat", (t.batch, tokens), FP32)]


@dataclass(frozen=True, slots=True)
class PromptTuning(Adapter):
    """Embeddings of virtual tokens are trained (Lester et al. 2021, arXiv:2104.08691)."""

    @property
    def longer(self) -> int:
        """Every sequence is that much longer for all layers and the loss."""
        return self.tokens

    def begin(self, t: Trace, c: Config) -> None:
        """The mask is all that is made before the tokens are embedded."""
        _only_decoder(t, c)
        lengthen_mask(t, self.tokens, t.sequence)

    def embedded(self, t: Trace, x: Tensor) -> Tensor:
        """The prompt and the tokens' embeddings; the caller holds what it is made of."""
        if any(weight.role == "adapter" for weight in t.weights.values()):
            raise LLMSizeError(
                "virtual tokens have no place in a model that embeds its tokens more than once",
                hint="use adapters, such as `lora`",
            )
        t.held += [
            t.new("full", (t.batch, self.tokens), INT64),
            t.new("cat", (t.batch, t.sequence), INT64),
        ]
        prompts = ops.tile(t, self.encoded(t, x.shape[-1]), t.batch)
        prompts = ops.to(t, prompts, x.format)
        whole = ops.cat(t, (prompts, x), dim=1)
        t.held += [prompts, whole]
        return whole

    def encoded(self, t: Trace, width: int) -> Tensor:
        """The prompt for one sequence."""
        return looked_up(t, "embedding", width, self.tokens, 1)


@dataclass(frozen=True, slots=True)
class PTuning(PromptTuning):
    """Virtual tokens are trained through three linear layers (Liu et al. 2021, arXiv:2103.10385).

    The encoder is peft's MLP, as wide as the model.
    """

    def encoded(self, t: Trace, width: int) -> Tensor:
        """The prompt for one sequence."""
        x = looked_up(t, "embedding", width, self.tokens, 1)
        for number in (0, 2):
            x = ops.relu(t, trained_linear(t, x, f"{ENCODER}.mlp_head.{number}", width))
        return trained_linear(t, x, f"{ENCODER}.mlp_head.4", width)


class Prefixes:
    """Keys and values of the virtual tokens of all layers, until each layer has taken its own."""

    __slots__ = ("caches", "format", "layers", "node", "shape")

    def __init__(self, t: Trace, made: Tensor, layers: int, heads: int, channels: int) -> None:
        """Split what the encoder has `made` into copies for the cache."""
        self.shape = (t.batch, heads, made.shape[1], channels)
        self.format, self.layers = made.format, layers
        self.caches: list[Tensor] = []  # as the model hands them out
        self.node = t.record(_collected, (made,), (), self)
        for _ in range(2 * layers):
            t.events.append((self.size, self._label(-1)))

    def handed_out(self) -> tuple[Tensor, ...]:
        """The cache, where the model's outputs are held: it is one of them."""
        caches = tuple(self.caches)
        self.caches.clear()
        return caches

    @property
    def size(self) -> int:
        """Bytes of the keys, or of the values, of one layer."""
        return stored_bytes(self.format, prod(self.shape))

    def _label(self, layer: int) -> Label:
        return "cache", "cat", layer, self.shape, self.format

    def joined(self, t: Trace, x: Tensor, slot: int) -> Tensor:
        """Keys or values of the layer at work behind those of the virtual tokens, which go."""
        if x.shape[1::2] != self.shape[1::2]:
            raise LLMSizeError(
                "keys and values of this model are not alike, and no prefix fits both",
                hint="use `prompt-tuning` or `lora`",
            )
        prefix = Tensor(self.shape, self.format, None, self.node, 2 * t.layer + slot)
        whole = ops.cat(t, (prefix, x), dim=2)
        (self.caches if t.setting.keep_outputs else t.held).append(whole)
        t.events.append((-self.size, self._label(t.layer)))
        return whole


def _collected(tape: Tape, node: Node, grads: list[Tensor | None]) -> Grads:
    """The gradients of all layers come together; each is a view of one of all its tokens."""
    prefixes: Prefixes = node.context
    batch, heads, tokens, channels = prefixes.shape
    of_layers = (prefixes.layers, 2, *prefixes.shape)
    parts = tape.new("slice_backward", of_layers, prefixes.format)
    assert isinstance(tape, Trace)
    tape.let_go(grads)
    whole = tape.new("cat", of_layers, prefixes.format)
    del parts
    laid = tape.new("copy", (batch, tokens, 2 * prefixes.layers * heads * channels), whole.format)
    return (laid,)


@dataclass(frozen=True, slots=True)
class Prefix(Adapter):
    """Keys and values of virtual tokens are trained, layer by layer (Li and Liang 2021).

    arXiv:2101.00190, without its reparametrisation, as is peft's default.
    """

    @property
    def remembered(self) -> int:
        """Tokens that every layer's attention sees besides its own."""
        return self.tokens

    def begin(self, t: Trace, c: Config) -> None:
        """The cache is made before the model runs."""
        from llmsize.anatomy.decoder import HEADS, read

        _only_decoder(t, c)
        if c.value(*HEADS) is None:
            raise c.error(
                "has no attention heads, to whose keys and values a prefix is added",
                "use `prompt-tuning` or `lora`",
            )
        lengthen_mask(t, self.tokens, self.tokens + t.sequence)
        s = read(c)
        width = 2 * s.layers * s.kv_heads * s.head_dim
        made = looked_up(t, "embedding", width, self.tokens, t.batch)
        made = ops.to(t, made, t.setting.format)
        t.prefixes = Prefixes(t, made, s.layers, s.kv_heads, s.head_dim)

    def cached(self, t: Trace, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens."""
        assert t.prefixes is not None
        return t.prefixes.joined(t, k, 0), t.prefixes.joined(t, v, 1)


@dataclass(frozen=True, slots=True)
class LlamaAdapter(Adapter):
    """A trained prompt that a gated second attention of the upper layers reads.

    Zhang et al. 2023, arXiv:2303.16199, as litgpt v0.5 has it in litgpt/adapter.py.
    """

    def attended(self, t: Trace, q: Tensor, out: Tensor) -> Tensor:
        """The output of attention by heads with what the gate lets in."""
        heads, channels = q.shape[1], q.shape[3]
        key, value = self._keys_and_values(t, heads, channels)
        mask = t.new("ones", (1, 1, q.shape[2], self.tokens), BOOL)
        read = attention.attend(t, q, key, value, mask)
        gate = t.adapter("attn.gating_factor", (1, heads, 1, 1))
        return ops.add(t, out, ops.to(t, ops.mul(t, gate, read), out.format))

    def _keys_and_values(self, t: Trace, heads: int, channels: int) -> tuple[Tensor, Tensor]:
        """The prompt through the layer's own projections."""
        projections = [w for (layer, _), w in t.weights.items()
                       if layer == t.layer and w.role in ("k", "v", "qkv")]  # fmt: skip
        if not projections:
            raise LLMSizeError(
                "no keys and values to read a prompt from", hint="use `lora` or `prompt-tuning`"
            )
        width = projections[0].shape[-1]
        table = t.adapter("attn.adapter_wte.weight", (Dim(self.tokens, "virtual_tokens"), width))
        prompt = ops.to(t, table.view(1, self.tokens, width), t.setting.format)
        read = [ops.linear(t, prompt, weight) for weight in projections]
        shape = (t.batch, heads, self.tokens, channels)
        return tuple(Tensor(shape, x.format, x.storage, x.node) for x in (read[0], read[-1]))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class LlamaAdapterV2(LlamaAdapter):
    """With a trained scale and bias for every output channel of every linear layer.

    Gao et al. 2023, arXiv:2304.15010, as litgpt v0.5 has it in litgpt/adapter_v2.py; the norms are
    trained, too.
    """

    def adapts(
        self, module: str, role: str, family: str = "", *, once_linear: bool = False
    ) -> bool:
        """Every linear layer, the head included."""
        return True

    def around(self, t: Trace, x: Tensor, layer: Linear) -> Tensor:
        """`scale * (linear(x) + bias)`."""
        bias = t.adapter(f"{layer.name}.adapter_bias", (layer.out,))
        scale = t.adapter(f"{layer.name}.adapter_scale", (layer.out,))
        return ops.mul(t, scale, ops.add(t, layer.run(t, x), bias))

    def around_parts(self, t: Trace, x: Tensor, layer: Linear, widths: Sequence[int]) -> Tensor:
        """Several layers in one are one."""
        return self.around(t, x, layer)


@dataclass(frozen=True, slots=True)
class AdaptionPrompt(Adapter):
    """peft's LLaMA-Adapter: beside the whole of attention, which is done again for the prompt.

    Zhang et al. 2023, arXiv:2303.16199; peft/tuners/adaption_prompt/layer.py. Prompt and gate have
    the format of the weights.
    """

    def begin(self, t: Trace, c: Config) -> None:
        """Only of some families does peft know how to have the queries again."""
        if t.family not in ("llama", "mistral"):
            raise c.error(
                "is of no family that peft's adaption prompts know", "use `llama-adapter` or `lora`"
            )

    def beside(self, t: Trace, x: Tensor, out: Tensor, queries: Callable[[], Tensor]) -> Tensor:
        """`AdaptedAttention.forward`: softmax over the prompt in fp32, through the output layer."""
        name = "self_attn"
        prompt = t.adapter(
            f"{name}.adaption_prompt", (1, Dim(self.tokens, "virtual_tokens"), x.shape[-1])
        )
        gate = t.adapter(f"{name}.adaption_gate", (1,))
        weights = {w.role: w for (layer, _), w in t.weights.items() if layer == t.layer}
        if "k" not in weights:
            raise LLMSizeError(
                "peft's adaption prompts have no place beside one projection of queries, keys and "
                "values",
                hint="choose `--stack transformers`, or `--method llama-adapter`",
            )
        read = [ops.linear(t, prompt, weights[role]) for role in ("k", "v")]
        again = queries()
        batch, _, _, channels = again.shape
        tiled = [self._by_head(t, each, batch, channels) for each in read]
        keys, values = (ops.repeat(t, each, x.shape[-1] // read[0].shape[-1]) for each in tiled)
        scores = ops.matmul(t, again, ops.to(t, ops.transpose(t, keys, 2, 3), again.format))
        scores = ops.scale(t, scores)
        scores = ops.mul(t, gate, ops.to(t, ops.softmax(t, scores, FP32), again.format))
        added = ops.merge_heads(t, ops.matmul(t, scores, values))
        added = t.linear(added, f"{name}.o_proj", out.shape[-1], role="o")
        out = ops.add(t, out, added)
        return ops.to(t, out, again.format)

    def _by_head(self, t: Trace, x: Tensor, batch: int, channels: int) -> Tensor:
        """The prompt's keys or values by heads, copied for every sequence."""
        by_token = x.view(1, self.tokens, x.shape[-1] // channels, channels)
        return ops.transpose(t, ops.tile(t, by_token, batch), 1, 2)


@dataclass(frozen=True, slots=True)
class TrainedTokens(Adapter):
    """Some rows of the embedding are trained: a copy of the whole is made for every use.

    peft/tuners/trainable_tokens/layer.py; a tied head multiplies with such a copy, too.
    """

    def begin(self, t: Trace, c: Config) -> None:
        """The rows as they were stay beside the trained ones."""
        _only_decoder(t, c)

    def table(self, t: Trace, weight: Tensor) -> Tensor:
        """`get_merged_weights`."""
        if self.tokens > weight.shape[0]:
            raise LLMSizeError(
                f"{self.tokens:,} trained tokens in a vocabulary of {weight.shape[0]:,}",
                hint="`--virtual-tokens` says how many of its rows are trained",
            )
        shape = (Dim(self.tokens, "trained_tokens"), weight.shape[-1])
        rows = t.adapter("trainable_tokens_delta.default", shape)
        t.share_buffer("trainable_tokens_original", *shape)
        places = t.new("to", shape[:1], INT64)
        return ops.with_rows(t, weight, ops.to(t, rows, weight.format), places)
