"""``rankonce serve --ray``: replicas answer as one process does, each for its own members."""

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from rankonce.cli.options import load_ranker
from rankonce.client import Client, ClientConfig
from rankonce.errors import ServerError
from rankonce.ranker import Ranker
from rankonce.records import ScoreRequest
from rankonce.serving.answers import RankAnswer
from tests.cli.cluster.clusters import Running, running
from tests.conftest import build_request

pytest.importorskip("ray", reason="ray is not installed: make test-ray brings it")
pytestmark = pytest.mark.slow
NUM_MEMBERS = 8


@contextmanager
def serving(model: Path, *options: str) -> Iterator[tuple[Running, Client]]:
    """Serve on a cluster of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    arguments = ("serve", "--ray", "--model", model, "--port", port, *options)
    with running(*arguments) as command:
        command.wait_for(lambda: f"serve on http://127.0.0.1:{port}" in command.log)
        url = f"http://127.0.0.1:{port}"
        with Client(ClientConfig(url=url, timeout_s=120)) as client:
            yield command, client


def replicas(command: Running) -> set[int]:
    """Find the processes of the replicas, which are below the command's."""
    return {
        process.pid
        for process in psutil.Process(command.process.pid).children(recursive=True)
        if "ray::ServeReplica" in " ".join(process.cmdline())
    }


def members() -> dict[str, ScoreRequest]:
    return {f"member {seed}": build_request(7, seed=seed) for seed in range(NUM_MEMBERS)}


def ask(client: Client, member: str, request: ScoreRequest) -> RankAnswer:
    """Ask, again where a replica died with the question."""
    for _ in range(60):
        try:
            return client.rank(request, member=member)
        except ServerError as error:
            if error.status not in (500, 503):
                raise
            time.sleep(1)
    raise AssertionError("no answer within a minute")


def assert_as_offline(answer: RankAnswer, ranker: Ranker, request: ScoreRequest) -> None:
    values = [one.value for one in answer.results]
    expected = [one.value for one in ranker.score(request).candidates]
    assert values == pytest.approx(expected, abs=2e-5)


def test_a_member_meets_the_same_replica_and_a_dead_one_is_replaced(model: Path) -> None:
    ranker = load_ranker(str(model))
    with serving(model, "--replicas", "2") as (command, client):
        assert len(replicas(command)) == 2
        for member, request in members().items():
            first, *others = (ask(client, member, request) for _ in range(4))
            for answer in (first, *others):
                assert_as_offline(answer, ranker, request)
            # The history is read once, by the one replica that knows the member from then on.
            assert first.usage.cached_tokens < others[0].usage.cached_tokens
            assert len({one.usage.cached_tokens for one in others}) == 1
        # The other replica does not know them: names that share a history meet both.
        request = build_request(7, seed=99)
        answers = [ask(client, f"somebody {place}", request) for place in range(12)]
        computed = [one.usage.computed_tokens for one in answers]
        assert computed.count(max(computed)) == 2

        killed = replicas(command).pop()
        psutil.Process(killed).kill()
        for member, request in members().items():
            assert_as_offline(ask(client, member, request), ranker, request)
        command.wait_for(lambda: len(replicas(command) - {killed}) == 2)
        for member, request in members().items():
            ask(client, member, request)
            assert ask(client, member, request).usage.cached_tokens > 0
        command.process.send_signal(signal.SIGTERM)
        assert command.finish() == 0, command.log
    assert command.out == ""
    assert "stopping: replicas finish what they answer" in command.log


def test_replicas_come_under_load(model: Path) -> None:
    options = ("--replicas", "1", "--max-replicas", "2", "--target-questions", "1")
    with serving(model, *options) as (command, client):
        assert len(replicas(command)) == 1
        enough = threading.Event()

        def load(seed: int) -> None:
            request = build_request(60, seed=seed)
            while not enough.is_set():
                ask(client, f"member {seed}", request)

        threads = [threading.Thread(target=load, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        try:
            began = time.monotonic()
            command.wait_for(lambda: len(replicas(command)) == 2)
            print(f"the second replica came after {time.monotonic() - began:.0f} s of load")
        finally:
            enough.set()
            for thread in threads:
                thread.join()


def test_every_endpoint_is_there(model: Path) -> None:
    with serving(model) as (_, client), httpx.Client(base_url=client.config.url) as http:
        assert http.get("/ready").json() == {"status": "ready"}
        assert http.get("/health").json()["status"] == "ok"
        assert "rankonce" in http.get("/metrics").text
        assert [card.id for card in client.models().data] == [model.name]
        reranked = client.rerank("Heat", ["Alien", "Up"])
        assert len(reranked.results) == 2
        refused = http.post("/v1/rank", json={"task": "movie-like"})
        assert refused.status_code == 400
        assert "candidates" in refused.json()["error"]["message"]


def test_a_model_that_cannot_be_loaded_ends_the_command(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    (tmp_path / "empty").mkdir()
    arguments = ("serve", "--ray", "--model", tmp_path / "empty", "--port", port)
    with running(*arguments) as command:
        assert command.finish() == 1
    assert command.lines[-1].startswith("error: no replica starts: ")
    assert str(tmp_path / "empty") in command.lines[-1]
