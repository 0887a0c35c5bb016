"""An open loop: requests leave at the times of a Poisson process, whether or not answers came.

Latency counts from the scheduled time, so that a client or server that falls behind cannot hide
its delay (no coordinated omission). A request that was refused or failed counts as never answered.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

JSON_HEADERS = {"Content-Type": "application/json"}
_TIMEOUT_S = 300.0
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request as bytes; nothing is computed between its scheduled time and the socket."""

    path: str
    body: bytes


@dataclass(frozen=True, kw_only=True)
class LoadStep:
    """What one rate gave.

    Attributes:
        rate: requests a second, of the Poisson process.
        num_requests: planned; ``num_answered`` of them with status 200, ``num_refused`` with
            another one or none.
        p50_ms, p90_ms, p99_ms: smallest latency that this share of the planned requests meets,
            ``None`` where it is not known: refused, or the step was broken off.
        max_lag_ms: latest departure behind its scheduled time; the client's own delay.
        broken_off: so many were late that p99 could not meet the bound any more.
    """

    rate: float
    num_requests: int
    num_answered: int
    num_refused: int
    seconds: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    max_lag_ms: float
    broken_off: bool

    def meets(self, bound_ms: float) -> bool:
        """Whether p99 is within the bound."""
        return self.p99_ms is not None and self.p99_ms <= bound_ms


def draw_arrivals(rate: float, count: int, *, seed: int) -> list[float]:
    """Draw the times of a Poisson process, seconds from its start, ascending."""
    draw, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += draw.expovariate(rate)
        times.append(now)
    return times


def percentile(latencies_ms: Sequence[float], share: float) -> float | None:
    """Return the smallest latency that ``share`` of all meet; ``None`` if that is infinite."""
    ranked = sorted(latencies_ms)
    found = ranked[math.ceil(share * len(ranked)) - 1]
    return found if math.isfinite(found) else None


@dataclass(kw_only=True)
class _Progress:
    """What a running step knows so far."""

    arrivals: Sequence[float]
    bound_ms: float
    latencies_ms: dict[int, float] = field(default_factory=dict)
    num_refused: int = 0
    max_lag_ms: float = 0.0

    @property
    def most_late(self) -> int:
        """How many may be late while p99 still meets the bound."""
        return len(self.arrivals) - math.ceil(0.99 * len(self.arrivals))

    def is_hopeless(self, now_s: float) -> bool:
        """Whether too many are late already, answered or not."""
        done = sum(latency > self.bound_ms for latency in self.latencies_ms.values())
        waiting = sum(
            index not in self.latencies_ms and 1000 * (now_s - arrival) > self.bound_ms
            for index, arrival in enumerate(self.arrivals)
        )
        return done + waiting > self.most_late


async def run_step(
    url: str,
    calls: Sequence[Call],
    *,
    rate: float,
    bound_ms: float,
    seed: int,
    on_answer: Callable[[], None] = lambda: None,
) -> LoadStep:
    """Send every call at its time and wait for the answers, unless the bound is out of reach.

    Args:
        url: of the server.
        rate: requests a second.
        bound_ms: of p99; the step is broken off once it cannot be met.
        on_answer: called for every answer.
    """
    arrivals = draw_arrivals(rate, len(calls), seed=seed)
    progress = _Progress(arrivals=arrivals, bound_ms=bound_ms)
    # A server's queue is the server's: the client holds nothing back.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits) as client:
        start = time.perf_counter()

        async def send(index: int) -> None:
            scheduled = start + arrivals[index]
            progress.max_lag_ms = max(progress.max_lag_ms, 1000 * (time.perf_counter() - scheduled))
            status = await post(client, calls[index])
            latency_ms = 1000 * (time.perf_counter() - scheduled)
            progress.latencies_ms[index] = latency_ms if status == 200 else math.inf
            progress.num_refused += status != 200
            on_answer()

        async def depart() -> None:
            async with asyncio.TaskGroup() as group:
                for index, arrival in enumerate(arrivals):
                    await asyncio.sleep(start + arrival - time.perf_counter())
                    group.create_task(send(index))

        departing = asyncio.create_task(depart())
        hopeless = False
        while not departing.done() and not hopeless:
            await asyncio.wait([departing], timeout=_POLL_S)
            hopeless = progress.is_hopeless(time.perf_counter() - start)
        broken_off = not departing.done()
        departing.cancel()
        await asyncio.gather(departing, return_exceptions=True)
        seconds = time.perf_counter() - start
    if not broken_off:
        departing.result()
    known = [] if broken_off else list(progress.latencies_ms.values())
    p50_ms, p90_ms, p99_ms = (
        percentile(known, share) if known else None for share in (0.5, 0.9, 0.99)
    )
    return LoadStep(
        rate=rate,
        num_requests=len(calls),
        num_answered=len(progress.latencies_ms) - progress.num_refused,
        num_refused=progress.num_refused,
        seconds=seconds,
        p50_ms=p50_ms,
        p90_ms=p90_ms,
        p99_ms=p99_ms,
        max_lag_ms=progress.max_lag_ms,
        broken_off=broken_off,
    )


async def post(client: httpx.AsyncClient, call: Call) -> int | None:
    """Send a call; its answer's status, ``None`` where none came."""
    try:
        answer = await client.post(call.path, content=call.body, headers=JSON_HEADERS)
    except httpx.HTTPError:
        return None
    return answer.status_code
