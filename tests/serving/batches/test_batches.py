"""Batches over the server's endpoints, through OpenAI's own client."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from rankonce.serving.app import create_app
from rankonce.serving.batches.config import BatchConfig
from rankonce.serving.engine import ServerConfig
from rankonce.serving.keys import ApiKey, KeyRing
from rankonce.serving.operations import OperationsConfig
from tests.serving.batches.conftest import Keeper, keeping, line, wait_for_end
from tests.serving.conftest import build_ranker, serving_app
from tests.serving.test_failures import VALID, error_of


def without_ids(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what is new every time."""
    kept = {name: part for name, part in answer.items() if name not in ("created", "usage")}
    return {**kept, "id": str(kept.get("id")).split("-")[0]}


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal, scores to 1e-5."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-5
    return bool(one == other)


@pytest.mark.parametrize("endpoint", VALID)
def test_a_line_is_answered_as_the_endpoint_answers(endpoint: str, keeper: Keeper) -> None:
    faulty = {**VALID[endpoint], "nonsense": 1}
    lines = [
        line("a", endpoint, VALID[endpoint]),
        line("b", endpoint, faulty),
        line("c", endpoint, {**VALID[endpoint], "model": "tiny"}),
        line("d", endpoint, {**VALID[endpoint], "model": "gpt"}),
    ]
    batch = keeper.run(endpoint, *lines, metadata={"run": "7"})
    assert batch.status == "completed"
    assert batch.metadata == {"run": "7"}
    assert batch.request_counts is not None
    assert batch.request_counts.model_dump() == {"completed": 2, "failed": 2, "total": 4}
    live = keeper.http.post(endpoint, json=VALID[endpoint]).json()
    output = keeper.lines_of(batch.output_file_id)
    assert [part["custom_id"] for part in output] == ["a", "c"]
    for part in output:
        assert part["id"].startswith("batch_req_")
        assert part["error"] is None
        assert part["response"]["status_code"] == 200
        assert part["response"]["request_id"].startswith("req_")
        assert same(without_ids(part["response"]["body"]), without_ids(live))
    errors = keeper.lines_of(batch.error_file_id)
    assert [part["custom_id"] for part in errors] == ["b", "d"]
    assert [part["response"]["status_code"] for part in errors] == [400, 404]
    for part, body in zip(errors, [faulty, lines[3]["body"]], strict=True):
        live = keeper.http.post(endpoint, json=body).json()
        assert part["response"]["body"] == live
    ids = {part["id"] for part in (*output, *errors)}
    assert len(ids) == 4
    assert batch.usage is not None
    assert batch.usage.input_tokens == sum(
        part["response"]["body"]["usage"]["prompt_tokens"] for part in output
    )


def test_times_follow_the_states(keeper: Keeper) -> None:
    body = VALID["/v1/completions"]
    created = keeper.create("/v1/completions", line("a", "/v1/completions", body))
    assert created.status == "validating"
    assert created.output_file_id is None
    assert created.expires_at == created.created_at + 86_400
    batch = keeper.wait(created.id)
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert None not in times
    assert times == sorted(times, key=lambda moment: moment or 0)
    assert batch.completed_at is not None
    assert batch.completed_at <= time.time()
    assert {batch.failed_at, batch.expired_at, batch.cancelling_at, batch.cancelled_at} == {None}
    assert batch.error_file_id is None
    assert batch.output_file_id is not None
    file = keeper.openai.files.retrieve(batch.output_file_id)
    assert file.purpose == "batch_output"
    assert file.filename == f"{batch.id}_output.jsonl"
    assert file.bytes == len(keeper.openai.files.content(file.id).read())


