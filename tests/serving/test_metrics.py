"""What /metrics tells is what happened."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from rankonce.serving.metrics import EngineState, Metrics
from rankonce.serving.observations import (
    CacheObserved,
    PassObserved,
    QueueObserved,
    Refusal,
    Stage,
)
from rankonce.serving.operations import OperationsConfig
from tests.serving.conftest import build_ranker, serving

QUESTION = {"prompt": [f"Heat, a film of {year}" for year in range(1990, 1997)], "max_tokens": 1}
DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "rankonce.json"


@pytest.fixture
def fresh() -> Iterator[httpx.Client]:
    """A server that nobody has asked anything."""
    with serving(build_ranker(chat=False), OperationsConfig(warm_up=False)) as http:
        yield http


def read(http: httpx.Client) -> dict[str, float]:
    """Every sample by its name and labels."""
    return parse(http.get("/metrics").text)


def parse(text: str) -> dict[str, float]:
    return {
        sample.name + json.dumps(sample.labels, sort_keys=True): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def name(base: str, **labels: str) -> str:
    return base + json.dumps(labels, sort_keys=True)


def test_a_question_is_counted_where_it_went(fresh: httpx.Client) -> None:
    answer = fresh.post("/v1/completions", json=QUESTION).json()
    again = fresh.post("/v1/completions", json=QUESTION).json()
    fresh.post("/v1/completions", json={})
    fresh.post("/no/such/path")
    seen = read(fresh)
    path = "/v1/completions"
    assert seen[name("rankonce_requests_total", method="POST", route=path, status="200")] == 2
    assert seen[name("rankonce_requests_total", method="POST", route=path, status="400")] == 1
    assert seen[name("rankonce_requests_total", method="POST", route="unmatched", status="404")]
    assert seen[name("rankonce_request_seconds_count", route=path)] == 3
    # The one that asks is under way itself.
    assert seen[name("rankonce_requests_in_flight")] == 1
    assert seen[name("rankonce_candidates_total")] == 14
    assert seen[name("rankonce_pass_tokens_count")] == 2
    computed = sum(
        one["usage"]["prompt_tokens"] - one["usage"]["prompt_tokens_details"]["cached_tokens"]
        for one in (answer, again)
    )
    assert seen[name("rankonce_tokens_total", source="computed")] == computed
    assert seen[name("rankonce_pass_tokens_sum")] == computed
    for stage in Stage:
        assert seen[name("rankonce_stage_seconds_count", stage=stage.value)] >= 2
    assert seen[name("rankonce_queue_open", model="tiny")] == 0
    assert seen[name("rankonce_cache_max_bytes", cache="prefix", model="tiny")] == 256_000_000
    assert seen[name("rankonce_cache_misses_total", cache="prefix", model="tiny")] >= 1
    assert seen[name("process_resident_memory_bytes")] > 10_000_000


def test_failures_are_counted_by_their_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    ranker = build_ranker(chat=False)

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(ranker, "prepare", crash)
    with serving(ranker, OperationsConfig(warm_up=False), max_body_mb=1) as http:
        question = {"task": "movie-like", "candidates": [{"fields": {"title": "M"}}]}
        assert http.post("/v1/rank", json=question).status_code == 500
        assert http.post("/v1/completions", json={"prompt": "M" * 1_100_000}).status_code == 413
        seen = read(http)
    assert seen[name("rankonce_errors_total", code="server_error")] == 1
    assert seen[name("rankonce_refusals_total", reason="request_too_large")] == 1
    assert seen[name("rankonce_refusals_total", reason="queue_full")] == 0


def test_what_the_engine_reports_is_exported() -> None:
    metrics = Metrics(version="0", models=["tiny"])
    metrics.on_pass(
        PassObserved(
            num_requests=2,
            num_candidates=9,
            computed_tokens=300,
            cached_tokens=50,
            max_tokens=1000,
            seconds=0.02,
        )
    )
    metrics.on_stage(Stage.WAIT, 0.003)
    metrics.on_refusal(Refusal.DEADLINE)
    seen = parse(metrics.write().decode())
    assert seen[name("rankonce_pass_packing_ratio_sum")] == pytest.approx(0.3)
    assert seen[name("rankonce_pass_packing_ratio_bucket", le="0.2")] == 0
    assert seen[name("rankonce_pass_packing_ratio_bucket", le="0.3")] == 1
    assert seen[name("rankonce_tokens_total", source="cached")] == 50
    assert seen[name("rankonce_stage_seconds_bucket", le="0.0025", stage="wait")] == 0
    assert seen[name("rankonce_stage_seconds_bucket", le="0.005", stage="wait")] == 1
    assert seen[name("rankonce_refusals_total", reason="deadline")] == 1
    assert seen[name("rankonce_info", model="tiny", version="0")] == 1


def test_engines_are_told_apart_by_their_models() -> None:
    metrics = Metrics(version="0", models=["one", "other"])
    for number, model in enumerate(("one", "other"), start=1):
        metrics.watch(
            EngineState(
                model=model,
                queue=lambda number=number: QueueObserved(num_open=number),  # type: ignore[misc]
                caches=lambda number=number: {  # type: ignore[misc]
                    "prefix": CacheObserved(hits=10 * number, num_bytes=7)
                },
            )
        )
    seen = parse(metrics.write().decode())
    for model in ("one", "other"):
        assert seen[name("rankonce_info", model=model, version="0")] == 1
    assert seen[name("rankonce_queue_open", model="one")] == 1
    assert seen[name("rankonce_queue_open", model="other")] == 2
    assert seen[name("rankonce_cache_hits_total", cache="prefix", model="other")] == 20
    assert seen[name("rankonce_cache_bytes", cache="prefix", model="one")] == 7


def test_the_dashboard_asks_for_metrics_that_exist(fresh: httpx.Client) -> None:
    fresh.post("/v1/completions", json=QUESTION)
    known = {key.partition("{")[0] for key in read(fresh)}
    # A counter has no sample before its first label is counted.
    text = fresh.get("/metrics").text
    known |= {f"{one}_total" for one in re.findall(r"# TYPE (\w+)_total counter", text)}
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(panels) >= 12
    asked = {
        word
        for panel in panels
        for target in panel["targets"]
        for word in re.findall(r"\b(?:rankonce|process)_\w+", target["expr"])
    }
    assert asked <= known
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    # What the server counts of its own is on the dashboard, whatever stands for the process.
    bases = {re.sub(r"_(total|bucket|sum|count|created)$", "", one) for one in known}
    shown = {re.sub(r"_(total|bucket|sum|count)$", "", one) for one in asked}
    missing = {one for one in bases if one.startswith("rankonce_")} - shown
    assert missing == set()
