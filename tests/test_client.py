"""The client gives what the ranker gives in Python, and comes back when the server says so."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest

from rankonce.client import AsyncClient, Client, ClientConfig, read_retry_after
from rankonce.errors import ServerError
from tests.conftest import build_request
from tests.serving.conftest import Served, build_ranker, serving

JSON = {"Content-Type": "application/json"}
TEXTS = ["Heat is a film of 1995.", "Alien is a film of 1979."]


@pytest.fixture(scope="module")
def chatty() -> Iterator[Served]:
    with serving(build_ranker(chat=True)) as http:
        ranker = build_ranker(chat=True)
        yield Served(http=http, openai=None, ranker=ranker, network=None, tokenizer=None)  # type: ignore[arg-type]


@pytest.fixture
def client(chatty: Served) -> Iterator[Client]:
    with Client(ClientConfig(url=str(chatty.http.base_url))) as client:
        yield client


@pytest.mark.parametrize("as_mapping", [False, True])
def test_rank_gives_what_the_ranker_gives(client: Client, chatty: Served, as_mapping: bool) -> None:
    request = build_request(9)
    answer = client.rank(asdict(request) if as_mapping else request, top_n=4)
    expected = chatty.ranker.score(request).ranked()[:4]
    assert [one.id for one in answer.results] == [one.id for one in expected]
    values = [one.value for one in answer.results]
    assert values == pytest.approx([one.value for one in expected], abs=1e-5)
    assert answer.results[0].log_probs == pytest.approx(expected[0].log_probs, abs=1e-5)


def test_every_method_reads_its_answer(client: Client) -> None:
    reranked = client.rerank("Heat", [TEXTS[0], {"text": TEXTS[1]}], return_documents=True)
    assert {one.index: one.document.text for one in reranked.results if one.document} == dict(
        enumerate(TEXTS)
    )
    scored = client.score(
        "Heat\n", ["Answer:", "Reply:"], labels=[" Yes", " No"], apply_softmax=True
    )
    assert [sum(row) for row in scored.scores] == pytest.approx([1.0, 1.0])
    completed = client.complete(TEXTS, labels=[" Yes"], logprobs=2)
    assert all(" Yes" in one.logprobs.top_logprobs[0] for one in completed.choices if one.logprobs)
    chat = client.chat([{"role": "user", "content": "Heat?"}], labels=["Yes", "No"])
    assert chat.choices[0].logprobs is not None
    listed = chat.choices[0].logprobs.content[0].top_logprobs
    assert {"Yes", "No"} <= {one.token for one in listed}
    assert [card.id for card in client.models().data] == ["tiny"]


def test_the_async_client_gives_the_same(client: Client, chatty: Served) -> None:
    async def ask() -> list[Any]:
        async with AsyncClient(ClientConfig(url=str(chatty.http.base_url))) as client:
            return await asyncio.gather(
                client.rank(build_request(5)),
                client.rerank("Heat", TEXTS),
                client.score("Heat\n", ["Answer:"], labels=[" Yes"]),
                client.complete(TEXTS, logprobs=1),
                client.chat([{"role": "user", "content": "Heat?"}]),
                client.models(),
            )

    answers = asyncio.run(ask())
    assert type(answers[0]).__name__ == "RankAnswer"
    expected = [one.value for one in client.rank(build_request(5)).results]
    assert [one.value for one in answers[0].results] == pytest.approx(expected, abs=1e-5)
    assert answers[2].scores[0] == pytest.approx(
        client.score("Heat\n", ["Answer:"], labels=[" Yes"]).scores[0], abs=1e-5
    )
    assert answers[5] == client.models()


def test_a_refusal_says_which_field_and_why(client: Client, chatty: Served) -> None:
    with pytest.raises(ServerError, match=r"documents\[1\].text: ") as raised:
        client.rerank("Heat", ["a", ""])
    assert (raised.value.status, raised.value.param) == (400, "documents[1].text")
    with Client(ClientConfig(url=str(chatty.http.base_url), model="nope")) as other:
        with pytest.raises(ServerError) as raised:
            other.rerank("Heat", TEXTS)
        assert (raised.value.status, raised.value.code) == (404, "model_not_found")
        # A call's own model comes before the client's.
        assert other.rerank("Heat", TEXTS, model="tiny").model == "tiny"


def test_a_server_that_is_not_there_is_named() -> None:
    url = "http://127.0.0.1:1"
    with Client(ClientConfig(url=url)) as client, pytest.raises(ServerError, match=url) as raised:
        client.models()
    assert raised.value.status is None


@contextmanager
def busy_before(
    target: str, refusals: list[tuple[int, str | None]]
) -> Iterator[tuple[str, list[float]]]:
    """Stand before a real server and refuse the first questions; also gives when each came."""
    came: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            came.append(time.monotonic())
            if len(came) > len(refusals):
                answer = httpx.post(target + self.path, content=body, headers=JSON)
                self._send(answer.status_code, None, answer.content)
            else:
                self._send(*refusals[len(came) - 1], b"busy")

        def _send(self, status: int, retry_after: str | None, content: bytes) -> None:
            self.send_response(status)
            if retry_after is not None:
                self.send_header("Retry-After", retry_after)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", came
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(kind: type[Client] | type[AsyncClient], config: ClientConfig) -> Any:
    """Ask for one reranking with a client of either kind."""
    if kind is Client:
        with Client(config) as client:
            return client.rerank("Heat", TEXTS)

    async def wait() -> Any:
        async with AsyncClient(config) as client:
            return await client.rerank("Heat", TEXTS)

    return asyncio.run(wait())


both_kinds = pytest.mark.parametrize("kind", [Client, AsyncClient])


@both_kinds
def test_it_waits_as_long_as_retry_after_says(
    chatty: Served, kind: type[Client] | type[AsyncClient]
) -> None:
    with busy_before(str(chatty.http.base_url), [(429, "1"), (503, "0")]) as (url, came):
        answer = ask(kind, ClientConfig(url=url))
    assert len(answer.results) == 2
    assert len(came) == 3
    assert came[1] - came[0] >= 1.0
    assert came[2] - came[1] < 1.0


@both_kinds
def test_it_waits_longer_each_time_where_the_server_does_not_say(
    chatty: Served, kind: type[Client] | type[AsyncClient]
) -> None:
    with busy_before(str(chatty.http.base_url), [(503, None), (503, "soon")]) as (url, came):
        assert len(ask(kind, ClientConfig(url=url)).results) == 2
    assert came[1] - came[0] >= 0.25
    assert came[2] - came[1] >= 0.5


@both_kinds
@pytest.mark.parametrize(
    ("refusals", "num_asked"), [([(429, "0")] * 9, 3), ([(503, "3600")], 1), ([(500, "0")], 1)]
)
def test_it_gives_up_after_its_retries_or_where_waiting_is_no_use(
    chatty: Served,
    kind: type[Client] | type[AsyncClient],
    refusals: list[tuple[int, str | None]],
    num_asked: int,
) -> None:
    with (
        busy_before(str(chatty.http.base_url), refusals) as (url, came),
        pytest.raises(ServerError, match="busy") as raised,
    ):
        ask(kind, ClientConfig(url=url, max_retries=2))
    assert raised.value.status == refusals[0][0]
    assert len(came) == num_asked


def test_retry_after_may_be_a_date() -> None:
    later = datetime.now(UTC) + timedelta(seconds=90)
    assert read_retry_after(format_datetime(later, usegmt=True)) == pytest.approx(90, abs=2)
    assert read_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert read_retry_after(" 7 ") == 7.0
    assert [read_retry_after(value) for value in (None, "", "soon", "-3")] == [None] * 4


def test_it_needs_neither_torch_nor_a_server_of_its_own() -> None:
    code = (
        "import sys, rankonce.client\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
