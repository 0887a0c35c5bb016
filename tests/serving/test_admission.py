"""Keys, limits, request ids and the log, as clients and operators meet them."""

import hashlib
import json
import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, OpenAI, RateLimitError

from rankonce.serving.keys import ApiKey, KeyRing
from rankonce.serving.logs import JsonFormatter, TextFormatter
from rankonce.serving.operations import OperationsConfig
from tests.serving.conftest import build_ranker, serving

SECRETS = {
    "search": "kIs3o0y8PqLw2ZrVt6nB",
    "monitor": "b7Yq0NfLs3Vx8TgKw1Rm",
    "release": "Hc4Vt9LmQx2RkPz7WdNs",
}
QUESTION = {"prompt": "Zanzibar", "max_tokens": 1}
PATH = "/v1/completions"


def ring(**limits: int) -> KeyRing:
    return KeyRing(
        [
            ApiKey(
                name=name,
                digest=hashlib.sha256(secret.encode()).digest(),
                reads_metrics=name == "monitor",
                changes_adapters=name == "release",
                **limits,  # type: ignore[arg-type]
            )
            for name, secret in SECRETS.items()
        ]
    )


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[name]}"}


@pytest.fixture(scope="module")
def guarded() -> Iterator[httpx.Client]:
    """A server with keys."""
    operations = OperationsConfig(keys=ring(), warm_up=False)
    with serving(build_ranker(chat=False), operations) as http:
        yield http


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {SECRETS['search']}"},
        {"Authorization": SECRETS["search"]},
        {"X-API-Key": "search"},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
)
@pytest.mark.parametrize("path", [PATH, "/v1/models", "/no/such/path"])
def test_without_a_key_nothing_is_told(guarded: httpx.Client, headers: Any, path: str) -> None:
    for method in ("GET", "POST"):
        response = guarded.request(method, path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_a_key_opens_in_either_header(guarded: httpx.Client) -> None:
    for headers in (
        bearer("search"),
        {"authorization": f"bearer {SECRETS['search']}"},
        {"X-API-Key": SECRETS["search"]},
    ):
        assert guarded.post(PATH, json=QUESTION, headers=headers).status_code == 200


def test_a_refusal_does_not_read_the_body(guarded: httpx.Client) -> None:
    address = (guarded.base_url.host, guarded.base_url.port)
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        # Not a byte of the body has come.
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")


def test_probes_and_the_interface_need_no_key(guarded: httpx.Client) -> None:
    for path in ("/health", "/ready", "/docs", "/openapi.json"):
        assert guarded.get(path).status_code == 200


def test_metrics_need_a_key_that_may_read_them(guarded: httpx.Client) -> None:
    assert guarded.get("/metrics").status_code == 401
    refused = guarded.get("/metrics", headers=bearer("search"))
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "permission_denied"
    assert "rankonce_requests_total" in guarded.get("/metrics", headers=bearer("monitor")).text


@pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
def test_adapters_are_changed_by_a_key_that_may_change_them(path: str) -> None:
    operations = OperationsConfig(keys=ring(), warm_up=False)
    question = {"lora_name": "songs", "lora_path": "no/such/folder"}
    if "unload" in path:
        del question["lora_path"]
    with serving(build_ranker(chat=False), operations, allow_adapter_loading=True) as http:
        assert http.post(path, json=question).status_code == 401
        for name in ("search", "monitor"):
            refused = http.post(path, json=question, headers=bearer(name))
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] == "permission_denied"
        # It comes as far as what it asks for.
        answer = http.post(path, json=question, headers=bearer("release"))
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["param"] in question


def test_metrics_may_be_opened_although_there_are_keys() -> None:
    operations = OperationsConfig(keys=ring(), open_metrics=True, warm_up=False)
    with serving(build_ranker(chat=False), operations) as http:
        assert http.get("/metrics").status_code == 200
        assert http.post(PATH, json=QUESTION).status_code == 401


