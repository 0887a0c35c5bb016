"""Servers on real sockets under load: right scores, refusals, and clients that go away."""

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import httpx
import pytest

from rankonce.model.loading import prepare_model
from rankonce.ranker import Ranker, RankerConfig
from rankonce.records import ScoreRequest
from rankonce.serving.app import create_app
from rankonce.serving.batcher import BatcherConfig
from rankonce.serving.engine import Engine, ServerConfig
from rankonce.serving.observations import Refusal
from tests.conftest import ARCHITECTURES, build_network, build_request
from tests.serving.conftest import build_ranker, serving, serving_app

TOLERANCE = 1e-5


def small_passes(ranker: Ranker, max_tokens: int = 700) -> Ranker:
    config = RankerConfig(max_tokens_per_pass=max_tokens, prefix_cache_mb=8)
    return Ranker(ranker.model, config=config)


def ask(http: httpx.Client, request: ScoreRequest, **fields: Any) -> httpx.Response:
    body = {name: value for name, value in asdict(request).items() if value is not None}
    return http.post("/v1/rank", json={**body, **fields})


def log_probs(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    return [value for one in response.json()["results"] for value in one["log_probs"].values()]


def offline(ranker: Ranker, request: ScoreRequest) -> list[float]:
    scores = ranker.score(request).candidates
    return [value for one in scores for value in one.log_probs.values()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_under_load_are_those_of_python(architecture: str, tokenizer: Any) -> None:
    """Many sizes at once, cut and packed, members that come again: nothing changes a score."""

    def build(**config: Any) -> Ranker:
        model = prepare_model(build_network(architecture), tokenizer, name=architecture)
        return Ranker(model, config=RankerConfig(**config))

    requests = [build_request(count, seed=seed % 3) for seed, count in enumerate((3, 70, 1, 17, 9))]
    in_python = build(prefix_cache_mb=0)
    with (
        serving(build(max_tokens_per_pass=700, prefix_cache_mb=1)) as http,
        ThreadPoolExecutor(5) as pool,
    ):
        for _ in range(2):
            answers = list(pool.map(lambda one: log_probs(ask(http, one)), requests))
            for request, answer in zip(requests, answers, strict=True):
                assert answer == pytest.approx(offline(in_python, request), abs=TOLERANCE)


def test_a_client_that_goes_away_frees_its_work() -> None:
    long, short = build_request(3000), build_request(2, seed=1)
    app = create_app(small_passes(build_ranker(chat=False)), ServerConfig())
    engine: Engine = app.state.models.engines[0]
    with serving_app(app) as http:
        body = json.dumps(asdict(long)).encode()
        head = (
            "POST /v1/rank HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((http.base_url.host, http.base_url.port)) as gone:
            gone.sendall(head.encode() + body)
            wait_until(lambda: engine.observations.snapshot().num_passes > 1)
        wait_until(lambda: engine.queue.num_open == 0)
        answer = log_probs(ask(http, short))
    snapshot = engine.observations.snapshot()
    assert snapshot.refusals[Refusal.CLIENT_GONE] == 1
    assert snapshot.num_candidates < 1500
    assert answer == pytest.approx(offline(build_ranker(chat=False), short), abs=TOLERANCE)


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.005)


def test_a_full_queue_answers_429_with_a_time_to_come_back() -> None:
    ranker = small_passes(build_ranker(chat=False))
    with (
        serving(ranker, batching=BatcherConfig(max_questions=2)) as http,
        ThreadPoolExecutor(6) as pool,
    ):
        answers = list(pool.map(lambda seed: ask(http, build_request(200, seed=seed)), range(6)))
        assert {one.status_code for one in answers} == {200, 429}
        refused = [one for one in answers if one.status_code == 429]
        assert all(1 <= int(one.headers["retry-after"]) <= 60 for one in refused)
        assert {one.json()["error"]["code"] for one in refused} == {"queue_full"}
        assert ask(http, build_request(2)).status_code == 200


def test_a_deadline_that_cannot_be_met_answers_503_and_names_its_field() -> None:
    with serving(small_passes(build_ranker(chat=False))) as http:
        refused = ask(http, build_request(3000), timeout_ms=200)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        error = refused.json()["error"]
        assert (error["param"], error["code"]) == ("timeout_ms", "deadline_exceeded")
        assert ask(http, build_request(2), timeout_ms=60_000).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"priority": 5000}, "priority"), ({"timeout_ms": 0}, "timeout_ms"), ({"task": ""}, "task")],
)
def test_wrong_terms_are_refused_by_name(fields: dict[str, Any], param: str, plain: Any) -> None:
    refused = ask(plain.http, build_request(1), **fields)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


def test_every_endpoint_takes_terms(plain: Any) -> None:
    terms = {"priority": 3, "timeout_ms": 60_000}
    labels = {"labels": [" Yes"]}
    bodies = {
        "/v1/rerank": {"query": "M", "documents": ["M"]},
        "/v1/score": {"query": "M", "items": [" a"], **labels},
        "/generative_scoring": {"query": "M", "items": [" a"], **labels},
        "/v1/completions": {"prompt": "M", "max_tokens": 1},
    }
    for path, body in bodies.items():
        assert plain.http.post(path, json={**body, **terms}).status_code == 200


