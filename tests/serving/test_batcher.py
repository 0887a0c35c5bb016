"""Questions that wait together share passes, and none of them notices."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from rankonce.layout import TokenizedRequest
from rankonce.model.scoring import RawScores
from rankonce.ranker import Ranker, RankerConfig
from rankonce.serving.batcher import Batcher, BatcherConfig, Terms
from rankonce.serving.failures import LaterError
from rankonce.serving.observations import PassObserved, Refusal, Stage
from tests.conftest import build_request
from tests.serving.conftest import Served, build_ranker
from tests.serving.test_observations import Listener

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    model = build_ranker(chat=False).model
    return Ranker(model, config=RankerConfig(max_tokens_per_pass=2000, prefix_cache_mb=0))


def tokens_of(ranker: Ranker, num_candidates: int, *, seed: int = 0) -> TokenizedRequest:
    return ranker.prepare(build_request(num_candidates, seed=seed)).rendered.tokens


def run(
    ranker: Ranker, ask: Callable[[Batcher], Awaitable[Any]], **config: Any
) -> tuple[Any, list[PassObserved], list[object]]:
    """Ask a running batcher; returns the answer, the passes, and all that was observed."""
    listener = Listener()

    async def work() -> Any:
        batcher = Batcher(ranker, BatcherConfig(**config))
        batcher.observations.subscribe(listener)
        async with batcher.running():
            return await ask(batcher)

    answer = asyncio.run(work())
    return answer, [one for one in listener.heard if isinstance(one, PassObserved)], listener.heard


def together(requests: Sequence[TokenizedRequest]) -> Callable[[Batcher], Awaitable[Any]]:
    async def ask(batcher: Batcher) -> Any:
        forwards = [batcher.forward([request], label_mass=True) for request in requests]
        return await asyncio.gather(*forwards, return_exceptions=True)

    return ask


def assert_same(raw: RawScores, expected: RawScores) -> None:
    torch.testing.assert_close(raw.labels_CL, expected.labels_CL, atol=TOLERANCE, rtol=0)


def test_questions_that_wait_together_share_a_pass(ranker: Ranker) -> None:
    requests = [tokens_of(ranker, 1, seed=seed) for seed in range(4)]
    answers, passes, heard = run(ranker, together(requests))
    assert [one.num_requests for one in passes] == [4]
    assert passes[0].computed_tokens == sum(one.separate_tokens for one in requests)
    for (raw,), expected in zip(answers, ranker.forward(requests), strict=True):
        assert_same(raw, expected)
    stages = [one[0] for one in heard if isinstance(one, tuple)]
    assert stages.count(Stage.WAIT) == stages.count(Stage.FORWARD) == 4


def test_each_question_gets_what_it_wants_of_the_vocabulary(ranker: Ranker) -> None:
    request = tokens_of(ranker, 2)

    async def ask(batcher: Batcher) -> Any:
        return await asyncio.gather(
            batcher.forward([request]),
            batcher.forward([request], label_mass=True),
            batcher.forward([request], num_top=3),
        )

    answers, passes, _ = run(ranker, ask)
    assert len(passes) == 1
    (plain,), (massed,), (topped,) = answers
    assert (plain.mass_C, plain.top_ids_CN) == (None, None)
    assert massed.mass_C is not None
    assert massed.top_ids_CN.shape == (2, 0)
    assert topped.top_ids_CN.shape == (2, 3)
    assert_same(plain, topped)


def test_a_question_of_many_candidates_does_not_hold_up_one_of_few(ranker: Ranker) -> None:
    """The long one runs; the short one comes a pass later and is answered by the pass after."""
    long, short = tokens_of(ranker, 1000), tokens_of(ranker, 2, seed=1)
    done: list[str] = []
    passes_at: dict[str, int] = {}

    async def ask(batcher: Batcher) -> Any:
        count = 0

        def on_pass(_: PassObserved) -> None:
            nonlocal count
            count += 1

        listener = Listener()
        listener.on_pass = on_pass  # type: ignore[method-assign]
        batcher.observations.subscribe(listener)

        async def wait_for(name: str, request: TokenizedRequest) -> RawScores:
            passes_at[f"{name} came"] = count
            (raw,) = await batcher.forward([request], label_mass=True)
            passes_at[name] = count
            done.append(name)
            return raw

        first = asyncio.create_task(wait_for("long", long))
        while count < 2:
            await asyncio.sleep(0)
        return await asyncio.gather(first, wait_for("short", short))

    raws, passes, _ = run(ranker, ask)
    assert done == ["short", "long"]
    assert passes_at["short"] - passes_at["short came"] <= 2
    assert passes_at["long"] > passes_at["short"] + 5
    for raw, request in zip(raws, (long, short), strict=True):
        assert_same(raw, ranker.forward([request])[0])
    assert all(one.computed_tokens <= one.max_tokens for one in passes)
    assert sum(one.efficiency for one in passes[:-1]) / len(passes[:-1]) > 0.9


def test_a_question_that_fails_does_not_fail_its_neighbours(ranker: Ranker) -> None:
    good = [tokens_of(ranker, 1, seed=seed) for seed in range(2)]
    bad = replace(good[0], segment_ids=((10_000,),))
    answers, _, _ = run(ranker, together([good[0], bad, good[1]]))
    assert isinstance(answers[1], IndexError)
    for place, request in ((0, good[0]), (2, good[1])):
        assert_same(answers[place][0], ranker.forward([request])[0])


def test_what_nobody_waits_for_is_dropped(ranker: Ranker) -> None:
    long, short = tokens_of(ranker, 1000), tokens_of(ranker, 2, seed=1)

    async def ask(batcher: Batcher) -> Any:
        given_up = asyncio.create_task(batcher.forward([long]))
        while not batcher.observations.snapshot().num_passes:
            await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        assert batcher.queue.num_waiting == 0
        return await batcher.forward([short])

    (raw,), passes, _ = run(ranker, ask)
    assert_same(raw, ranker.forward([short])[0])
    assert sum(one.num_candidates for one in passes) < 500


def test_too_many_questions_are_refused_until_some_are_answered(ranker: Ranker) -> None:
    request = tokens_of(ranker, 3)

    async def ask(batcher: Batcher) -> Any:
        async def one() -> RawScores:
            with batcher.admit():
                return (await batcher.forward([request]))[0]

        outcomes = await asyncio.gather(*(one() for _ in range(5)), return_exceptions=True)
        return [*outcomes, await one()]

    outcomes, _, heard = run(ranker, ask, max_questions=3)
    refused = [one for one in outcomes if isinstance(one, LaterError)]
    assert [isinstance(one, LaterError) for one in outcomes] == [False] * 3 + [True] * 2 + [False]
    assert all((one.status_code, one.code) == (429, "queue_full") for one in refused)
    assert all(int(one.headers["Retry-After"]) >= 1 for one in refused)
    assert heard.count(Refusal.QUEUE_FULL) == 2


def test_tokens_that_wait_are_bounded_but_one_question_always_may(ranker: Ranker) -> None:
    requests = [tokens_of(ranker, 100), tokens_of(ranker, 100, seed=1)]
    answers, _, _ = run(ranker, together(requests), max_waiting_tokens=100)
    assert_same(answers[0][0], ranker.forward([requests[0]])[0])
    assert answers[1].status_code == 429


def test_who_would_wait_too_long_is_refused_unless_served_first(ranker: Ranker) -> None:
    request, long = tokens_of(ranker, 3), tokens_of(ranker, 1000, seed=1)

    async def ask(batcher: Batcher) -> Any:
        # The speed is known after a pass; what came before it waits as long as it takes.
        await batcher.forward([request])
        waits = asyncio.create_task(batcher.forward([long]))
        await asyncio.sleep(0)
        with pytest.raises(LaterError, match="what waits already takes") as refused:
            await batcher.forward([request])
        urgent = await batcher.forward([request], terms=Terms(priority=-1))
        return refused.value, urgent, await waits

    (error, urgent, waited), _, heard = run(ranker, ask, max_queue_s=0.01)
    assert (error.status_code, error.code) == (429, "queue_full")
    assert heard.count(Refusal.QUEUE_FULL) == 1
    assert_same(urgent[0], ranker.forward([request])[0])
    assert_same(waited[0], ranker.forward([long])[0])


def test_a_deadline_that_passes_refuses_and_stops_the_work(ranker: Ranker) -> None:
    long = tokens_of(ranker, 3000)

    async def ask(batcher: Batcher) -> Any:
        deadline = asyncio.get_running_loop().time() + 0.05
        with pytest.raises(LaterError, match="timeout_ms") as refused:
            await batcher.forward([long], terms=Terms(deadline=deadline))
        late = asyncio.get_running_loop().time() - deadline
        assert batcher.queue.num_waiting == 0
        return refused.value, late

    (error, late), passes, heard = run(ranker, ask)
    assert (error.status_code, error.code) == (503, "deadline_exceeded")
    assert int(error.headers["Retry-After"]) >= 1
    assert sum(one.num_candidates for one in passes) < 3000
    assert late < 1
    assert heard.count(Refusal.DEADLINE) == 1


def test_a_deadline_that_cannot_be_met_is_refused_before_anything_is_computed(
    ranker: Ranker,
) -> None:
    long, short = tokens_of(ranker, 3000), tokens_of(ranker, 2)

    async def ask(batcher: Batcher) -> Any:
        await batcher.forward([short])
        began = time.perf_counter()
        deadline = asyncio.get_running_loop().time() + 0.5
        # At the speed of the first pass this one would take many times as long.
        batcher._speeds.append(len(long.segment_ids))
        batcher._speeds.popleft()
        with pytest.raises(LaterError):
            await batcher.forward([long], terms=Terms(deadline=deadline))
        return time.perf_counter() - began

    seconds, passes, _ = run(ranker, ask)
    assert seconds < 0.4
    assert sum(one.num_candidates for one in passes) == 2


def test_a_deadline_is_judged_by_what_no_cache_can_spare(ranker: Ranker) -> None:
    cached = Ranker(ranker.model, config=RankerConfig(max_tokens_per_pass=2000))
    request = tokens_of(cached, 1)

    async def ask(batcher: Batcher) -> Any:
        await batcher.forward([request])
        # The whole prompt would take twice its time, the candidate alone a tenth.
        batcher._speeds.append(request.separate_tokens / 20)
        batcher._speeds.popleft()
        deadline = asyncio.get_running_loop().time() + 10
        return await batcher.forward([request], terms=Terms(deadline=deadline))

    (raw,), _, _ = run(cached, ask)
    assert_same(raw, ranker.forward([request])[0])


def test_the_urgent_come_first(ranker: Ranker) -> None:
    requests = [tokens_of(ranker, 40, seed=seed) for seed in range(4)]
    order: list[int] = []

    async def ask(batcher: Batcher) -> None:
        async def one(place: int, priority: int) -> None:
            await batcher.forward([requests[place]], terms=Terms(priority=priority))
            order.append(priority)

        await asyncio.gather(*(one(place, p) for place, p in enumerate([3, 1, 2, -5])))

    run(ranker, ask)
    assert order == sorted(order)


def test_a_pass_waits_for_those_that_are_being_read_but_not_longer_than_declared(
    ranker: Ranker,
) -> None:
    requests = [tokens_of(ranker, 1, seed=seed) for seed in range(2)]

    async def ask(batcher: Batcher, reading_s: float) -> None:
        async def one(place: int) -> None:
            with batcher.admit():
                await asyncio.sleep(place * reading_s)
                await batcher.forward([requests[place]])

        await asyncio.gather(one(0), one(1))

    _, passes, _ = run(ranker, lambda batcher: ask(batcher, 0.05), max_wait_ms=5000)
    assert [one.num_requests for one in passes] == [2]
    _, passes, _ = run(ranker, lambda batcher: ask(batcher, 0.3), max_wait_ms=5)
    assert [one.num_requests for one in passes] == [1, 1]


@pytest.mark.parametrize("num_threads", [8])
def test_concurrent_questions_get_the_answers_they_get_alone(
    plain: Served, num_threads: int
) -> None:
    questions: list[tuple[str, Any]] = []
    for seed in range(6):
        questions += [
            ("/v1/rank", asdict(build_request(1 + 9 * seed, seed=seed))),
            ("/v1/completions", {"prompt": f"M {seed}", "max_tokens": 1, "logprobs": seed % 6}),
            ("/v1/score", {"query": f"M {seed}", "items": [" a", " b"], "label_token_ids": [9, 8]}),
            ("/v1/rank", {"task": "movie-like", "candidates": [{"fields": {}}]}),
        ]

    def ask(question: tuple[str, Any]) -> tuple[int, Any]:
        response = plain.http.post(question[0], json=question[1])
        return response.status_code, response.json()

    alone = [ask(question) for question in questions]
    with ThreadPoolExecutor(num_threads) as pool:
        together = list(pool.map(ask, questions))
    for (status, answer), (status_alone, answer_alone) in zip(together, alone, strict=True):
        assert status == status_alone
        assert _numbers(answer) == pytest.approx(_numbers(answer_alone), abs=1e-5)


def _numbers(answer: Any) -> list[float]:
    """Every score of an answer, in order."""
    if "error" in answer:
        return []
    if "scores" in answer:
        return [value for row in answer["scores"] for value in row]
    if "results" in answer:
        return [value for one in answer["results"] for value in one["log_probs"].values()]
    return [
        value for one in answer["choices"] for value in one["logprobs"]["top_logprobs"][0].values()
    ]