def test_the_openai_client_sends_its_key_and_reads_the_refusal(guarded: httpx.Client) -> None:
    url = f"{guarded.base_url}/v1"
    with OpenAI(base_url=url, api_key=SECRETS["search"], max_retries=0) as client:
        answer = client.completions.create(model="tiny", prompt="M", max_tokens=1)
        assert answer._request_id
    with (
        OpenAI(base_url=url, api_key="wrong", max_retries=0) as client,
        pytest.raises(AuthenticationError),
    ):
        client.completions.create(model="tiny", prompt="M", max_tokens=1)


def test_an_owner_that_asks_too_often_is_told_when_to_come_back() -> None:
    operations = OperationsConfig(keys=ring(), requests_per_minute=3, warm_up=False)
    with serving(build_ranker(chat=False), operations) as http:
        answers = [http.post(PATH, json=QUESTION, headers=bearer("search")) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert 1 <= int(answers[3].headers["retry-after"]) <= 20
        error = answers[3].json()["error"]
        assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
        # Reading costs nothing, and the other owner has a bucket of its own.
        assert http.get("/v1/models", headers=bearer("search")).status_code == 200
        assert http.post(PATH, json=QUESTION, headers=bearer("monitor")).status_code == 200
        with (
            OpenAI(
                base_url=f"{http.base_url}/v1", api_key=SECRETS["search"], max_retries=0
            ) as client,
            pytest.raises(RateLimitError),
        ):
            client.completions.create(model="tiny", prompt="M", max_tokens=1)


def test_tokens_are_charged_as_the_answer_counts_them() -> None:
    operations = OperationsConfig(keys=ring(tokens_per_minute=100), warm_up=False)
    question = {"prompt": "M " * 150, "max_tokens": 1}
    with serving(build_ranker(chat=False), operations) as http:
        answer = http.post(PATH, json=question, headers=bearer("search"))
        num_tokens = answer.json()["usage"]["prompt_tokens"]
        assert num_tokens > 120
        refused = http.post(PATH, json=QUESTION, headers=bearer("search"))
        assert refused.status_code == 429
        wait_s = (num_tokens - 100 + 1) * 60 / 100
        assert wait_s - 2 < int(refused.headers["retry-after"]) <= wait_s + 1


def test_a_bad_question_is_not_charged_tokens() -> None:
    operations = OperationsConfig(keys=ring(tokens_per_minute=100), warm_up=False)
    with serving(build_ranker(chat=False), operations) as http:
        bad = {"prompt": "M " * 150, "max_tokens": 2}
        for _ in range(5):
            assert http.post(PATH, json=bad, headers=bearer("search")).status_code == 400
        assert http.post(PATH, json=QUESTION, headers=bearer("search")).status_code == 200


def test_a_request_id_comes_back_and_a_wrong_one_is_replaced(guarded: httpx.Client) -> None:
    for sent, kept in (("abc-1.2:3_4", True), ("a b", False), ("x" * 129, False), ("", False)):
        response = guarded.get("/health", headers={"X-Request-Id": sent})
        got = response.headers["x-request-id"]
        assert (got == sent) is kept
        if not kept:
            assert len(got) == 32
    ids = {guarded.get("/health").headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5
    assert guarded.get("/v1/models").headers["x-request-id"]


@dataclass(frozen=True, kw_only=True)
class Logs:
    """What a server writes, in both formats."""

    json: StringIO
    text: StringIO

    def records(
        self, logger: str = "rankonce.access", *, ids: Sequence[str] | None = None
    ) -> list[Any]:
        """Read a logger's lines once there is one, or one of each of these requests.

        A line follows its answer, so the last one of an earlier test may come among these.
        """
        deadline = time.monotonic() + 5
        while True:
            lines = [json.loads(line) for line in self.json.getvalue().splitlines()]
            lines = [
                line
                for line in lines
                if line["logger"] == logger and (ids is None or line["request_id"] in ids)
            ]
            if len(lines) >= (1 if ids is None else len(ids)) or time.monotonic() > deadline:
                return lines
            time.sleep(0.01)

    def everything(self) -> str:
        return self.json.getvalue() + self.text.getvalue()


@contextmanager
def logs(*, show_messages: bool = False) -> Iterator[Logs]:
    """Collect what is logged; the client's own lines are not the server's."""
    written = Logs(json=StringIO(), text=StringIO())
    logger = logging.getLogger("rankonce")
    handlers = [logging.StreamHandler(written.json), logging.StreamHandler(written.text)]
    level = logger.level
    logger.setLevel(logging.INFO)
    for handler, formatter in zip(handlers, (JsonFormatter, TextFormatter), strict=True):
        handler.setFormatter(formatter(show_messages=show_messages))
        logger.addHandler(handler)
    try:
        yield written
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)


def test_every_question_is_one_line_without_its_text(
    guarded: httpx.Client,
) -> None:
    with logs() as written:
        ids = [f"line-{number}" for number in range(5)]
        headers = [{**bearer("search"), "X-Request-Id": name} for name in ids]
        guarded.post(f"{PATH}?member=Zanzibar", json=QUESTION, headers=headers[0])
        guarded.get("/v1/models/Zanzibar", headers=headers[1])
        guarded.post("/Zanzibar", json=QUESTION, headers=headers[2])
        guarded.post("/v1/rank", json={"task": "Zanzibar"}, headers=headers[3])
        guarded.post(PATH, content='{"Zanzibar', headers=headers[4])
        lines = sorted(written.records(ids=ids), key=lambda line: ids.index(line["request_id"]))
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("POST", PATH, 200),
        ("GET", "/v1/models/{name:path}", 404),
        ("POST", "unmatched", 404),
        ("POST", "/v1/rank", 400),
        ("POST", PATH, 400),
    ]
    first = lines[0]
    assert [line["request_id"] for line in lines] == ids
    assert first["key"] == "search"
    assert first["tokens"] > 0
    assert first["seconds"] > 0
    assert lines[3]["code"] == "invalid_request_error"
    assert "Zanzibar" not in written.everything()
    assert SECRETS["search"] not in written.everything()