def test_every_fault_of_the_input_is_told_with_its_line(keeper: Keeper) -> None:
    url, body = "/v1/completions", VALID["/v1/completions"]
    batch = keeper.run(
        url,
        line("a", url, body),
        "",
        line("a", url, body),
        "{broken",
        {**line("b", url, body), "method": "GET"},
        line("c", "/v1/score", body),
        line("d", url, "M"),
        {"custom_id": "e", "method": "POST", "url": url},
        line("", url, body),
        {**line("f", url, body), "extra": 1},
        "[]",
    )
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert batch.errors.data is not None
    found = [(fault.line, fault.code, fault.param) for fault in batch.errors.data]
    assert found == [
        (3, "duplicate_custom_id", "custom_id"),
        (4, "invalid_json_line", None),
        (5, "invalid_line", "method"),
        (6, "mismatched_url", "url"),
        (7, "invalid_line", "body"),
        (8, "invalid_line", "body"),
        (9, "invalid_line", "custom_id"),
        (10, "invalid_line", "extra"),
        (11, "invalid_json_line", None),
    ]
    assert batch.errors.data[0].message == "custom_id: should be unique, line 1 has 'a' too"
    assert batch.errors.data[3].message == (
        "url: should be the batch's endpoint, /v1/completions, is '/v1/score'"
    )
    assert batch.request_counts is not None
    assert batch.request_counts.total == 0
    assert batch.output_file_id is None
    assert batch.error_file_id is None


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([""], "empty_file"),
        ([line(str(n), "/v1/rank", {}) for n in range(51)], "too_many_lines"),
    ],
)
def test_too_few_and_too_many_lines_are_refused(
    lines: list[Any], code: str, keeper: Keeper
) -> None:
    batch = keeper.run("/v1/rank", *lines)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert [(fault.code, fault.line) for fault in batch.errors.data] == [(code, None)]


def test_as_many_lines_as_allowed_are_taken(keeper: Keeper) -> None:
    batch = keeper.run("/v1/rank", *(line(str(n), "/v1/rank", {}) for n in range(50)))
    assert batch.status == "completed"
    assert [part["custom_id"] for part in keeper.lines_of(batch.error_file_id)] == [
        str(n) for n in range(50)
    ]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_file_id": "file-no"}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"extra": 1}, "extra"),
        (
            {"output_expires_after": {"anchor": "now", "seconds": 3600}},
            "output_expires_after.anchor",
        ),
    ],
)
def test_a_batch_with_a_fault_is_refused(
    change: dict[str, Any], param: str, keeper: Keeper
) -> None:
    body = {
        "input_file_id": keeper.upload({}),
        "endpoint": "/v1/completions",
        "completion_window": "24h",
        **change,
    }
    assert error_of(keeper.http.post("/v1/batches", json=body), 400)["param"] == param


def test_an_output_file_is_no_input(keeper: Keeper) -> None:
    body = VALID["/v1/completions"]
    batch = keeper.run(
        "/v1/completions",
        line("a", "/v1/completions", body),
        output_expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert batch.output_file_id is not None
    file = keeper.openai.files.retrieve(batch.output_file_id)
    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError, match="of purpose batch"):
        keeper.openai.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )


def test_batches_are_listed_page_by_page(tmp_path: Path) -> None:
    with keeping(tmp_path) as keeper:
        ids = [keeper.create("/v1/rank", line("a", "/v1/rank", {})).id for _ in range(5)]
        assert [batch.id for batch in keeper.openai.batches.list(limit=2)] == ids[::-1]
        page = keeper.openai.batches.list(limit=2, after=ids[3])
        assert [batch.id for batch in page.data] == [ids[2], ids[1]]
        assert page.has_more
        assert not keeper.openai.batches.list(after=ids[1]).has_more
        for limit in (0, 101):
            error = error_of(keeper.http.get("/v1/batches", params={"limit": limit}), 400)
            assert error["param"] == "limit"
        with pytest.raises(openai.BadRequestError, match="after: there is no"):
            keeper.openai.batches.list(after="batch_no")


