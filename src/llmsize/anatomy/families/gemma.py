"""Gemma 1, 2 and 3: GELU, scaled embeddings, norms in fp32, local layers between global ones.

VaultGemma is Gemma 2 without the norms of what each half adds.

transformers v5.23, models/gemma/modeling_gemma.py, models/gemma2/modeling_gemma2.py,
models/gemma3/modeling_gemma3.py (the text model) and models/vaultgemma/modeling_vaultgemma.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llmsize.anatomy import blocks, decoder, lm_head, rotary
from llmsize.anatomy.blocks import Masking
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Frame, Heads, gemma_norm
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace

NORMED_HEADS = ("gemma3", "gemma3_text")
"""Types that normalise each head of q and k, and turn local layers by angles of their own."""

SOFTCAPPED = ("gemma2", "vaultgemma")
"""Types that limit scores and logits unless told otherwise, every other layer of them local."""

JOINED: dict[str, Callable[..., Tensor]] = {
    "gemma": decoder.pre_norm,
    "vaultgemma": partial(decoder.pre_norm, names=("input_layernorm", "pre_feedforward_layernorm")),
}
"""How types join attention and feed-forward that normalise only what each half reads."""


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    family = c.text("model_type")
    limits = family in SOFTCAPPED
    softcap = limits and bool(c.fields.get("attn_logit_softcapping", True))
    capped = bool(c.fields.get("final_logit_softcapping", limits))
    both_ways = family in NORMED_HEADS and c.flag("use_bidirectional_attention")
    if both_ways:  # no kernel knows such a mask by itself, and half of a window lies to each side
        c = c.changed(sliding_window=c.size("sliding_window", default=4096) // 2 + 1)
    masking: Masking = "eager" if softcap else "always" if both_ways else "as needed"
    s = decoder.read(c, tied=True, activation="gelu_pytorch_tanh")
    norm = gemma_norm if family in NORMED_HEADS else None
    join = JOINED.get(family, decoder.sandwich)
    h = Heads(bias=c.flag("attention_bias"), norm=norm, softcap=softcap)

    def block(x: Tensor, window: int, around: Around) -> Tensor:
        return join(
            t,
            x,
            lambda x: decoder.attention(t, s, h, x, around, window),
            lambda x: decoder.gated(t, s, x),
            norm=gemma_norm,
        )

    frame = Frame(
        norm=gemma_norm,
        embed=scaled,
        rope=rotary.Rope(apart=family in NORMED_HEADS),
        masking=masking,
        masks=(0, s.window) if family != "gemma" else (),
        alike=True,
        head=Head(end=lm_head.SOFTCAP if capped else ()),
    )
    return decoder.run(t, s, block, windows(c, s.layers), frame)


def scaled(t: Trace, x: Tensor) -> Tensor:
    """Embeddings times a number, which is a buffer of its own."""
    t.buffers += t.setting.format.block_bytes
    return blocks.scaled_embeddings(t, x)


def windows(c: Config, layers: int) -> list[int]:
    """Gemma 2: every other layer is local, the first one too. Gemma 3: five of six are."""
    family = c.text("model_type")
    period = c.size("sliding_window_pattern", default=2 if family in SOFTCAPPED else 6)
    return decoder.windows(c, layers, lambda layer: family != "gemma" and (layer + 1) % period > 0)
