"""A server under load and faults for a long time, with every answer checked.

Clients ask at random times, one in ten wrongly and some without waiting for the answer; the server
process is killed and started again. Nothing may be answered wrongly, nothing valid refused but for
load, and memory must not grow.
"""

import asyncio
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from rankonce.benchmarks.serve import describe_machine, load_offline_ranker, write_record
from rankonce.benchmarks.serve_arms import READY_S, Setup
from rankonce.benchmarks.serve_capacity import Capacity, find_capacity
from rankonce.benchmarks.serve_load import JSON_HEADERS, Call, LoadStep, percentile, run_step
from rankonce.benchmarks.soak_batches import BatchCounts, run_batch
from rankonce.benchmarks.soak_memory import MemorySample, describe_memory
from rankonce.benchmarks.soak_traffic import (
    SOAK_WORKLOAD,
    FaultyQuestion,
    KnownQuestion,
    declare_too_much,
    send_too_much,
    vanish,
    write_faulty,
    write_known,
)
from rankonce.serving.backends.processes import ServerProcess, running

_INVALID_SHARE = 0.1
_VANISHING_SHARE = 0.05
# Of the invalid ones; a body without a length costs as much as it has bytes.
_DECLARED_SHARE, _CHUNKED_SHARE = 0.1, 0.01
_SAMPLE_S = 1.0
_TIMEOUT_S = 120.0
_MAX_FAULTS_KEPT = 20
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