def test_a_prepared_prefix_says_its_own_instruction() -> None:
    request = replace(build_request(5), instruction="The member is a child.")
    before = {k: v for k, v in asdict(request).items() if k != "candidates" and v is not None}
    rest = {"candidates": asdict(request)["candidates"]}
    with serving(build_ranker(chat=False)) as http:
        rest["prefix"] = http.post("/v1/prefixes", json=before).json()["id"]
        answer = http.post("/v1/rank", json=rest)
        assert log_probs(answer) == pytest.approx(
            offline(build_ranker(chat=False), request), abs=TOLERANCE
        )
        assert answer.json()["usage"]["cached_tokens"] > 0
        refused = http.post("/v1/rank", json={**rest, "instruction": "The member is old."})
        assert refused.json()["error"]["param"] == "instruction"


def test_a_prefix_is_prepared_before_its_candidates() -> None:
    request = build_request(5)
    before = {k: v for k, v in asdict(request).items() if k != "candidates" and v is not None}
    candidates = asdict(request)["candidates"]
    in_python = build_ranker(chat=False)
    num_prefix = len(in_python.prepare(request).rendered.tokens.prefix_ids)
    with serving(small_passes(build_ranker(chat=False))) as http:
        prepared = http.post("/v1/prefixes", json=before).json()
        assert prepared["object"] == "prefix"
        assert prepared["usage"]["prompt_tokens"] == num_prefix
        assert prepared["usage"]["computed_tokens"] == num_prefix
        assert 0 < prepared["expires_at"] - time.time() <= 300
        assert prepared["history"]["num_kept"] == 6
        for some in (candidates[:2], candidates[2:], candidates):
            answer = http.post("/v1/rank", json={"prefix": prepared["id"], "candidates": some})
            assert answer.json()["usage"]["cached_tokens"] == num_prefix
            assert answer.json()["task"] == "movie-like"
        assert log_probs(answer) == pytest.approx(offline(in_python, request), abs=TOLERANCE)
        again = http.post("/v1/prefixes", json=before).json()
        assert again["usage"]["cached_tokens"] == num_prefix


def test_a_prefix_that_cannot_be_used_is_refused_by_name(plain: Any) -> None:
    request = build_request(2)
    before = {k: v for k, v in asdict(request).items() if k != "candidates" and v is not None}
    candidates = asdict(request)["candidates"]
    handle = plain.http.post("/v1/prefixes", json=before).json()["id"]

    def refused(path: str, **body: Any) -> tuple[int, str, str]:
        answer = plain.http.post(path, json=body)
        error = answer.json()["error"]
        return answer.status_code, error["param"], error["code"]

    rank = "/v1/rank"
    assert refused(rank, prefix="prefix-1", candidates=candidates) == (
        404, "prefix", "prefix_not_found",
    )  # fmt: skip
    assert refused(rank, prefix=handle, candidates=candidates, task="movie-like")[:2] == (
        400, "task",
    )  # fmt: skip
    assert refused(rank, prefix=handle, candidates=candidates, time=1)[:2] == (400, "time")
    assert refused(rank, prefix=handle)[:2] == (400, "candidates")
    assert refused(rank, candidates=candidates)[:2] == (400, "task")
    assert refused("/v1/prefixes", **before, candidates=candidates)[:2] == (400, "candidates")
    assert refused("/v1/prefixes", profile={})[:2] == (400, "task")


def test_a_task_whose_instruction_is_pinned_is_known_at_the_first_question() -> None:
    ranker = small_passes(build_ranker(chat=False))
    with serving(ranker, pinned_tasks=("movie-like",)) as http:
        usage = ask(http, build_request(2)).json()["usage"]
    task = ranker.tasks["movie-like"]
    instruction = len(ranker.renderer.instruction_ids(task))
    assert instruction - 16 < usage["cached_tokens"] <= instruction


def test_kept_results_are_those_of_a_fresh_pass_and_cost_no_tokens() -> None:
    first, more = build_request(9), build_request(14)
    more = replace(more, candidates=first.candidates + more.candidates[9:])
    in_python = build_ranker(chat=False)
    with serving(small_passes(build_ranker(chat=False)), result_cache_pairs=1000) as http:
        log_probs(ask(http, first))
        again, grown = ask(http, first), ask(http, more)
        assert again.json()["usage"]["computed_tokens"] == 0
        segments = in_python.prepare(more).rendered.tokens.segment_ids
        assert grown.json()["usage"]["computed_tokens"] == sum(map(len, segments[9:]))
        for request, answer in ((first, again), (more, grown)):
            assert log_probs(answer) == pytest.approx(offline(in_python, request), abs=TOLERANCE)
        body = {"query": "M", "items": [" a", " b"], "labels": [" Yes"]}
        scores = [http.post("/v1/score", json=body).json()["scores"] for _ in range(2)]
        assert scores[0] == scores[1]


def test_results_are_not_kept_unless_asked_for() -> None:
    with serving(small_passes(build_ranker(chat=False))) as http:
        usages = [ask(http, build_request(9)).json()["usage"] for _ in range(2)]
    assert usages[1]["computed_tokens"] > 0
