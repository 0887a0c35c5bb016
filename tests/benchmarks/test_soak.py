import asyncio
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from rankonce.benchmarks.serve_arms import Setup
from rankonce.benchmarks.serve_load import JSON_HEADERS
from rankonce.benchmarks.serve_models import load_offline_ranker
from rankonce.benchmarks.soak import SoakBenchmark, run_soak
from rankonce.benchmarks.soak_memory import MemorySample, describe_memory
from rankonce.benchmarks.soak_report import describe_soak
from rankonce.benchmarks.soak_traffic import (
    KnownQuestion,
    declare_too_much,
    send_too_much,
    vanish,
    write_faulty,
    write_known,
)
from rankonce.ranker import EMBEDDED_MODEL, Ranker, RankerConfig
from tests.serving.conftest import serving


@pytest.fixture(scope="module")
def known() -> list[KnownQuestion]:
    return write_known(load_offline_ranker(EMBEDDED_MODEL), count=3, seed=0)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    ranker = Ranker.from_pretrained(config=RankerConfig(chat=False))
    with serving(ranker, max_body_mb=2) as http:
        yield str(http.base_url)


def _ask(url: str, question: KnownQuestion) -> Any:
    call = question.call
    answer = httpx.post(url + call.path, content=call.body, headers=JSON_HEADERS, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_answers_are_checked_against_the_offline_scores(
    url: str, known: list[KnownQuestion]
) -> None:
    assert [question.form for question in known] == ["/v1/rank", "/v1/score", "/v1/completions"]
    for question in known:
        answer = _ask(url, question)
        assert question.difference(answer) < 1e-5
        shifted = [[value + 0.01 for value in row] for row in question.expected]
        assert replace(question, expected=shifted).difference(answer) > 0.009


def test_an_answer_with_a_hole_is_infinitely_wrong(url: str, known: list[KnownQuestion]) -> None:
    rank, score, _ = known
    ranked, scored = _ask(url, rank), _ask(url, score)
    ranked["results"].pop()
    scored["scores"][3][1] = 0.0
    assert rank.difference(ranked) == math.inf
    assert score.difference(scored) == math.inf
    assert score.difference({"error": {}}) == math.inf


def test_every_fault_is_refused_with_its_status(url: str, known: list[KnownQuestion]) -> None:
    faulty = write_faulty(known)
    assert len({question.fault for question in faulty}) == len(faulty) > 12
    for question in faulty:
        answer = httpx.request(
            question.method,
            url + question.call.path,
            content=question.call.body,
            headers=JSON_HEADERS,
            timeout=60,
        )
        assert answer.status_code == question.status, (question.fault, answer.text)
        assert answer.json()["error"]["message"]


def test_too_large_a_body_is_refused_with_and_without_its_length(
    url: str, known: list[KnownQuestion]
) -> None:
    call = known[0].call
    assert asyncio.run(declare_too_much(url, call)) == 413
    assert asyncio.run(send_too_much(url, call, num_bytes=3_000_000)) == 413


def test_the_server_answers_after_clients_that_vanished(
    url: str, known: list[KnownQuestion]
) -> None:
    draw = random.Random(0)

    async def come_and_go() -> None:
        await asyncio.gather(*(vanish(url, known[0].call, draw=draw) for _ in range(20)))

    asyncio.run(come_and_go())
    assert known[0].difference(_ask(url, known[0])) < 1e-5


def _samples(life: int, start: int, values: list[float]) -> list[MemorySample]:
    return [
        MemorySample(seconds=start + place, life=life, mb=mb) for place, mb in enumerate(values)
    ]


def test_memory_is_judged_in_the_longest_life_after_its_warm_up() -> None:
    short = _samples(0, 0, [900.0] * 10)
    # A warm-up from 100 to 300 MB, then a megabyte every ten seconds.
    long = _samples(1, 20, [100.0] * 20 + [300.0 + place / 10 for place in range(80)])
    found = describe_memory(short + long)
    assert found["max_mb"] == 900.0
    assert found["growth_mb"] == pytest.approx(6.0, abs=0.1)
    assert found["mb_per_hour"] == pytest.approx(360.0)
    assert len(found["samples"]) == 110


def test_a_life_too_short_tells_nothing_of_growth() -> None:
    assert describe_memory(_samples(0, 0, [1.0] * 5))["growth_mb"] is None
    assert describe_memory([])["max_mb"] is None


@pytest.mark.slow
def test_a_short_soak_with_a_kill_is_clean(tmp_path: Path) -> None:
    record = run_soak(
        SoakBenchmark(
            setup=Setup(model=EMBEDDED_MODEL, threads=1),
            # A server that starts again takes most of this on a slow machine.
            minutes=0.75,
            rate=6.0,
            kills=1,
            members=12,
            output=tmp_path / "soak.json",
        )
    )
    assert record["is_clean"], record["faults"]
    assert record["num_wrong"] == 0
    assert record["deaths"] == 0
    assert len(record["outage_seconds"]) == 1
    assert record["outcomes"]["valid: right"] > 10
    assert 0 < record["worst_difference"] < 1e-5
    assert "what must not happen: nothing did" in describe_soak(record)


@pytest.mark.slow
def test_batches_survive_a_kill_with_every_line_once(tmp_path: Path) -> None:
    pytest.importorskip("rankonce.serving.batches")
    record = run_soak(
        SoakBenchmark(
            setup=Setup(model=EMBEDDED_MODEL, threads=1),
            minutes=0.75,
            rate=1.0,
            kills=1,
            members=12,
            batch_lines=30,
            output=tmp_path / "soak.json",
        )
    )
    assert record["is_clean"], record["faults"]
    assert record["batches"]["num_batches"] >= 1
    assert record["batches"]["num_lines"] == 30 * record["batches"]["num_batches"]
