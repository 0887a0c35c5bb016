"""The same requests through several engines, in one run.

All engines are open, and take turns request by request, so that a machine that is busier for a
while is so for all of them. Every request is another member, so that nothing of it is in a cache.
Each is timed alone, from its tokens to its scores; then as many more are asked for together. Scores
are compared with those of the first engine.
"""

import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from rankonce.benchmarks.records import describe_machine, write_record
from rankonce.benchmarks.serve_arms import Setup
from rankonce.benchmarks.serve_models import shared_checkpoint
from rankonce.benchmarks.serve_workloads import MEMBER, LoadWorkload, LoadWriter
from rankonce.errors import DataError
from rankonce.model.scoring import RawScores
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


@dataclass(kw_only=True)
class _Arm:
    """An engine and what it did.

    Attributes:
        raws: of the requests alone, then of those together.
    """

    name: str
    version: str = ""
    ranker: Ranker = field(init=False)
    times_ms: list[float] = field(default_factory=list)
    together_s: float = 0.0
    raws: list[RawScores] = field(default_factory=list)

    def describe(self, first: "_Arm", options: EngineBenchmark) -> dict[str, Any]:
        """Sum it up, and compare the scores.

        Raises:
            DataError: they are not those of the first engine.
        """
        pairs = zip(self.raws, first.raws, strict=True)
        difference = max(float((a.labels_CL - b.labels_CL).abs().max()) for a, b in pairs)
        if difference > _TOLERANCE:
            raise DataError(
                f"{self.name}: scores differ from the first engine's by {difference:.2g}"
            )
        alone = self.raws[: options.num_requests]
        candidates = options.num_requests * options.workload.num_candidates
        return {
            "engine": self.name,
            "version": self.version,
            "greatest_difference": difference,
            "candidates_per_s": candidates / sum(self.times_ms) * 1e3,
            "together_candidates_per_s": candidates / self.together_s,
            "median_ms": statistics.median(self.times_ms),
            "slowest_ms": max(self.times_ms),
            "times_ms": self.times_ms,
            "computed_tokens": statistics.mean(raw.computed_tokens for raw in alone),
            "cached_tokens": statistics.mean(raw.cached_tokens for raw in alone),
        }


def measure_engines(options: EngineBenchmark) -> dict[str, Any]:
    """Measure every engine and write the record.

    Raises:
        RankOnceError: an engine cannot be used, or gives other scores than the first.
    """
    torch.set_num_threads(options.threads)
    with (
        shared_checkpoint(options.model, size=options.size, seed=options.seed) as model,
        ExitStack() as stack,
    ):
        arms = []
        for engine in options.engines:
            arm = _Arm(name=NATIVE if engine is None else engine.engine)
            print(f"{arm.name}: starts", file=sys.stderr)
            arm.version = _version(engine, options)
            arm.ranker = stack.enter_context(_opened(engine, model))
            arms.append(arm)
        load = os.getloadavg()[0]
        _measure(arms, options)
    engines = [arm.describe(arms[0], options) for arm in arms]
    record = {
        "environment": describe_machine(),
        # More than the threads of one engine: others worked beside them.
        "load_average": load,
        "settings": {
            "model": options.size or options.model.name,
            "workload": str(options.workload),
            "num_requests": options.num_requests,
            "threads": options.threads,
            "seed": options.seed,
        },
        "engines": engines,
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


def _measure(arms: Sequence["_Arm"], options: EngineBenchmark) -> None:
    writer = LoadWriter(arms[0].ranker, options.workload, seed=options.seed)
    requests = [writer.write(number).tokens for number in range(1 + 2 * options.num_requests)]
    first, alone, together = (
        requests[0],
        requests[1 : 1 + options.num_requests],
        requests[1 + options.num_requests :],
    )
    for arm in arms:  # the first request warms up
        arm.ranker.forward([first])
    for number, request in enumerate(alone):
        # Whoever comes first may find the machine in another state.
        for arm in arms if number % 2 == 0 else arms[::-1]:
            began = perf_counter()
            raws = arm.ranker.forward([request])
            arm.times_ms.append((perf_counter() - began) * 1e3)
            arm.raws += raws
    for arm in arms:
        began = perf_counter()
        arm.raws += arm.ranker.forward(together)
        arm.together_s = perf_counter() - began


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
