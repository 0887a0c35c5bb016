"""transformers without packing: a prompt a candidate, and the prefix cached and repeated."""

from typing import Any

import torch
from torch import Tensor

from rankonce.benchmarks.passes import PassInputs, difference_of, measurement
from rankonce.benchmarks.runner import Difference, Measurement
from rankonce.benchmarks.timing import Timing, time_call

# Keys and values of the prompts that run at once behind a cached prefix.
_MAX_CACHE_BYTES = 20e9


def measure_separate(inputs: PassInputs) -> Measurement:
    """Run one prompt a candidate, on a part of the candidates."""
    prompts = inputs.prompts(0, inputs.num_prompts)

    def score() -> Tensor:
        return inputs.run_prompts(prompts)

    with torch.no_grad():
        difference = difference_of(inputs, score(), inputs.dtype)
        timing = None if difference.is_wrong else time_call(score, inputs.device)
    return _scaled_up(inputs, timing, difference, inputs.num_prompts)


def measure_cached_prefix(inputs: PassInputs) -> Measurement:
    """Read the prefix once and repeat its keys and values for a part of the candidates."""
    from transformers import DynamicCache

    shape, model = inputs.shape, inputs.model
    token_bytes = 4 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim
    fitting = int(_MAX_CACHE_BYTES / (token_bytes * shape.prompt_tokens))
    count = min(shape.num_candidates, max(1, fitting))
    prompts = inputs.prompts(0, count)
    prefix_ids, candidate_ids = prompts.split([shape.prefix_tokens, shape.candidate_tokens], dim=1)

    def read_prefix() -> Any:
        cache = DynamicCache()
        inputs.run_prompts(prefix_ids[:1], past_key_values=cache, use_cache=True)
        return cache

    def score() -> Tensor:
        cache = DynamicCache()
        for number, layer in enumerate(known.layers):
            keys, values = (x.expand(count, -1, -1, -1) for x in (layer.keys, layer.values))
            cache.update(keys, values, number)
        return inputs.run_prompts(candidate_ids, past_key_values=cache, use_cache=True)

    with torch.no_grad():
        known = read_prefix()
        difference = difference_of(inputs, score(), inputs.dtype)
        if difference.is_wrong:
            return _scaled_up(inputs, None, difference, count)
        prefix_ms = time_call(read_prefix, inputs.device).median_ms
        timing = time_call(score, inputs.device)
    return _scaled_up(inputs, timing, difference, count, once_ms=prefix_ms)


def _scaled_up(
    inputs: PassInputs,
    timing: Timing | None,
    difference: Difference,
    count: int,
    *,
    once_ms: float = 0.0,
) -> Measurement:
    """Extend the time of ``count`` candidates to all of them."""
    factor = inputs.shape.num_candidates / count
    note = f"measured on {count} of {inputs.shape.num_candidates} candidates and scaled"
    details = {"measured_candidates": float(count)}
    if timing is not None:
        details["measured_ms"] = timing.median_ms + once_ms
        timing = Timing(
            median_ms=once_ms + timing.median_ms * factor,
            p20_ms=once_ms + timing.p20_ms * factor,
            p80_ms=once_ms + timing.p80_ms * factor,
            num_runs=timing.num_runs,
        )
    if once_ms:
        details["prefix_ms"] = once_ms
    return measurement(inputs, timing, difference, details, note)
