"""The same requests through one engine after the other, in one run.

Every request is another member, so that nothing of it is in a cache. Each is timed alone, from its
tokens to its scores; then as many more are asked for together. Scores are compared with those of
the first engine.
"""

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from rankonce.benchmarks.records import describe_machine, write_record
from rankonce.benchmarks.serve_arms import Setup
from rankonce.benchmarks.serve_models import shared_checkpoint
from rankonce.benchmarks.serve_workloads import MEMBER, LoadWorkload, LoadWriter
from rankonce.errors import DataError
from rankonce.layout import TokenizedRequest
from rankonce.ranker import Ranker, RankerConfig
from rankonce.serving.backends.opening import EngineOptions, open_ranker

NATIVE = "native"
# Engines of other kernels agree in FP32 to four decimals.
_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class EngineBenchmark:
    """What is compared on what.

    Attributes:
        engines: ``None`` is RankOnce itself.
        model: folder of a checkpoint, which stands where ``size`` is ``None``.
        size: of random weights.
        num_requests: timed alone, and again together.
        threads: that each engine computes with.
    """

    engines: Sequence[EngineOptions | None]
    model: Path
    size: str | None = None
    workload: LoadWorkload = MEMBER
    num_requests: int = 5
    threads: int = 1
    seed: int = 0
    output: Path = Path("results/engines.json")


def measure_engines(options: EngineBenchmark) -> dict[str, Any]:
    """Measure every engine and write the record.

    Raises:
        RankOnceError: an engine cannot be used, or gives other scores than the first.
    """
    torch.set_num_threads(options.threads)
    arms: list[dict[str, Any]] = []
    loads: list[float] = []
    expected: list[torch.Tensor] | None = None
    with shared_checkpoint(options.model, size=options.size, seed=options.seed) as model:
        for engine in options.engines:
            name = NATIVE if engine is None else engine.engine
            print(f"{name}: starts", file=sys.stderr)
            loads.append(os.getloadavg()[0])
            with _opened(engine, model) as ranker:
                arm, scores = _measure(ranker, options)
            expected = expected or scores
            difference = max(
                float((one - other).abs().max())
                for one, other in zip(scores, expected, strict=True)
            )
            if difference > _TOLERANCE:
                raise DataError(
                    f"{name}: scores differ from the first engine's by {difference:.2g}"
                )
            arms.append(
                {
                    "engine": name,
                    "version": _version(engine, options),
                    "greatest_difference": difference,
                    **arm,
                }
            )
    record = {
        "environment": describe_machine(),
        # Above the cores, others worked beside the engines.
        "load_averages": loads,
        "settings": {
            "model": options.size or options.model.name,
            "workload": str(options.workload),
            "num_requests": options.num_requests,
            "threads": options.threads,
            "seed": options.seed,
        },
        "engines": arms,
    }
    write_record(options.output, record)
    return record


def describe_engines(record: dict[str, Any]) -> str:
    """Write a record as a table in Markdown."""
    settings = record["settings"]
    lines = [
        f"{settings['model']}, {settings['workload']}, {settings['num_requests']} requests, "
        f"{settings['threads']} threads, {record['environment']['processor']}",
        "",
        "| engine | candidates/s | together | latency, median | slowest | tokens computed "
        "| difference |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {arm['version']} | {arm['candidates_per_s']:,.0f} "
        f"| {arm['together_candidates_per_s']:,.0f} | {arm['median_ms']:,.0f} ms "
        f"| {arm['slowest_ms']:,.0f} ms | {arm['computed_tokens']:,.0f} "
        f"| {arm['greatest_difference']:.1g} |"
        for arm in record["engines"]
    ]
    return "\n".join(lines)


@contextmanager
def _opened(engine: EngineOptions | None, model: Path) -> Iterator[Ranker]:
    config = RankerConfig(chat=False)
    if engine is None:
        yield Ranker.from_pretrained(model, config=config)
        return
    with open_ranker(engine, model, config=config) as ranker:
        yield ranker


def _measure(ranker: Ranker, options: EngineBenchmark) -> tuple[dict[str, Any], list[torch.Tensor]]:
    writer = LoadWriter(ranker, options.workload, seed=options.seed)
    count = options.num_requests
    requests = [writer.write(number).tokens for number in range(1 + 2 * count)]
    # The first one warms up.
    _score(ranker, requests[:1])
    times, scores, computed, cached = [], [], [], []
    for request in requests[1 : 1 + count]:
        began = perf_counter()
        (raw,) = ranker.forward([request])
        times.append((perf_counter() - began) * 1e3)
        scores.append(raw.labels_CL)
        computed.append(raw.computed_tokens)
        cached.append(raw.cached_tokens)
    began = perf_counter()
    scores += _score(ranker, requests[1 + count :])
    together_s = perf_counter() - began
    candidates = count * options.workload.num_candidates
    arm = {
        "candidates_per_s": candidates / sum(times) * 1e3,
        "together_candidates_per_s": candidates / together_s,
        "median_ms": statistics.median(times),
        "slowest_ms": max(times),
        "times_ms": times,
        "computed_tokens": statistics.mean(computed),
        "cached_tokens": statistics.mean(cached),
        "separate_tokens": requests[1].separate_tokens,
    }
    return arm, scores


def _score(ranker: Ranker, requests: Sequence[TokenizedRequest]) -> list[torch.Tensor]:
    return [raw.labels_CL for raw in ranker.forward(requests)]


def _version(engine: EngineOptions | None, options: EngineBenchmark) -> str:
    setup = Setup(
        model=options.model,
        threads=options.threads,
        vllm_python=None if engine is None else engine.python,
    )
    if engine is None:
        return setup.version("rankonce")
    if setup.vllm_python is None or engine.engine != "vllm":
        return f"{engine.engine} at {engine.url}" if engine.url else engine.engine
    return setup.version("vllm")
