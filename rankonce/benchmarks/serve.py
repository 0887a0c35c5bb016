"""Capacity of servers at a fixed p99, side by side on the same checkpoint and the same texts.

A server is a process of its own and this one is its client: they share the machine and not an
interpreter. Before a server is measured, its answers are compared with the ranker's in this
process.
"""

import asyncio
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from rankonce.benchmarks.records import describe_machine, write_record
from rankonce.benchmarks.serve_arms import ARMS, READY_S, ServingArm, Setup
from rankonce.benchmarks.serve_capacity import find_capacity
from rankonce.benchmarks.serve_load import JSON_HEADERS, Call, LoadStep, run_step
from rankonce.benchmarks.serve_models import load_offline_ranker
from rankonce.benchmarks.serve_workloads import (
    LOAD_WORKLOADS,
    LoadRequest,
    LoadWorkload,
    LoadWriter,
)
from rankonce.errors import DataError
from rankonce.serving.backends.processes import ServerProcess, running

# Other engines agree with transformers to four decimals.
TOLERANCE = 1e-3
_TIMEOUT_S = 600.0
_NUM_COMPARED = 2
_NUM_ALONE = 5
_BOUNDS_A_STEP = 10


@dataclass(frozen=True, kw_only=True)
class ServeBenchmark:
    """What is measured.

    Attributes:
        bound_ms: of p99.
        step_seconds: how long a rate is held, at least ten times the bound; a step has
            ``min_requests`` all the same.
        precision: of the capacity, as a share.
        arms: names of ``ARMS``; those whose server or form is not there are left out.
        output: JSON, rewritten after every step.
    """

    setup: Setup
    workloads: tuple[LoadWorkload, ...] = tuple(LOAD_WORKLOADS.values())
    arms: tuple[str, ...] = tuple(ARMS)
    bound_ms: float = 1000.0
    step_seconds: float = 20.0
    min_requests: int = 30
    precision: float = 0.1
    seed: int = 0
    output: Path = Path("results/serve.json")


def measure_serving(options: ServeBenchmark) -> dict[str, Any]:
    """Search every server's capacity on every workload and write the record.

    Raises:
        DataError: a server's scores are not the ranker's.
        ServerError: a server did not start.
    """
    ranker = load_offline_ranker(options.setup.model)
    chosen = [ARMS[name] for name in options.arms]
    record: dict[str, Any] = {
        "environment": describe_machine(),
        "settings": _describe_settings(options),
        "workloads": {w.name: asdict(w) for w in options.workloads},
        "arms": [],
    }
    plan = [
        (arm, workload)
        for server in dict.fromkeys(arm.server for arm in chosen)
        for arm in chosen
        if arm.server == server and _is_there(server, options.setup)
        for workload in options.workloads
        if arm.takes(workload)
    ]
    with _progress(len(plan)) as bars, tempfile.TemporaryDirectory() as folder:
        for server in dict.fromkeys(arm.server for arm, _ in plan):
            bars.say(f"starting {server}")
            with _served(options.setup, server, Path(folder)) as (url, process):
                for arm, workload in plan:
                    if arm.server != server:
                        continue
                    entry = {"arm": arm.name, "server": server, "workload": workload.name}
                    record["arms"].append(entry)
                    measured = _Measurement(
                        options, arm, LoadWriter(ranker, workload, seed=options.seed), url, bars
                    )

                    def save(entry: dict[str, Any] = entry) -> None:
                        entry["memory_mb"] = None if process is None else process.memory_mb()
                        write_record(options.output, record)

                    measured.run(entry, save)
                    bars.finish_arm()
    return record


def greatest_difference(
    found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]
) -> float:
    """Compare probabilities with log-probabilities, as log-probabilities.

    Args:
        found: probabilities by candidate, of the first labels at least.
        expected: log-probabilities of all labels by candidate.

    Returns:
        The greatest absolute difference; infinite where candidates are missing or a probability is
        not above zero.
    """
    if len(found) != len(expected):
        return math.inf
    pairs = [
        pair
        for one, other in zip(found, expected, strict=True)
        for pair in zip(one, other, strict=False)
    ]
    if not pairs or not all(probability > 0 for probability, _ in pairs):
        return math.inf
    return max(abs(math.log(probability) - log_prob) for probability, log_prob in pairs)


@dataclass(kw_only=True)
class _Bars:
    """Two bars on stderr: the arms, and the requests of the present step."""

    progress: Any
    arms: Any
    step: Any = field(default=None)

    def say(self, text: str) -> None:
        self.progress.update(self.arms, description=text)

    def finish_arm(self) -> None:
        self.progress.advance(self.arms)

    def start_step(self, text: str, count: int) -> None:
        self.progress.reset(self.step, total=count, description=text, visible=True)

    def advance(self) -> None:
        self.progress.advance(self.step)


