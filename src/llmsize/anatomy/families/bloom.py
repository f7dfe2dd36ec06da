"""BLOOM: ALiBi for positions, a norm behind the embedding, q, k and v in one projection.

transformers v5.23, models/bloom/modeling_bloom.py.
"""

from __future__ import annotations

from llmsize.anatomy import blocks, decoder, lm_head
from llmsize.anatomy import operations as ops
from llmsize.anatomy.autograd import Grads, Node
from llmsize.anatomy.config import Config
from llmsize.anatomy.decoder import Sizes
from llmsize.anatomy.lm_head import Head
from llmsize.anatomy.operations import GradList, first
from llmsize.anatomy.tape import Tape
from llmsize.anatomy.tensor import Tensor
from llmsize.anatomy.trace import Trace
from llmsize.formats import FP32, INT64

EMBEDDING = "transformer.word_embeddings"


def forward(t: Trace, c: Config) -> Tensor:
    """Tokens to loss or logits."""
    fields = {"hidden_size": c.value("n_embed", "hidden_size"), **c.fields}
    fields["intermediate_size"] = 4 * c.size("hidden_size", "n_embed")
    s = decoder.read(Config(fields, c.model), tied=True, rotary=0.0)
    x = model(t, s, c.number("hidden_dropout"), c.flag("apply_residual_connection_post_layernorm"))
    return lm_head.causal_lm(t, x, s.vocabulary, Head(EMBEDDING, casts=False), tied=s.tied)


def model(t: Trace, s: Sizes, dropout: float, after_norm: bool) -> Tensor:
    """Embeddings, blocks, final norm; the residual stream may branch off `after_norm`."""
    embeddings = blocks.embed(t, EMBEDDING, s.vocabulary, s.hidden)
    slopes = t.new("pow", (s.heads,), FP32)
    biases = alibi(t, s)
    mask = blocks.mask(t, masking="eager")
    assert mask is not None
    returned: list[Tensor] = []

    def block(x: Tensor, kind: str) -> Tensor:
        normed = blocks.layer_norm(t, x, "input_layernorm")
        residual = normed if after_norm else x
        attended, weights = attention(t, s, normed, residual, biases, mask, dropout)
        normed = blocks.layer_norm(t, attended, "post_attention_layernorm")
        residual = normed if after_norm else attended
        out = mlp(t, s, normed, residual, dropout)
        blocks.hand_back(t, returned, weights)
        return out

    x = t.layers(
        "transformer.h",
        block,
        blocks.layer_norm(t, embeddings, f"{EMBEDDING}_layernorm"),
        ["full"] * s.layers,
        biases,
    )
    x = blocks.layer_norm(t, x, "transformer.ln_f")
    del slopes
    returned.clear()
    return x


def mlp(t: Trace, s: Sizes, x: Tensor, residual: Tensor, dropout: float) -> Tensor:
    """Two linear layers around the activation, added to the residual."""
    x = gelu(t, t.linear(x, "mlp.dense_h_to_4h", s.intermediate, bias=True, role="up"))
    out = t.linear(x, "mlp.dense_4h_to_h", s.hidden, bias=True, role="down")
    return ops.add(t, residual, ops.dropout(t, out, dropout))


def alibi(t: Trace, s: Sizes) -> Tensor:
    """What the scores of each head gain by distance: batch × heads, 1, all tokens."""
    total = t.sequence + t.setting.past
    shape = (t.batch * s.heads, 1, total)
    places = t.new("arange", (total,), INT64)
    per_head = t.new("mul", (s.heads, 1, total), FP32)
    del places
    repeated = t.new("repeat", shape, FP32)
    del per_head
    return ops.to(t, repeated, FP32 if t.autocast else t.setting.format)


def attention(
    t: Trace,
    s: Sizes,
    x: Tensor,
    residual: Tensor,
    biases: Tensor,
    mask: Tensor,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Attention over one fused projection, added to the residual, and the weights beside."""
    batch, sequence, _ = x.shape
    fused = t.linear(x, "self_attention.query_key_value", 3 * s.hidden, bias=True, role="qkv")
    by_head = ops.reshape(t, fused, batch, sequence, s.heads, 3, s.head_dim)
    q, k, v = (ops.transpose(t, ops.select(t, by_head, 3), 1, 2) for _ in range(3))
    k, v = blocks.remember(t, k, v)
    total, rows = k.shape[2], batch * s.heads
    q = ops.reshape(t, q, rows, sequence, s.head_dim)
    k = ops.transpose(t, ops.reshape(t, k, rows, total, s.head_dim), -1, -2)
    v = ops.reshape(t, v, rows, total, s.head_dim)
    products = ops.add_product(t, biases, q, k)
    scores = ops.reshape(t, products, batch, s.heads, sequence, total)
    scores = ops.add(t, scores, mask)
    weights = ops.to(t, ops.softmax(t, scores, FP32), q.format)
    weights = ops.dropout(t, weights, s.attention_dropout)
    context = ops.matmul(t, ops.reshape(t, weights, rows, sequence, total), v)
    context = ops.reshape(t, context, batch, s.heads, sequence, s.head_dim)
    context = ops.merge_heads(t, context)
    out = t.linear(context, "self_attention.dense", s.hidden, bias=True, role="o")
    return ops.add(t, residual, ops.dropout(t, out, dropout)), weights


def gelu(t: Tape, x: Tensor) -> Tensor:
    """GELU's tanh form as a function of its own: keeps its input only."""
    node = t.record(_gelu_backward, (x,), (x,))
    grad, t.grad = t.grad, False
    out = ops.mul(t, ops.scale(t, x), ops.shift(t, _tanh(t, x)))
    t.grad = grad
    out.node = node
    return out


def _tanh(t: Tape, x: Tensor) -> Tensor:
    return ops.tanh(t, ops.mul(t, ops.scale(t, x), ops.shift(t, ops.mul(t, ops.scale(t, x), x))))


def _gelu_backward(t: Tape, node: Node, grads: GradList) -> Grads:
    """`bloom_gelu_back`, line by line."""
    (x,) = node.saved
    assert x is not None
    grad, t.grad = t.grad, False
    tanh = _tanh(t, x)
    steep = ops.mul(
        t,
        ops.scale(t, x),
        ops.mul(
            t,
            ops.shift(t, ops.mul(t, tanh, tanh)),
            ops.shift(t, ops.mul(t, ops.scale(t, x), x)),
        ),
    )
    slope = ops.add(t, steep, ops.scale(t, ops.shift(t, tanh)))
    del steep
    out = ops.mul(t, slope, first(grads))
    t.grad = grad
    return (out,)
