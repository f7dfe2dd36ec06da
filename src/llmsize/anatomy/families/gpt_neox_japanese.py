"""GPT-NeoX Japanese: GPT-NeoX almost without biases, whose attention is written out.

transformers v5.23, models/gpt_neox_japanese/modeling_gpt_neox_japanese.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, lm_head, rotary
from llmsize.anatomy import operations as ops
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.rotary import Rotation
from llmsize.anatomy.tensor import Dim, Tensor
from llmsize.anatomy.trace import Trace

NAME = "gpt_neox_japanese"
HEAD = Head(f"{NAME}.embed_in", "embed_out")


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    if t.setting.checkpoint_every:
        raise c.error(
            "is of a class without gradient checkpointing in transformers", "train without it"
        )
    s = decoder.read(c, tied=True, activation="gelu", attention_dropout=0.1)
    width = int(s.hidden * c.number("intermediate_multiple_size", default=4))
    s = s._replace(intermediate=Dim(width, "intermediate"))
    x = model(t, s, c.number("hidden_dropout", default=0.0))
    return lm_head.causal_lm(t, x, s.vocabulary, HEAD, tied=s.tied)


def model(t: Trace, s: Sizes, dropout: float) -> Tensor:
    """Embedding, blocks, final norm."""
    embeddings = blocks.embed(t, f"{NAME}.embed_in", s.vocabulary, s.hidden)
    position_ids = blocks.positions(t)
    mask = blocks.mask(t, masking="eager")
    rotation = rotary.table(t, embeddings, s.rotary)
    returned: list[Tensor] = []

    def block(x: Tensor, last: bool) -> Tensor:
        normed = blocks.layer_norm(t, x, "input_layernorm")
        attended, weights = attention(t, s, normed, rotation, mask)
        total = ops.add(t, x, ops.dropout(t, biased(t, s, attended) if last else attended, dropout))
        del attended
        fed = mlp(t, s, blocks.layer_norm(t, total, "post_attention_layernorm"))
        out = ops.add(t, total, ops.dropout(t, fed, dropout))
        blocks.hand_back(t, returned, weights)
        return out

    kinds = [layer == s.layers - 1 for layer in range(s.layers)]
    x = t.layers(f"{NAME}.layers", block, embeddings, kinds)
    x = blocks.layer_norm(t, x, f"{NAME}.final_layer_norm")
    returned.clear()
    del position_ids
    return x


def biased(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """What attention gives with the bias that the last layer has."""
    return ops.add(t, x, t.weight("attention.dense_bias", (s.hidden,), "bias"))


def attention(
    t: Trace, s: Sizes, x: Tensor, rotation: Rotation, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention over one fused projection, and its weights beside."""
    fused = t.linear(x, "attention.query_key_value", 3 * s.hidden, role="qkv")
    fused = ops.split_heads(t, fused, s.heads)
    q, k, v = (ops.slice_last(t, fused, s.head_dim) for _ in range(3))
    q, k = rotary.rotate_part(t, q, k, *rotation)
    k, v = blocks.remember(t, k, v)
    rows, total = t.batch * s.heads, k.shape[2]
    zeros = t.new("zeros", (rows, q.shape[2], total), q.format)
    q, k = (ops.reshape(t, part, rows, *part.shape[2:]) for part in (q, k))
    scores = ops.add_product(t, zeros, q, ops.transpose(t, k, -1, -2))
    scores = ops.reshape(t, scores, t.batch, s.heads, t.sequence, total)
    scores = ops.add(t, scores, mask) if mask is not None else scores
    weights = ops.softmax(t, scores)
    weights = ops.to(t, ops.dropout(t, weights, s.attention_dropout), v.format)
    context = [ops.matmul(t, weights, v)]
    del zeros, scores
    merged = ops.merge_heads(t, context.pop())
    return t.linear(merged, "attention.dense", s.hidden, role="o"), weights


def mlp(t: Trace, s: Sizes, x: Tensor) -> Tensor:
    """Two linear layers around the activation."""
    between = t.linear(x, "mlp.dense_h_to_4h", s.intermediate, role="up")
    between = s.activation(t, between)
    out = t.linear(between, "mlp.dense_4h_to_h", s.hidden, role="down")
    del x, between
    return out
