"""Checkpoints side by side: what they weigh, how fast they score, and how well, in one run.

Rounds go over all checkpoints in turn, so that a machine that slows down slows them all. A pass has
as many requests as fit the token budget; nothing is cached between passes. The highest memory is
measured in a process of its own for each checkpoint, so that one does not hide the next.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM

from rankonce.environment import describe_environment
from rankonce.errors import DataError
from rankonce.evaluation.held_out import measure_ranker
from rankonce.layout import TokenizedRequest, plan_passes
from rankonce.prompts.tasks import Task
from rankonce.ranker import Ranker, RankerConfig
from rankonce.records import TrainingExample

_COMPARED = ("parameters", "weights_mb", "peak_memory_mb", "latency_ms", "tokens_per_s")


@dataclass(frozen=True, kw_only=True)
class RungsOptions:
    """How checkpoints are measured.

    Attributes:
        rounds: each times every checkpoint once over all examples.
        device, precision: as in ``load_model``.
        max_tokens_per_pass: bound of a pass.
        tasks: beside those of the library.
    """

    rounds: int = 5
    device: str | None = None
    precision: str | None = None
    max_tokens_per_pass: int = 4096
    tasks: tuple[Task, ...] = ()


def measure_rungs(
    folders: Sequence[Path], examples: Sequence[TrainingExample], options: RungsOptions
) -> dict[str, Any]:
    """Measure checkpoints on the same labelled requests.

    Returns:
        For every folder, in the order given: ``parameters``, ``weights_mb``, ``peak_memory_mb``,
        ``latency_ms`` of a pass (median), ``tokens_per_s`` and ``candidates_per_s``, ``quality`` by
        task as ``measure_ranker`` gives it, and ``ratios`` to the first; the environment beside.

    Raises:
        DataError: there is nothing to measure.
    """
    if not folders or not examples:
        raise DataError("rungs: should be given one checkpoint and one example at least")
    if options.rounds < 1:
        raise DataError(f"rounds: should be 1 or more, is {options.rounds}")
    rankers = [_load(folder, options) for folder in folders]
    requests = [
        [ranker.prepare(one.request).rendered.tokens for one in examples] for ranker in rankers
    ]
    times: list[list[list[float]]] = [[] for _ in rankers]
    console = Console(stderr=True)
    rounds = track(
        range(options.rounds + 1),
        description="timing",
        console=console,
        disable=not console.is_terminal,
    )
    for number in rounds:
        for place, ranker in enumerate(rankers):
            taken = _time_passes(ranker, requests[place])
            # The first round loads libraries and fills caches of the processor.
            if number:
                times[place].append(taken)
    rungs: list[dict[str, Any]] = [
        {
            "model": str(folder),
            **_weigh(ranker),
            "peak_memory_mb": _peak_memory_mb(folder, examples, options),
            **_speed(requests[place], times[place]),
            "quality": measure_ranker(ranker, examples),
        }
        for place, (folder, ranker) in enumerate(zip(folders, rankers, strict=True))
    ]
    for rung in rungs:
        rung["ratios"] = {
            name: rung[name] / rungs[0][name] for name in (*_COMPARED, "candidates_per_s")
        }
    return {
        "rungs": rungs,
        "device": str(rankers[0].loaded.device),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "max_tokens_per_pass": options.max_tokens_per_pass,
        "examples": len(examples),
        "environment": describe_environment(),
    }


def describe_rungs(record: Mapping[str, Any]) -> str:
    """Write the record as a table in Markdown."""
    tasks = sorted({name for rung in record["rungs"] for name in rung["quality"]})
    quality = [
        (task, metric)
        for task in tasks
        for metric in ("auc", "ndcg@10", "log_loss")
        if metric in record["rungs"][0]["quality"].get(task, {})
    ]
    titles = ["model", "parameters", "weights, MB", "peak memory, MB", "pass p50, ms"]
    titles += ["tokens/s", "candidates/s", *(f"{task} {metric}" for task, metric in quality)]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for rung in record["rungs"]:
        cells = [Path(rung["model"]).name, f"{rung['parameters']:,}"]
        cells += [f"{rung[name]:.1f}" for name in ("weights_mb", "peak_memory_mb", "latency_ms")]
        cells += [
            f"{rung[name]:,.0f} ({rung['ratios'][name]:.2f}×)"
            for name in ("tokens_per_s", "candidates_per_s")
        ]
        cells += [f"{rung['quality'][task][metric]:.4f}" for task, metric in quality]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _load(folder: Path, options: RungsOptions) -> Ranker:
    config = RankerConfig(
        calibrate=False, prefix_cache_mb=0, max_tokens_per_pass=options.max_tokens_per_pass
    )
    return Ranker.from_pretrained(
        folder,
        device=options.device,
        precision=options.precision,
        tasks=options.tasks,
        config=config,
    )


def _weigh(ranker: Ranker) -> dict[str, float]:
    network = ranker.loaded.network
    # Quantised weights are packed, or no parameters at all: the shape says how many there are.
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(network.config)
    # Tied weights are one tensor under two names.
    held = {one.data_ptr(): one for one in network.state_dict().values()}
    return {
        "parameters": sum(one.numel() for one in shape.parameters()),
        "weights_mb": sum(one.numel() * one.element_size() for one in held.values()) / 1e6,
    }


def _time_passes(ranker: Ranker, requests: Sequence[TokenizedRequest]) -> list[float]:
    """Time every pass, in ms."""
    opened = [ranker.scorer.open_request(one) for one in requests]
    passes = plan_passes(
        requests, [0] * len(requests), max_tokens_per_pass=ranker.config.max_tokens_per_pass
    )
    taken = []
    for parts in passes:
        start = time.perf_counter()
        ranker.scorer.run_pass([(opened[part.request], part.last) for part in parts])
        if ranker.loaded.device.type == "cuda":
            torch.cuda.synchronize(ranker.loaded.device)
        taken.append((time.perf_counter() - start) * 1e3)
    return taken


def _speed(
    requests: Sequence[TokenizedRequest], rounds: Sequence[Sequence[float]]
) -> dict[str, float]:
    seconds = statistics.median(sum(taken) for taken in rounds) / 1e3
    tokens = sum(len(one.prefix_ids) + sum(map(len, one.segment_ids)) for one in requests)
    return {
        "latency_ms": statistics.median(one for taken in rounds for one in taken),
        "tokens_per_s": tokens / seconds,
        "candidates_per_s": sum(len(one.segment_ids) for one in requests) / seconds,
    }


def _peak_memory_mb(
    folder: Path, examples: Sequence[TrainingExample], options: RungsOptions
) -> float:
    """Return the highest memory of a process that loads a checkpoint and scores the examples.

    On a GPU the highest that torch has allocated there, else the resident memory of the process,
    its libraries among it.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_score_once, (folder, list(examples), options))


def _score_once(folder: Path, examples: Sequence[TrainingExample], options: RungsOptions) -> float:
    ranker = _load(folder, options)
    for _ in ranker.score_many([one.request for one in examples], progress=False):
        pass
    if ranker.loaded.device.type == "cuda":
        return torch.cuda.max_memory_allocated(ranker.loaded.device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage says on Linux is no less than the parent had when this process began.
        (line,) = (one for one in status.read_text().splitlines() if one.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, KiB elsewhere.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