class _Measurement:
    """One arm on one workload at a running server."""

    def __init__(
        self, options: ServeBenchmark, arm: ServingArm, writer: LoadWriter, url: str, bars: _Bars
    ) -> None:
        self._options = options
        self._arm = arm
        self._writer = writer
        self._url = url
        self._bars = bars
        self._num_written = 0
        self._num_steps = 0

    def run(self, entry: dict[str, Any], save: Callable[[], None]) -> None:
        """Compare, measure alone, and search; ``entry`` is filled as the numbers come."""
        shape = self._writer.workload
        self._bars.say(f"{self._arm.name}, {shape.name}")
        entry["greatest_difference"] = self._compare()
        alone_ms = self._measure_alone()
        entry["alone_ms"] = alone_ms
        entry["alone_candidates_per_s"] = 1000 * shape.num_candidates / alone_ms
        entry["steps"] = []
        save()

        def measure(rate: float) -> LoadStep:
            step = self._step(rate)
            entry["steps"].append(asdict(step))
            save()
            return step

        bound_ms = self._options.bound_ms
        # One that is late alone is late at every rate.
        rate = 0.0
        if alone_ms <= bound_ms:
            found = find_capacity(
                measure,
                bound_ms=bound_ms,
                alone_rate=1000 / alone_ms,
                precision=self._options.precision,
            )
            rate = found.rate
        entry["capacity_requests_per_s"] = rate
        entry["capacity_candidates_per_s"] = rate * shape.num_candidates
        save()

    def _write(self) -> LoadRequest:
        self._num_written += 1
        return self._writer.write(self._num_written)

    def _compare(self) -> float:
        worst = 0.0
        with httpx.Client(base_url=self._url, timeout=_TIMEOUT_S) as client:
            for _ in range(_NUM_COMPARED):
                request = self._write()
                answer = _ask(client, self._arm.ask(request))
                found = self._arm.read(request, answer)
                worst = max(worst, greatest_difference(found, self._writer.score_offline(request)))
        if not worst <= TOLERANCE:
            raise DataError(
                f"{self._arm.name}: log-probabilities differ from the ranker's by {worst:.2g}, "
                f"{TOLERANCE:g} is allowed"
            )
        return worst

    def _measure_alone(self) -> float:
        """Median time of requests that wait for each other, ms."""
        times = []
        with httpx.Client(base_url=self._url, timeout=_TIMEOUT_S) as client:
            for _ in range(_NUM_ALONE):
                call = self._arm.ask(self._write())
                began = time.perf_counter()
                _ask(client, call)
                times.append(1000 * (time.perf_counter() - began))
        return statistics.median(times)

    def _step(self, rate: float) -> LoadStep:
        self._settle()
        self._num_steps += 1
        options = self._options
        # A queue that grows needs time to show in the latencies.
        seconds = max(options.step_seconds, _BOUNDS_A_STEP * options.bound_ms / 1000)
        count = max(options.min_requests, round(rate * seconds))
        self._bars.start_step(f"writing {count} requests", count)
        calls = []
        for _ in range(count):
            calls.append(self._arm.ask(self._write()))
            self._bars.advance()
        self._bars.start_step(f"{rate:.3g} requests/s", count)
        step = run_step(
            self._url,
            calls,
            rate=rate,
            bound_ms=options.bound_ms,
            seed=options.seed + self._num_steps,
            on_answer=self._bars.advance,
        )
        done = asyncio.run(step)
        p99 = "broken off" if done.p99_ms is None else f"p99 {done.p99_ms:.0f} ms"
        self._bars.progress.console.print(
            f"{self._arm.name}, {self._writer.workload.name}: {rate:.3g} requests/s: {p99}"
        )
        return done

    def _settle(self) -> None:
        """Wait until the server has done what an earlier step left behind."""
        call = self._arm.ask(self._write())
        with httpx.Client(base_url=self._url, timeout=_TIMEOUT_S) as client:
            _ask(client, call)


def _ask(client: httpx.Client, call: Call) -> Any:
    """Send a call and wait, again while the server says that it is full."""
    end = time.monotonic() + _TIMEOUT_S
    while True:
        answer = client.post(call.path, content=call.body, headers=JSON_HEADERS)
        if answer.status_code == 200:
            return answer.json()
        if answer.status_code not in (429, 503) or time.monotonic() > end:
            raise DataError(f"{call.path}: status {answer.status_code}: {answer.text[:300]}")
        time.sleep(1.0)


@contextmanager
def _served(setup: Setup, server: str, folder: Path) -> Iterator[tuple[str, ServerProcess | None]]:
    if server == "rankonce" and setup.url is not None:
        yield setup.url, None
        return
    process = setup.process(server, folder / f"{server}.log")
    with running(process, timeout_s=READY_S):
        yield process.url, process


def _is_there(server: str, setup: Setup) -> bool:
    return server != "vllm" or setup.vllm_python is not None


def _describe_settings(options: ServeBenchmark) -> dict[str, Any]:
    setup = options.setup
    servers = dict.fromkeys(ARMS[name].server for name in options.arms)
    return {
        "model": setup.model.name,
        "threads": setup.threads,
        "bound_ms": options.bound_ms,
        "step_seconds": options.step_seconds,
        "min_requests": options.min_requests,
        "precision": options.precision,
        "seed": options.seed,
        "url": setup.url,
        "servers": {
            server: {
                "version": setup.version(server),
                "arguments": list(setup.arguments.get(server, ())),
            }
            for server in servers
            if _is_there(server, setup)
        },
    }


@contextmanager
def _progress(num_arms: int) -> Iterator[_Bars]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        arms = progress.add_task("arms", total=num_arms)
        step = progress.add_task("", total=None, visible=False)
        yield _Bars(progress=progress, arms=arms, step=step)
