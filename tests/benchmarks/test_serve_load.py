import asyncio
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Response

from rankonce.benchmarks.serve_load import Call, draw_arrivals, percentile, run_step
from rankonce.serving.app import open_listener
from rankonce.serving.engine import ServerConfig

SERVICE_S = 0.05


@contextmanager
def running_app(app: Any) -> Iterator[str]:
    """Serve an application with uvicorn in a thread of its own."""
    listener = open_listener(ServerConfig(port=0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def one_at_a_time() -> Iterator[str]:
    """A server that takes 50 ms a question and has one place."""
    app = FastAPI()
    place = asyncio.Lock()

    @app.post("/work")
    async def work() -> dict[str, str]:
        async with place:
            await asyncio.sleep(SERVICE_S)
        return {}

    @app.post("/refuse")
    async def refuse() -> Response:
        return Response(status_code=429, headers={"Retry-After": "1"})

    with running_app(app) as url:
        yield url


def _step(url: str, path: str, **options: Any) -> Any:
    calls = [Call(path=path, body=b"{}")] * options.pop("count")
    return asyncio.run(run_step(url, calls, **{"bound_ms": 60_000.0, "seed": 1, **options}))


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    times = draw_arrivals(50.0, 20_000, seed=3)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.03)
    # An exponential distribution's standard deviation is its mean.
    assert math.sqrt(variance) == pytest.approx(mean, rel=0.05)
    assert draw_arrivals(50.0, 9, seed=3) == times[:9]


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 50.0), (0.9, 90.0), (0.99, 99.0), (1.0, 100.0)]
)
def test_a_percentile_is_the_smallest_latency_that_the_share_meets(
    share: float, expected: float
) -> None:
    assert percentile([float(number) for number in range(100, 0, -1)], share) == expected


def test_the_percentile_of_unanswered_questions_is_not_known() -> None:
    latencies = [1.0] * 97 + [math.inf] * 3
    assert percentile(latencies, 0.9) == 1.0
    assert percentile(latencies, 0.99) is None


def test_latency_counts_the_wait_that_a_slow_server_causes(one_at_a_time: str) -> None:
    # 20 questions of 50 ms that arrive within some 100 ms: the last waits for all others. A client
    # that sent the next only after an answer would see 50 ms each.
    step = _step(one_at_a_time, "/work", count=20, rate=200.0)
    assert step.num_answered == 20
    assert step.p50_ms > 5 * 1000 * SERVICE_S
    assert step.p99_ms > 14 * 1000 * SERVICE_S
    assert step.max_lag_ms < step.p50_ms
    assert not step.broken_off


def test_a_step_that_cannot_meet_the_bound_is_broken_off(one_at_a_time: str) -> None:
    began = time.monotonic()
    step = _step(one_at_a_time, "/work", count=200, rate=100.0, bound_ms=200.0)
    # All of them would take ten seconds.
    assert time.monotonic() - began < 5
    assert step.broken_off
    assert step.p99_ms is None
    assert not step.meets(200.0)


def test_a_refused_question_counts_as_never_answered(one_at_a_time: str) -> None:
    step = _step(one_at_a_time, "/refuse", count=5, rate=100.0)
    # The step may be broken off once one of them has come back.
    assert step.num_answered == 0
    assert 1 <= step.num_refused <= 5
    assert not step.meets(math.inf)


def test_a_server_that_is_not_there_answers_nothing() -> None:
    step = _step("http://127.0.0.1:9", "/work", count=3, rate=100.0)
    assert step.num_answered == 0
    assert 1 <= step.num_refused <= 3
    assert not step.meets(math.inf)
