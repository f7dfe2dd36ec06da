"""ESM C: an encoder of proteins with Llama's layers, whose norms give what they were given.

transformers v5.23, models/esmc/modeling_esmc.py.
"""

from __future__ import annotations

from functools import partial

from llmsize.anatomy import blocks, decoder, lm_head, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.families import bert, eurobert, t5gemma
from llmsize.anatomy.families.bert import Shape, Type
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import INT64

ESMC = Type(prefix="esmc", counted=False, has_kinds=False)


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    bert.check(t, c)
    s, sizes = bert.read(c, ESMC), decoder.read(c)
    x = encoder(t, sizes, c.flag("attention_bias"), c.flag("mlp_bias"))
    if s.labels or t.setting.objective == "score":
        return bert.classified(t, s, x)
    head = Head("", "lm_head.decoder", bias=True, transform=partial(transformed, s))
    return lm_head.causal_lm(t, x, s.vocabulary, head, tied=False, loss=t5gemma.loss)


def encoder(t: Trace, s: Sizes, bias: bool, mlp_bias: bool) -> Tensor:
    """Embeddings, layers, final norm."""
    inputs = [blocks.embed(t, "esmc.embed_tokens", s.vocabulary, s.hidden)]
    position_ids = t.new("arange", (1, t.sequence), INT64)
    rotation = rotary.table(t, inputs[0], s.rotary)
    mask = blocks.mask(t) if t.setting.padded else None
    attend = partial(
        eurobert.attention, t, s, rotation, mask, bias=bias, softmax_format=None, norm=norm
    )

    def block(x: Tensor, kind: int) -> Tensor:
        normed = [layer_norm(t, x, "input_layernorm")]
        attended = attend(normed.pop())
        x = ops.add(t, x, ops.scale(t, attended))
        normed.append(layer_norm(t, x, "post_attention_layernorm"))
        x = ops.add(t, x, ops.scale(t, decoder.gated(t, s, normed.pop(), bias=mlp_bias)))
        del attended
        return x

    cosines, sines = rotation  # one by one, as a call with a star holds all that it is given
    x = t.layers("esmc.layers", block, inputs.pop(), [0] * s.layers, mask, cosines, sines)
    x = layer_norm(t, x, "esmc.norm", bias=False)
    del position_ids
    return x


def layer_norm(t: Trace, x: Tensor, name: str, *, bias: bool = True) -> Tensor:
    """LayerNorm, also under autocast in the format of its input."""
    return ops.to(t, blocks.layer_norm(t, x, name, bias=bias), x.format)


def norm(t: Trace, x: Tensor, name: str) -> Tensor:
    """That of all heads of queries or keys, in the format of the residual stream."""
    return ops.to(t, layer_norm(t, x, name, bias=False), t.setting.format)


def transformed(s: Shape, t: Trace, x: Tensor) -> Tensor:
    """What the head makes of hidden states before it tells tokens."""
    x = t.linear(x, "lm_head.dense", s.hidden, bias=True, role="transform")
    return blocks.layer_norm(t, ops.gelu(t, x), "lm_head.layer_norm")
