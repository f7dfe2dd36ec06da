"""Mamba, Falcon-Mamba and Mamba-2: no attention, one mixer a layer.

transformers v5.23, models/mamba, models/falcon_mamba, models/mamba2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from llmsize.anatomy import blocks, lm_head, mamba, mamba2
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.families.llama4 import norm_without_weights as normalised
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32

HEAD = Head("backbone.embeddings", end=(lm_head.in_fp32,))


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    hidden = Dim(c.size("hidden_size", "d_model"), "hidden")
    vocabulary = Dim(c.size("vocab_size"), "vocabulary")
    layers = c.few("num_hidden_layers", "n_layer")
    mixer = second(c, hidden) if c.text("model_type") == "mamba2" else first(c, hidden)

    wide = c.flag("residual_in_fp32", default=True)

    def block(x: Tensor, kind: str) -> Tensor:
        residual = x
        narrow = ops.to(t, x, t.setting.format)
        x = blocks.rms_norm(t, narrow, "norm")
        del narrow
        residual = ops.to(t, residual, FP32) if wide else residual
        return ops.add(t, residual, mixer(t, x))

    embeddings = blocks.embed(t, "backbone.embeddings", vocabulary, hidden)
    x = t.layers("backbone.layers", block, embeddings, ["mixer"] * layers)
    x = lm_head.asked_for(t, blocks.rms_norm(t, x, "backbone.norm_f"))
    del embeddings
    tied = c.flag("tie_word_embeddings", default=c.text("model_type") != "mamba2")
    return lm_head.causal_lm(t, ops.to(t, x, t.setting.format), vocabulary, HEAD, tied=tied)


def first(c: Config, hidden: int) -> Callable[[Trace, Tensor], Tensor]:
    """Mamba's mixer, from a `config.json`."""
    rank = c.value("time_step_rank")
    expanded = c.size("expand", default=2) * hidden
    inner = Dim(c.size("intermediate_size", default=expanded), "inner")
    m = mamba.Mamba(
        hidden=hidden,
        inner=inner,
        state=Dim(c.size("state_size", default=16), "state"),
        rank=Dim(-(-hidden // 16) if rank in (None, "auto") else c.size("time_step_rank"), "rank"),
        kernel=c.size("conv_kernel", default=4),
        bias=c.flag("use_bias"),
        conv_bias=c.flag("use_conv_bias", default=True),
        norm=partial(norm_without_weights, inner)
        if c.text("model_type") == "falcon_mamba"
        else None,
    )
    return lambda t, x: mamba.mixer(t, m, x, "mixer")


def norm_without_weights(inner: int, t: Trace, x: Tensor, name: str) -> Tensor:
    """Falcon-Mamba's RMSNorm in fp32; kernels are handed constants as its weights."""
    width = inner if name.endswith("dt_layernorm") else x.shape[-1]
    t.add_buffer(width * t.setting.format.block_bytes)
    return normalised(t, x)


def second(c: Config, hidden: int) -> Callable[[Trace, Tensor], Tensor]:
    """Mamba-2's mixer, from a `config.json`."""
    inner = c.size("expand", default=2) * hidden
    head_dim = c.size("head_dim", default=64)
    m = mamba2.Mamba2(
        hidden=hidden,
        heads=Dim(c.size("num_heads", default=inner // head_dim), "heads"),
        head_dim=Dim(head_dim, "head_dim"),
        groups=c.size("n_groups", default=8),
        state=Dim(c.size("state_size", default=128), "state"),
        kernel=c.size("conv_kernel", default=4),
        bias=c.flag("use_bias"),
        conv_bias=c.flag("use_conv_bias", default=True),
        chunk=c.size("chunk_size", default=256),
    )
    return lambda t, x: mamba2.mixer(t, m, x, "mixer")
