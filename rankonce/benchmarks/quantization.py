"""Passes in int8 on a CPU beside fp32: one model, taken in turns, so that ratios count."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankonce.benchmarks.records import write_record
from rankonce.environment import describe_environment
from rankonce.kernels.int8_linear.cpu import cpu_path
from rankonce.layout import PassPart, TokenizedRequest
from rankonce.model.acceleration import accelerate_model
from rankonce.model.attention import register_segment_attention
from rankonce.model.loading import use_segment_attention
from rankonce.model.packing import forward_pass, pack_pass
from rankonce.model.quantized import quantize_layers
from rankonce.model.sizes import VOCABULARY_SIZE, build_model

_ARMS = ("fp32", "cpu-int8")


@dataclass(frozen=True, kw_only=True)
class QuantizationBenchmark:
    """What is timed.

    Attributes:
        sizes: names of ``SIZES``.
        prefix_tokens, num_candidates, candidate_tokens: of the one request of a pass.
        rounds: each arm once, the first of them in turns.
        output: the record, written anew after every size.
    """

    sizes: tuple[str, ...] = ("1m", "3m", "10m", "25m", "60m")
    prefix_tokens: int = 512
    num_candidates: int = 25
    candidate_tokens: int = 20
    rounds: int = 5
    output: Path = Path("results/quantization.json")


def measure_quantization(
    options: QuantizationBenchmark, *, on_pass: Callable[[str, int, int], None] = lambda *_: None
) -> dict[str, Any]:
    """Time every size, write the record and return it.

    Args:
        on_pass: called after every pass with its size, the passes of this size that are done and
            how many there are.

    Raises:
        ModelError: no size has this name.
    """
    register_segment_attention()
    record: dict[str, Any] = {
        "command": "rankonce bench quantization "
        + " ".join(f"--size {size}" for size in options.sizes)
        + f" --rounds {options.rounds}",
        "product": cpu_path(),
        "threads": torch.get_num_threads(),
        "pass": {
            "prefix_tokens": options.prefix_tokens,
            "num_candidates": options.num_candidates,
            "candidate_tokens": options.candidate_tokens,
        },
        "sizes": {},
        "environment": describe_environment(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for size in options.sizes:
        record["sizes"][size] = _measure(size, options, on_pass)
        write_record(options.output, record)
    return record


def describe_quantization(record: dict[str, Any]) -> str:
    """Return the record as a table in Markdown."""
    lines = [
        "| size | fp32 ms | cpu-int8 ms | fp32 / cpu-int8 | its rounds | in processor time |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size, one in record["sizes"].items():
        fp32, int8 = (statistics.median(one["wall_ms"][arm]) for arm in _ARMS)
        ratios = _ratios(one["wall_ms"])
        lines.append(
            f"| {size} | {fp32:,.0f} | {int8:,.0f} | {one['speedup']:.2f}× "
            f"| {min(ratios):.2f} – {max(ratios):.2f} | {one['cpu_speedup']:.2f}× |"
        )
    return "\n".join(lines)


@torch.inference_mode()
def _measure(
    size: str, options: QuantizationBenchmark, on_pass: Callable[[str, int, int], None]
) -> dict[str, Any]:
    networks = {arm: build_model(size, seed=0).eval() for arm in _ARMS}
    quantize_layers(networks["cpu-int8"], "cpu-int8")
    for network in networks.values():
        use_segment_attention(network)
        accelerate_model(network)
    request = _request(options)
    of = len(_ARMS) * (options.rounds + 1)
    wall_ms: dict[str, list[float]] = {arm: [] for arm in _ARMS}
    cpu_ms: dict[str, list[float]] = {arm: [] for arm in _ARMS}
    for number in range(options.rounds + 1):
        # The arm that follows a heavy one finds caches and clocks as that left them.
        for place, arm in enumerate(_ARMS if number % 2 else reversed(_ARMS)):
            wall, cpu = _time(networks[arm], request)
            on_pass(size, number * len(_ARMS) + place + 1, of)
            # The first round fills caches and lays weights out.
            if number:
                wall_ms[arm].append(wall)
                cpu_ms[arm].append(cpu)
    return {
        "speedup": statistics.median(_ratios(wall_ms)),
        "cpu_speedup": statistics.median(_ratios(cpu_ms)),
        "wall_ms": wall_ms,
        "cpu_ms": cpu_ms,
    }


def _request(options: QuantizationBenchmark) -> TokenizedRequest:
    size, step = options.prefix_tokens, options.candidate_tokens
    generator = torch.Generator().manual_seed(0)
    shape = (size + options.num_candidates * step,)
    tokens = torch.randint(3, VOCABULARY_SIZE, shape, generator=generator).tolist()
    return TokenizedRequest(
        prefix_ids=tuple(tokens[:size]),
        segment_ids=tuple(
            tuple(tokens[start : start + step]) for start in range(size, len(tokens), step)
        ),
        label_ids=((3,), (4,)),
    )


def _ratios(times: dict[str, list[float]]) -> Sequence[float]:
    """Return fp32 over int8 of every round."""
    return [fp32 / int8 for fp32, int8 in zip(*(times[arm] for arm in _ARMS), strict=True)]


def _time(network: Any, request: TokenizedRequest) -> tuple[float, float]:
    """Return wall and processor time of one pass, in ms."""
    part = PassPart(request=0, first=0, last=len(request.segment_ids), cached=False)
    batch = pack_pass([part], [request], {}, keep_prefixes=False, device=torch.device("cpu"))
    wall, cpu = time.perf_counter(), time.process_time()
    forward_pass(network, batch)
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3
