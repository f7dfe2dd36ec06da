"""GPT-J and CodeGen: both halves side by side behind one norm, part of each head rotated.

transformers v5.23, models/gptj/modeling_gptj.py, models/codegen/modeling_codegen.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Around, Names, Sizes
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32

NAMES = Names(embedding="transformer.wte", layers="transformer.h", norm="transformer.ln_f")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    hidden, heads = c.size("n_embd", "hidden_size"), c.few("n_head", "num_attention_heads")
    channels = max(hidden // heads, 1)
    fields = {**c.fields, "n_inner": c.size("n_inner", default=4 * hidden)}
    share = c.size("rotary_dim", default=channels) / channels
    s = decoder.read(Config(fields, c.model), activation="gelu_new", rotary=share)
    fused = c.text("model_type") == "codegen"
    dropout = c.number("resid_pdrop")

    def block(x: Tensor, kind: str, around: Around) -> Tensor:
        residual = x
        x = blocks.layer_norm(t, x, "ln_1")
        attended = ops.dropout(t, attention(t, s, x, around, fused), dropout)
        fed = decoder.plain(t, s, x, up="mlp.fc_in", down="mlp.fc_out", bias=True)
        fed = ops.dropout(t, fed, dropout)
        return ops.add(t, ops.add(t, attended, fed), residual)

    return decoder.run(
        t, s, block, ["full"] * s.layers, norm=blocks.layer_norm, names=NAMES, masking="eager",
        head_bias=True, begin=lambda x: ops.dropout(t, x, c.number("embd_pdrop")),
    )  # fmt: skip


def attention(t: Trace, s: Sizes, x: Tensor, around: Around, fused: bool) -> Tensor:
    """Attention with q and k in fp32; CodeGen's projections are one."""
    if fused:
        parts = ops.split(
            t, t.linear(x, "attn.qkv_proj", 3 * s.hidden, role="qkv"), *[s.hidden] * 3
        )
    else:
        parts = tuple(t.linear(x, f"attn.{p}_proj", s.hidden, role=p) for p in ("q", "k", "v"))
    q, k, v = (ops.split_heads(t, part, s.heads) for part in parts)
    q, k = decoder.turn(t, q, k, around)
    q, k = ops.to(t, q, FP32), ops.to(t, k, FP32)
    out = decoder.attend_eager(t, q, k, v, around.mask)
    return t.linear(out, "attn.out_proj", s.hidden, role="o")
