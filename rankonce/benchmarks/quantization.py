"""Passes in int8 on a CPU beside fp32: one model, taken in turns, so that only ratios count."""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankonce.environment import describe_environment
from rankonce.kernels.int8_linear.cpu import cpu_path
from rankonce.layout import PassPart, TokenizedRequest
from rankonce.model.acceleration import accelerate_model
from rankonce.model.attention import register_segment_attention
from rankonce.model.loading import use_segment_attention
from rankonce.model.packing import forward_pass, pack_pass
from rankonce.model.quantized import quantize_layers
from rankonce.model.sizes import SIZES, VOCABULARY_SIZE, build_model


@dataclass(frozen=True, kw_only=True)
class QuantizationBenchmark:
    """What is timed.

    Attributes:
        sizes: names of ``SIZES``.
        prefix_tokens, num_candidates, candidate_tokens: of the one request of a pass.
        rounds: both arms once each.
    """

    sizes: tuple[str, ...] = tuple(SIZES)
    prefix_tokens: int = 512
    num_candidates: int = 25
    candidate_tokens: int = 20
    rounds: int = 5
    output: Path = Path("results/quantization.json")


def measure_quantization(options: QuantizationBenchmark) -> dict[str, Any]:
    """Time every size, write the record and return it."""
    register_segment_attention()
    record = {
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
        "sizes": {size: _measure(size, options) for size in options.sizes},
        "environment": describe_environment(),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    return record


def describe_quantization(record: dict[str, Any]) -> str:
    """Return the record as a table in Markdown."""
    lines = ["| size | fp32 / cpu-int8 | slowest – fastest round |", "| --- | ---: | ---: |"]
    lines += [
        f"| {size} | {one['speedup']:.2f}× | {min(one['ratios']):.2f} – {max(one['ratios']):.2f} |"
        for size, one in record["sizes"].items()
    ]
    return "\n".join(lines)


@torch.inference_mode()
def _measure(size: str, options: QuantizationBenchmark) -> dict[str, Any]:
    networks = [build_model(size, seed=0).eval() for _ in range(2)]
    quantize_layers(networks[1], "cpu-int8")
    for network in networks:
        use_segment_attention(network)
        accelerate_model(network)
    ids = torch.randint(3, VOCABULARY_SIZE, (4096,), generator=torch.Generator().manual_seed(0))
    tokens = ids.tolist()
    request = TokenizedRequest(
        prefix_ids=tuple(tokens[: options.prefix_tokens]),
        segment_ids=tuple(
            tuple(tokens[start : start + options.candidate_tokens])
            for start in range(options.num_candidates)
        ),
        label_ids=((3,), (4,)),
    )
    rounds = [[_time(network, request) for network in networks] for _ in range(options.rounds + 1)]
    return _ratios(rounds[1:])


def _ratios(rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    ratios = [fp32 / int8 for fp32, int8 in rounds]
    return {"speedup": statistics.median(ratios), "ratios": ratios}


def _time(network: Any, request: TokenizedRequest) -> float:
    part = PassPart(request=0, first=0, last=len(request.segment_ids), cached=False)
    batch = pack_pass([part], [request], {}, keep_prefixes=False, device=torch.device("cpu"))
    start = time.perf_counter()
    forward_pass(network, batch)
    return time.perf_counter() - start
