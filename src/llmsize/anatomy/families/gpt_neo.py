"""GPT-Neo: GPT-2's block with every other layer local.

transformers v5.23, models/gpt_neo/modeling_gpt_neo.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import MOST, Config
from llmsize.anatomy.decoder import Around, Names, Sizes
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32

NAMES = Names(embedding="transformer.wte", layers="transformer.h", norm="transformer.ln_f")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    inner = c.size("intermediate_size", default=4 * c.size("hidden_size"))
    fields = {**c.fields, "intermediate_size": inner}
    s = decoder.read(Config(fields, c.model), tied=True, activation="gelu_new", rotary=0.0)
    positions = c.size("max_position_embeddings", default=2048)

    def block(x: Tensor, window: int, around: Around) -> Tensor:
        return decoder.pre_norm(
            t,
            x,
            lambda x: attention(t, s, x, around, window),
            lambda x: decoder.plain(t, s, x, up="mlp.c_fc", down="mlp.c_proj", bias=True),
            norm=blocks.layer_norm,
            names=("ln_1", "ln_2"),
        )

    return decoder.run(
        t, s, block, windows(c, s.layers), norm=blocks.layer_norm, names=NAMES, masking="eager",
        begin=lambda x: decoder.add_positions(t, x, "transformer.wpe", positions),
    )  # fmt: skip


def windows(c: Config, layers: int) -> list[int]:
    """Each layer's window, from groups such as `[["global", "local"], 12]`."""
    window = c.size("window_size", default=256)
    kinds = c.sequence("attention_layers")
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


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, window: int) -> Tensor:
    """Attention with q and k in fp32; only the output projection has a bias."""
    q, k, v = (
        ops.split_heads(t, t.linear(x, f"attn.attention.{p}_proj", s.hidden, role=p), s.heads)
        for p in ("q", "k", "v")
    )
    q, k = ops.to(t, q, FP32), ops.to(t, k, FP32)
    out = decoder.attend_eager(t, q, k, v, around.masks[window], window=window)
    return t.linear(out, "attn.attention.out_proj", s.hidden, bias=True, role="o")
