"""Tenants of one engine share nothing that is kept, and everything that is kept is counted."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

import pytest

from rankonce.ranker import Ranker, RankerConfig
from rankonce.serving.engine import Engine, ServerConfig
from rankonce.serving.failures import ServingError
from rankonce.serving.observations import Stage
from rankonce.serving.schemas import PrefixBody, RankBody
from tests.conftest import build_request
from tests.serving.conftest import build_ranker


def body_of(num_candidates: int, **fields: Any) -> RankBody:
    request = build_request(num_candidates)
    return RankBody(
        task=request.task,
        time=request.time,
        profile=request.profile,
        history=request.history,
        candidates=request.candidates,
        **fields,
    )


def run(ask: Callable[[Engine], Awaitable[Any]], **options: Any) -> Any:
    async def work() -> Any:
        config = RankerConfig(max_tokens_per_pass=700, prefix_cache_mb=8)
        ranker = Ranker(build_ranker(chat=False).model, config=config)
        engine = Engine(ranker, ServerConfig(**options))
        async with engine.running():
            return await ask(engine)

    return asyncio.run(work())


@pytest.mark.parametrize("pairs", [0, 1000])
def test_questions_of_different_salts_share_nothing(pairs: int) -> None:
    async def ask(engine: Engine) -> None:
        salts = (None, "a", "b")
        answers = [await engine.rank(body_of(5), cache_salt=salt) for salt in salts]
        assert {one.usage.cached_tokens for one in answers} == {0}
        assert engine.caches["tokens"].hits == 0
        again = [await engine.rank(body_of(5), cache_salt=salt) for salt in salts]
        assert all(one.usage.cached_tokens > 0 for one in again)
        for one, other in zip(answers, again, strict=True):
            assert [row.value for row in one.results] == pytest.approx(
                [row.value for row in other.results], abs=1e-5
            )

    run(ask, result_cache_pairs=pairs)


def test_a_prepared_prefix_belongs_to_whoever_prepared_it() -> None:
    request = build_request(2)
    prefix = PrefixBody(
        task=request.task, time=request.time, profile=request.profile, history=request.history
    )

    async def ask(engine: Engine) -> None:
        handle = (await engine.prepare_prefix(prefix, cache_salt="a")).id
        body = RankBody(candidates=request.candidates, prefix=handle)
        for salt in (None, "b"):
            with pytest.raises(ServingError, match="none with this id"):
                await engine.rank(body, cache_salt=salt)
        assert (await engine.rank(body, cache_salt="a")).usage.cached_tokens > 0

    run(ask)


def test_a_prefix_that_had_to_go_is_computed_again() -> None:
    request = build_request(2)
    prefix = PrefixBody(
        task=request.task, time=request.time, profile=request.profile, history=request.history
    )

    async def ask(engine: Engine) -> None:
        handle = (await engine.prepare_prefix(prefix)).id
        await engine.forget_adapter(None)
        assert engine.caches["prefix"].num_bytes == 0
        answer = await engine.rank(RankBody(candidates=request.candidates, prefix=handle))
        expected = build_ranker(chat=False).score(request).candidates
        assert answer.usage.cached_tokens == 0
        assert [one.value for one in answer.results] == pytest.approx(
            [one.value for one in expected], abs=1e-5
        )

    run(ask)


def test_a_handle_expires() -> None:
    async def ask(engine: Engine) -> None:
        request = build_request(1)
        prefix = PrefixBody(task=request.task, profile=request.profile, ttl_s=1)
        handle = (await engine.prepare_prefix(prefix)).id
        await asyncio.sleep(1.1)
        with pytest.raises(ServingError, match="expired"):
            await engine.rank(RankBody(candidates=request.candidates, prefix=handle))

    run(ask)


def test_what_is_kept_and_what_takes_time_is_counted() -> None:
    async def ask(engine: Engine) -> None:
        for _ in range(3):
            await engine.rank(body_of(5))
        snapshot, caches = engine.observations.snapshot(), engine.caches
        assert {stage: one.count for stage, one in snapshot.seconds.items()} == dict.fromkeys(
            Stage, 3
        )
        assert (snapshot.num_passes, snapshot.num_candidates) == (3, 15)
        assert (caches["prefix"].hits, caches["prefix"].misses) == (2, 1)
        assert caches["prefix"].hit_rate == pytest.approx(2 / 3)
        assert caches["prefix"].hit_tokens == snapshot.cached_tokens > 0
        assert 0 < caches["prefix"].num_bytes <= caches["prefix"].max_bytes
        # Candidates and events of the second and third question are known.
        assert (caches["tokens"].hits, caches["tokens"].misses) == (22, 11)
        assert asdict(engine.queue) == {"num_open": 0, "num_waiting": 0, "waiting_tokens": 0}

    run(ask)