def test_bodies_are_logged_when_they_are_asked_for() -> None:
    operations = OperationsConfig(log_bodies=True, warm_up=False)
    with serving(build_ranker(chat=False), operations) as http, logs() as written:
        http.post(PATH, content=json.dumps({**QUESTION, "prompt": "Zanzi\nbar"}, indent=1))
        (line,) = written.records()
    assert json.loads(line["body"])["prompt"] == "Zanzi\nbar"
    (text,) = [line for line in written.text.getvalue().splitlines() if "body=" in line]
    assert "Zanzi" in text


@pytest.mark.parametrize("show_messages", [False, True])
def test_a_crash_is_logged_without_its_message_unless_that_is_asked_for(
    show_messages: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker = build_ranker(chat=False)

    def crash(*_: object, **__: object) -> None:
        try:
            {}["Zanzi" + "bar"]
        except KeyError as error:
            raise ValueError("Zanzi" + "bar") from error

    monkeypatch.setattr(ranker, "prepare", crash)
    operations = OperationsConfig(warm_up=False)
    with serving(ranker, operations) as http, logs(show_messages=show_messages) as written:
        question = {"task": "movie-like", "candidates": [{"fields": {"title": "M"}}]}
        response = http.post("/v1/rank", json=question, headers={"X-Request-Id": "id-2"})
        assert response.status_code == 500
        (line,) = written.records("rankonce.serving.failures")
    assert line["request_id"] == "id-2"
    for text in (line["exception"], written.text.getvalue()):
        assert "ValueError" in text
        assert "KeyError" in text
        assert "in crash" in text
        assert ("Zanzibar" in text) is show_messages


def test_bodies_together_are_bounded() -> None:
    operations = OperationsConfig(max_open_body_mb=1, warm_up=False)
    with serving(build_ranker(chat=False), operations) as http:
        refused = http.post(PATH, json={**QUESTION, "prompt": "M" * 1_100_000})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "bodies_full"
        assert refused.headers["retry-after"] == "1"
        # What was held is free again.
        for _ in range(3):
            assert http.post(PATH, json={**QUESTION, "x": "M" * 600_000}).status_code == 400
        assert http.post(PATH, json=QUESTION).status_code == 200