def test_a_cancelled_batch_keeps_its_finished_lines(tmp_path: Path) -> None:
    url, body = "/v1/completions", {"prompt": ["M " * 200] * 8, "max_tokens": 1}
    with keeping(tmp_path, max_lines_in_flight=2) as keeper:
        batch = keeper.create(url, *(line(str(n), url, body) for n in range(200)))
        while (keeper.openai.batches.retrieve(batch.id).request_counts or 0).completed < 5:  # type: ignore[union-attr]
            time.sleep(0.005)
        cancelling = keeper.openai.batches.cancel(batch.id)
        assert cancelling.status == "cancelling"
        assert cancelling.cancelling_at is not None
        batch = keeper.wait(batch.id)
        assert batch.status == "cancelled"
        assert batch.cancelled_at is not None
        assert batch.request_counts is not None
        num_completed = batch.request_counts.completed
        assert 5 <= num_completed < 200
        output = keeper.lines_of(batch.output_file_id)
        assert [part["custom_id"] for part in output] == [str(n) for n in range(num_completed)]
        assert batch.error_file_id is None
        with pytest.raises(openai.ConflictError, match="that is cancelled cannot be cancelled"):
            keeper.openai.batches.cancel(batch.id)


def test_lines_that_are_left_when_the_window_closes_are_told(tmp_path: Path) -> None:
    url, body = "/v1/completions", {"prompt": ["M " * 200] * 20, "max_tokens": 1}
    with keeping(tmp_path, max_lines_in_flight=1) as keeper:
        batch = keeper.run(url, *(line(str(n), url, body) for n in range(400)), window="1s")
        assert batch.status == "expired"
        assert batch.expired_at is not None
        assert batch.completed_at is None
        assert batch.request_counts is not None
        counts = batch.request_counts
        assert counts.completed + counts.failed == counts.total == 400
        errors = keeper.lines_of(batch.error_file_id)
        done = keeper.lines_of(batch.output_file_id) if counts.completed else []
        ids = [int(part["custom_id"]) for part in (*done, *errors)]
        assert ids == list(range(400))
        assert {part["error"]["code"] for part in errors} == {"batch_expired"}
        assert {part["response"] for part in errors} == {None}


def test_live_questions_are_answered_while_a_batch_runs(tmp_path: Path) -> None:
    url, body = "/v1/completions", {"prompt": ["M " * 100] * 4, "max_tokens": 1}
    with keeping(tmp_path, max_lines_in_flight=2) as keeper:
        batch = keeper.create(url, *(line(str(n), url, body) for n in range(60)))
        num_live = 0
        while keeper.openai.batches.retrieve(batch.id).status in ("validating", "in_progress"):
            assert keeper.http.post(url, json=VALID[url]).status_code == 200
            num_live += 1
        assert num_live > 3
        assert keeper.wait(batch.id).status == "completed"


def test_owners_see_only_their_own(tmp_path: Path) -> None:
    config = ServerConfig(batches=BatchConfig(data_dir=tmp_path))
    secrets = {name: f"{name}-0123456789abcdef" for name in ("ann", "ben")}
    keys = [
        ApiKey(name=name, digest=hashlib.sha256(secret.encode()).digest())
        for name, secret in secrets.items()
    ]
    operations = OperationsConfig(keys=KeyRing(keys), warm_up=False)
    app = create_app(build_ranker(chat=False), config, operations)
    with serving_app(app, operations) as http:
        url = f"{http.base_url}/v1"
        with (
            OpenAI(base_url=url, api_key=secrets["ann"], max_retries=0) as ann,
            OpenAI(base_url=url, api_key=secrets["ben"], max_retries=0) as ben,
        ):
            body = VALID["/v1/completions"]
            content = json.dumps(line("a", "/v1/completions", body)).encode()
            file = ann.files.create(file=content, purpose="batch")
            batch = ann.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            batch = wait_for_end(ann, batch.id)
            assert batch.output_file_id is not None
            assert len(list(ann.files.list())) == 2
            assert list(ben.files.list()) == []
            assert list(ben.batches.list()) == []
            for file_id in (file.id, batch.output_file_id):
                for call in (ben.files.retrieve, ben.files.content, ben.files.delete):
                    with pytest.raises(openai.NotFoundError):
                        call(file_id)
            for see in (ben.batches.retrieve, ben.batches.cancel):
                with pytest.raises(openai.NotFoundError):
                    see(batch.id)
            with pytest.raises(openai.BadRequestError):
                ben.batches.create(
                    input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
                )
            with pytest.raises(openai.BadRequestError):
                ben.batches.list(after=batch.id)
            assert ann.files.delete(file.id).deleted
