"""GPT-Neo: GPT-2's block with every other layer local.

transformers v5.23, models/gpt_neo/modeling_gpt_neo.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsize.anatomy import blocks, decoder, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import MOST, Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import BOOL, FP32

EMBEDDING = "transformer.wte"


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    inner = c.size("intermediate_size", default=4 * c.size("hidden_size"))
    s = decoder.read(
        c.changed(intermediate_size=inner), tied=True, activation="gelu_new", rotary=0.0
    )
    x = model(t, s, c, c.number("resid_dropout"))
    return lm_head.causal_lm(t, x, s.vocabulary, Head(EMBEDDING), tied=s.tied)


def model(t: Trace, s: Sizes, c: Config, dropout: float) -> Tensor:
    """Token and position embeddings, blocks, final norm."""
    kinds = windows(c, s.layers)
    longest = Dim(c.size("max_position_embeddings", default=2048), "positions")
    t.buffers += s.layers * longest * longest  # what every layer may see, as yes and no
    embeddings = blocks.embed(t, EMBEDDING, s.vocabulary, s.hidden)
    position_ids = blocks.positions(t)
    mask = blocks.mask(t, masking="eager")
    assert mask is not None
    table = t.weight("transformer.wpe.weight", (longest, s.hidden), "position")
    places = ops.embedding(t, table, 1, t.sequence, indices=position_ids)
    returned: list[Tensor] = []

    def block(x: Tensor, window: int) -> Tensor:
        residual = x
        x = blocks.layer_norm(t, x, "ln_1")
        attended, weights = attention(t, s, x, mask)
        attended = ops.dropout(t, attended, dropout)
        x = ops.add(t, attended, residual)
        residual = x
        x = blocks.layer_norm(t, x, "ln_2")
        fed = decoder.plain(t, s, x, up="mlp.c_fc", down="mlp.c_proj", bias=True)
        fed = ops.dropout(t, fed, dropout)
        x = ops.add(t, residual, fed)
        blocks.hand_back(t, returned, weights)
        return x

    x = t.layers(
        "transformer.h",
        block,
        ops.dropout(t, ops.add(t, embeddings, places), c.number("embed_dropout")),
        kinds,
        mask,
    )
    x = blocks.layer_norm(t, x, "transformer.ln_f")
    returned.clear()
    return x


def windows(c: Config, layers: int) -> list[int]:
    """Each layer's window, from groups such as `[["global", "local"], 12]`."""
    window = c.size("window_size", default=256)
    kinds = c.each_layer(layers, "attention_layers")
    if kinds is None:
        kinds = [kind for group in groups(c, layers) for kind in repeated(c, group)]
    if len(kinds) < layers:
        raise c.error(f"has {len(kinds)} attention types for {layers} layers", "give one a layer")
    return [window if kind == "local" else 0 for kind in kinds[:layers]]


def groups(c: Config, layers: int) -> Sequence[Any]:
    """Kinds of layers and how often they come, as the configuration gives them."""
    return c.sequence("attention_types") or [[["global", "local"], -(-layers // 2)]]


def repeated(c: Config, group: Any) -> list[Any]:
    """The layers of one group. Raises `LLMSizeError` for anything but kinds and a number."""
    match group:
        case [[*kinds], int(times)] if 0 <= times <= MOST:
            return kinds * times
    raise c.error("has malformed `attention_types`", 'write `[[["global", "local"], 12]]`')


def attention(t: Trace, s: Sizes, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention, of which only the output projection has a bias, and its weights beside.

    Local layers keep all tokens for the next one, too: a buffer hides what is far away.
    """
    parts = [t.linear(x, f"attn.attention.{p}_proj", s.hidden, role=p) for p in ("q", "k", "v")]
    q, k, v = (ops.split_heads(t, part, s.heads) for part in parts)
    del parts
    k, v = blocks.remember(t, k, v)
    out, weights = weighted(t, s, q, k, v, mask)
    out = ops.merge_heads(t, out)
    return t.linear(out, "attn.attention.out_proj", s.hidden, bias=True, role="o"), weights


def weighted(
    t: Trace, s: Sizes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The values by the weights of q and k, which are made in fp32."""
    q, k = ops.to(t, q, FP32), ops.to(t, k, FP32)
    weights = ops.matmul(t, q, ops.transpose(t, k, -1, -2))
    visible = Tensor((1, 1, *weights.shape[2:]), BOOL, None)
    lowest = t.new("to", (), weights.format)
    weights = ops.where(t, visible, weights)
    weights = ops.add(t, weights, mask)
    weights = ops.softmax(t, weights)
    weights = ops.to(t, weights, v.format)
    weights = ops.dropout(t, weights, s.attention_dropout)
    out = ops.matmul(t, weights, v)
    del lowest
    return out, weights
