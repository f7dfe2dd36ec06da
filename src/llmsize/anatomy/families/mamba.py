"""Mamba, Falcon-Mamba and Mamba-2: no attention, one mixer a layer.

transformers v5.23, models/mamba, models/falcon_mamba, models/mamba2.
"""

from __future__ import annotations

from collections.abc import Callable

from llmsize.anatomy import blocks, recurrent
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    hidden = Dim(c.size("hidden_size", "d_model"), "hidden")
    vocabulary = Dim(c.size("vocab_size"), "vocabulary")
    layers = c.few("num_hidden_layers", "n_layer")
    mixer = second(c, hidden) if c.text("model_type") == "mamba2" else first(c, hidden)

    def block(x: Tensor, kind: str) -> Tensor:
        residual = x
        x = blocks.rms_norm(t, x, "norm")
        return ops.add(t, residual, mixer(t, x))

    x = blocks.embed(t, "backbone.embeddings", vocabulary, hidden)
    x = t.layers("backbone.layers", block, x, ["mixer"] * layers)
    x = blocks.rms_norm(t, x, "backbone.norm_f")
    tied = c.flag("tie_word_embeddings", default=c.text("model_type") != "mamba2")
    return blocks.causal_lm(t, x, vocabulary, tied="backbone.embeddings" if tied else "")


def first(c: Config, hidden: int) -> Callable[[Trace, Tensor], Tensor]:
    """Mamba's mixer, from a `config.json`."""
    rank = c.value("time_step_rank")
    expanded = c.size("expand", default=2) * hidden
    m = recurrent.Mamba(
        hidden=hidden,
        inner=Dim(c.size("intermediate_size", default=expanded), "inner"),
        state=Dim(c.size("state_size", default=16), "state"),
        rank=Dim(-(-hidden // 16) if rank in (None, "auto") else c.size("time_step_rank"), "rank"),
        kernel=c.size("conv_kernel", default=4),
        bias=c.flag("use_bias"),
        conv_bias=c.flag("use_conv_bias", default=True),
    )
    return lambda t, x: recurrent.mamba(t, m, x, "mixer")


def second(c: Config, hidden: int) -> Callable[[Trace, Tensor], Tensor]:
    """Mamba-2's mixer, from a `config.json`."""
    inner = c.size("expand", default=2) * hidden
    head_dim = c.size("head_dim", default=64)
    m = recurrent.Mamba2(
        hidden=hidden,
        heads=Dim(c.size("num_heads", default=inner // head_dim), "heads"),
        head_dim=Dim(head_dim, "head_dim"),
        groups=c.size("n_groups", default=8),
        state=Dim(c.size("state_size", default=128), "state"),
        kernel=c.size("conv_kernel", default=4),
        bias=c.flag("use_bias"),
        conv_bias=c.flag("use_conv_bias", default=True),
    )
    return lambda t, x: recurrent.mamba2(t, m, x, "mixer")
