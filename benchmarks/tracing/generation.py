"""A prefill and one decoded token, without gradients."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from benchmarks.tracing.models import Settings, architecture, first
from benchmarks.tracing.runs import Run, build, kernel_name, make_batch, place
from benchmarks.tracing.tracker import Tracker, tensors_in


def measure_inference(settings: Settings) -> tuple[dict[str, Any], Tracker]:
    """A prefill of `batch` by `seq` tokens and one decoded token, without gradients."""
    run = build(settings)
    run.model.eval()
    tracker = run.tracker
    tokens = make_batch(settings)["input_ids"]
    one = torch.zeros((settings.batch, 1), dtype=torch.int64)
    weights = tracker.add_all(run.model.parameters(), "param")
    buffers = tracker.add_all(run.model.buffers(), "buffer")
    tracker.add(tokens, "input")
    with torch.no_grad(), tracker.hooks(), tracker:
        figures = prefill_and_decode(run, tokens, one)
    prefill, decode = tracker.peaks["prefill"], tracker.peaks["decode"]
    counts = {"params_total": run.total_parameters, "sdpa_kernel": kernel_name(run)}
    static = weights + buffers
    figures |= {
        "param_bytes": weights,
        "buffer_bytes": buffers,
        "peak_prefill_bytes": prefill.total,
        "peak_prefill_op": place(prefill),
        "prefill_over_weights_kv_bytes": prefill.total - static - figures["kv_cache_bytes"],
        "peak_decode_bytes": decode.total,
        "decode_over_weights_kv_bytes": decode.total
        - static
        - figures["kv_cache_after_decode_bytes"],
    }
    return architecture(run.model.config) | counts | figures, tracker


def cache_layers(cache: Any) -> list[Any]:
    """What each layer keeps; of an encoder with a decoder, its own keys and the encoder's apart."""
    from transformers import EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache.layers + cache.cross_attention_cache.layers
    return getattr(cache, "layers", [])


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors in a cache, as their shapes say.

    A sliding-window layer keeps the whole prefill storage alive behind its shorter view; that
    shows in `live_after_prefill_bytes`, not here.
    """
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache_layers(cache)
        for value in vars(layer).values()
        for tensor in tensors_in(list(value.values()) if isinstance(value, dict) else value)
        if tensor.device.type == "cuda" and tensor.is_floating_point()
    )


SHIFT_TOKENS = ("bart", "mbart", "plbart")
"""Types whose decoder reads the encoder's tokens, shifted, unless it is given others."""


def generation_step(run: Run, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """Logits and cache after the given tokens."""
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(run.model.forward).parameters:
        options["logits_to_keep"] = run.settings.logits_to_keep
    if cache is not None:
        recurrent = "cache_params" in inspect.signature(run.model.forward).parameters
        options["cache_params" if recurrent else "past_key_values"] = cache
    config = run.model.config
    if config.is_encoder_decoder and config.model_type not in SHIFT_TOKENS:
        options["decoder_input_ids"] = torch.zeros_like(tokens)
    outputs = run.model(tokens, **options)
    return outputs.logits, first(outputs, "past_key_values", "cache_params", default=None)


def prefill_and_decode(run: Run, tokens: torch.Tensor, one: torch.Tensor) -> dict[str, Any]:
    """A prefill with a cache, its logits dropped, then one decoded token."""
    tracker = run.tracker
    tracker.start("prefill")
    logits, cache = generation_step(run, tokens, None)
    figures: dict[str, Any] = {
        "logits_dtype": str(logits.dtype).removeprefix("torch."),
        "logits_shape": "x".join(str(n) for n in logits.shape),
        "logits_bytes": logits.numel() * logits.element_size(),
    }
    del logits
    figures["kv_cache_bytes"] = cache_bytes(cache)
    figures["live_after_prefill_bytes"] = tracker.live
    tracker.add(one, "input")
    tracker.start("decode")
    _, cache = generation_step(run, one, cache)
    figures["kv_cache_after_decode_bytes"] = cache_bytes(cache)
    return figures
