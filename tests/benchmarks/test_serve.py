"""Servers of the load benchmark, with small workloads of the embedded ranker."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from rankonce.benchmarks.serve import (
    ServeBenchmark,
    greatest_difference,
    measure_serving,
)
from rankonce.benchmarks.serve_arms import ARMS, Setup
from rankonce.benchmarks.serve_load import JSON_HEADERS
from rankonce.benchmarks.serve_models import load_offline_ranker
from rankonce.benchmarks.serve_report import describe_serving, plot_serving
from rankonce.benchmarks.serve_transformers import create_transformers_app
from rankonce.benchmarks.serve_workloads import BENCH_SCORE, MEMBER, LoadWriter
from rankonce.errors import DataError, EngineError
from rankonce.model.sizes import build_model
from rankonce.ranker import EMBEDDED_MODEL, Ranker, RankerConfig
from rankonce.serving.backends.processes import ServerProcess, free_port
from tests.benchmarks.test_serve_load import running_app
from tests.serving.conftest import serving

SMALL_MEMBER = replace(MEMBER, prefix_tokens=250, num_candidates=5, candidate_tokens=20)
SMALL_BENCH_SCORE = replace(BENCH_SCORE, prefix_tokens=30, num_candidates=3, candidate_tokens=11)


@pytest.fixture(scope="module")
def offline() -> Ranker:
    return load_offline_ranker(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def ours() -> Iterator[str]:
    """Our server with the embedded ranker."""
    with serving(Ranker.from_pretrained(config=RankerConfig(chat=False))) as http:
        yield str(http.base_url)


@pytest.fixture(scope="module")
def plain() -> Iterator[str]:
    """The embedded ranker behind plain transformers, three prompts at a time."""
    with running_app(create_transformers_app(str(EMBEDDED_MODEL), max_prompts=3)) as url:
        yield url


@pytest.mark.parametrize("workload", [SMALL_MEMBER, SMALL_BENCH_SCORE], ids=str)
@pytest.mark.parametrize("name", ["rankonce rank", "rankonce score", "transformers"])
def test_every_arm_gives_the_offline_scores(
    name: str, workload: Any, offline: Ranker, ours: str, plain: str
) -> None:
    arm, writer = ARMS[name], LoadWriter(offline, workload)
    if not arm.takes(workload):
        assert (name, workload.name) == ("rankonce rank", "bench_score")
        return
    request = writer.write(11)
    call = arm.ask(request)
    url = plain if arm.server == "transformers" else ours
    answer = httpx.post(url + call.path, content=call.body, headers=JSON_HEADERS, timeout=60)
    assert answer.status_code == 200, answer.text
    found = arm.read(request, answer.json())
    assert [len(row) for row in found] == [3] * workload.num_candidates
    assert greatest_difference(found, writer.score_offline(request)) < 1e-5


def test_the_form_of_vllm_is_read_by_index_and_first_label(offline: Ranker) -> None:
    request = LoadWriter(offline, SMALL_BENCH_SCORE).write(1)
    body = json.loads(ARMS["vllm"].ask(request).body)
    assert body["query"] + body["items"][2] == request.query + request.items[2]
    assert body["label_token_ids"] == request.label_ids
    answer = {"data": [{"index": 1, "score": 0.2}, {"index": 0, "score": 0.7}]}
    assert ARMS["vllm"].read(request, answer) == [[0.7], [0.2]]


def test_plain_transformers_gives_the_whole_vocabularys_probabilities_too(
    offline: Ranker, plain: str
) -> None:
    writer = LoadWriter(offline, SMALL_BENCH_SCORE)
    request = writer.write(2)
    body = json.loads(ARMS["transformers"].ask(request).body)
    body["apply_softmax"] = False
    scores = httpx.post(f"{plain}/v1/score", json=body, timeout=60).json()["scores"]
    (raw,) = offline.forward([request.tokens], label_mass=True)
    assert raw.mass_C is not None
    expected = (raw.labels_CL + raw.mass_C[:, None]).exp().tolist()
    for row, known in zip(scores, expected, strict=True):
        assert row == pytest.approx(known, rel=1e-4)


def test_the_difference_is_infinite_where_a_score_is_missing() -> None:
    half = math.log(0.5)
    assert greatest_difference([[0.5]], [[half, half]]) == 0
    assert greatest_difference([[0.5, 0.25]], [[half, half]]) == pytest.approx(math.log(2))
    assert greatest_difference([[0.5]], [[half], [half]]) == math.inf
    assert greatest_difference([[0.0]], [[half]]) == math.inf


def test_a_server_of_other_weights_is_not_measured(ours: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    build_model("0.16m", seed=5).save_pretrained(other)
    tokenizer = load_offline_ranker(EMBEDDED_MODEL).model.tokenizer
    tokenizer.save_pretrained(other)
    options = ServeBenchmark(
        setup=Setup(model=other, threads=1, url=ours),
        workloads=(SMALL_MEMBER,),
        arms=("rankonce rank",),
        output=tmp_path / "serve.json",
    )
    with pytest.raises(DataError, match="differ from the ranker's"):
        measure_serving(options)


def test_a_server_that_is_late_alone_has_no_capacity(ours: str, tmp_path: Path) -> None:
    options = ServeBenchmark(
        setup=Setup(model=EMBEDDED_MODEL, threads=1, url=ours),
        workloads=(SMALL_MEMBER,),
        arms=("rankonce rank",),
        bound_ms=0.1,
        output=tmp_path / "serve.json",
    )
    (arm,) = measure_serving(options)["arms"]
    assert arm["alone_ms"] > 0.1
    assert (arm["capacity_candidates_per_s"], arm["steps"]) == (0.0, [])


def test_a_server_that_ends_at_once_is_reported_with_its_log(tmp_path: Path) -> None:
    server = ServerProcess(
        ["python3", "-c", "raise SystemExit('no such checkpoint')"],
        port=free_port(),
        log=tmp_path / "log",
    )
    with pytest.raises(EngineError, match="no such checkpoint"):
        server.start(timeout_s=30)
    assert not server.is_running


@pytest.mark.slow
def test_two_servers_are_measured_side_by_side(tmp_path: Path) -> None:
    options = ServeBenchmark(
        setup=Setup(model=EMBEDDED_MODEL, threads=1),
        workloads=(SMALL_MEMBER, SMALL_BENCH_SCORE),
        arms=("rankonce rank", "vllm", "transformers"),
        bound_ms=200.0,
        step_seconds=2.0,
        min_requests=10,
        precision=0.5,
        output=tmp_path / "serve.json",
    )
    record = measure_serving(options)
    assert json.loads((tmp_path / "serve.json").read_text()) == record
    measured = [(arm["arm"], arm["workload"]) for arm in record["arms"]]
    # There is no vLLM, and our own form has no use for texts alone.
    assert measured == [
        ("rankonce rank", "member"),
        ("transformers", "member"),
        ("transformers", "bench_score"),
    ]
    for arm in record["arms"]:
        assert arm["greatest_difference"] < 1e-5
        assert arm["memory_mb"] > 100
        passed = [step["rate"] for step in arm["steps"] if (step["p99_ms"] or math.inf) <= 200]
        assert arm["capacity_requests_per_s"] == max(passed, default=0.0)
    text = describe_serving(record)
    assert "member, vllm: not measured" in text
    assert "member, transformers: " in text
    plot_serving(tmp_path / "serve.png", record)
    assert (tmp_path / "serve.png").stat().st_size > 10_000
