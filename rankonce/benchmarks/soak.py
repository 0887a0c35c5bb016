"""A server under load and faults for a long time, with every answer checked.

Clients ask at random times, one in ten wrongly and some without waiting for the answer; the server
process is killed and started again. Nothing may be answered wrongly, nothing valid refused but for
load, and memory must not grow.
"""

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from rankonce.benchmarks.records import describe_machine, write_record
from rankonce.benchmarks.serve_arms import READY_S, Setup
from rankonce.benchmarks.serve_capacity import Capacity, find_capacity
from rankonce.benchmarks.serve_load import JSON_HEADERS, LoadStep, percentile, run_step
from rankonce.benchmarks.serve_models import load_offline_ranker
from rankonce.benchmarks.soak_batches import BatchCounts, run_batch
from rankonce.benchmarks.soak_clients import INVALID_SHARE, TIMEOUT_S, VANISHING_SHARE, Clients
from rankonce.benchmarks.soak_memory import describe_memory
from rankonce.benchmarks.soak_supervision import Supervisor
from rankonce.benchmarks.soak_tally import MAX_FAULTS_KEPT, Tally
from rankonce.benchmarks.soak_traffic import SOAK_WORKLOAD, KnownQuestion, write_known
from rankonce.serving.backends.processes import ServerProcess, running

_CAPACITY_STEP_S = 10.0
_CAPACITY_REQUESTS = 50


@dataclass(frozen=True, kw_only=True)
class SoakBenchmark:
    """What is run.

    Attributes:
        minutes: of traffic; the kills fall into the first third, so that the last server lives long
            enough for its memory to tell.
        rate: requests a second; ``None`` takes ``load`` of the capacity that is measured first.
        load: share of the capacity.
        bound_ms: of p99, for the capacity.
        kills: of the server process.
        members: whose questions are asked again and again.
        batch_lines: of each batch file that runs beside the traffic; 0 sends none.
        max_body_mb: what the server takes.
        tolerance: of a log-probability.
        output: JSON.
    """

    setup: Setup
    minutes: float = 30.0
    rate: float | None = None
    load: float = 0.8
    bound_ms: float = 1000.0
    kills: int = 3
    members: int = 600
    batch_lines: int = 0
    max_body_mb: int = 32
    tolerance: float = 1e-5
    seed: int = 0
    output: Path = Path("results/soak.json")