@dataclass(kw_only=True)
class Tally:
    """What became of the questions.

    Attributes:
        outcomes: number by kind of question and what came of it.
        faults: what must not happen, in words; the first few.
        num_faults: all of them.
        worst_difference: greatest difference of a log-probability in a right answer.
        latencies_ms: of right answers.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0
    num_wrong: int = 0
    worst_difference: float = 0.0
    latencies_ms: list[float] = field(default_factory=list)

    def blame(self, fault: str) -> None:
        """Note what must not happen."""
        self.num_faults += 1
        if len(self.faults) < _MAX_FAULTS_KEPT:
            self.faults.append(fault)


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
            "invalid_share": _INVALID_SHARE,
            "vanishing_share": _VANISHING_SHARE,
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
        self._faulty = write_faulty(known)
        self._options = options
        self._rate = rate
        self._draw = random.Random(options.seed)
        self._memory: list[MemorySample] = []
        self._lives = 0
        # Start and end of the times in which the server was down; the last may have no end yet.
        self._outages: list[tuple[float, float]] = []
        self._num_deaths = 0
        self._began = 0.0

    async def run(self) -> None:
        """Send traffic for the time of the soak."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            base_url=self._server.url, timeout=_TIMEOUT_S, limits=limits
        ) as client:
            self._began = time.monotonic()
            beside = [asyncio.create_task(self._supervise()), asyncio.create_task(self._sample())]
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
            "faults": tally.faults + self.batches.faults[:_MAX_FAULTS_KEPT],
            "worst_difference": tally.worst_difference,
            "p50_ms": p50_ms,
            "p99_ms": p99_ms,
            "kills": self._options.kills,
            "deaths": self._num_deaths,
            "outage_seconds": [round(end - start, 2) for start, end in self._outages],
            "batches": asdict(self.batches) if self._options.batch_lines else None,
            "memory": describe_memory(self._memory),
            "is_clean": not tally.num_faults and self.batches.is_clean,
        }

    @property
    def _seconds(self) -> float:
        return 60 * self._options.minutes

    @property
    def _is_down(self) -> bool:
        return bool(self._outages) and self._outages[-1][1] == math.inf

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
                    group.create_task(self._send_one(client, departure))
                    told = f"{self.tally.outcomes.total()} asked, {self.tally.num_faults} faults"
                    elapsed = time.monotonic() - self._began
                    progress.update(bar, completed=elapsed, description=told)

    async def _send_one(self, client: httpx.AsyncClient, departure: float) -> None:
        kind = self._draw.random()
        if kind < _INVALID_SHARE:
            await self._send_faulty(client)
        elif kind < _INVALID_SHARE + _VANISHING_SHARE:
            await self._vanish()
        else:
            await self._send_known(client, departure)

    async def _send_known(self, client: httpx.AsyncClient, departure: float) -> None:
        question = self._draw.choice(self._known)
        sent = time.monotonic()
        answer = await _request(client, "POST", question.call)
        if answer is None:
            self._judge_silence("valid", sent)
        elif answer.status_code in (429, 503) and "retry-after" in answer.headers:
            self.tally.outcomes["valid: refused for load"] += 1
        elif answer.status_code != 200:
            self.tally.outcomes[f"valid: status {answer.status_code}"] += 1
            self.tally.blame(f"{question.form}: {answer.status_code}: {answer.text[:200]}")
        else:
            difference = question.difference(answer.json())
            if difference <= self._options.tolerance:
                self.tally.outcomes["valid: right"] += 1
                self.tally.worst_difference = max(self.tally.worst_difference, difference)
                self.tally.latencies_ms.append(1000 * (time.monotonic() - departure))
            else:
                self.tally.outcomes["valid: wrong"] += 1
                self.tally.num_wrong += 1
                self.tally.blame(f"{question.form}: log-probabilities differ by {difference:.2g}")

    async def _send_faulty(self, client: httpx.AsyncClient) -> None:
        kind, sent = self._draw.random(), time.monotonic()
        fault, expected = "too large a body", 413
        some = self._draw.choice(self._known).call
        status: int | None
        try:
            if kind < _DECLARED_SHARE:
                status = await declare_too_much(self._server.url, some)
            elif kind < _DECLARED_SHARE + _CHUNKED_SHARE:
                size = (self._options.max_body_mb + 1) * 1_000_000
                status = await send_too_much(self._server.url, some, num_bytes=size)
            else:
                question: FaultyQuestion = self._draw.choice(self._faulty)
                fault, expected = question.fault, question.status
                answer = await _request(client, question.method, question.call)
                status = None if answer is None else answer.status_code
        except OSError:
            status = None
        if status is None:
            self._judge_silence(f"invalid, {fault}", sent)
        elif status == expected:
            self.tally.outcomes["invalid: refused"] += 1
        elif status in (429, 503):
            self.tally.outcomes["invalid: refused for load"] += 1
        else:
            self.tally.outcomes[f"invalid: status {status}"] += 1
            self.tally.blame(f"{fault}: should be {expected}, was {status}")

    async def _vanish(self) -> None:
        sent = time.monotonic()
        try:
            await vanish(self._server.url, self._draw.choice(self._known).call, draw=self._draw)
        except OSError:
            self._judge_silence("vanishing", sent)
        else:
            self.tally.outcomes["vanished"] += 1

    def _judge_silence(self, kind: str, sent: float) -> None:
        """A question without an answer is excused if the server was down meanwhile."""
        now = time.monotonic()
        if any(start <= now and sent <= end for start, end in self._outages):
            self.tally.outcomes[f"{kind.partition(',')[0]}: lost in an outage"] += 1
        else:
            self.tally.outcomes[f"{kind.partition(',')[0]}: no answer"] += 1
            self.tally.blame(f"{kind}: no answer, and the server was not down")

    async def _supervise(self) -> None:
        """Kill the server at its times, and start it again whenever it is not there."""
        kills = self._options.kills
        times = [self._seconds / 3 * (number + 0.5) / kills for number in range(kills)]
        while True:
            if times and time.monotonic() - self._began >= times[0]:
                del times[0]
                await self._restart(by_us=True)
            elif not self._server.is_running:
                self._num_deaths += 1
                self.tally.blame(f"the server ended by itself: {self._server.log_tail()[-500:]}")
                await self._restart(by_us=False)
            await asyncio.sleep(0.05)

    async def _restart(self, *, by_us: bool) -> None:
        self._outages.append((time.monotonic(), math.inf))
        if by_us:
            self._server.kill()
        self._lives += 1
        await asyncio.to_thread(self._server.start, timeout_s=READY_S)
        self._outages[-1] = (self._outages[-1][0], time.monotonic())

    async def _sample(self) -> None:
        while True:
            # A server that starts has no questions yet, and less memory.
            if self._server.is_running and not self._is_down:
                now = time.monotonic() - self._began
                memory_mb = self._server.memory_mb()
                self._memory.append(MemorySample(seconds=now, life=self._lives, mb=memory_mb))
            await asyncio.sleep(_SAMPLE_S)

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

    with httpx.Client(base_url=url, timeout=_TIMEOUT_S) as client:
        began = time.perf_counter()
        for question in known[:6]:
            call = question.call
            answer = client.post(call.path, content=call.body, headers=JSON_HEADERS)
            answer.raise_for_status()
        alone_rate = 6 / (time.perf_counter() - began)
    return find_capacity(measure, bound_ms=options.bound_ms, alone_rate=alone_rate, precision=0.2)


async def _request(client: httpx.AsyncClient, method: str, call: Call) -> httpx.Response | None:
    try:
        return await client.request(method, call.path, content=call.body, headers=JSON_HEADERS)
    except httpx.HTTPError:
        return None