def run_soak(options: SoakBenchmark) -> dict[str, Any]:
    """Run the soak and write its record.

    Raises:
        ServerError: the server did not start.
    """
    ranker = load_offline_ranker(options.setup.model)
    print(f"scoring {options.members} members offline", file=sys.stderr)
    known = write_known(ranker, count=options.members, seed=options.seed)
    record: dict[str, Any] = {
        "environment": describe_machine(),
        "settings": {
            **{k: v for k, v in asdict(options).items() if k not in ("setup", "output")},
            "model": options.setup.model.name,
            "threads": options.setup.threads,
            "arguments": list(options.setup.arguments.get("rankonce", ())),
            "workload": asdict(SOAK_WORKLOAD),
            "invalid_share": INVALID_SHARE,
            "vanishing_share": VANISHING_SHARE,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = dict(options.setup.arguments)
        if options.batch_lines:
            data = ["--data-dir", str(Path(folder) / "data")]
            arguments["rankonce"] = [*arguments.get("rankonce", ()), *data]
        setup = Setup(model=options.setup.model, threads=options.setup.threads, arguments=arguments)
        with running(setup.process("rankonce", Path(folder) / "log"), timeout_s=READY_S) as server:
            rate = options.rate
            if rate is None:
                capacity = _find_capacity(server.url, known, options)
                record["capacity_requests_per_s"] = capacity.rate
                rate = options.load * capacity.rate
            record["rate"] = rate
            soak = Soak(server, known, options, rate=rate)
            asyncio.run(soak.run())
            record.update(soak.describe())
            if soak.tally.num_faults:
                record["server_log"] = server.log_tail()
    write_record(options.output, record)
    return record


class Soak:
    """The traffic, the supervisor and the samples of one soak.

    Args:
        server: runs already.
        known: questions with their scores.
        rate: questions a second, of every kind together.
    """

    def __init__(
        self,
        server: ServerProcess,
        known: Sequence[KnownQuestion],
        options: SoakBenchmark,
        *,
        rate: float,
    ) -> None:
        self.tally = Tally()
        self.batches = BatchCounts()
        self._server = server
        self._known = known
        self._options = options
        self._rate = rate
        self._draw = random.Random(options.seed)
        self._supervisor = Supervisor(
            server, self.tally, seconds=self._seconds, kills=options.kills
        )
        self._clients = Clients(
            server.url,
            known,
            self.tally,
            self._supervisor,
            draw=self._draw,
            tolerance=options.tolerance,
            max_body_mb=options.max_body_mb,
        )
        self._began = 0.0

    async def run(self) -> None:
        """Send traffic for the time of the soak."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            base_url=self._server.url, timeout=TIMEOUT_S, limits=limits
        ) as client:
            self._began = time.monotonic()
            beside = [
                asyncio.create_task(self._supervisor.supervise(self._began)),
                asyncio.create_task(self._supervisor.sample(self._began)),
            ]
            ending = asyncio.Event()
            batches = asyncio.create_task(self._run_batches(client, ending))
            await self._send_all(client)
            ending.set()
            await batches
            for task in beside:
                task.cancel()
            for failure in await asyncio.gather(*beside, return_exceptions=True):
                if not isinstance(failure, asyncio.CancelledError):
                    assert isinstance(failure, BaseException)
                    raise failure

    def describe(self) -> dict[str, Any]:
        """Give the figures."""
        tally = self.tally
        p50_ms, p99_ms = (
            percentile(tally.latencies_ms, share) if tally.latencies_ms else None
            for share in (0.5, 0.99)
        )
        return {
            "outcomes": dict(sorted(tally.outcomes.items())),
            "num_faults": tally.num_faults,
            "num_wrong": tally.num_wrong,
            "faults": tally.faults + self.batches.faults[:MAX_FAULTS_KEPT],
            "worst_difference": tally.worst_difference,
            "p50_ms": p50_ms,
            "p99_ms": p99_ms,
            "kills": self._options.kills,
            "deaths": self._supervisor.num_deaths,
            "outage_seconds": [round(end - start, 2) for start, end in self._supervisor.outages],
            "batches": asdict(self.batches) if self._options.batch_lines else None,
            "memory": describe_memory(self._supervisor.memory),
            "is_clean": not tally.num_faults and self.batches.is_clean,
        }

    @property
    def _seconds(self) -> float:
        return 60 * self._options.minutes

    async def _send_all(self, client: httpx.AsyncClient) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(file=sys.stderr)
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        departure = self._began
        with progress:
            bar = progress.add_task("soak", total=self._seconds)
            async with asyncio.TaskGroup() as group:
                while (departure := departure + self._draw.expovariate(self._rate)) < (
                    self._began + self._seconds
                ):
                    await asyncio.sleep(departure - time.monotonic())
                    group.create_task(self._clients.send(client, departure))
                    told = f"{self.tally.outcomes.total()} asked, {self.tally.num_faults} faults"
                    elapsed = time.monotonic() - self._began
                    progress.update(bar, completed=elapsed, description=told)

    async def _run_batches(self, client: httpx.AsyncClient, ending: asyncio.Event) -> None:
        """Have one batch after the other done until the traffic ends."""
        options = self._options
        by_form: dict[str, list[KnownQuestion]] = {}
        for question in self._known:
            by_form.setdefault(question.form, []).append(question)
        number = 0
        while options.batch_lines and not ending.is_set():
            of_form = list(by_form.values())[number % len(by_form)]
            number += 1
            await run_batch(
                client,
                self._draw.choices(of_form, k=options.batch_lines),
                self.batches,
                tolerance=options.tolerance,
                timeout_s=max(300.0, self._seconds),
            )


def _find_capacity(url: str, known: Sequence[KnownQuestion], options: SoakBenchmark) -> Capacity:
    """Search the capacity for the valid questions."""
    draw = random.Random(options.seed)

    def measure(rate: float) -> LoadStep:
        count = max(_CAPACITY_REQUESTS, round(rate * _CAPACITY_STEP_S))
        calls = [draw.choice(known).call for _ in range(count)]
        step = run_step(
            url, calls, rate=rate, bound_ms=options.bound_ms, seed=draw.randrange(2**31)
        )
        done = asyncio.run(step)
        print(f"capacity: {rate:.3g} requests/s: p99 {done.p99_ms} ms", file=sys.stderr)
        return done

    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        began = time.perf_counter()
        for question in known[:6]:
            call = question.call
            answer = client.post(call.path, content=call.body, headers=JSON_HEADERS)
            answer.raise_for_status()
        alone_rate = 6 / (time.perf_counter() - began)
    return find_capacity(measure, bound_ms=options.bound_ms, alone_rate=alone_rate, precision=0.2)
